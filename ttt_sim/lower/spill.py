"""What lies in the backing memory when the main memory is full, and which traffic moves there with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.traffic import MAIN, Traffic
from ttt_sim.ops import TEMPORARY_ROLES, IntArray, Role, Trace, owners, total_by


def spill(trace: Trace, kernels: Kernels, traffic: Traffic, nbytes: int) -> Traffic:
    """``traffic`` with ``nbytes`` of the tensors that last in the backing memory (all of these if that is more).

    Each operand entry that reaches the main memory moves the spilled share of its bytes, rounded down, over the backing
    memory instead.
    """
    if not nbytes:
        return traffic
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)
    spilled = np.zeros_like(size)
    for tensor in coldest_first(trace, traffic):
        spilled[tensor] = min(int(size[tensor]), nbytes)
        nbytes -= int(spilled[tensor])

    def far(place: IntArray, missed: IntArray, tensor: IntArray) -> IntArray:
        return np.where(place == MAIN, part_of(missed, spilled[tensor], size[tensor]), 0)

    missed, stored = trace.read_bytes - traffic.read_hit_bytes, trace.write_bytes - traffic.write_hit_bytes
    read_far = far(traffic.read_place, missed, trace.read_tensor)
    write_far = far(traffic.write_place, stored, trace.write_tensor)
    far_read = total_by(kernels.of_op[owners(trace.read_ptr)], read_far, kernels.n)
    far_write = total_by(kernels.of_op[owners(trace.write_ptr)], write_far, kernels.n)
    return replace(
        traffic,
        main_read_bytes=traffic.main_read_bytes - far_read,
        main_write_bytes=traffic.main_write_bytes - far_write,
        spilled_bytes=spilled,
        read_far_bytes=read_far,
        write_far_bytes=write_far,
        far_read_bytes=far_read,
        far_write_bytes=far_write,
    )


def coldest_first(trace: Trace, traffic: Traffic) -> list[int]:
    """Tensors that last, in the order in which they are spilled.

    First those that are never read from the main memory; then state of sequences, least often read first; then
    weights. Of equals, what the program reads for the first time last: the layers from the last one on.
    """
    n = len(trace.tensors)
    reads = total_by(trace.read_tensor, ((traffic.read_place == MAIN) & (trace.read_bytes > 0)).astype(np.int64), n)
    first = np.full(n, trace.n_ops, dtype=np.int64)
    np.minimum.at(first, trace.read_tensor, owners(trace.read_ptr))

    def coldness(tensor: int) -> tuple[int, int, int, int]:
        count = int(reads[tensor])
        if count == 0:
            return 0, 0, 0, tensor
        weight = trace.tensors[tensor].role == Role.WEIGHT
        return (2 if weight else 1), (0 if weight else count), -int(first[tensor]), tensor

    return sorted((i for i in range(n) if trace.tensors[i].role not in TEMPORARY_ROLES), key=coldness)


def part_of(nbytes: IntArray, part: IntArray, whole: IntArray) -> IntArray:
    """floor(nbytes * part / whole) without overflow; 0 where ``part`` is 0."""
    out = np.zeros_like(nbytes)
    some = part > 0
    out[some] = (nbytes[some].astype(object) * part[some] // whole[some]).astype(np.int64)
    return out
