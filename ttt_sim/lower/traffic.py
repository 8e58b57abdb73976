"""Which operands really travel, and between which levels.

The trace lists compulsory unfused traffic. Four things change it:

* *fusion*: a value made and used inside one kernel stays in registers;
* *sharing*: a kernel that uses one operand in several ops reads it once;
* *reuse*: a value that was touched recently enough is still in the cache that all cores share. "Recently enough" is a
  reuse distance of at most ``cache_frac`` of the cache: all bytes that the kernels in between moved, plus its own bytes
  or those that the kernel which touched it last wrote, whichever are more. What the workload wants behind the main
  memory is fetched from there each time;
* *computing in memory*: what is used where it is stored does not travel (:mod:`ttt_sim.lower.placement`).

A write is dropped only when nobody can miss it: all its readers found it in the cache and it is dead or overwritten
there. Every operand of the trace lands in exactly one class, so the classes add up to the trace's own bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.errors import CapacityError
from ttt_sim.lower.kernels import Kernels
from ttt_sim.lower.placement import Placement, far_names, pinned_names, place
from ttt_sim.lower.writes import padding_bytes, reupload_bytes
from ttt_sim.ops import TEMPORARY_ROLES, IntArray, Role, Trace, owners, total_by, version_slots
from ttt_sim.units import format_bytes

#: Where an operand of the trace comes from or goes to.
MAIN, CACHED, FUSED, SHARED, IN_PLACE = range(5)

#: Roles of tensors to which ops add a few rows.
_GROWING = (int(Role.KV), int(Role.CARRY), int(Role.INDEX))

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """``placement``: operands that stay where they are stored.

    ``read_place, write_place`` (n_entries,) class of each operand entry of the trace.

    ``main_read_bytes, main_write_bytes`` (n_kernels,) what crosses the main memory before re-streaming;
    ``on_chip_bytes`` (n_kernels,) operand bytes that kernels exchange with the shared cache, whatever their class.
    ``needs_main`` (n_kernels,) the kernel loads from main memory what another kernel of the trace made.
    ``padding_bytes`` (n_write_entries,) read and written again beside each write, because the memory replaces more at
    once; in the sums above.
    ``read_hit_bytes, write_hit_bytes`` (n_entries,) bytes of class MAIN that are in the cache from an earlier round of
    a loop around the trace (see :func:`hit_share`).
    ``spilled_bytes`` (n_tensors,) what lies in the backing memory; ``read_far_bytes, write_far_bytes`` (n_entries,) and
    ``far_read_bytes, far_write_bytes`` (n_kernels,) what therefore crosses it instead of the main memory.
    """

    placement: Placement
    read_place: IntArray
    write_place: IntArray
    main_read_bytes: IntArray
    main_write_bytes: IntArray
    on_chip_bytes: IntArray
    needs_main: BoolArray
    padding_bytes: IntArray
    read_hit_bytes: IntArray
    write_hit_bytes: IntArray
    spilled_bytes: IntArray
    read_far_bytes: IntArray
    write_far_bytes: IntArray
    far_read_bytes: IntArray
    far_write_bytes: IntArray


def usable_cache_bytes(trace: Trace, chip: Chip) -> int:
    """Bytes of the shared cache that reuse may count on, after what is pinned there.

    Raises:
        CapacityError: pinned tensors do not fit the cache.
    """
    cache = chip.cache
    pinned = pinned_bytes(trace)
    if cache is None:
        if pinned:
            raise CapacityError(
                f"{format_bytes(pinned)} of fast weights are to stay on chip, but {chip.name} has no cache that all "
                "cores share"
            )
        return 0
    usable = int(cache.capacity_bytes * chip.mapping.cache_frac)
    if pinned > usable:
        raise CapacityError(
            f"{format_bytes(pinned)} of fast weights are to stay on chip, but {format_bytes(usable)} of {cache.name} "
            "are usable"
        )
    return usable - pinned


def pinned_bytes(trace: Trace) -> int:
    """Bytes of the tensors that the workload wants kept on chip."""
    names = set(pinned_names(trace))
    return sum(tensor.nbytes for tensor in trace.tensors if tensor.name in names) if names else 0


def resolve_traffic(trace: Trace, chip: Chip, kernels: Kernels) -> Traffic:
    """Classify every operand of ``trace``, nothing spilled; see the module text."""
    usable = usable_cache_bytes(trace, chip)
    pinned_tensors = set(pinned_names(trace))
    pinned = np.array([tensor.name in pinned_tensors for tensor in trace.tensors], dtype=np.bool_)
    far_tensors = set(far_names(trace))
    far = np.array([tensor.name in far_tensors for tensor in trace.tensors], dtype=np.bool_)
    role = np.array([int(tensor.role) for tensor in trace.tensors], dtype=np.int64)
    in_place = np.array([tensor.in_place for tensor in trace.tensors], dtype=np.bool_)

    read_kernel = kernels.of_op[owners(trace.read_ptr)]
    write_kernel = kernels.of_op[owners(trace.write_ptr)]
    read_slot, write_slot, n_slots = version_slots(trace)
    writer_of = np.full(n_slots, -1, dtype=np.int64)
    writer_of[write_slot] = np.arange(write_slot.size)
    writer = writer_of[read_slot]  # write entry that made what is read
    made = writer >= 0
    producer = (
        np.where(made, write_kernel[writer], -1) if write_slot.size else np.full(read_slot.size, -1, dtype=np.int64)
    )

    read_place = np.full(read_slot.size, MAIN, dtype=np.int64)
    fused = producer == read_kernel
    if write_slot.size:  # a kernel that appends a few rows to a cache or carry did not make the others that it reads
        grows = np.isin(role, _GROWING)[trace.read_tensor]
        fused &= ~(grows & (trace.write_bytes[writer] < trace.read_bytes))
    read_place[fused] = FUSED
    read_place[~fused & _repeated(read_kernel, read_slot, trace.read_bytes, ~fused)] = SHARED

    placement = place(trace, chip)
    read_place[placement.in_place & (read_place != SHARED) & ~pinned[trace.read_tensor]] = IN_PLACE

    # Reuse distance in bytes, from the kernels' own operand traffic.
    wanted = read_place == MAIN
    moved = np.bincount(read_kernel[wanted], trace.read_bytes[wanted], minlength=kernels.n).astype(np.int64)
    moved += np.bincount(write_kernel, trace.write_bytes, minlength=kernels.n).astype(np.int64)
    through = np.cumsum(moved)
    last = _last_touch(trace, role, read_slot, write_slot, read_kernel, write_kernel, wanted)
    between = np.where(last >= 0, through[read_kernel - 1] - through[np.maximum(last, 0)], 0)
    resident = pinned[trace.read_tensor]
    # The kernel that touched it last may have written more beside it.
    beside = np.bincount(write_kernel, trace.write_bytes, minlength=kernels.n).astype(np.int64)[np.maximum(last, 0)]
    near = (last >= 0) & (between + np.maximum(trace.read_bytes, beside) <= usable)
    cached = wanted & ((near & ~far[trace.read_tensor]) | resident)
    read_place[cached] = CACHED

    write_place = _write_places(
        trace, writer, read_place, write_slot, write_kernel, through, role, in_place, pinned, usable
    )

    def per_kernel(kernel: IntArray, nbytes: IntArray, keep: BoolArray) -> IntArray:
        return total_by(kernel[keep], nbytes[keep], kernels.n)

    share = _hit_shares(trace, chip)
    read_hit = np.where(read_place == MAIN, _part(trace.read_bytes, share[trace.read_tensor]), 0)
    write_hit = np.where(write_place == MAIN, _part(trace.write_bytes, share[trace.write_tensor]), 0)
    main_read = per_kernel(read_kernel, trace.read_bytes - read_hit, read_place == MAIN)
    main_write = per_kernel(write_kernel, trace.write_bytes - write_hit, write_place == MAIN)
    padding = np.where(write_place == MAIN, padding_bytes(trace, chip), 0)
    replaced = total_by(write_kernel, padding, kernels.n)
    on_chip = per_kernel(read_kernel, trace.read_bytes, read_place <= CACHED)
    on_chip += per_kernel(write_kernel, trace.write_bytes, write_place <= CACHED)
    needs_main = np.zeros(kernels.n, dtype=np.bool_)
    needs_main[read_kernel[(read_place == MAIN) & made]] = True
    needs_main |= np.r_[False, reupload_bytes(trace, chip, kernels.of_op, kernels.n)[:-1] > 0][: kernels.n]
    return Traffic(
        placement=placement,
        read_place=read_place,
        write_place=write_place,
        main_read_bytes=main_read + replaced,
        main_write_bytes=main_write + replaced,
        on_chip_bytes=on_chip,
        needs_main=needs_main,
        padding_bytes=padding,
        read_hit_bytes=read_hit,
        write_hit_bytes=write_hit,
        spilled_bytes=np.zeros(len(trace.tensors), dtype=np.int64),
        read_far_bytes=np.zeros_like(read_place),
        write_far_bytes=np.zeros_like(write_place),
        far_read_bytes=np.zeros_like(main_read),
        far_write_bytes=np.zeros_like(main_write),
    )


def hit_share(distance_bytes: int, usable_bytes: float) -> float:
    """Share of an operand that a cache still holds when ``distance_bytes`` were touched since its last use, 0 to 1.

    All of it while everything fits; beyond that the share falls with the square of the excess, between a cache that
    keeps the oldest lines and one that keeps the newest (calibrated on repeated products; docs/hardware_model.md).
    """
    if distance_bytes <= usable_bytes:
        return 1.0
    part = usable_bytes / distance_bytes
    return part * part


def _hit_shares(trace: Trace, chip: Chip) -> npt.NDArray[np.float64]:
    """Hit share by tensor. ``trace.meta["held"]`` maps the tensors of a repeated trace to the bytes that a loop around
    it touches between two uses; tensors that it does not name come from main memory each time."""
    shares = np.zeros(len(trace.tensors), dtype=np.float64)
    held = trace.meta.get("held")
    if isinstance(held, Mapping) and chip.cache is not None:
        usable = chip.cache.capacity_bytes * chip.library.warm_frac
        number = {tensor.name: index for index, tensor in enumerate(trace.tensors)}
        for name, distance in held.items():
            shares[number[name]] = hit_share(int(distance), usable)
    return shares


def _part(nbytes: IntArray, share: npt.NDArray[np.float64]) -> IntArray:
    return np.floor(nbytes * share).astype(np.int64)


def _repeated(kernel: IntArray, key: IntArray, nbytes: IntArray, eligible: BoolArray) -> BoolArray:
    """True for all but the largest entry of each (kernel, key) among the eligible ones."""
    flags = np.zeros(kernel.size, dtype=np.bool_)
    chosen = np.flatnonzero(eligible)
    order = chosen[np.lexsort((-nbytes[chosen], key[chosen], kernel[chosen]))]
    same = (kernel[order][1:] == kernel[order][:-1]) & (key[order][1:] == key[order][:-1])
    flags[order[1:][same]] = True
    return flags


def _last_touch(
    trace: Trace,
    role: IntArray,
    read_slot: IntArray,
    write_slot: IntArray,
    read_kernel: IntArray,
    write_kernel: IntArray,
    wanted: BoolArray,
) -> IntArray:
    """Kernel that last touched, before each read, the same version of its tensor; -1 for none.

    An op of one chunk that reads part of a version touches only that chunk's rows. A KV cache, carry or index changes
    by a few rows from version to version, so there any earlier read of the tensor counts, and appends do not.
    """
    grows = np.isin(role, _GROWING)
    n_slots = int(max(read_slot.max(initial=0), write_slot.max(initial=0))) + 1
    read_group = np.where(grows[trace.read_tensor], n_slots + trace.read_tensor, read_slot)
    chunk = trace.chunk[owners(trace.read_ptr)]
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)[trace.read_tensor]
    part = (chunk >= 0) & (trace.read_bytes < size) & ~grows[trace.read_tensor]
    touches = wanted & (trace.read_bytes > 0)

    whole_reads, whole_writes = touches & ~part, ~grows[trace.write_tensor]
    last = _latest_before(
        np.concatenate([read_group[whole_reads], write_slot[whole_writes]]),
        np.concatenate([read_kernel[whole_reads], write_kernel[whole_writes]]),
        read_group,
        read_kernel,
    )
    rows = read_slot * (int(trace.chunk.max(initial=0)) + 1) + np.maximum(chunk, 0)
    of_rows = _latest_before(rows[touches & part], read_kernel[touches & part], rows, read_kernel)
    return np.where(part, np.maximum(last, of_rows), last)


def _latest_before(group: IntArray, kernel: IntArray, asked_group: IntArray, asked_kernel: IntArray) -> IntArray:
    """Largest ``kernel`` of the same group below each asked kernel, -1 for none."""
    if not group.size or not asked_group.size:
        return np.full(asked_group.size, -1, dtype=np.int64)
    n = int(max(kernel.max(), asked_kernel.max())) + 1
    keys = np.sort(group * n + kernel)
    at = np.searchsorted(keys, asked_group * n + asked_kernel) - 1
    found = keys[np.maximum(at, 0)]
    return np.where((at >= 0) & (found // n == asked_group), found % n, -1)


def _write_places(
    trace: Trace,
    writer: IntArray,
    read_place: IntArray,
    write_slot: IntArray,
    write_kernel: IntArray,
    through: IntArray,
    role: IntArray,
    in_place: BoolArray,
    pinned: BoolArray,
    usable: int,
) -> IntArray:
    """Class of each write: FUSED if only its own kernel reads it, CACHED if it never needs main memory, else MAIN."""
    n = write_slot.size
    readers = np.bincount(writer[writer >= 0], minlength=n)
    missed = np.bincount(writer[(writer >= 0) & np.isin(read_place, [MAIN, IN_PLACE])], minlength=n)
    outside = np.bincount(writer[(writer >= 0) & (read_place != FUSED)], minlength=n)
    temporary = np.isin(role[trace.write_tensor], [int(kept) for kept in TEMPORARY_ROLES])

    place = np.full(n, MAIN, dtype=np.int64)
    place[temporary & (readers > 0) & (missed == 0)] = CACHED
    place[temporary & (readers > 0) & (outside == 0)] = FUSED

    # State written again soon in the same place: the first version need not leave the cache.
    order = np.argsort(write_slot, kind="stable")
    follows = np.zeros(n, dtype=np.bool_)
    gap = np.zeros(n, dtype=np.int64)
    consecutive = write_slot[order][1:] == write_slot[order][:-1] + 1
    consecutive &= trace.write_tensor[order][1:] == trace.write_tensor[order][:-1]
    first, second = order[:-1][consecutive], order[1:][consecutive]
    follows[first] = True
    gap[first] = through[np.maximum(write_kernel[second] - 1, 0)] - through[write_kernel[first]]
    state = in_place[trace.write_tensor] & ~temporary
    place[state & follows & (missed == 0) & (gap + trace.write_bytes <= usable)] = CACHED
    place[pinned[trace.write_tensor]] = CACHED
    return place
