"""Kernels of the NumPy backend."""
