"""Kernels for GPUs, written in Triton: imported where they run, for Triton is not everywhere."""
