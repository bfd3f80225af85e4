"""Kernels of the Triton backend, and what launches them."""
