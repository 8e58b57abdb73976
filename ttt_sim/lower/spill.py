"""What lies in the backing memory, because the workload wants it there or the main memory is full, and which traffic
moves there with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ttt_sim.chip import Chip, MemoryLevel
from ttt_sim.errors import UnsupportedError
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.placement import far_names
from ttt_sim.lower.traffic import MAIN, Traffic
from ttt_sim.ops import TEMPORARY_ROLES, IntArray, Role, Trace, owners, total_by


def with_host_memory(chip: Chip, trace: Trace) -> Chip:
    """``chip`` as it runs ``trace``: where tensors are to lie behind the main memory and no memory is there, that of
    the host behind its link, as large as these need.

    Raises:
        UnsupportedError: there is no such link either.
    """
    names = set(far_names(trace))
    if not names or chip.backing is not None:
        return chip
    link = next((link for link in chip.links if link.topology == "host"), None)
    if link is None:
        raise UnsupportedError(
            f"{chip.name}: the workload keeps tensors behind the main memory, and the file has neither a memory of "
            "scope backing nor a link to the host"
        )
    host = MemoryLevel(
        name=link.name, scope="backing",
        capacity_bytes=sum(tensor.nbytes for tensor in trace.tensors if tensor.name in names),
        read_bytes_per_s=link.bytes_per_s, write_bytes_per_s=link.bytes_per_s, shared_bus=False, channels=1,
        channel_groups=1, banks_per_channel=1, interleave_bytes=1, row_bytes=1, row_miss_s=0.0,
        latency_s=link.latency_s, read_to_write_s=0.0, write_to_read_s=0.0, achievable_frac=1.0,
        read_energy_j_per_byte=link.energy_j_per_byte, write_energy_j_per_byte=link.energy_j_per_byte,
        write_granularity_bytes=1, volatile=True, endurance_writes=None,
    )  # fmt: skip
    return replace(chip, memories=(host, *chip.memories))


def spill(trace: Trace, kernels: Kernels, traffic: Traffic, nbytes: int) -> Traffic:
    """``traffic`` with ``nbytes`` of the tensors that last in the backing memory (all of these if that is more), and no
    less than what the workload wants there.

    Each operand entry that reaches the main memory moves the spilled share of its bytes, rounded down, over the backing
    memory instead.
    """
    wanted = set(far_names(trace))
    if not nbytes and not wanted:
        return traffic
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)
    spilled = np.zeros_like(size)
    order = coldest_first(trace, traffic)
    if wanted:
        order.sort(key=lambda tensor: trace.tensors[tensor].name not in wanted)
        nbytes = max(nbytes, sum(tensor.nbytes for tensor in trace.tensors if tensor.name in wanted))
    for tensor in order:
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
