"""Native CPU kernels: C++ behind a C ABI, called one by one or as a recorded program. Knows torch tensors, no model."""
