"""Collects the ops of a trace, and repeats them over layers and calls with array code.

A trace of a long prefill is the same few ops many times over: layers are alike, and so are calls of equal length. A
generator therefore emits each kind of *segment* (the start of a call, one plain layer, one TTT layer, the end of a
call) once per *run* of alike calls. A number in it is either one int or an array with one value per call of the run,
for what depends on the position. Operands are named by *family*: a tensor per layer under one name, or one tensor that
all layers share. The builder fills in the layer.

Versions are counted, not computed from positions: a write makes the version after the last one written, a read takes
the newest. So versions never skip, also where a scenario leaves calls out, and a segment may stand anywhere in a call:
a backward pass reads what the forward pass of its layer wrote, or what a recomputation wrote since. In a scenario that
starts at position 0 and leaves nothing out, version i of a fast weight is the one that chunk i is applied with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ttt_sim.dtypes import DTYPE_BITS, DTYPES
from ttt_sim.ops import KIND, OP_COLUMNS, IntArray, Num, Phase, Role, Tensor, Trace, op_cost

#: (family, bytes), or (family, bytes, writes ago) for a version older than the newest.
Read = tuple[str, Num] | tuple[str, Num, int]
Write = tuple[str, Num]

_COLUMN = {name: index for index, name in enumerate(OP_COLUMNS)}
_DTYPE = {name: index for index, name in enumerate(DTYPES)}
_ABSENT = -1


def n_bytes(elements: Num, dtype: str) -> Num:
    """Bytes of packed elements, rounded up; an array gives an array."""
    return -(-elements * DTYPE_BITS[dtype] // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring calls that emit the same ops. ``positions`` (n_calls,) tokens before each.

    ``again``: rows that earlier calls ran are run once more, with the new ones.
    """

    first_step: int
    positions: IntArray
    tokens: int
    logits: bool
    again: bool = False

    @property
    def from_empty(self) -> bool:
        """The run is the first call of its sequences."""
        return int(self.positions[0]) == 0 and not self.again


@dataclass(slots=True)
class _Operands:
    """Operand entries of a segment, in op order."""

    counts: list[int] = field(default_factory=list)  # entries of each op
    families: list[int] = field(default_factory=list)
    ago: list[int] = field(default_factory=list)  # writes before the newest; 0 for a write
    sizes: list[int] = field(default_factory=list)
    size_arrays: list[tuple[int, IntArray]] = field(default_factory=list)  # (entry, bytes by call)

    def add(self, family: int, ago: int, size: Num) -> None:
        if isinstance(size, np.ndarray):
            self.size_arrays.append((len(self.sizes), size))
            size = 0
        self.families.append(family)
        self.ago.append(ago)
        self.sizes.append(int(size))


