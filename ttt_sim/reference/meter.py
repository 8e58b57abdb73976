"""Counting what the reference really does, op by op, from the arrays that it handles.

Conventions (the same as in the operation lists of the workloads): a multiply-add is two FLOPs; an elementwise operation
on n numbers is n lane operations, transcendental ones tagged; operations on one number per row, but for a reciprocal
root, are not counted. Bytes are those of every operand read once and every result written once; rows that only move to
a buffer are counted where they are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.exact import dot
from ttt_sim.reference.formats import Format, round_to


@dataclass(slots=True, kw_only=True)
class OpCount:
    """One op as it was observed. ``lanes`` includes ``exps``, ``roots`` and ``divisions``."""

    kind: str = ""
    step: int = -1
    layer: int = -1
    chunk: int = -1
    flops: int = 0
    lanes: int = 0
    exps: int = 0
    roots: int = 0
    divisions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def read(self, x: FloatArray, fmt: Format) -> FloatArray:
        """``x``, counted as an operand that is read."""
        self.bytes_read += x.size * fmt.bits // 8
        return x

    def write(self, x: FloatArray, fmt: Format) -> FloatArray:
        """``x`` rounded to ``fmt``, counted as a result that is written."""
        self.bytes_written += x.size * fmt.bits // 8
        return round_to(x, fmt, self.kind)

    def product(self, a: FloatArray, b: FloatArray, fmt: Format) -> FloatArray:
        """(..., m, k) by (..., k, n), every element rounded once to ``fmt``; two FLOPs for each of its terms."""
        y = dot(a, b, fmt, self.kind)
        self.flops += 2 * y.size * a.shape[-1]
        return y


@dataclass(slots=True)
class Meter:
    """The counts of a run, in the order in which its ops began. ``step`` is the call that is running."""

    counts: list[OpCount] = field(default_factory=list)
    step: int = 0

    def op(self, kind: str, *, layer: int = -1, chunk: int = -1) -> OpCount:
        """A new count, to be filled while the op computes."""
        count = OpCount(kind=kind, step=self.step, layer=layer, chunk=chunk)
        self.counts.append(count)
        return count
