"""Orders in which the ops of a trace may execute, and whether an order, or a set of dependencies, keeps the data right.

Dependencies are lists by op: ``needs[i]`` are the earlier ops that op i waits for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ttt_sim.lower import Lowered
from ttt_sim.ops import IntArray, Trace, dependencies, owners
from ttt_sim.program import Timeline

Needs = Sequence[Sequence[int]]


def data_dependencies(trace: Trace) -> list[list[int]]:
    """What each op waits for: read after write, write after read, write after write."""
    found = dependencies(trace)
    idx, ptr = found.idx.tolist(), found.ptr.tolist()
    return [idx[begin:end] for begin, end in pairwise(ptr)]


def ancestors(needs: Needs) -> list[int]:
    """All ops that come before each op, directly or through others, as a bit set (bit j: op j)."""
    out: list[int] = []
    for own in needs:
        bits = 0
        for op in own:
            bits |= out[op] | 1 << op
        out.append(bits)
    return out


def transitive_reduction(needs: Needs) -> list[list[int]]:
    """The fewest dependencies that order the same ops: those that no other path implies."""
    before = ancestors(needs)
    reduced = []
    for own in needs:
        kept: list[int] = []
        implied = 0
        for op in sorted(own, reverse=True):  # a path to an earlier op leads through later ones
            if not implied >> op & 1:
                kept.append(op)
            implied |= before[op] | 1 << op
        reduced.append(sorted(kept))
    return reduced


def missing_dependencies(trace: Trace, needs: Needs) -> list[tuple[int, int]]:
    """Data dependencies (op, earlier op) that ``needs`` does not imply: the static version check."""
    before = ancestors(needs)
    return [
        (op, earlier)
        for op, own in enumerate(data_dependencies(trace))
        for earlier in own
        if not before[op] >> earlier & 1
    ]


def kernel_needs(lowered: Lowered, *, serial: bool) -> list[list[int]]:
    """What each kernel waits for as lowered: its edges, and with ``serial`` kernels the one before it in its stream."""
    kernels = lowered.kernels
    needs: list[list[int]] = [[] for _ in range(kernels.n)]
    for kernel, earlier in kernels.edges.tolist():
        needs[kernel].append(earlier)
    if serial:
        for kernel, earlier in enumerate(kernels.before.tolist()):
            if earlier >= 0:
                needs[kernel].append(earlier)
    return needs


def unordered_pairs(trace: Trace, lowered: Lowered, *, serial: bool) -> list[tuple[int, int]]:
    """Data dependencies (op, earlier op) that neither the order inside a kernel nor the kernels' own order implies."""
    before = ancestors(kernel_needs(lowered, serial=serial))
    of_op = lowered.kernels.of_op.tolist()
    return [
        (op, earlier)
        for op, own in enumerate(data_dependencies(trace))
        for earlier in own
        if of_op[op] != of_op[earlier] and not before[of_op[op]] >> of_op[earlier] & 1
    ]


def schedule_order(lowered: Lowered, timeline: Timeline) -> IntArray:
    """Ops in the order in which the engine finished them: kernels by their last task, ops of a kernel as in the
    trace."""
    finish = np.zeros(lowered.kernels.n, dtype=np.int64)
    np.maximum.at(finish, lowered.program.op, timeline.finish_cycles)
    of_op = lowered.kernels.of_op
    return np.lexsort((np.arange(of_op.size), of_op, finish[of_op])).astype(np.int64)


def adversarial_order(trace: Trace, needs: Needs, *, delay: int | None = None) -> list[int]:
    """A legal order that a missing dependency is most likely to break.

    Of the ops whose dependencies have run, those that overwrite something come first and those that only read what is
    overwritten come last. Everything that does not depend on the op ``delay`` runs before it.
    """
    n = trace.n_ops
    in_place = np.array([tensor.in_place for tensor in trace.tensors], dtype=np.bool_)
    writes, reads = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
    writes[owners(trace.write_ptr)[in_place[trace.write_tensor]]] = True
    reads[owners(trace.read_ptr)[in_place[trace.read_tensor]]] = True
    rank = np.where(writes, 0, np.where(reads, 2, 1)).tolist()
    late = [False] * n
    waiting: list[list[int]] = [[] for _ in range(n)]
    left = [0] * n
    for op, own in enumerate(needs):
        late[op] = op == delay or any(late[earlier] for earlier in own)
        left[op] = len(own)
        for earlier in own:
            waiting[earlier].append(op)
    ready = [(late[op], rank[op], op) for op in range(n) if not left[op]]
    heapq.heapify(ready)
    order = []
    while ready:
        *_, op = heapq.heappop(ready)
        order.append(op)
        for waiter in waiting[op]:
            left[waiter] -= 1
            if not left[waiter]:
                heapq.heappush(ready, (late[waiter], rank[waiter], waiter))
    return order