class Segment:
    """Ops emitted once and repeated for ``layers`` (empty: ops outside the layers) and the calls of ``run``.

    ``phase``: that of ops which do not say another; ``after``: what the first of them waits for, read without bytes.
    """

    def __init__(
        self, builder: TraceBuilder, run: Run, layers: Sequence[int], phase: Phase = Phase.FORWARD, *,
        after: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._builder = builder
        self._phase = phase
        self._after: tuple[Read, ...] = tuple((name, 0) for name in after)
        self.run = run
        self.layers = tuple(layers)
        self.rows: list[list[int]] = []
        self.row_arrays: list[tuple[int, int, IntArray]] = []  # (column, row, value by call)
        self.read_entries, self.write_entries = _Operands(), _Operands()

    def buffer(
        self, name: str, shape: tuple[int, ...], dtype: str, role: Role = Role.ACTIVATION, *, size: int | None = None
    ) -> Write:
        """An operand to write: a buffer of ``shape``, a new one for each version. Declares its family where needed.

        ``size``: its bytes, if there are more than those of its elements.
        """
        elements = 1
        for length in shape:
            elements *= length
        size = int(n_bytes(elements, dtype)) if size is None else size
        self._builder.declare(name, shape, dtype, role, layers=self.layers or None, size=size)
        return name, size

    def op(
        self,
        kind: str,
        *,
        reads: Iterable[Read],
        writes: Iterable[Write],
        dtype: str,
        m: Num,
        n: Num,
        k: int = 0,
        batch: int = 1,
        heads: int = 0,
        kv_heads: int = 0,
        pairs: Num = 0,
        phase: Phase | None = None,
        chunk: Num = -1,
        extra_lanes: Num = 0,
    ) -> None:
        """Emit one op; FLOPs and lane operations follow from its kind and dimensions (:func:`ttt_sim.ops.op_cost`)."""
        cost = op_cost(kind, batch=batch, m=m, n=n, k=k, heads=heads, pairs=pairs, extra_lanes=extra_lanes)
        phase = self._phase if phase is None else phase
        values = (KIND[kind], phase, -1, chunk, 0, 0, _DTYPE[dtype], batch, m, n, k, heads, kv_heads, pairs, *cost)
        row = []
        for column, value in enumerate(values):
            if isinstance(value, np.ndarray):
                self.row_arrays.append((column, len(self.rows), value))
                row.append(0)
            else:
                row.append(int(value))
        self.rows.append(row)
        number = self._builder.number_of
        before = len(self.read_entries.sizes)
        for operand in (*reads, *(self._after if len(self.rows) == 1 else ())):
            self.read_entries.add(number(operand[0]), operand[2] if len(operand) == 3 else 0, operand[1])
        self.read_entries.counts.append(len(self.read_entries.sizes) - before)
        before = len(self.write_entries.sizes)
        for name, size in writes:
            self.write_entries.add(number(name), 0, size)
        self.write_entries.counts.append(len(self.write_entries.sizes) - before)


@dataclass(slots=True)
class _Repeats:
    """Where a segment stands in the calls of a run."""

    layers: list[int] = field(default_factory=list)
    op_offsets: list[int] = field(default_factory=list)
    read_offsets: list[int] = field(default_factory=list)
    write_offsets: list[int] = field(default_factory=list)


class TraceBuilder:
    """Declares tensors, takes runs, returns the trace."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._tensors: list[Tensor] = []
        self._numbers: dict[str, int] = {}
        self._ids: list[IntArray] = []  # by family number: (n_layers,) tensor id by layer
        self._written: IntArray = np.zeros(0, dtype=np.int64)  # by tensor id: versions written by the runs so far
        self._blocks: list[tuple[IntArray, IntArray, IntArray]] = []  # columns and counts, reads, writes

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        role: Role,
        *,
        layers: Sequence[int] | None,
        size: int | None = None,
        initial_version: int = -1,
        in_place: bool = False,
    ) -> None:
        """Declare one tensor per layer of ``layers``, or one for all (None). Again: adds layers, enlarges."""
        if size is None:
            size = int(n_bytes(int(np.prod(shape, dtype=np.int64)), dtype))
        if name not in self._numbers:
            self._add_family(name, np.full(self._n_layers, _ABSENT, dtype=np.int64))
        ids = self._ids[self._numbers[name]]

        def make(full_name: str) -> Tensor:
            return Tensor(
                name=full_name, shape=shape, dtype=dtype, role=role, nbytes=size,
                initial_version=initial_version, in_place=in_place,
            )  # fmt: skip

        for layer in (0,) if layers is None else layers:
            known = int(ids[layer])
            full_name = name if layers is None else f"layers.{layer}.{name}"
            if known == _ABSENT:
                ids[slice(None) if layers is None else layer] = len(self._tensors)
                self._tensors.append(make(full_name))
            elif size > self._tensors[known].nbytes:
                self._tensors[known] = make(full_name)

    def declare_stream(self, name: str, shape: tuple[int, ...], dtype: str, **families: str) -> None:
        """Declare what passes through all layers: L + 1 tensors ``name.0`` to ``name.L``, known under four families.

        ``families``: names for ``before`` and ``after`` a layer, and for the ``first`` and the ``last`` of them.
        """
        first_id = len(self._tensors)
        size = int(n_bytes(int(np.prod(shape, dtype=np.int64)), dtype))
        self._tensors += [
            Tensor(name=f"{name}.{i}", shape=shape, dtype=dtype, role=Role.ACTIVATION, nbytes=size)
            for i in range(self._n_layers + 1)
        ]
        ids = first_id + np.arange(self._n_layers + 1, dtype=np.int64)
        by_layer = {
            "before": ids[:-1], "after": ids[1:], "first": np.repeat(ids[:1], self._n_layers),
            "last": np.repeat(ids[-1:], self._n_layers),
        }  # fmt: skip
        for place, family in families.items():
            self._add_family(family, by_layer[place])

    def declare_slots(
        self, name: str, shape: tuple[int, ...], dtype: str, role: Role, *, slots: int, size: int
    ) -> None:
        """Declare tensors ``name.0``, ``name.1``, ... that layers take in turn and overwrite in place."""
        first_id = len(self._tensors)
        slots = min(slots, self._n_layers)
        self._tensors += [
            Tensor(name=f"{name}.{i}", shape=shape, dtype=dtype, role=role, nbytes=size, in_place=True)
            for i in range(slots)
        ]
        self._add_family(name, first_id + np.arange(self._n_layers, dtype=np.int64) % slots)

    def number_of(self, name: str) -> int:
        """Number of a family that is declared."""
        return self._numbers[name]

    def _add_family(self, name: str, ids: IntArray) -> None:
        self._numbers[name] = len(self._ids)
        self._ids.append(ids)

    def add_run(self, run: Run, segments: Sequence[tuple[Segment, int]]) -> None:
        """Append the calls of ``run``, each made of ``segments`` with their layers (-1: none), in order."""
        n_calls = run.positions.size
        repeats: dict[Segment, _Repeats] = {}
        ops = reads = writes = 0
        for segment, layer in segments:
            place = repeats.setdefault(segment, _Repeats())
            place.layers.append(layer)
            place.op_offsets.append(ops)
            place.read_offsets.append(reads)
            place.write_offsets.append(writes)
            ops += len(segment.rows)
            reads += len(segment.read_entries.sizes)
            writes += len(segment.write_entries.sizes)

        columns = np.empty((len(OP_COLUMNS) + 2, n_calls, ops), dtype=np.int64)
        read_block = np.empty((3, n_calls, reads), dtype=np.int64)
        write_block = np.empty((3, n_calls, writes), dtype=np.int64)
        for segment, place in repeats.items():
            layers = np.array(place.layers, dtype=np.int64)
            self._repeat_rows(columns, segment, layers, np.array(place.op_offsets))
            for block, entries, offsets in (
                (read_block, segment.read_entries, place.read_offsets),
                (write_block, segment.write_entries, place.write_offsets),
            ):
                self._repeat_entries(block, entries, layers, np.array(offsets))
        self._number_versions(columns[:, 0], read_block, write_block)
        columns[_COLUMN["step"]] = (run.first_step + np.arange(n_calls, dtype=np.int64))[:, None]
        self._blocks.append((columns.reshape(len(columns), -1), read_block.reshape(3, -1), write_block.reshape(3, -1)))

    def _number_versions(self, columns: IntArray, reads: IntArray, writes: IntArray) -> None:
        """Turn "writes ago" in row 1 of both blocks into versions; ``columns`` are those of one call."""
        n_ops, n_calls = columns.shape[1], reads.shape[1]
        initial = np.array([tensor.initial_version for tensor in self._tensors], dtype=np.int64)
        before = np.zeros(initial.size, dtype=np.int64)
        before[: self._written.size] = self._written
        newest = initial + before
        tensor = writes[0, 0]
        per_call = np.bincount(tensor, minlength=initial.size).astype(np.int64)
        calls = np.arange(n_calls, dtype=np.int64)[:, None]

        # Writes of one call by tensor, in order of ops; how many of a tensor come before a place is a search in them.
        place = tensor * (n_ops + 1) + np.repeat(np.arange(n_ops), columns[-1])
        order = np.argsort(place, kind="stable")
        start = np.cumsum(per_call) - per_call
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size) - start[tensor[order]]
        writes[1] = newest[tensor] + 1 + rank + per_call[tensor] * calls

        tensor = reads[0, 0]
        earlier = np.searchsorted(place[order], tensor * (n_ops + 1) + np.repeat(np.arange(n_ops), columns[-2]))
        reads[1] = newest[tensor] + earlier - start[tensor] - reads[1] + per_call[tensor] * calls
        self._written = before + n_calls * per_call

    @staticmethod
    def _repeat_rows(columns: IntArray, segment: Segment, layers: IntArray, offsets: IntArray) -> None:
        n_rows = len(segment.rows)
        where = (offsets[:, None] + np.arange(n_rows)).ravel()
        values = np.empty((len(OP_COLUMNS) + 2, n_rows), dtype=np.int64)
        values[:-2] = np.array(segment.rows, dtype=np.int64).T
        values[-2] = segment.read_entries.counts
        values[-1] = segment.write_entries.counts
        columns[:, :, where] = np.tile(values, layers.size)[:, None, :]
        columns[_COLUMN["layer"]][:, where] = np.repeat(layers, n_rows)
        columns[_COLUMN["position"]][:, where] = segment.run.positions[:, None]
        for column, row, by_call in segment.row_arrays:
            columns[column][:, offsets + row] = by_call[:, None]

    def _repeat_entries(
        self,
        block: IntArray,
        entries: _Operands,
        layers: IntArray,
        offsets: IntArray,
    ) -> None:
        where = (offsets[:, None] + np.arange(len(entries.sizes))).ravel()
        families = np.array(entries.families, dtype=np.int64)
        ids = np.stack(self._ids)[families][:, layers].T.ravel()
        block[0][:, where] = ids
        block[1][:, where] = np.tile(np.array(entries.ago, dtype=np.int64), layers.size)
        block[2][:, where] = np.tile(np.array(entries.sizes, dtype=np.int64), layers.size)
        for entry, by_call in entries.size_arrays:
            block[2][:, offsets + entry] = by_call[:, None]

    def build(self, meta: Mapping[str, object]) -> Trace:
        """The trace of all runs."""
        columns = np.concatenate([block[0] for block in self._blocks], axis=1)
        reads = np.concatenate([block[1] for block in self._blocks], axis=1)
        writes = np.concatenate([block[2] for block in self._blocks], axis=1)
        n_ops = columns.shape[1]
        return Trace(
            **dict(zip(OP_COLUMNS, columns, strict=False)),
            read_ptr=offsets_of(columns[-2]),
            read_tensor=reads[0],
            read_version=reads[1],
            read_bytes=reads[2],
            write_ptr=offsets_of(columns[-1]),
            write_tensor=writes[0],
            write_version=writes[1],
            write_bytes=writes[2],
            after_ptr=np.zeros(n_ops + 1, dtype=np.int64),
            after_idx=np.zeros(0, dtype=np.int64),
            tensors=tuple(self._tensors),
            meta=meta,
        )


def offsets_of(counts: IntArray) -> IntArray:
    """CSR offsets of entries that come ``counts`` at a time."""
    ptr = np.zeros(counts.size + 1, dtype=np.int64)
    np.cumsum(counts, out=ptr[1:])
    return ptr
