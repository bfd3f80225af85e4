"""Kernels in CUDA C++ for CuPy's arrays, and what launches them."""
