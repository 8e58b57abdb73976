"""Formats in which keys and values are kept: a floating-point format, or integers and fp8 with scales.

Scales and zero points are 16-bit (float16) numbers. A stored element c stands for c * scale + zero, rounded to the
format of the activations. 4-bit formats share a scale and a zero point in groups of elements of one token; int8 and fp8
share a scale per head and token, or have one fixed scale per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttt_sim.reference.checks import FloatArray, InputError, as_count
from ttt_sim.reference.formats import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32, Format, nearest, round_to

#: Plain formats by the short names that are used for caches.
PLAIN: dict[str, Format] = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}
QUANTISED = ("fp8", "int8", "fp4", "int4")
_GROUPED = ("fp4", "int4")
_BITS = {"fp8": 8, "int8": 8, "fp4": 4, "int4": 4}
#: The fixed scale of an int8 tensor: normed keys and values stay within 8 in size.
INT8_TENSOR_SCALE = 1 / 16
#: Numbers of fp4 (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
_E2M1 = Format(name="float4_e2m1fn", precision=2, min_exponent=0, largest=6.0, bits=4, dtype=np.dtype(np.float64))
#: What the largest number of a group or head is mapped to.
_TOP = {"fp8": 448.0, "int8": 127.0, "fp4": 6.0, "int4": 15.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """``group``: elements that share scale and zero point (4-bit only); ``per_token_scale`` (fp8 and int8 only)."""

    name: str = "bf16"
    group: int = 32
    per_token_scale: bool = False

    def __post_init__(self) -> None:
        if self.name not in PLAIN and self.name not in QUANTISED:
            raise InputError(f"KV format: {self.name!r} is unknown; expected one of {', '.join((*PLAIN, *QUANTISED))}")
        as_count("group", self.group)

    @property
    def quantised(self) -> bool:
        return self.name in QUANTISED

    def row_bytes(self, heads: int, width: int) -> int:
        """Bytes of one token's keys (or values) and their scales."""
        elements = heads * width
        if not self.quantised:
            return elements * PLAIN[self.name].bits // 8
        scales = 0
        if self.name in _GROUPED:
            scales = 2 * 2 * -(-elements // self.group)
        elif self.per_token_scale:
            scales = 2 * heads
        return -(-elements * _BITS[self.name] // 8) + scales

    def stored(self, x: FloatArray, activations: Format) -> FloatArray:
        """What a reader of the cache gets for ``x`` (batch, tokens, heads, width)."""
        if not self.quantised:
            return round_to(x, PLAIN[self.name], "kv_append")
        if self.name in _GROUPED:
            y = self._grouped(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
        else:
            y = self._scaled(x)
        return round_to(y, activations, "kv_append")

    def _scaled(self, x: FloatArray) -> FloatArray:
        scale: FloatArray | float = INT8_TENSOR_SCALE if self.name == "int8" else 1.0
        if self.per_token_scale:
            scale = round_to(np.abs(x).max(axis=-1, keepdims=True) / _TOP[self.name], FLOAT16, "KV scale")
            scale = np.where(scale > 0, scale, 1.0)
        ratio = x / scale
        codes = nearest(ratio, FLOAT8_E4M3) if self.name == "fp8" else np.rint(ratio)
        return np.clip(codes, -_TOP[self.name], _TOP[self.name]) * scale

    def _grouped(self, x: FloatArray) -> FloatArray:
        y = np.empty_like(x)
        for start in range(0, x.shape[-1], self.group):
            part = x[..., start : start + self.group]
            low, high = part.min(axis=-1, keepdims=True), part.max(axis=-1, keepdims=True)
            if self.name == "int4":  # codes 0 to 15 above the smallest element
                zero, span, least = low, (high - low) / 15, 0.0
            else:  # codes around the middle
                zero, span, least = (high + low) / 2, (high - low) / 12, -6.0
            zero, scale = round_to(zero, FLOAT16, "KV zero point"), round_to(span, FLOAT16, "KV scale")
            ratio = (part - zero) / np.where(scale > 0, scale, 1.0)
            codes = np.rint(ratio) if self.name == "int4" else nearest(ratio, _E2M1)
            y[..., start : start + self.group] = np.clip(codes, least, _TOP[self.name]) * scale + zero
        return y
