"""Executing the ops of a trace in a given order, on given tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np

from ttt_sim.ops import OP_KINDS, Phase, Tensor, Trace
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.elementary import rotary_tables
from ttt_sim.reference.exact import IntArray as Ids
from ttt_sim.reference.formats import Format, nearest
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.kernels import OpCall, Operand, execute, rows_per_sequence
from ttt_sim.replay.memory import Memory, Observer
from ttt_sim.replay.products import Accumulate
from ttt_sim.replay.settings import ROTARY_BASE, format_of, settings_of
from ttt_sim.replay.tiling import Tiling, TilingOf

_OPERAND_COLUMNS = tuple(
    f"{side}_{part}" for side in ("read", "write") for part in ("ptr", "tensor", "version", "bytes")
)


def whole(trace: Trace) -> TilingOf:
    """Every op as one tile, for executions without a chip."""

    def tiling(op: int) -> Tiling:
        m = int(trace.m[op])
        if trace.heads[op]:
            heads, n = int(trace.heads[op] // trace.kv_heads[op]), int(trace.n[op])
            return Tiling(tiles=((0, m * heads, 0, int(trace.k[op])),), parts=((0, n),), depth=n, heads=heads)
        k = int(trace.k[op])
        return Tiling(tiles=((0, m, 0, int(trace.n[op])),), parts=((0, k),), depth=k)

    return tiling


def run_ops(
    trace: Trace,
    order: Iterable[int],
    *,
    parameters: Mapping[str, FloatArray],
    tokens: Ids,
    tiling: TilingOf,
    mode: Accumulate = "exact",
    check_versions: bool = True,
    observers: tuple[Observer, ...] = (),
) -> Memory:
    """Execute the ops of a trace that starts at position 0, in ``order``; returns the memory as they leave it.

    ``parameters`` by tensor name; ``tokens`` (batch, all tokens of the trace).

    Raises:
        ExecutionError: an op met memory that is not what the trace says; the message names the op.
    """
    kv, ttt = settings_of(trace)
    calls = cast(Sequence[Sequence[int]], trace.meta["calls"])
    q = format_of(str(trace.meta["dtype"]))
    initial = {
        number: initial_content(tensor, parameters, q)
        for number, tensor in enumerate(trace.tensors)
        if tensor.initial_version >= 0
    }
    memory = Memory(trace, initial, check_versions, observers)
    families = [family_of(tensor.name) for tensor in trace.tensors]
    lists = {name: getattr(trace, name).tolist() for name in _OPERAND_COLUMNS}  # faster to index than arrays

    def entries(side: str, op: int) -> list[tuple[int, int, int]]:
        """(tensor, version, bytes) of an op's operands."""
        begin, end = lists[f"{side}_ptr"][op : op + 2]
        return list(zip(*(lists[f"{side}_{part}"][begin:end] for part in ("tensor", "version", "bytes")), strict=True))

    def operand(tensor: int, nbytes: int, content: FloatArray | None) -> Operand:
        described = trace.tensors[tensor]
        return Operand(described, families[tensor], rows_per_sequence(described, nbytes), content)

    for op in order:
        try:
            reads = [
                operand(tensor, nbytes, memory.read(tensor, version)) for tensor, version, nbytes in entries("read", op)
            ]
            written = entries("write", op)
            writes = [operand(tensor, nbytes, memory.before(tensor)) for tensor, _, nbytes in written]
            call = OpCall(
                trace=trace, op=op, reads=reads, writes=writes, tokens=tokens, calls=calls, kv=kv, ttt=ttt,
                tiling=tiling, mode=mode,
            )  # fmt: skip
            for (tensor, version, _), values in zip(written, execute(call), strict=True):
                memory.write(tensor, version, values)
        except ExecutionError as error:
            raise ExecutionError(f"{op_label(trace, op)} {error}") from None
    return memory


def family_of(name: str) -> str:
    """``layers.3.fast_weight`` to ``fast_weight``, ``residual.3`` to ``residual``."""
    parts = name.split(".")
    return parts[2] if parts[0] == "layers" else parts[0]


def initial_content(tensor: Tensor, parameters: Mapping[str, FloatArray], q: Format) -> FloatArray:
    """What a tensor holds before the first op: parameters, the rotary table, or no rows yet."""
    if tensor.name in parameters:
        return parameters[tensor.name]
    if tensor.name == "rope_table":
        _, context, width = tensor.shape
        halves = rotary_tables(np.arange(context, dtype=np.float64), width, ROTARY_BASE)
        return np.stack([np.tile(nearest(half, q), 2) for half in halves])
    if tensor.name.endswith("accumulator"):
        return np.zeros(tensor.shape)
    return np.zeros((tensor.shape[0], 0, *tensor.shape[2:]))


def op_label(trace: Trace, op: int) -> str:
    """An op as messages name it: number, kind, and where it stands."""
    name = OP_KINDS[int(trace.kind[op])].name
    phase = Phase(int(trace.phase[op])).name.lower()
    where = [f"call {int(trace.step[op])}"]
    for what, number in (("layer", int(trace.layer[op])), ("chunk", int(trace.chunk[op]))):
        if number >= 0:
            where.append(f"{what} {number}")
    return f"op {op} {name} ({phase}, {', '.join(where)})"
