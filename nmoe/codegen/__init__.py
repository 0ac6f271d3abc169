"""From a schedule to kernels: what each kernel computes, how it is generated, and a place where it is kept."""
