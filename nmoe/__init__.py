"""nmoe: Mixture-of-Experts training for NVIDIA B200."""

__version__ = "0.1.0"
