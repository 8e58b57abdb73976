"""Collects the ops of a trace, and repeats them over layers and calls with array code.

A trace of a long prefill is the same few ops many times over: layers are alike, and so are calls of equal length. A
generator therefore emits each kind of *segment* (the start of a call, one plain layer, one TTT layer, the end of a
call) once per *run* of alike calls. A number in it is either one int or an array with one value per call of the run,
for what depends on the position. Operands are named by *family*: a tensor per layer under one name, or one tensor that
all layers share. The builder fills in the layer.

Versions are counted, not computed from positions: a write makes the version after the last one written, a read takes
the newest. So versions never skip, also where a scenario leaves calls out. In a scenario that starts at position 0 and
leaves nothing out, version i of a fast weight is the one that chunk i is applied with.
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
    """Neighbouring calls that emit the same ops. ``positions`` (n_calls,) tokens before each."""

    first_step: int
    positions: IntArray
    tokens: int
    logits: bool

    @property
    def from_empty(self) -> bool:
        """The run is the first call of its sequences."""
        return int(self.positions[0]) == 0


@dataclass(slots=True)
class _Family:
    """Tensors of one name. ``per_call``: written exactly once in every call, so its version is the step."""

    number: int
    ids: IntArray  # (n_layers,) tensor id by layer
    newest: int
    per_call: bool


@dataclass(slots=True)
class _Operands:
    """Operand entries of a segment, in op order."""

    counts: list[int] = field(default_factory=list)  # entries of each op
    families: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # in the first call of the run
    sizes: list[int] = field(default_factory=list)
    size_arrays: list[tuple[int, IntArray]] = field(default_factory=list)  # (entry, bytes by call)

    def add(self, family: int, version: int, size: Num) -> None:
        if isinstance(size, np.ndarray):
            self.size_arrays.append((len(self.sizes), size))
            size = 0
        self.families.append(family)
        self.versions.append(version)
        self.sizes.append(int(size))


class Segment:
    """Ops emitted once and repeated for ``layers`` (empty: ops outside the layers) and the calls of ``run``."""

    def __init__(self, builder: TraceBuilder, run: Run, layers: Sequence[int]) -> None:
        self._builder = builder
        self.run = run
        self.layers = tuple(layers)
        self.writes: dict[str, int] = {}  # versions written per call, by family
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
        phase: Phase = Phase.FORWARD,
        chunk: Num = -1,
        extra_lanes: Num = 0,
    ) -> None:
        """Emit one op; FLOPs and lane operations follow from its kind and dimensions (:func:`ttt_sim.ops.op_cost`)."""
        cost = op_cost(kind, batch=batch, m=m, n=n, k=k, heads=heads, pairs=pairs, extra_lanes=extra_lanes)
        values = (KIND[kind], phase, -1, chunk, 0, 0, _DTYPE[dtype], batch, m, n, k, heads, kv_heads, pairs, *cost)
        row = []
        for column, value in enumerate(values):
            if isinstance(value, np.ndarray):
                self.row_arrays.append((column, len(self.rows), value))
                row.append(0)
            else:
                row.append(int(value))
        self.rows.append(row)
        before = len(self.read_entries.sizes)
        for operand in reads:
            ago = operand[2] if len(operand) == 3 else 0
            self.read_entries.add(*self._newest(operand[0], ago), operand[1])
        self.read_entries.counts.append(len(self.read_entries.sizes) - before)
        before = len(self.write_entries.sizes)
        for name, size in writes:
            self.writes[name] = self.writes.get(name, 0) + 1
            self.write_entries.add(*self._newest(name, 0), size)
        self.write_entries.counts.append(len(self.write_entries.sizes) - before)

    def _newest(self, name: str, ago: int) -> tuple[int, int]:
        """Number of the family, and its version ``ago`` writes before the newest in the first call of the run."""
        family = self._builder.families[name]
        if family.per_call:
            return family.number, self.run.first_step
        return family.number, family.newest + self.writes.get(name, 0) - ago


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
        self.families: dict[str, _Family] = {}
        self._n_layers = n_layers
        self._tensors: list[Tensor] = []
        self._ids: list[IntArray] = []  # by family number
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
        family = self.families.get(name)
        if family is None:
            family = self._add_family(name, np.full(self._n_layers, _ABSENT, dtype=np.int64), initial_version)

        def make(full_name: str) -> Tensor:
            return Tensor(
                name=full_name, shape=shape, dtype=dtype, role=role, nbytes=size,
                initial_version=initial_version, in_place=in_place,
            )  # fmt: skip

        for layer in (0,) if layers is None else layers:
            known = int(family.ids[layer])
            full_name = name if layers is None else f"layers.{layer}.{name}"
            if known == _ABSENT:
                family.ids[slice(None) if layers is None else layer] = len(self._tensors)
                self._tensors.append(make(full_name))
            elif size > self._tensors[known].nbytes:
                self._tensors[known] = make(full_name)

    def declare_residual(self, shape: tuple[int, ...], dtype: str) -> None:
        """Declare the residual stream: ``layer_input``, ``layer_output`` of each layer; ``first``, ``last`` outside."""
        first_id = len(self._tensors)
        size = int(n_bytes(int(np.prod(shape, dtype=np.int64)), dtype))
        self._tensors += [
            Tensor(name=f"residual.{i}", shape=shape, dtype=dtype, role=Role.ACTIVATION, nbytes=size)
            for i in range(self._n_layers + 1)
        ]
        ids = first_id + np.arange(self._n_layers + 1, dtype=np.int64)
        for name, by_layer in (
            ("layer_input", ids[:-1]),
            ("layer_output", ids[1:]),
            ("first", np.repeat(ids[:1], self._n_layers)),
            ("last", np.repeat(ids[-1:], self._n_layers)),
        ):
            self._add_family(name, by_layer, -1, per_call=True)

    def _add_family(self, name: str, ids: IntArray, newest: int, *, per_call: bool = False) -> _Family:
        self.families[name] = _Family(number=len(self._ids), ids=ids, newest=newest, per_call=per_call)
        self._ids.append(ids)
        return self.families[name]

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

        stride = self._versions_per_call(repeats)
        calls = np.arange(n_calls, dtype=np.int64)
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
                self._repeat_entries(block, entries, layers, np.array(offsets), stride, calls)
        columns[_COLUMN["step"]] = (run.first_step + calls)[:, None]
        columns[_COLUMN["position"]] = run.positions[:, None]
        self._blocks.append((columns.reshape(len(columns), -1), read_block.reshape(3, -1), write_block.reshape(3, -1)))
        for family in self.families.values():
            family.newest += n_calls * int(stride[family.number])

    def _versions_per_call(self, segments: Iterable[Segment]) -> IntArray:
        stride = np.zeros(len(self._ids), dtype=np.int64)
        for segment in segments:
            for name, count in segment.writes.items():
                number = self.families[name].number
                assert stride[number] in (0, count), f"layers write {name} different numbers of times"
                stride[number] = count
        for family in self.families.values():
            if family.per_call:
                stride[family.number] = 1
        return stride

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
        for column, row, by_call in segment.row_arrays:
            columns[column][:, offsets + row] = by_call[:, None]

    def _repeat_entries(
        self,
        block: IntArray,
        entries: _Operands,
        layers: IntArray,
        offsets: IntArray,
        stride: IntArray,
        calls: IntArray,
    ) -> None:
        where = (offsets[:, None] + np.arange(len(entries.sizes))).ravel()
        families = np.array(entries.families, dtype=np.int64)
        ids = np.stack(self._ids)[families][:, layers].T.ravel()
        versions = np.array(entries.versions, dtype=np.int64) + stride[families] * calls[:, None]
        block[0][:, where] = ids
        block[1][:, where] = np.tile(versions, layers.size)
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
