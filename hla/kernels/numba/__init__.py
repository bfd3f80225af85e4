"""Kernels of the Numba backend, in Python."""
