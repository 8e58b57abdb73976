"""The update of a fast weight from one chunk: ops U1 to U6, fused and split forms, and the online accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import TTTSettings
from ttt_sim.ops import Num, Phase, Role
from ttt_sim.workload.builder import Read, Segment, Write
from ttt_sim.workload.fast_state import (
    ACCUMULATOR_DTYPE,
    CONV_TAPS,
    MASTER_DTYPE,
    conv_lookahead,
    layer_weight_bytes,
    outer_first,
    target_columns,
    value_columns,
)
from ttt_sim.workload.transformer import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkUpdate:
    """Emits updates into a TTT layer. Rows are per sequence; sizes cover the batch."""

    decoder: Decoder
    ttt: TTTSettings

    @property
    def fast_rows(self) -> int:
        """Rows of the weight that change."""
        return self.ttt.rows_of(self.decoder.model)

    @property
    def delta_dtype(self) -> str:
        """A delta has the format of the weight that it is added to."""
        return MASTER_DTYPE if self.ttt.weight_write == "master" else self.ttt.fast_dtype

    def weights(self) -> list[Write]:
        """The fast tensors of a layer, the one that deltas are added to first."""
        sizes = layer_weight_bytes(self.decoder.model, self.ttt)
        order = ["fast_master", "fast_weight"] if "fast_master" in sizes else ["fast_weight"]
        return [(name, self.decoder.batch * sizes[name]) for name in order]

    def emit_chunk(self, s: Segment, chunk: Num, targets: Sequence[Read], hidden: Sequence[Read]) -> None:
        """The update from a whole chunk whose C rows of targets and hidden rows the operands hold."""
        self.emit_factors(s, chunk, self._target_values(s, self.ttt.chunk_tokens, chunk, targets), hidden)

    def emit_factors(self, s: Segment, chunk: Num, values: Read, hidden: Sequence[Read]) -> None:
        """The same from the factors of the delta: C rows of values, projected or, where the outer product comes first,
        not yet, and C hidden rows."""
        rows = self.ttt.chunk_tokens
        if outer_first(self.decoder.model, self.ttt):
            self._project_delta(s, chunk, self._outer(s, rows, chunk, values, hidden))
        elif self._needs_delta:
            delta = self._delta_buffer(s, "delta")
            self._product(s, "delta_gemm", rows, chunk, [values, *hidden], [delta])
            self._add_delta(s, chunk, delta)
        else:
            self._product(s, "delta_write", rows, chunk, [values, *hidden, self.weights()[0]], self.weights())

    def emit_own_delta(
        self, s: Segment, chunk: Num, targets: Sequence[Read], hidden: Sequence[Read], *, first: bool
    ) -> None:
        """The scaled delta of a chunk, kept for later, and the sum of this chip's deltas up to it."""
        rows = self.ttt.chunk_tokens
        values = self._target_values(s, rows, chunk, targets)
        delta = self._delta_buffer(s, "delta")
        if outer_first(self.decoder.model, self.ttt):
            self._projection(s, "outer_proj", chunk, self._outer(s, rows, chunk, values, hidden), [], [delta])
        else:
            self._product(s, "delta_gemm", rows, chunk, [values, *hidden], [delta])
        scaled, total = self._delta_buffer(s, "scaled_delta"), self._delta_buffer(s, "delta_total")
        self._row_wise(s, "delta_scale", chunk, [delta, *self._norm(s, chunk, delta)], [scaled])
        self._row_wise(s, "delta_sum", chunk, [scaled, *([] if first else [total])], [total])

    def emit_scan(self, s: Segment, chunk: Num) -> None:
        """P6: the deltas of all chips before this one, added to the trained weight."""
        before, total = self._delta_buffer(s, "delta_before"), self._delta_buffer(s, "delta_total")
        elements = self.decoder.batch * self.fast_rows * self.decoder.model.d_ff
        parallel = self.decoder.parallel
        s.op(
            "delta_scan", reads=[total], writes=[before], dtype=self.delta_dtype, m=elements, n=1, heads=parallel.cp,
            kv_heads=parallel.tp * parallel.cp, phase=Phase.BACKWARD, chunk=chunk,
        )  # fmt: skip
        self._write(s, chunk, before)

    def emit_write(self, s: Segment, chunk: Num, *, ago: int) -> None:
        """U6 with a delta that was scaled before; ``ago`` others were scaled after it."""
        name, size = self._delta_buffer(s, "scaled_delta")
        self._write(s, chunk, (name, size, ago))

    def emit_fold(self, s: Segment, chunk: Num, *, before: int, after: int, target: str) -> None:
        """Online form: an open chunk grows from ``before`` to ``after`` rows; at C rows the weight is updated.

        A row enters the accumulator once the rows that its convolution looks ahead to are there.
        """
        model, batch, f = self.decoder.model, self.decoder.batch, self.decoder.model.d_ff
        width = target_columns(model, self.ttt)
        full = after == self.ttt.chunk_tokens
        done = max(0, before - conv_lookahead(self.ttt))
        ready = after if full else max(0, after - conv_lookahead(self.ttt))
        rows = ready - done
        if not rows:
            return
        targets = _nonempty(
            ("carry_targets", self.decoder.size(batch * min(before, CONV_TAPS - 1), width)),
            (target, self.decoder.size(batch * (after - before), width)),
        )
        waiting = min(before - done, rows)
        hidden = _nonempty(
            ("carry_hidden", self.decoder.size(batch * waiting, f)),
            ("hidden", self.decoder.size(batch * (rows - waiting), f)),
        )
        values = self._target_values(s, rows, chunk, targets)
        elements = batch * value_columns(model, self.ttt) * f
        accumulator = ("accumulator", tensor_bytes(elements, ACCUMULATOR_DTYPE))
        old = [accumulator] if done else []  # the first rows of a chunk overwrite what the last chunk left
        self._product(s, "online_update", rows, chunk, [values, *hidden, *old], [accumulator])
        if full and outer_first(self.decoder.model, self.ttt):
            self._project_delta(s, chunk, accumulator)
        elif full:
            self._add_delta(s, chunk, accumulator)

    @property
    def _needs_delta(self) -> bool:
        """The delta must exist by itself before the weight changes; a norm needs all of it."""
        return self.ttt.weight_write == "official" or self.ttt.clip is not None

    def _delta_buffer(self, s: Segment, name: str) -> Write:
        rows = self.decoder.model.d_model if name == "outer_delta" else self.fast_rows
        shape = (self.decoder.batch, rows, self.decoder.model.d_ff)
        return s.buffer(name, shape, self.delta_dtype, Role.GRADIENT)

    def _target_values(self, s: Segment, rows: int, chunk: Num, targets: Sequence[Read]) -> Read:
        """U1 and, if the projection comes first, U2 on ``rows`` rows."""
        batch, d, dtype = self.decoder.batch, self.decoder.model.d_model, self.decoder.dtype
        width = target_columns(self.decoder.model, self.ttt)
        values = s.buffer("convolved_targets", (batch, rows, width), dtype, Role.GRADIENT)
        s.op(
            "target_conv", reads=[*targets, ("ttt_conv.weight", self.decoder.size(CONV_TAPS, width))], writes=[values],
            dtype=dtype, m=batch * rows, n=width, phase=Phase.BACKWARD, chunk=chunk,
        )  # fmt: skip
        if not self.ttt.projection or outer_first(self.decoder.model, self.ttt):
            return values
        fast = self.fast_rows
        projected = s.buffer("projected_targets", (batch, rows, fast), dtype, Role.GRADIENT)
        s.op(
            "target_proj", reads=[values, ("ttt_proj.weight", self.decoder.size(d, fast))], writes=[projected],
            dtype=dtype, m=batch * rows, n=fast, k=d, phase=Phase.BACKWARD, chunk=chunk,
        )  # fmt: skip
        return projected

    def _product(
        self, s: Segment, kind: str, rows: int, chunk: Num, reads: Sequence[Read], writes: Sequence[Write]
    ) -> None:
        """(u, rows) by (rows, f) for every sequence, u the fast rows or, before a projection, d."""
        model, batch = self.decoder.model, self.decoder.batch
        fused = kind == "delta_write"
        s.op(
            kind, reads=reads, writes=writes, dtype=self.decoder.dtype,
            batch=batch, m=value_columns(model, self.ttt), n=model.d_ff, k=rows, chunk=chunk,
            phase=Phase.WEIGHT_WRITE if fused else Phase.BACKWARD, extra_lanes=self._scale_and_add if fused else 0,
        )  # fmt: skip

    def _project_delta(self, s: Segment, chunk: Num, outer: Read) -> None:
        """U2': P^T Q, as the rows of Q^T of all sequences by the shared P."""
        if self._needs_delta:
            delta = self._delta_buffer(s, "delta")
            self._projection(s, "outer_proj", chunk, outer, [], [delta])
            self._add_delta(s, chunk, delta)
        else:
            self._projection(s, "delta_write", chunk, outer, [self.weights()[0]], self.weights())

    def _projection(
        self, s: Segment, kind: str, chunk: Num, outer: Read, old: Sequence[Read], writes: Sequence[Write]
    ) -> None:
        d, f = self.decoder.model.d_model, self.decoder.model.d_ff
        fused = kind == "delta_write"
        s.op(
            kind, reads=[outer, ("ttt_proj.weight", self.decoder.size(d, self.fast_rows)), *old], writes=writes,
            dtype=self.decoder.dtype, m=self.decoder.batch * f, n=self.fast_rows, k=d, chunk=chunk,
            phase=Phase.WEIGHT_WRITE if fused else Phase.BACKWARD, extra_lanes=self._scale_and_add if fused else 0,
        )  # fmt: skip

    def _outer(self, s: Segment, rows: int, chunk: Num, values: Read, hidden: Sequence[Read]) -> Write:
        """U3': the delta before its projection."""
        outer = self._delta_buffer(s, "outer_delta")
        self._product(s, "outer_gemm", rows, chunk, [values, *hidden], [outer])
        return outer

    @property
    def _scale_and_add(self) -> int:
        return 2 * self.decoder.batch * self.fast_rows * self.decoder.model.d_ff

    def _add_delta(self, s: Segment, chunk: Num, delta: Read) -> None:
        """U4 (with a clip), U5, U6: scale and add are one pass unless the variant is the released code's."""
        norm = self._norm(s, chunk, delta)
        if self.ttt.weight_write == "official":
            scaled = self._delta_buffer(s, "scaled_delta")
            self._row_wise(s, "delta_scale", chunk, [delta, *norm], [scaled])
            self._write(s, chunk, scaled)
        else:
            self._write(s, chunk, delta, *norm, scales=True)

    def _norm(self, s: Segment, chunk: Num, delta: Read) -> list[Read]:
        """U4, with a clip: of the parts of all chips that share the weight."""
        if self.ttt.clip is None:
            return []
        # One number per sequence: named for its order, too small to count.
        norm, size = s.buffer("delta_norm", (self.decoder.batch,), "fp32", Role.GRADIENT)
        self._row_wise(s, "delta_norm", chunk, [delta], [(norm, 0)])
        ranks = self.decoder.parallel.tp
        if ranks > 1:
            s.op(
                "allreduce", reads=[(norm, size)], writes=[(norm, size)], dtype="fp32", m=self.decoder.batch, n=1,
                heads=ranks, phase=Phase.BACKWARD, chunk=chunk,
            )  # fmt: skip
        return [(norm, 0)]

    def _write(self, s: Segment, chunk: Num, *reads: Read, scales: bool = False) -> None:
        """U6, or U5 and U6 in one pass."""
        self._row_wise(s, "weight_write", chunk, [*reads, self.weights()[0]], self.weights(), scales=scales)

    def _row_wise(
        self, s: Segment, kind: str, chunk: Num, reads: Sequence[Read], writes: Sequence[Write], *, scales: bool = False
    ) -> None:
        """One pass over the elements of a delta."""
        m, f = self.decoder.batch * self.fast_rows, self.decoder.model.d_ff
        s.op(
            kind, reads=reads, writes=writes, dtype=self.delta_dtype, m=m, n=f, chunk=chunk,
            phase=Phase.WEIGHT_WRITE if kind == "weight_write" else Phase.BACKWARD, extra_lanes=m * f if scales else 0,
        )  # fmt: skip


def _nonempty(*reads: Read) -> list[Read]:
    return [read for read in reads if read[1]]
