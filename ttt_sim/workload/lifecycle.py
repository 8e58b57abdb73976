"""What happens to the changing weights of a sequence besides being read and updated, as traces of their own.

Checkpoints and the ways back, hashes and logs of an audit trail, swapping out and in, forks, rejected drafts, resets,
shared prefixes, and the forms in which a step can apply weights that changed. Each function takes what one chip holds
of ``batch`` sequences (:class:`Held`) and returns the trace of one operation on all of them; docs/lifecycle.md has the
formulas. A state without fast weights, that of a KV cache, takes the same operations where they make sense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from ttt_sim.dtypes import DTYPE_BITS, tensor_bytes
from ttt_sim.errors import ConfigError
from ttt_sim.model import MethodSettings, Model, TTTSettings
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import kept_tokens, kv_token_bytes
from ttt_sim.workload.builder import Read, Run, Segment, TraceBuilder, Write
from ttt_sim.workload.chunk_update import ChunkUpdate
from ttt_sim.workload.fast_state import MASTER_DTYPE, carry_buffers, layer_weight_bytes, outer_first, value_columns
from ttt_sim.workload.kv_forms import TABLE_ENTRY_BYTES, PagedOptions
from ttt_sim.workload.transformer import Decoder

#: How a step applies a weight that changed. ``merged``: one weight per sequence; ``split``: the trained weight, shared,
#: and the change S of each sequence beside it (copy on write); ``kernel``: the trained weight, and instead of S the
#: factors of the deltas that it is the sum of.
Form = Literal["merged", "split", "kernel"]
FORMS: tuple[Form, ...] = ("merged", "split", "kernel")

#: Tokens of a block of the KV cache that a table finds.
BLOCK_TOKENS = PagedOptions().block_tokens
#: Prefix of the names of copies outside the chip.
OUTSIDE = "outside"
#: Bytes of a token id in a log.
TOKEN_BYTES = 4
#: One record of the audit trail, of one chunk, layer and sequence: bytes of its fields.
RECORD_FIELDS: Mapping[str, int] = {
    "sequence": 8, "layer": 4, "chunk": 4, "first_token": 8, "tokens": 4, "rate": 4, "delta_norm": 4, "hash": 32,
    "code_version": 8,
}  # fmt: skip
RECORD_BYTES = sum(RECORD_FIELDS.values())

LoggedItem = Literal["record", "factors", "tokens"]
HashedItem = Literal["weights", "factors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HashFunction:
    """``lanes_per_kib``: 32-bit lane operations for 1024 bytes."""

    title: str
    lanes_per_kib: int
    digest_bytes: int
    source: str


#: Hash functions. XXH3 takes, per 8 bytes, an exclusive or (2 lane operations), two 64-bit additions (4) and a 32 x 32
#: bit multiplication (2), and per 1024 bytes 8 scrambles of 7. BLAKE3 takes 17 compressions per 1024 bytes (16 blocks
#: and a parent) of 7 rounds x 8 mixings of 14, and 8 to finish.
HASHES: Mapping[str, HashFunction] = {
    "xxh3": HashFunction(
        title="XXH3, not cryptographic", lanes_per_kib=128 * 8 + 8 * 7, digest_bytes=8,
        source="github.com/Cyan4973/xxHash, commit 0e1d320, doc/xxhash_spec.md",
    ),
    "blake3": HashFunction(
        title="BLAKE3, cryptographic", lanes_per_kib=17 * (7 * 8 * 14 + 8), digest_bytes=32,
        source="github.com/BLAKE3-team/BLAKE3, reference_impl.rs",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """``batch`` sequences of a method on one chip, after ``context_tokens``.

    ``model``: what the chip holds of the model (:func:`ttt_sim.model.shard`); ``layers``: which of its layers, None for
    all; ``open_rows``: rows of the open chunk, None for the most, one short of a chunk.
    """

    model: Model
    settings: MethodSettings
    batch: int
    dtype: str
    context_tokens: int
    layers: tuple[int, ...] | None = None
    open_rows: int | None = None

    @property
    def ttt(self) -> TTTSettings:
        if self.settings.ttt is None:
            raise ConfigError(f"method {self.settings.name} has no fast weights")
        return self.settings.ttt

    @property
    def kv_layers(self) -> tuple[int, ...]:
        return tuple(range(self.model.n_layers)) if self.layers is None else self.layers

    @property
    def ttt_layers(self) -> tuple[int, ...]:
        if self.settings.ttt is None:
            return ()
        return tuple(layer for layer in self.settings.ttt.layers_of(self.model) if layer in self.kv_layers)

    @property
    def decoder(self) -> Decoder:
        return Decoder(model=self.model, kv=self.settings.kv, batch=self.batch, dtype=self.dtype)

    @property
    def update(self) -> ChunkUpdate:
        return ChunkUpdate(decoder=self.decoder, ttt=self.ttt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """``nbytes`` of all sequences in each of ``layers``, None: once for all of them."""

    name: str
    dtype: str
    role: Role
    nbytes: int
    layers: tuple[int, ...] | None

    def like(self, prefix: str, *, role: Role | None = None, times: int = 1) -> Buffer:
        """A copy by another name; ``times`` as large."""
        return Buffer(
            name=f"{prefix}_{self.name}", dtype=self.dtype, role=self.role if role is None else role,
            nbytes=times * self.nbytes, layers=self.layers,
        )  # fmt: skip


Move = tuple[Buffer, Buffer]


# --- what a state is made of ------------------------------------------------------------------------------------------


def weight_buffers(held: Held) -> list[Buffer]:
    """Fast weights, and their masters."""
    if held.settings.ttt is None:
        return []
    sizes = layer_weight_bytes(held.model, held.ttt)
    return [
        Buffer(
            name=name, dtype=MASTER_DTYPE if name == "fast_master" else held.ttt.fast_dtype, role=Role.FAST_WEIGHT,
            nbytes=held.batch * size, layers=held.ttt_layers,
        )
        for name, size in sizes.items()
    ]  # fmt: skip


def carry_of(held: Held) -> list[Buffer]:
    """The open chunk, as far as it has come."""
    if held.settings.ttt is None or held.open_rows == 0:
        return []
    found = []
    for buffer in carry_buffers(held.model, held.ttt, held.dtype):
        rows = buffer.rows if held.open_rows is None or buffer.name == "accumulator" else held.open_rows
        size = held.batch * tensor_bytes(min(rows, buffer.rows) * buffer.width, buffer.dtype)
        layers = None if buffer.shared else held.ttt_layers
        found.append(Buffer(name=buffer.name, dtype=buffer.dtype, role=Role.CARRY, nbytes=size, layers=layers))
    return found


def kv_of(held: Held, tokens: int | None = None) -> list[Buffer]:
    """Keys and values: all that are kept, or those of ``tokens`` tokens."""
    kept = kept_tokens(held.settings.kv, held.context_tokens) if tokens is None else tokens
    if not kept:
        return []
    size = held.batch * kept * kv_token_bytes(held.model, held.settings.kv)
    return [Buffer(name="kv", dtype=held.settings.kv.dtype, role=Role.KV, nbytes=size, layers=held.kv_layers)]


def state_of(held: Held) -> list[Buffer]:
    """All that is kept between calls: fast weights, open chunk, keys and values."""
    return [*weight_buffers(held), *carry_of(held), *kv_of(held)]


def block_table(held: Held) -> Buffer:
    """Where the blocks of the keys and values lie, one table per sequence for all layers."""
    blocks = ceil_div(kept_tokens(held.settings.kv, held.context_tokens), BLOCK_TOKENS)
    nbytes = held.batch * blocks * TABLE_ENTRY_BYTES
    return Buffer(name="block_table", dtype="int8", role=Role.CARRY, nbytes=nbytes, layers=None)


# --- collecting ops ---------------------------------------------------------------------------------------------------


class _Ops:
    """Segments of one operation, in order inside each layer."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.builder = TraceBuilder(held.model.n_layers)
        self.run = Run(first_step=0, positions=np.array([held.context_tokens], dtype=np.int64), tokens=1, logits=False)
        self._placed: list[tuple[Segment, int]] = []

    def there(self, buffer: Buffer) -> Write:
        """Declare what exists before."""
        return self._declare(buffer, 0)

    def new(self, buffer: Buffer) -> Write:
        """Declare what the operation makes."""
        return self._declare(buffer, -1)

    def _declare(self, buffer: Buffer, version: int) -> Write:
        elements = buffer.nbytes * 8 // DTYPE_BITS[buffer.dtype]
        self.builder.declare(
            buffer.name, (self.held.batch, max(elements // self.held.batch, 1)), buffer.dtype, buffer.role,
            layers=buffer.layers, size=buffer.nbytes, initial_version=version, in_place=version == 0,
        )  # fmt: skip
        return buffer.name, buffer.nbytes

    def segment(self, layers: Iterable[int] | None) -> Segment:
        """A segment for these layers (None: outside all of them); its place is after those before it."""
        segment = Segment(self.builder, self.run, tuple(layers or ()))
        self._placed += [(segment, layer) for layer in ((-1,) if layers is None else segment.layers)]
        return segment

    def trace(self, operation: str, *, outside: str = "") -> Trace | None:
        """The trace, layer by layer; None if there is no op in it. Tensors whose names begin with ``outside`` lie
        outside the chip."""
        placed = [(segment, layer) for segment, layer in self._placed if segment.rows]
        if not placed:
            return None
        last = self.held.model.n_layers
        placed.sort(key=lambda place: place[1] if place[1] >= 0 else last)
        self.builder.add_run(self.run, placed)
        settings = self.held.settings
        meta: dict[str, object] = {
            "model": self.held.model.name, "method": settings.name, "operation": operation,
            "kv": asdict(settings.kv), "ttt": None if settings.ttt is None else asdict(settings.ttt), "pinned": [],
        }  # fmt: skip
        trace = self.builder.build(meta)
        if outside:
            names = (tensor.name for tensor in trace.tensors)
            meta["placed_far"] = [name for name in names if name.rpartition(".")[2].startswith(outside)]
        return trace


def _copy(segment: Segment, batch: int, source: Sequence[Read], target: Write, dtype: str) -> None:
    elements = max(target[1] * 8 // (DTYPE_BITS[dtype] * batch), 1)
    segment.op("state_copy", reads=source, writes=[target], dtype=dtype, m=batch, n=elements)


def _moves(held: Held, operation: str, moves: Iterable[Move], *, restores: bool = False) -> Trace | None:
    """Copies from the first buffer of each move to the second, which is made or, ``restores``, overwritten."""
    ops = _Ops(held)
    for source, target in moves:
        written = ops.there(target) if restores else ops.new(target)
        _copy(ops.segment(source.layers), held.batch, [ops.there(source)], written, source.dtype)
    return ops.trace(operation, outside=f"{OUTSIDE}_" if operation.startswith("swap") else "")


# --- checkpoints and the ways back ------------------------------------------------------------------------------------


def snapshot(held: Held) -> Trace | None:
    """A copy of the whole state in memory."""
    return _moves(held, "snapshot", [(part, part.like("saved", role=Role.CARRY)) for part in state_of(held)])


def restore(held: Held) -> Trace | None:
    """Rollback 1: the state becomes a snapshot of it again."""
    moves = [(part.like("saved", role=Role.CARRY), part) for part in state_of(held)]
    return _moves(held, "restore", moves, restores=True)


def subtract(held: Held) -> Trace | None:
    """Rollback 2: the delta of the last chunk, which was kept, is scaled and subtracted."""
    rows = held.batch * held.update.fast_rows
    ops, elements = _Ops(held), rows * held.model.d_ff
    dtype = held.update.delta_dtype
    delta = ops.there(
        Buffer(
            name="kept_delta", dtype=dtype, role=Role.CARRY, nbytes=tensor_bytes(elements, dtype),
            layers=held.ttt_layers,
        )
    )  # fmt: skip
    for weight in weight_buffers(held):
        ops.there(weight)
    weights = held.update.weights()
    ops.segment(held.ttt_layers).op(
        "weight_write", reads=[delta, weights[0]], writes=weights, dtype=dtype,
        m=rows, n=held.model.d_ff, phase=Phase.WEIGHT_WRITE, extra_lanes=elements,
    )  # fmt: skip
    return ops.trace("subtract")


def subtract_logged(held: Held) -> Trace | None:
    """Rollback 2 with the delta made again from the logged factors of the last chunk."""
    ops = _Ops(held)
    for weight in weight_buffers(held):
        ops.there(weight)
    _emit_logged(ops, range(1))
    return ops.trace("subtract_logged")


def replay_factors(held: Held, chunks: int) -> Trace | None:
    """Rollback 3: the trained weight, and the updates from the logged factors of ``chunks`` chunks one after the
    other."""
    ops = _Ops(held)
    _emit_init(ops)
    _emit_logged(ops, range(chunks))
    return ops.trace("replay_factors")


def factor_bytes(held: Held) -> tuple[int, int]:
    """Bytes of the factors of a chunk, one layer, all sequences: values, hidden rows."""
    rows = held.batch * held.ttt.chunk_tokens
    return held.decoder.size(rows, value_columns(held.model, held.ttt)), held.decoder.size(rows, held.model.d_ff)


def _emit_logged(ops: _Ops, chunks: Iterable[int]) -> None:
    """Updates from a log."""
    held = ops.held
    if outer_first(held.model, held.ttt):
        shape = (held.model.d_model, held.update.fast_rows)
        ops.builder.declare(
            "ttt_proj.weight", shape, held.dtype, Role.WEIGHT, layers=held.ttt_layers, initial_version=0
        )
    values_bytes, hidden_bytes = factor_bytes(held)
    segment = ops.segment(held.ttt_layers)
    for chunk in chunks:
        values, hidden = (
            ops.there(
                Buffer(
                    name=f"logged_{name}_{chunk}", dtype=held.dtype, role=Role.CARRY, nbytes=size,
                    layers=held.ttt_layers,
                )
            )
            for name, size in (("values", values_bytes), ("hidden", hidden_bytes))
        )  # fmt: skip
        held.update.emit_factors(segment, chunk, values, [hidden])


def _emit_init(ops: _Ops) -> None:
    """C3: the weight of every sequence becomes a copy of the trained one."""
    held, d, f = ops.held, ops.held.model.d_model, ops.held.model.d_ff
    rows = held.update.fast_rows
    for weight in weight_buffers(held):
        ops.there(weight)
    ops.builder.declare("down_proj.weight", (d, f), held.dtype, Role.WEIGHT, layers=held.ttt_layers, initial_version=0)
    ops.segment(held.ttt_layers).op(
        "fast_init", reads=[("down_proj.weight", held.decoder.size(rows, f))], writes=held.update.weights(),
        dtype=held.ttt.fast_dtype, m=held.batch * rows, n=f,
    )  # fmt: skip


# --- audit ------------------------------------------------------------------------------------------------------------


def hash_state(held: Held, item: HashedItem, function: str) -> Trace | None:
    """A hash per layer and sequence of the fast weights (of masters where there are any), or of the factors of one
    chunk."""
    return _hash(held, f"hash_{item}", weight_buffers(held)[-1:] if item == "weights" else _factors(held), function)


def hash_kv(held: Held, tokens: int, function: str) -> Trace | None:
    """A hash per layer and sequence of the keys and values of ``tokens`` new tokens."""
    return _hash(held, "hash_kv", kv_of(held, tokens), function)


def _hash(held: Held, operation: str, parts: Sequence[Buffer], function: str) -> Trace | None:
    hashed, ops = HASHES[function], _Ops(held)
    for part in parts:
        digest = part.like("digest", role=Role.CARRY)
        digest = replace(digest, dtype="int8", nbytes=held.batch * hashed.digest_bytes)
        elements = part.nbytes * 8 // (DTYPE_BITS[part.dtype] * held.batch)
        ops.segment(part.layers).op(
            "state_hash", reads=[ops.there(part)], writes=[ops.new(digest)], dtype=part.dtype, m=held.batch,
            n=elements, extra_lanes=ceil_div(part.nbytes * hashed.lanes_per_kib, 1024),
        )  # fmt: skip
    return ops.trace(operation)


def _factors(held: Held) -> list[Buffer]:
    """The factors of one chunk where an update leaves them."""
    return [
        Buffer(name=name, dtype=held.dtype, role=Role.CARRY, nbytes=size, layers=held.ttt_layers)
        for name, size in zip(("chunk_values", "chunk_hidden"), factor_bytes(held), strict=True)
    ]


def log(held: Held, item: LoggedItem) -> Trace | None:
    """One chunk enters the log: a record per layer, the factors of its delta, or its token ids."""
    ops = _Ops(held)
    if item == "factors":
        for part in _factors(held):
            target = ops.new(part.like("log"))
            _copy(ops.segment(part.layers), held.batch, [ops.there(part)], target, part.dtype)
        return ops.trace("log_factors")
    size = RECORD_BYTES if item == "record" else TOKEN_BYTES * held.ttt.chunk_tokens
    layers = held.ttt_layers if item == "record" else None
    target = ops.new(Buffer(name="log", dtype="int8", role=Role.CARRY, nbytes=held.batch * size, layers=layers))
    _copy(ops.segment(layers), held.batch, [], target, "int8")
    return ops.trace(f"log_{item}")


# --- swapping, forks, drafts, resets, shared prefixes -----------------------------------------------------------------


def swap_out(held: Held) -> Trace | None:
    """The state moves out of the chip."""
    return _moves(held, "swap_out", [(part, part.like(OUTSIDE, role=Role.CARRY)) for part in state_of(held)])


def swap_in(held: Held) -> Trace | None:
    """And back."""
    moves = [(part.like(OUTSIDE, role=Role.CARRY), part) for part in state_of(held)]
    return _moves(held, "swap_in", moves, restores=True)


def fork(held: Held, beams: int) -> Trace | None:
    """Every sequence becomes ``beams`` sequences with a state of their own."""
    moves = [(part, part.like("beam", times=beams - 1)) for part in state_of(held)]
    return _moves(held, "fork", moves if beams > 1 else [])


def fork_shared(held: Held, beams: int) -> Trace | None:
    """The same, copied on write: beams read one weight until their next updates, which write one for each, and share
    blocks of keys and values. The open chunk is copied, as its next rows differ."""
    parts = [*carry_of(held), block_table(held)]
    return _moves(
        held, "fork_shared", [(part, part.like("beam", times=beams - 1)) for part in parts] if beams > 1 else []
    )


def reject(held: Held, draft: int) -> Trace | None:
    """A draft of ``draft`` tokens that completed a chunk is rejected: the weights from before it come back from a
    snapshot, the rows of the chunk with them, and the keys and values that it overwrote in a ring. A full cache only
    becomes shorter."""
    ring = held.settings.kv.window_tokens
    lost = 0 if ring is None else min(draft, kept_tokens(held.settings.kv, held.context_tokens))
    parts = [*weight_buffers(held), *carry_of(held), *kv_of(held, lost)]
    return _moves(held, "reject", [(part.like("saved", role=Role.CARRY), part) for part in parts], restores=True)


def reset(held: Held) -> Trace | None:
    """At a document boundary every sequence gets the trained weight again."""
    ops = _Ops(held)
    _emit_init(ops)
    return ops.trace("reset")


def share_prefix(held: Held) -> Trace | None:
    """One snapshot, taken at the end of a chunk, becomes the state of every sequence: read once, written for each."""
    moves = [
        (source.like("saved", role=Role.CARRY), replace(source, nbytes=held.batch * source.nbytes))
        for source in state_of(replace(held, batch=1, open_rows=0))
    ]
    return _moves(held, "share_prefix", moves, restores=True)


def share_blocks(held: Held) -> Trace | None:
    """Every sequence gets a table of the blocks of the same prefix."""
    table = block_table(held)
    one = Buffer(
        name="prefix_table", dtype=table.dtype, role=table.role, nbytes=table.nbytes // held.batch, layers=None
    )
    return _moves(held, "share_blocks", [(one, table)])


# --- forms of applying ------------------------------------------------------------------------------------------------


def apply_step(held: Held, form: Form, history_tokens: int = 0) -> Trace:
    """The MLPs of the TTT layers in one decode step, with weights that hold ``history_tokens`` tokens of updates."""
    ops, decoder, batch = _Ops(held), held.decoder, held.batch
    d, f, dtype, layers = held.model.d_model, held.model.d_ff, held.dtype, held.ttt_layers
    fast = held.update.fast_rows
    trained_rows = d - fast if form == "merged" else d
    weights = {"gate_proj": (f, d), "up_proj": (f, d)} | ({"down_proj": (trained_rows, f)} if trained_rows else {})
    for name, shape in weights.items():
        ops.builder.declare(f"{name}.weight", shape, dtype, Role.WEIGHT, layers=layers, initial_version=0)
    inputs = ("mlp_normed", decoder.size(batch, d))
    ops.builder.declare("mlp_normed", (batch, 1, d), dtype, Role.ACTIVATION, layers=layers, initial_version=0)
    s = ops.segment(layers)
    decoder.emit_hidden(s, 1, [inputs], Phase.FORWARD)
    hidden: Read = ("hidden", decoder.size(batch, f))
    so_far: list[Read] = []
    if trained_rows:
        whole = s.buffer("frozen_out" if form == "merged" else "fast_out", (batch, 1, trained_rows), dtype)
        trained = ("down_proj.weight", decoder.size(trained_rows, f))
        s.op("down_proj", reads=[hidden, trained], writes=[whole], dtype=dtype, m=batch, n=trained_rows, k=f)
    out = s.buffer("fast_out", (batch, 1, fast), dtype)
    if form != "merged":
        so_far = [out]
    if form != "kernel":
        name = "fast_weight" if form == "merged" else "weight_change"
        weight = ops.there(
            Buffer(
                name=name, dtype=held.ttt.fast_dtype, role=Role.FAST_WEIGHT,
                nbytes=batch * tensor_bytes(fast * f, held.ttt.fast_dtype), layers=layers,
            )
        )  # fmt: skip
        s.op("fast_apply", reads=[hidden, weight, *so_far], writes=[out], dtype=dtype, batch=batch, m=1, n=fast, k=f)
    elif history_tokens:
        rows = batch * history_tokens
        keys, values = (
            ops.there(Buffer(name=name, dtype=dtype, role=Role.KV, nbytes=decoder.size(rows, width), layers=layers))
            for name, width in (("history_hidden", f), ("history_values", fast))
        )
        scores = s.buffer("history_scores", (batch, 1, history_tokens), dtype)
        s.op(
            "history_scores", reads=[hidden, keys], writes=[scores], dtype=dtype, batch=batch, m=1, n=history_tokens,
            k=f,
        )  # fmt: skip
        s.op(
            "history_apply", reads=[scores, values, *so_far], writes=[out], dtype=dtype, batch=batch, m=1, n=fast,
            k=history_tokens,
        )  # fmt: skip
    trace = ops.trace(f"apply_{form}")
    if trace is None:
        raise ConfigError(f"no TTT layer of {held.model.name} is held here")
    return trace
