"""Number formats of stored tensors."""

WIDTH = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes, by the names that safetensors has."""

PLAIN = ("F64", "F32", "F16", "BF16")
"""Those that are weights by themselves. Others mean something only together with scales."""
