"""The CuTeDSL sources that kernels are generated from. Importing this package's modules needs nvidia-cutlass-dsl."""
