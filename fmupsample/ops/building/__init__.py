"""The compiled CUDA extension: its tools, how it is built, where it is found. Not its kernels."""
