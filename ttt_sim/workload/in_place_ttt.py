"""In-Place TTT (arXiv 2604.06169): the down projection of some layers is a fast weight, updated once per chunk.

Control flow of the released inference code (github.com/ByteDance-Seed/In-Place-TTT, commit be2324829b0e), which a call
of m rows after r rows of an open chunk follows, with r' = r + m:

* r' < C: the MLP runs on the m new rows with the current weight; their inputs and targets join the open chunk.
* r' >= C: gate, up and SiLU run again on all r' rows. Chunk by chunk the weight is applied (the last chunk padded to C
  rows) and, if the chunk is full, updated. The rows after the last full chunk stay open.

A chunk is thus updated as soon as its last row has come, also while decoding. An op over rows of which some were
computed before is one product in the released code, so it has phase RECOMPUTE as a whole.

``carry`` chooses what is kept of the open chunk (:mod:`ttt_sim.workload.fast_state`). ``ring`` writes each row once and
reads it in place. ``keep_z`` and ``online`` recompute and pad nothing: a weight is applied to new rows only. Rows that
are appended are counted where they are written, not as read once more; an official decode step reads 2 r d and writes 2
(r + 1) d elements per layer.

With ``update_rows`` only the first rows of the down projection are fast. The others are a product that all sequences
share, once per call and on its new rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.model_config import check_ttt
from ttt_sim.ops import Num, Phase, Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import kv_bytes
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.chunk_update import ChunkUpdate
from ttt_sim.workload.fast_state import (
    CONV_TAPS,
    MASTER_DTYPE,
    carry_buffers,
    carry_bytes,
    fast_weight_bytes,
    own_targets,
    target_columns,
)
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE, DEFAULT_WINDOW_TOKENS
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.transformer import Decoder, decoder_trace

#: With this many open rows or more, what an online step reads no longer depends on their number.
_SETTLED_ROWS = CONV_TAPS - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceMlp:
    """The MLP of a TTT layer. ``from_empty``: the scenario begins without a state."""

    decoder: Decoder
    ttt: TTTSettings
    from_empty: bool

    @property
    def layers(self) -> tuple[int, ...]:
        return self.ttt.layers_of(self.decoder.model)

    @property
    def _update(self) -> ChunkUpdate:
        return ChunkUpdate(decoder=self.decoder, ttt=self.ttt)

    @property
    def weights(self) -> list[Write]:
        """The fast tensors of a layer."""
        return self._update.weights()

    @property
    def _target_width(self) -> int:
        return target_columns(self.decoder.model, self.ttt)

    @property
    def _target(self) -> str:
        return "mlp_normed" if own_targets(self.ttt) else "first"

    @property
    def _recomputes(self) -> bool:
        return self.ttt.carry in ("official", "ring")

    def shape_key(self, call: Call) -> tuple[int, ...]:
        open_rows = call.position % self.ttt.chunk_tokens
        if open_rows + call.tokens >= self.ttt.chunk_tokens:
            return 1, open_rows
        return 0, min(open_rows, _SETTLED_ROWS if self.ttt.carry == "online" else 1)

    def declare(self, builder: TraceBuilder) -> None:
        model, batch, dtype = self.decoder.model, self.decoder.batch, self.decoder.dtype
        rows = self._update.fast_rows
        weights = {"ttt_conv": (self._target_width, CONV_TAPS)}
        if self.ttt.projection:
            weights["ttt_proj"] = (model.d_model, rows)
        for name, shape in weights.items():
            builder.declare(f"{name}.weight", shape, dtype, Role.WEIGHT, layers=self.layers, initial_version=0)
        for name, size in self.weights:
            weight_dtype = MASTER_DTYPE if name == "fast_master" else self.ttt.fast_dtype
            builder.declare(
                name, (batch, rows, model.d_ff), weight_dtype, Role.FAST_WEIGHT, layers=self.layers, size=int(size),
                initial_version=-1 if self.from_empty else 0, in_place=True,
            )  # fmt: skip
        for buffer in carry_buffers(model, self.ttt, dtype):
            builder.declare(
                buffer.name, (batch, buffer.rows, buffer.width), buffer.dtype, Role.CARRY,
                layers=None if buffer.shared else self.layers, size=batch * buffer.size_bytes,
                initial_version=0, in_place=self.ttt.carry != "official",
            )  # fmt: skip

    def emit_layer(self, s: Segment) -> Sequence[Read]:
        if self.decoder.shares_prompt:
            return self._emit_shared_prompt(s)
        if s.run.from_empty:
            self._init_weights(s)
        open_rows = int(s.run.positions[0]) % self.ttt.chunk_tokens
        if open_rows + s.run.tokens < self.ttt.chunk_tokens:
            return self._emit_open(s)
        return self._emit_chunks(s, open_rows)

    def emit_end(self, s: Segment) -> None:
        """Keep the targets that all layers share, once all layers have read the ones before."""
        if any(buffer.shared for buffer in carry_buffers(self.decoder.model, self.ttt, self.decoder.dtype)):
            self._keep(s, shared=True)

    def _init_weights(self, s: Segment) -> None:
        """C3: every sequence starts from a copy of the trained weight."""
        rows, f = self._update.fast_rows, self.decoder.model.d_ff
        s.op(
            "fast_init", reads=[("down_proj.weight", self.decoder.size(rows, f))], writes=self.weights,
            dtype=self.ttt.fast_dtype, m=self.decoder.batch * rows, n=f,
        )  # fmt: skip

    def _emit_open(self, s: Segment) -> list[Read]:
        """A call that leaves the chunk open."""
        m, chunk = s.run.tokens, s.run.positions // self.ttt.chunk_tokens
        open_rows = s.run.positions % self.ttt.chunk_tokens
        rows_in, d = self.decoder.batch * m, self.decoder.model.d_model
        if self.ttt.carry == "official":
            old = open_rows if open_rows.any() else 0
            self._concat(s, old, self._carried(open_rows + m))
        self.decoder.emit_hidden(s, m, [("mlp_normed", self.decoder.size(rows_in, d))], Phase.FORWARD)
        self._apply(s, chunk, m, Phase.FORWARD)
        if self.ttt.carry == "online":
            before = min(int(open_rows[0]), _SETTLED_ROWS)
            self._update.emit_fold(s, chunk, before=before, after=before + m, target=self._target)
        if self.ttt.carry != "official":
            self._keep(s, shared=False)
        return [("fast_out", self._rows(m, self._update.fast_rows)), *self._frozen(s)]

    def _emit_chunks(self, s: Segment, open_rows: int) -> list[Read]:
        """A call that completes ``n_full`` chunks, the first of them with ``open_rows`` rows from before."""
        size, m, d = self.ttt.chunk_tokens, s.run.tokens, self.decoder.model.d_model
        total = open_rows + m
        first_chunk = s.run.positions // size
        joined = self.ttt.carry == "official" and open_rows > 0
        if joined:
            widths = {"joined_inputs": d, "joined_targets": self._target_width}
            joined_rows = [
                s.buffer(name, (self.decoder.batch, total, width), self.decoder.dtype) for name, width in widths.items()
            ]
            self._concat(s, open_rows, joined_rows)
        if self._recomputes:
            inputs: list[Read] = [("joined_inputs", self._rows(total, d))]
            if not joined:
                inputs = self._split("carry_inputs", "mlp_normed", d, open_rows, m)
            self.decoder.emit_hidden(s, total, inputs, Phase.RECOMPUTE if open_rows else Phase.FORWARD)
        else:
            self.decoder.emit_hidden(s, m, [("mlp_normed", self._rows(m, d))], Phase.FORWARD)

        n_chunks, rows_out = ceil_div(total, size), self._update.fast_rows
        added: list[Read] = []
        for i in range(n_chunks):
            old = open_rows if i == 0 else 0  # rows of this chunk from before the call
            new = min((i + 1) * size, total) - max(i * size, open_rows)
            chunk = first_chunk + i
            again = self._recomputes and old > 0
            rows = size if self._recomputes else new
            self._apply(s, chunk, rows, Phase.RECOMPUTE if again else Phase.FORWARD)
            added.append(("fast_out", self._rows(new, rows_out), n_chunks - 1 - i))
            if self.ttt.carry == "online" and (old or old + new < size):
                self._update.emit_fold(s, chunk, before=old, after=old + new, target=self._target)
            elif old + new == size:
                self._emit_update(s, chunk, old, new, joined)
        if self.ttt.carry == "official":
            self._save_tail(s, total % size)
        else:
            self._keep(s, shared=False)
        return [*added, *self._frozen(s)]

    def _emit_shared_prompt(self, s: Segment) -> list[Read]:
        """The last chip's part of a prompt that a context-parallel group shares (the algorithm of the paper).

        Every chip forms the deltas of its chunks and their sum. The sums of the chips before this one arrive through a
        scan, and only then does it apply a weight: the trained one plus all that the chunks before added.
        """
        size, m, d, f = self.ttt.chunk_tokens, s.run.tokens, self.decoder.model.d_model, self.decoder.model.d_ff
        ranks = self.decoder.parallel.cp
        if m % size:
            raise UnsupportedError(
                f"{ranks} chips can share prompts of whole chunks only: multiples of {ranks * size} tokens"
            )
        self._init_weights(s)
        self.decoder.emit_hidden(s, m, [("mlp_normed", self._rows(m, d))], Phase.FORWARD)
        first, n_chunks = s.run.positions // size, m // size
        for i in range(n_chunks):
            targets: list[Read] = [(self._target, self._rows(size, self._target_width))]
            self._update.emit_own_delta(s, first + i, targets, [("hidden", self._rows(size, f))], first=i == 0)
        self._update.emit_scan(s, first)
        added: list[Read] = []
        for i in range(n_chunks):
            self._apply(s, first + i, size, Phase.FORWARD)
            added.append(("fast_out", self._rows(size, self._update.fast_rows), n_chunks - 1 - i))
            self._update.emit_write(s, first + i, ago=n_chunks - 1 - i)
        return [*added, *self._frozen(s)]

    def _emit_update(self, s: Segment, chunk: Num, old: int, new: int, joined: bool) -> None:
        """The update from a chunk of ``old`` rows from before the call and ``new`` rows of it."""
        width, f = self._target_width, self.decoder.model.d_ff
        kept_targets = "carry_inputs" if self.ttt.carry == "ring" and own_targets(self.ttt) else "carry_targets"
        targets: list[Read] = [("joined_targets", self._rows(old + new, width))]
        if not joined:
            targets = self._split(kept_targets, self._target, width, old, new)
        hidden: list[Read] = [("hidden", self._rows(old + new, f))]
        if not self._recomputes:
            hidden = self._split("carry_hidden", "hidden", f, old, new)
        self._update.emit_chunk(s, chunk, targets, hidden)

    def _apply(self, s: Segment, chunk: Num, rows: int, phase: Phase) -> None:
        """F14 with the weight of each sequence, on ``rows`` rows of each."""
        batch, n, f = self.decoder.batch, self._update.fast_rows, self.decoder.model.d_ff
        weight = next(weight for weight in self.weights if weight[0] == "fast_weight")
        s.op(
            "fast_apply", reads=[("hidden", self._rows(rows, f)), weight],
            writes=[s.buffer("fast_out", (batch, rows, n), self.decoder.dtype)],
            dtype=self.decoder.dtype, batch=batch, m=rows, n=n, k=f, phase=phase, chunk=chunk,
        )  # fmt: skip

    def _frozen(self, s: Segment) -> list[Read]:
        """F14 with the rows of the weight that stay as trained, if any, on the new rows of all sequences together."""
        m, f = s.run.tokens, self.decoder.model.d_ff
        n = self.decoder.model.d_model - self._update.fast_rows
        if not n:
            return []
        out = s.buffer("frozen_out", (self.decoder.batch, m, n), self.decoder.dtype)
        self.decoder.project(s, "down_proj", [("hidden", self._rows(m, f))], out, n=n, k=f)
        return [out]

    def _concat(self, s: Segment, old: Num, writes: Sequence[Write]) -> None:
        """C1, official: copy ``old`` open rows and the new ones into new buffers."""
        reads: list[Read] = [("mlp_normed", 0), (self._target, 0)]
        if not isinstance(old, int) or old:
            reads += self._carried(old)
        self._append(s, reads, writes)

    def _save_tail(self, s: Segment, rows: int) -> None:
        """C1, official: copy the rows after the last full chunk, or the whole call would have to be kept for them."""
        if rows:
            self._append(s, [("mlp_normed", 0), (self._target, 0)], self._carried(rows))

    def _carried(self, rows: Num) -> list[Write]:
        """Official: ``rows`` open rows in the buffers that hold them."""
        widths = {"carry_inputs": self.decoder.model.d_model, "carry_targets": self._target_width}
        return [(name, self._rows(rows, width)) for name, width in widths.items()]

    def _keep(self, s: Segment, *, shared: bool) -> None:
        """C1 without copies: new rows of the open chunk go to the buffers that layers share, or to the layer's own."""
        size, m = self.ttt.chunk_tokens, s.run.tokens
        open_rows = int(s.run.positions[0]) % size
        rows = m if open_rows + m < size else (open_rows + m) % size
        sources = {"carry_inputs": "mlp_normed", "carry_targets": self._target, "carry_hidden": "hidden"}
        buffers = [
            buffer
            for buffer in carry_buffers(self.decoder.model, self.ttt, self.decoder.dtype)
            if buffer.name in sources and buffer.shared == shared
        ]
        if rows and buffers:
            writes = [(buffer.name, self._rows(min(rows, buffer.rows), buffer.width)) for buffer in buffers]
            self._append(s, [(sources[buffer.name], 0) for buffer in buffers], writes)

    def _append(self, s: Segment, reads: Sequence[Read], writes: Sequence[Write]) -> None:
        """The op itself; a row of it is all that one sequence appends."""
        elements = sum(size for _, size in writes) * 8 // (DTYPE_BITS[self.decoder.dtype] * self.decoder.batch)
        s.op("carry_append", reads=reads, writes=writes, dtype=self.decoder.dtype, m=self.decoder.batch, n=elements)

    def _rows(self, rows: Num, width: int) -> Num:
        """Bytes of ``rows`` activation rows of every sequence."""
        return n_bytes(self.decoder.batch * rows * width, self.decoder.dtype)

    def _split(self, kept: str, name: str, width: int, old: int, new: int) -> list[Read]:
        """``old`` rows from the buffer ``kept`` and ``new`` rows from ``name``."""
        return [(source, self._rows(rows, width)) for source, rows in ((kept, old), (name, new)) if rows]


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops F0 to F16, and the updates of the TTT layers.

    Raises:
        ConfigError: settings that cannot be.
    """
    ttt = _checked(model, settings)
    decoder = Decoder.of(model, settings.kv, scenario)
    mlp = InPlaceMlp(decoder=decoder, ttt=ttt, from_empty=scenario.from_empty)
    names = [f"layers.{layer}.{name}" for name, _ in mlp.weights for layer in mlp.layers]
    meta = {
        "model": model.name,
        "method": settings.name,
        "kv": asdict(settings.kv),
        "ttt": {**asdict(ttt), "layers": list(mlp.layers)},
        "pinned": names if ttt.weight_write == "resident" else [],
    }
    return decoder_trace(decoder, scenario, other=mlp, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The KV cache that the model still keeps, the fast weights, and the open chunk at its largest."""
    ttt = _checked(model, settings)
    return State(
        kv_bytes=kv_bytes(model, settings.kv, tokens),
        fast_weight_bytes=fast_weight_bytes(model, ttt),
        carry_bytes=carry_bytes(model, ttt, dtype),
    )


