"""Fused kernels for NVIDIA GPUs, each under the name and signature of its twin in :mod:`densecal.ops`. Triton is imported where one is asked for."""
