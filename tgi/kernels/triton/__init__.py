"""Kernels for CUDA devices in Triton, which comes with torch there; its interpreter runs them on a CPU, for tests."""
