"""Which operands stay where they are stored, and what becomes of products for which nothing is stored.

A chip whose matrix unit computes in the memory (``dataflow: in_array``) multiplies with frozen weights, fast weights,
keys and values where they lie. Deltas have two operands that nobody stored. Arrays that can be written at any time hold
one of them for the while (*staged*); others leave the product to the vector lanes. Memory that accumulates adds a delta
to a weight without reading it out, whatever computes the delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.ops import (
    IntArray,
    OpClass,
    Role,
    Trace,
    element_bits,
    op_classes,
    overwritten,
    owners,
    query_bytes,
    total_by,
)

#: Roles of tensors that lie in the arrays of a chip that computes there.
STORED_ROLES: tuple[Role, ...] = (Role.WEIGHT, Role.FAST_WEIGHT, Role.KV, Role.INDEX)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """``in_place`` (n_read_entries,) operands that do not travel; ``staged_bytes`` (n_ops,) written into arrays before
    a product; ``on_lanes`` (n_ops,) products that run on vector lanes."""

    in_place: BoolArray
    staged_bytes: IntArray
    on_lanes: BoolArray


def pinned_names(trace: Trace) -> tuple[str, ...]:
    """Tensors that the workload wants kept on chip, in the cache that all cores share."""
    names = trace.meta.get("pinned", ())
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else ()


def far_names(trace: Trace) -> tuple[str, ...]:
    """Tensors that the workload wants behind the main memory."""
    names = trace.meta.get("placed_far", ())
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else ()


def computes_in_memory(chip: Chip) -> bool:
    """Whether products run where their weights are stored."""
    return chip.has_unit("matrix") and chip.unit("matrix").dataflow == "in_array"


def arrays_are_writable(chip: Chip) -> bool:
    """Whether an operand may be written into the arrays for one product: volatile cells that the chip itself writes."""
    return chip.main_memory.volatile and chip.writability.mode not in ("reupload", "none")


def place(trace: Trace, chip: Chip) -> Placement:
    """Decide for every product and attention core of ``trace``; see the module text."""
    op, op_class = owners(trace.read_ptr), op_classes(trace)
    role = np.array([int(tensor.role) for tensor in trace.tensors], dtype=np.int64)
    added_to = overwritten(trace)
    in_place = _accumulated(trace, chip, role, added_to)
    staged, on_lanes = np.zeros(trace.n_ops, dtype=np.int64), np.zeros(trace.n_ops, dtype=np.bool_)
    if not computes_in_memory(chip):
        return Placement(in_place=in_place, staged_bytes=staged, on_lanes=on_lanes)

    pinned = set(pinned_names(trace))
    kept = np.array([tensor.role in STORED_ROLES and tensor.name not in pinned for tensor in trace.tensors])
    matmul, attends = op_class == int(OpClass.MATMUL), op_class == int(OpClass.ATTENTION)
    operand = kept[trace.read_tensor] & (trace.read_bytes > 0) & ~added_to
    candidate = operand & (matmul[op] | (attends[op] & (role[trace.read_tensor] == int(Role.KV))))
    # Of a product whose operands are all stored, those before the last are read out: they are the input vectors.
    last = np.full(trace.n_ops, -1, dtype=np.int64)
    np.maximum.at(last, op[candidate], np.flatnonzero(candidate))
    inputs = total_by(op, ((trace.read_bytes > 0) & ~candidate & ~added_to).astype(np.int64), trace.n_ops)
    candidate &= (inputs[op] > 0) | (np.arange(op.size) == last[op])

    smaller = -(-trace.batch * np.minimum(trace.m, trace.n) * trace.k * element_bits(trace) // 8)
    staged = np.where(matmul & (last < 0), smaller, 0)
    # An attention core multiplies with keys and values of this call that are not in the cache yet; the output so far,
    # to which a core over further keys adds, is no operand of it.
    temporary = total_by(op, np.where(candidate | added_to, 0, trace.read_bytes), trace.n_ops)
    staged = np.where(attends, np.maximum(temporary - query_bytes(trace), 0), staged)
    if not arrays_are_writable(chip):
        on_lanes = staged > 0
        staged = np.zeros_like(staged)
        candidate &= ~on_lanes[op]
    return Placement(in_place=in_place | candidate, staged_bytes=staged, on_lanes=on_lanes)


def _accumulated(trace: Trace, chip: Chip, role: IntArray, added_to: BoolArray) -> BoolArray:
    """Reads of a fast weight that its memory adds a delta to. A copy in another format needs the sum read out."""
    if not chip.writability.accumulate:
        return np.zeros(trace.read_tensor.size, dtype=np.bool_)
    fast = role == int(Role.FAST_WEIGHT)
    copies = total_by(owners(trace.write_ptr), fast[trace.write_tensor].astype(np.int64), trace.n_ops)
    flags: BoolArray = fast[trace.read_tensor] & added_to & (copies[owners(trace.read_ptr)] == 1)
    return flags