def _checked(model: Model, settings: MethodSettings) -> TTTSettings:
    if settings.ttt is None:
        raise ConfigError(f"method {settings.name} needs TTT settings and has none")
    check_ttt(settings.ttt, model)
    return settings.ttt


def _full(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="ttt", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), ttt=ttt or TTTSettings())


def _windowed(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    window = DEFAULT_WINDOW_TOKENS if window_tokens is None else window_tokens
    kv = KVSettings(window_tokens=window, dtype=kv_dtype or DEFAULT_KV_DTYPE)
    return MethodSettings(name="ttt_window", kv=kv, ttt=ttt or TTTSettings())


_NEEDS = (
    "fast weights of every sequence, written at run time", "delta products over the tokens of a chunk",
)  # fmt: skip
_CAVEAT = "RULER-16k of a 4B model: 7.57 with a window and TTT, 5.07 with a window, 19.99 with full attention and TTT"

TTT = Method(
    name="ttt", title="In-Place TTT over full attention", settings=_full, trace=trace, state=state,
    family="fast_weights", needs=_NEEDS,
    caveat="Adds to the quality of full attention (RULER-16k of a 4B model: 19.99, arXiv 2604.06169).",
)  # fmt: skip
TTT_WINDOW = Method(
    name="ttt_window", title="In-Place TTT over windowed attention", settings=_windowed, trace=trace, state=state,
    family="fast_weights", needs=_NEEDS, caveat=f"{_CAVEAT} (arXiv 2604.06169).",
)  # fmt: skip
