"""Number formats. A module of its own, so that configuration files can be checked without loading NumPy."""

from __future__ import annotations

from collections.abc import Mapping

#: Bits per element. Four-bit formats are packed two to a byte; :func:`tensor_bytes` rounds up per tensor.
DTYPE_BITS: Mapping[str, int] = {
    "fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4,
}  # fmt: skip
DTYPES: tuple[str, ...] = tuple(DTYPE_BITS)


def tensor_bytes(elements: int, dtype: str) -> int:
    """Bytes of a packed tensor, rounded up to a whole byte."""
    return -(-elements * DTYPE_BITS[dtype] // 8)
