"""One NumPy kernel per op kind: from the contents of an op's operands to the contents of its results.

The trace says how many bytes of an operand an op touches; which rows these are follows from the kind of the operand:
of what is kept between calls the last ones, of what a call makes the rows of the op's chunk. Everything is rounded to
the format of the tensor that is written, once; silu_mul rounds the activation before the product, and norms round
before the gain, as the released code and the model classes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.model import KVSettings, TTTSettings
from ttt_sim.ops import OP_KINDS, IntArray, Tensor, Trace
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.elementary import exp
from ttt_sim.reference.exact import row_dot
from ttt_sim.reference.formats import Format, round_to, wide_format
from ttt_sim.reference.kv_formats import KVFormat
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.products import Accumulate, attention, product
from ttt_sim.replay.settings import NORM_EPSILON, format_of
from ttt_sim.replay.tiling import Span, TilingOf
from ttt_sim.workload.fast_state import CONV_TAPS, conv_lookahead


class Operand(NamedTuple):
    """``family``: the tensor's name without its layer; ``rows`` per sequence that the op touches (None, for a tensor
    that is not (batch, rows, width): everything); ``content`` of the whole buffer, for in-place results what is
    overwritten (None: nothing)."""

    tensor: Tensor
    family: str
    rows: int | None
    content: FloatArray | None

    @property
    def values(self) -> FloatArray:
        assert self.content is not None
        return self.content

    def last(self) -> FloatArray:
        """The last ``rows`` rows of every sequence."""
        return self.values if self.rows is None else self.ending(self.rows)

    def ending(self, rows: int) -> FloatArray:
        """The last ``rows`` rows of every sequence; raises :class:`ExecutionError` if so many were never written."""
        there = self.values.shape[1]
        if rows > there:
            raise ExecutionError(f"takes {rows} rows of {self.tensor.name}, of which {there} were written")
        return self.values[:, self.values.shape[1] - rows :]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCall:
    """One op about to execute."""

    trace: Trace
    op: int
    reads: Sequence[Operand]
    writes: Sequence[Operand]
    tokens: IntArray  # (batch, tokens of the whole scenario)
    calls: Sequence[Sequence[int]]  # position, tokens of each step
    kv: KVSettings
    ttt: TTTSettings | None
    tiling: TilingOf
    mode: Accumulate

    def column(self, name: str) -> int:
        return int(getattr(self.trace, name)[self.op])

    @property
    def kind(self) -> str:
        return OP_KINDS[self.column("kind")].name

    @property
    def batch(self) -> int:
        """Sequences in lockstep."""
        return int(self.tokens.shape[0])

    @property
    def new_tokens(self) -> int:
        return self.calls[self.column("step")][1]

    @property
    def q(self) -> Format:
        """The format of the operands that the op multiplies."""
        return format_of(str(self.trace.meta["dtype"]))

    def out(self, i: int = 0) -> Format:
        return format_of(self.writes[i].tensor.dtype)

    # --- rows of a chunk ----------------------------------------------------------------------------------------------

    @property
    def settings(self) -> TTTSettings:
        assert self.ttt is not None, f"{self.kind} outside a TTT layer"
        return self.ttt

    @property
    def open_rows(self) -> int:
        """Rows of the open chunk before this call; rows are numbered from the first of them."""
        return self.column("position") % self.settings.chunk_tokens

    @property
    def recomputes(self) -> bool:
        return self.settings.carry in ("official", "ring")

    def chunk_span(self) -> Span:
        """First row and end of the op's chunk, as far as it has come."""
        size, position = self.settings.chunk_tokens, self.column("position")
        begin = (self.column("chunk") - position // size) * size
        return begin, min(begin + size, self.open_rows + self.new_tokens)

    def rows_of(self, operand: Operand, span: Span) -> FloatArray:
        """The rows of ``span`` that ``operand`` holds."""
        if operand.family == "carry_inputs":  # as targets, of which an op may touch some columns only
            return operand.ending(self.open_rows)
        if operand.family.startswith("carry_"):
            return operand.last()
        begins_at = 0 if operand.family.startswith("joined_") or self._holds_all(operand) else self.open_rows
        return operand.values[:, max(span[0], begins_at) - begins_at : span[1] - begins_at]

    def _holds_all(self, operand: Operand) -> bool:
        """Hidden rows of the whole open chunk, computed again."""
        completes = self.open_rows + self.new_tokens >= self.settings.chunk_tokens
        return operand.family == "hidden" and self.recomputes and completes

    def fold(self) -> Span | None:
        """Online carry: rows of the chunk (numbered from its first) that this call adds to the accumulator; None where
        the chunk is updated at once."""
        begin, end = self.chunk_span()
        before, after, size = max(self.open_rows - begin, 0), end - begin, self.settings.chunk_tokens
        if self.settings.carry != "online" or (before == 0 and after == size):
            return None
        ahead = conv_lookahead(self.settings)
        return max(0, before - ahead), after if after == size else max(0, after - ahead)

    # --- products -----------------------------------------------------------------------------------------------------

    def product(self, a: FloatArray, b: FloatArray, fmt: Format) -> FloatArray:
        """(batch, m, k) by (batch, k, n) on the op's tiles."""
        shape = tuple(self.column(name) for name in ("batch", "m", "n", "k"))
        assert (*a.shape[:2], b.shape[2], a.shape[2]) == shape, f"{self.kind}: operands do not have the op's dimensions"
        return product(a, b, self.tiling(self.op), fmt, self.mode, self.kind)

    def linear(self, x: FloatArray, weight: FloatArray, fmt: Format) -> FloatArray:
        """Rows of all sequences by one weight (n, k)."""
        rows = x.reshape(1, -1, x.shape[-1])
        return self.product(rows, weight.T[None], fmt).reshape(*x.shape[:-1], -1)


Results = Sequence[FloatArray]


def _heads(x: FloatArray, width: int) -> FloatArray:
    return x.reshape(*x.shape[:-1], -1, width)


def _embedding(c: OpCall) -> Results:
    position = c.column("position")
    ids = c.tokens[:, position : position + c.new_tokens]
    return [c.reads[0].values[ids]]


def _norm(c: OpCall) -> Results:
    x, gain = c.reads
    rows = x.last()
    return [_normed(rows, gain.values, c.q)]


def _normed(x: FloatArray, gain: FloatArray, q: Format) -> FloatArray:
    mean = row_dot(x, x, wide_format(q)) / x.shape[-1]
    return round_to(x * (1 / np.sqrt(mean + NORM_EPSILON))[..., None], q, "norm") * gain


def _linear(c: OpCall) -> Results:
    """Inputs, perhaps in parts that follow one another, by a frozen weight (n, k), or those of its rows that are not
    fast, the last n."""
    *parts, weight = c.reads
    x = np.concatenate([part.last() for part in parts], axis=1)
    return [c.linear(x, weight.values[-c.column("n") :], c.out())]


def _qk_norm(c: OpCall) -> Results:
    q, k, gains = c.reads
    width = gains.values.shape[-1]
    return [
        _normed(_heads(x.values, width), gain, c.q).reshape(x.values.shape)
        for x, gain in zip((q, k), gains.values, strict=True)
    ]


def _rope(c: OpCall) -> Results:
    """x cos + partner sin, where the partner of the first half of a head is minus its second half."""
    *inputs, table = c.reads
    position = c.column("position")
    cos, sin = table.values[:, position : position + c.new_tokens, None, :]
    out = []
    for x in inputs:
        heads = _heads(x.values, cos.shape[-1])
        first, second = np.split(heads, 2, axis=-1)
        out.append((heads * cos + np.concatenate([-second, first], axis=-1) * sin).reshape(x.values.shape))
    return out


def _kv_format(c: OpCall) -> KVFormat:
    return KVFormat(name=c.kv.dtype, group=c.kv.group, per_token_scale=c.kv.per_token_scale)


def _kv_append(c: OpCall) -> Results:
    """(batch, rows, 2, G, h): the rows before and the new ones, as many of the last as there is room for."""
    k, v, before = c.reads
    room, width = before.tensor.shape[1], before.tensor.shape[-1]
    rows = c.column("m") // c.batch
    new = [_kv_format(c).stored(_heads(x.values[:, -rows:], width), c.q) for x in (k, v)]
    return [np.concatenate([before.values, np.stack(new, axis=2)], axis=1)[:, -room:]]


def _attention(c: OpCall) -> Results:
    m, n, width, position = c.new_tokens, c.column("n"), c.column("k"), c.column("position")
    queries, *sources = c.reads
    fresh = [_heads(x.values, width) for x in sources if x.family != "kv"]
    stored = n - m if fresh else n
    parts = [x.ending(stored) for x in sources if x.family == "kv"]
    if fresh:
        parts.append(np.stack(fresh, axis=2))
    both = np.concatenate(parts, axis=1)
    distance = np.arange(position, position + m)[:, None] - np.arange(position + m - n, position + m)[None, :]
    visible: npt.NDArray[np.bool_] = distance >= 0
    if c.kv.window_tokens is not None:
        visible &= distance < c.kv.window_tokens
    q = _heads(queries.values, width)
    core = attention(q, both[:, :, 0], both[:, :, 1], visible, c.tiling(c.op), c.out(), c.mode)
    return [core.reshape(queries.values.shape)]


def _residual(c: OpCall) -> Results:
    """The stream and what is added: one tensor, or the outputs of chunks that follow one another and, beside them,
    those of rows of a weight that are not fast."""
    stream, *pieces = c.reads
    frozen = [piece.values for piece in pieces if piece.family == "frozen_out"]
    pieces = [piece for piece in pieces if piece.family != "frozen_out"]
    parts = []
    for i, piece in enumerate(pieces):
        # Of an applied chunk, the rows of this call: those after the rows that were applied in earlier calls.
        completes = piece.family == "fast_out" and i == 0 and c.recomputes
        old = c.open_rows if completes and c.open_rows + c.new_tokens >= c.settings.chunk_tokens else 0
        assert piece.rows is not None
        parts.append(piece.values[:, old : old + piece.rows])
    return [stream.values + np.concatenate([np.concatenate(parts, axis=1), *frozen], axis=-1)]


def _silu_mul(c: OpCall) -> Results:
    gate, up = (x.values for x in c.reads)
    return [round_to(gate / (1 + exp(-gate)), c.q, "silu") * up]


def _fast_init(c: OpCall) -> Results:
    trained = c.reads[0].values[: c.writes[0].tensor.shape[1]]
    return [np.repeat(trained[None], c.batch, axis=0)] * len(c.writes)


def _fast_apply(c: OpCall) -> Results:
    hidden, weight = c.reads
    z = c.rows_of(hidden, c.chunk_span()) if c.new_tokens + c.open_rows >= c.settings.chunk_tokens else hidden.values
    z = np.pad(z, ((0, 0), (0, c.column("m") - z.shape[1]), (0, 0)))
    return [c.product(z, weight.values.transpose(0, 2, 1), c.out())]


def _carry_append(c: OpCall) -> Results:
    """Rows that are kept, of targets perhaps the first columns only; a result that is overwritten in place is a ring,
    which drops its oldest rows."""
    n = len(c.writes)
    sources, old = c.reads[:n], c.reads[n:]
    out = []
    for i, (source, result) in enumerate(zip(sources, c.writes, strict=True)):
        assert result.rows is not None
        columns = slice(result.tensor.shape[2])
        if result.tensor.in_place:
            kept = np.concatenate([result.values, source.ending(result.rows)[..., columns]], axis=1)
            out.append(kept[:, -result.tensor.shape[1] :])
        else:
            before = old[i].last() if old else source.ending(0)[..., columns]
            new = source.ending(result.rows - before.shape[1])[..., columns]
            out.append(np.concatenate([before, new], axis=1))
    return out


def _target_conv(c: OpCall) -> Results:
    """Five taps over the rows of one chunk, zero outside it."""
    *sources, taps = c.reads
    begin, end = c.chunk_span()
    columns = slice(taps.values.shape[0])
    rows = np.concatenate([c.rows_of(x, (begin, end))[..., columns] for x in sources], axis=1)
    held = end - begin - rows.shape[1]  # rows of the chunk that are no longer needed
    first, last = c.fold() or (0, c.settings.chunk_tokens)
    padded = np.pad(rows, ((0, 0), (CONV_TAPS, CONV_TAPS), (0, 0)))
    reach = conv_lookahead(c.settings) - (CONV_TAPS - 1) + CONV_TAPS - held  # of the first tap, into ``padded``
    shifted = [padded[:, first + reach + j : last + reach + j] for j in range(CONV_TAPS)]
    return [row_dot(np.stack(shifted, axis=-1), taps.values, c.q, c.kind)]


def _target_proj(c: OpCall) -> Results:
    x, projection = c.reads
    return [c.linear(x.values, projection.values.T, c.out())]


def _outer(c: OpCall, values: Operand, hidden: Sequence[Operand], fmt: Format) -> FloatArray:
    """(d or fast rows, rows) by (rows, f) for every sequence."""
    span = c.chunk_span()
    z = np.concatenate([c.rows_of(x, span) for x in hidden], axis=1)[:, : values.values.shape[1]]
    return c.product(values.values.transpose(0, 2, 1), z, fmt)


def _projected(c: OpCall, fmt: Format) -> FloatArray:
    """P^T Q, as the rows of Q^T of all sequences by P."""
    outer, projection = c.reads[:2]
    b, d, f = outer.values.shape
    rows = outer.values.transpose(0, 2, 1).reshape(1, b * f, d)
    return c.product(rows, projection.values[None], fmt).reshape(b, f, -1).transpose(0, 2, 1)


def _delta_gemm(c: OpCall) -> Results:
    values, *hidden = c.reads
    return [_outer(c, values, hidden, c.out())]


def _outer_proj(c: OpCall) -> Results:
    return [_projected(c, c.out())]


def _rate(c: OpCall, norm: Sequence[Operand]) -> float | FloatArray:
    """The rate, less for a sequence whose delta is longer than the clip."""
    if not norm:
        return c.settings.rate
    assert c.settings.clip is not None
    length = norm[0].values
    shorter = length <= c.settings.clip
    return c.settings.rate * np.where(shorter, 1.0, c.settings.clip / np.where(shorter, 1.0, length))[:, None, None]


def _with_shadow(c: OpCall, new: FloatArray) -> Results:
    """The new weight, or the new master and the shadow that is rounded from it."""
    return [new] if len(c.writes) == 1 else [new, round_to(new, c.out(0), c.kind)]


def _delta_write(c: OpCall) -> Results:
    """The delta is accumulated into the weight without being stored."""
    wide = wide_format(c.q)
    if c.reads[1].family == "ttt_proj":
        delta = _projected(c, wide)
    else:
        delta = _outer(c, c.reads[0], c.reads[1:-1], wide)
    return _with_shadow(c, c.reads[-1].values + c.settings.rate * delta)


def _online_update(c: OpCall) -> Results:
    values, *rest = c.reads
    span = c.fold()
    assert span is not None
    begin, end = c.chunk_span()
    waiting = max(c.open_rows - begin, 0) - span[0]  # hidden rows from before, of which the first are used
    parts = [
        x.ending(waiting) if x.family == "carry_hidden" else c.rows_of(x, (begin, end))
        for x in rest
        if x.family != "accumulator"
    ]
    rows = np.concatenate(parts, axis=1)[:, : span[1] - span[0]]
    new = c.product(values.values.transpose(0, 2, 1), rows, wide_format(c.q))
    old = [x.values for x in rest if x.family == "accumulator"]
    return [new + old[0] if old else new]


def _delta_norm(c: OpCall) -> Results:
    flat = c.reads[0].values.reshape(c.batch, -1)
    return [np.sqrt(row_dot(flat, flat, wide_format(c.q), c.kind))]


def _delta_scale(c: OpCall) -> Results:
    delta, *norm = c.reads
    return [_rate(c, norm) * delta.values]


def _weight_write(c: OpCall) -> Results:
    """W + E, or with scaling fused W + rate D."""
    delta, *norm, weight = c.reads
    if delta.family == "scaled_delta":
        return [weight.values + delta.values]
    return _with_shadow(c, weight.values + _rate(c, norm) * delta.values)


#: The kernel of every op kind of a KV cache and of In-Place TTT.
KERNELS: Mapping[str, Callable[[OpCall], Results]] = {
    "embedding": _embedding,
    "attn_norm": _norm,
    "q_proj": _linear,
    "k_proj": _linear,
    "v_proj": _linear,
    "qk_norm": _qk_norm,
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "o_proj": _linear,
    "attn_residual": _residual,
    "mlp_norm": _norm,
    "carry_append": _carry_append,
    "gate_proj": _linear,
    "up_proj": _linear,
    "silu_mul": _silu_mul,
    "down_proj": _linear,
    "fast_apply": _fast_apply,
    "mlp_residual": _residual,
    "final_norm": _norm,
    "lm_head": _linear,
    "target_conv": _target_conv,
    "target_proj": _target_proj,
    "delta_gemm": _delta_gemm,
    "outer_gemm": _delta_gemm,
    "outer_proj": _outer_proj,
    "delta_norm": _delta_norm,
    "delta_scale": _delta_scale,
    "weight_write": _weight_write,
    "delta_write": _delta_write,
    "online_update": _online_update,
    "fast_init": _fast_init,
}


def execute(c: OpCall) -> Results:
    """The contents of the op's results, each in the format of its tensor."""
    out = KERNELS[c.kind](c)
    assert len(out) == len(c.writes)
    return [
        # What a cache holds was rounded when it was stored; its format need not be one of the reference's.
        values if result.family == "kv" else round_to(values, format_of(result.tensor.dtype), c.kind)
        for values, result in zip(out, c.writes, strict=True)
    ]


def rows_per_sequence(tensor: Tensor, nbytes: int) -> int | None:
    """Rows of every sequence that ``nbytes`` of a (batch, rows, width) tensor are; None for tensors of other shapes."""
    if len(tensor.shape) != 3:
        return None
    row_bits = tensor.shape[0] * tensor.shape[2] * DTYPE_BITS[tensor.dtype]
    return nbytes * 8 // row_bits
