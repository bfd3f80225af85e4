"""Kernels of the Pallas backend."""
