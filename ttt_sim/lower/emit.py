"""Cutting kernels into the tasks of a program.

A kernel is a pipeline over ``steps`` steps; each step passes the levels far, read, cache, matrix, vector,
special, link, write. Simulating every step would cost thousands of tasks per op, so steps are grouped into *pieces*:

* A level that takes at least an eighth of the kernel's busiest level is *major*. It is cut into a head of one step
  (filling the pipeline), middle pieces, and a tail of one step (draining it). A middle piece of one level starts when
  the level before it has finished the piece before: levels stream side by side, one step apart.
* Any other level is *minor*: one piece for everything but the last step and one for the last step, or, before the first
  major level, one for the first step and one for the rest.
* A load piece waits for the consumer's piece two places back: operands are double-buffered, no more.

So a kernel takes its busiest level's time plus one step of each other level, which is what a full simulation of all
steps gives; more pieces per op (``detail``) only refine how two streams interleave. All arithmetic is in integers,
and pieces of one level add up exactly to its cycles, bytes and FLOPs (a piece lasts at least one cycle).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.lower.kernels import STREAMS, TRANSFER_STREAM, Kernels
from ttt_sim.lower.work import CACHE, FAR, LEVELS, LINK, MATRIX, READ, VECTOR, WRITE, KernelWork
from ttt_sim.ops import IntArray
from ttt_sim.program import COMPUTE, OVERHEAD, TASK_KINDS, Program
from ttt_sim.program import READ as READ_TASK
from ttt_sim.program import WRITE as WRITE_TASK

#: A level is major from this share of the busiest level on (one over it).
MAJOR_SHARE = 8
#: Squares of more steps than this do not fit 64 bits.
LONGEST_EXACT = 1 << 31
_LEVEL_KIND = (READ_TASK, READ_TASK, COMPUTE, COMPUTE, COMPUTE, COMPUTE, COMPUTE, WRITE_TASK)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Units of a chip as the engine sees them. ``level_unit[level]`` are the units of a level: one, or one per
    channel group."""

    names: tuple[str, ...]
    n_queues: IntArray
    level_unit: tuple[tuple[int, ...], ...]
    launch_unit: tuple[int, ...]  # by stream
    switch_cycles: IntArray
    row_miss_cycles: IntArray


def has_transfers(kernels: Kernels, work: KernelWork) -> bool:
    """Whether something crosses links off the chip, or is moved beside other work."""
    return bool(work.cycles[:, LINK].any() or (kernels.stream == TRANSFER_STREAM).any())


def units_of(chip: Chip, *, linked: bool = False) -> Units:
    """Engine units: a front end per stream, channel groups of the main memory, the backing memory, the shared cache,
    compute units.

    ``linked`` adds one for the links to other chips, and the stream of transfers.
    """
    main = chip.main_memory
    streams = STREAMS if linked else STREAMS[:TRANSFER_STREAM]
    names = [f"launch.{stream}" for stream in streams]
    groups = [main.name] if main.channel_groups == 1 else [f"{main.name}.{g}" for g in range(main.channel_groups)]
    memory = tuple(range(len(names), len(names) + len(groups)))
    names += groups
    level_unit: list[tuple[int, ...]] = []
    for level in LEVELS:
        if level in ("read", "write"):
            level_unit.append(memory)
            continue
        if (level == "link" and not linked) or (level == "far" and chip.backing is None):
            level_unit.append((0,))  # no kernel uses it
            continue
        if level == "cache":
            name = chip.cache.name if chip.cache else "cache"
        elif level == "far" and chip.backing is not None:
            name = chip.backing.name
        else:
            name = next((unit.name for unit in chip.units if unit.kind == level), level)
        level_unit.append((len(names),))
        names.append(name)
    write_units = memory
    if not main.shared_bus:  # ports of their own: writes never meet reads
        write_units = tuple(range(len(names), len(names) + len(groups)))
        names += [f"{group}.write" for group in groups]
        level_unit[WRITE] = write_units

    n = len(names)
    queues = np.full(n, len(streams), dtype=np.int64)
    queues[: len(streams)] = 1
    switch = np.zeros((n, len(TASK_KINDS), len(TASK_KINDS)), dtype=np.int64)
    row_miss = np.zeros(n, dtype=np.int64)
    for unit in {*memory, *write_units}:
        queues[unit] = (2 if main.shared_bus else 1) * len(streams)
        switch[unit, READ_TASK, WRITE_TASK] = chip.cycles(main.read_to_write_s)
        switch[unit, WRITE_TASK, READ_TASK] = chip.cycles(main.write_to_read_s)
        row_miss[unit] = chip.cycles(main.row_miss_s)
    return Units(
        names=tuple(names),
        n_queues=queues,
        level_unit=tuple(level_unit),
        launch_unit=tuple(range(len(streams))),
        switch_cycles=switch,
        row_miss_cycles=row_miss,
    )


@dataclass(slots=True)
class _Tasks:
    """Columns of tasks gathered batch by batch; every batch names its tasks by their final ids."""

    ids: list[IntArray] = field(default_factory=list)
    columns: dict[str, list[IntArray]] = field(default_factory=dict)
    waits: list[tuple[IntArray, IntArray]] = field(default_factory=list)  # task ids unique inside one batch

    def add(self, ids: IntArray, **columns: IntArray | int) -> None:
        self.ids.append(ids)
        for name, values in columns.items():
            array = np.full(ids.size, values, dtype=np.int64) if isinstance(values, int) else values
            self.columns.setdefault(name, []).append(array)

    def wait(self, tasks: IntArray, needs: IntArray) -> None:
        if tasks.size:
            self.waits.append((tasks, needs))

    def in_order(self, names: tuple[str, ...]) -> dict[str, IntArray]:
        """The named columns with task i at place i."""
        order = np.concatenate(self.ids)
        out = {name: np.empty(order.size, dtype=np.int64) for name in names}
        for name in names:
            out[name][order] = np.concatenate(self.columns[name])
        return out

    def dependencies(self, n: int) -> tuple[IntArray, IntArray]:
        degree = np.zeros(n + 1, dtype=np.int64)
        for tasks, _ in self.waits:
            degree[tasks + 1] += 1
        ptr = np.cumsum(degree)
        filled = ptr[:-1].copy()
        idx = np.empty(int(ptr[-1]), dtype=np.int64)
        for tasks, needs in self.waits:
            idx[filled[tasks]] = needs
            filled[tasks] += 1
        return ptr, idx


def _share(total: IntArray, steps: IntArray, at: IntArray) -> IntArray:
    """floor(total * at / steps) without overflow."""
    rest = total % steps
    if int(steps.max(initial=0)) > LONGEST_EXACT:
        part = rest.astype(object) * at // steps
        return (total // steps) * at + part.astype(np.int64)
    return (total // steps) * at + rest * at // steps


def _pieces(work: KernelWork, groups: int, detail: int) -> tuple[IntArray, BoolArray, IntArray]:
    """(pieces of the major levels (n,), major (n, 8), pieces per level (n, 8)) within ``detail`` tasks per kernel.

    A kernel needs three pieces per major level to overlap its levels, and two per minor one; a chip whose memory
    groups multiply the tasks, or one with a backing memory, may exceed ``detail`` for that.
    """
    cycles = work.cycles
    present = cycles > 0
    copies = np.ones(len(LEVELS), dtype=np.int64)
    copies[[READ, WRITE]] = groups
    busiest = cycles.max(axis=1)
    budget = detail - (work.launch_cycles > 0)
    piped = work.steps >= 2
    share = np.full(cycles.shape[0], MAJOR_SHARE, dtype=np.int64)
    while True:
        major = present & (cycles * share[:, None] >= busiest[:, None])
        n_major = (major * copies).sum(axis=1)
        n_minor = ((present & ~major) * copies).sum(axis=1)
        heavy = piped & (3 * n_major + 2 * n_minor > budget) & (share > 1)
        if not heavy.any():
            break
        share[heavy] //= 2
    pieces = np.minimum(np.maximum((budget - 2 * n_minor) // np.maximum(n_major, 1), 3), work.steps)
    minor_pieces = np.where(piped, 2, 1)
    count = np.where(major, pieces[:, None], np.where(present, minor_pieces[:, None], 0))
    return pieces, major, count


def emit(chip: Chip, kernels: Kernels, work: KernelWork, needs_main: BoolArray, *, detail: int) -> Program:
    """Cut every kernel into at most ``detail`` tasks and connect them; see the module text.

    ``needs_main`` (n_kernels,): the kernel loads from main memory what another kernel made.
    """
    units = units_of(chip, linked=has_transfers(kernels, work))
    n = kernels.n
    groups, n_streams = len(units.level_unit[READ]), len(units.launch_unit)
    pieces, major, count = _pieces(work, groups, detail)
    copies = np.array([len(level) for level in units.level_unit], dtype=np.int64)
    launched = work.launch_cycles > 0
    empty = (count.sum(axis=1) == 0) & ~launched  # a kernel that costs nothing still orders others: one cycle
    overhead = launched | empty
    sizes = (count * copies).sum(axis=1) + overhead
    base = np.r_[0, np.cumsum(sizes)[:-1]].astype(np.int64) if n else np.zeros(0, dtype=np.int64)
    used = np.zeros(n, dtype=np.int64)
    tasks = _Tasks()
    nbytes = np.zeros((n, len(LEVELS)), dtype=np.int64)
    nbytes[:, READ], nbytes[:, WRITE], nbytes[:, CACHE] = work.main_read_bytes, work.main_write_bytes, work.cache_bytes
    nbytes[:, CACHE] *= work.cycles[:, CACHE] > 0
    nbytes[:, FAR] = work.far_read_bytes + work.far_write_bytes
    nbytes[:, LINK] = work.link_bytes.sum(axis=1)
    flops_level = np.where(work.cycles[:, MATRIX] > 0, MATRIX, VECTOR)

    all_kernels = np.arange(n, dtype=np.int64)
    start_task = np.full(n, -1, dtype=np.int64)  # overhead task, if any
    chosen = all_kernels[overhead]
    ids = base[chosen]
    start_task[chosen] = ids
    used[chosen] += 1
    stream = kernels.stream
    tasks.add(
        ids,
        unit=np.array(units.launch_unit, dtype=np.int64)[stream[chosen]],
        queue=0,
        priority=stream[chosen],
        kind=OVERHEAD,
        cycles=np.maximum(work.launch_cycles[chosen], 1),
        row=-1,
        op=chosen,
        nbytes=0,
        flops=0,
    )

    early = ~major & (np.cumsum(major, axis=1) == 0)  # minor levels before the first major one
    slots = int(pieces.max(initial=1))
    # First copy of each piece; a minor level has pieces in slot 0 and in the last slot only.
    piece_id = np.full((slots, len(LEVELS), n), -1, dtype=np.int64)
    for slot in range(slots):
        for level in range(len(LEVELS)):
            last = pieces - 1
            here = (count[:, level] > 0) & (
                (major[:, level] & (slot <= last)) | (~major[:, level] & ((slot == 0) | (slot == last)))
            )
            chosen = all_kernels[here]
            if not chosen.size:
                continue
            steps, p = work.steps[chosen], pieces[chosen]
            begin, end = _bounds(steps, p, slot, major[chosen, level], early[chosen, level])
            service = work.cycles[chosen, level]
            cycles = _share(service, steps, end) - _share(service, steps, begin)
            moved = _share(nbytes[chosen, level], steps, end) - _share(nbytes[chosen, level], steps, begin)
            flops = _share(work.flops[chosen], steps, end) - _share(work.flops[chosen], steps, begin)
            flops = np.where(flops_level[chosen] == level, flops, 0)
            for copy, unit in enumerate(units.level_unit[level]):
                ids = base[chosen] + used[chosen]
                if copy == 0:
                    piece_id[slot, level, chosen] = ids
                used[chosen] += 1
                share = len(units.level_unit[level])
                tasks.add(
                    ids,
                    unit=unit,
                    queue=stream[chosen] + (n_streams if level == WRITE and chip.main_memory.shared_bus else 0),
                    priority=2 * stream[chosen] + (level == WRITE),
                    kind=_LEVEL_KIND[level],
                    cycles=np.maximum(cycles, 1),
                    row=work.row[chosen] if level in (READ, WRITE) else -1,
                    op=chosen,
                    nbytes=moved * (copy + 1) // share - moved * copy // share,
                    flops=flops,
                )
    waits = needs_main | (work.far_write_bytes > 0)
    _connect(chip, kernels, pieces, major, count, piece_id, start_task, waits, copies, tasks)
    n_tasks = int(sizes.sum())
    dep_ptr, dep_idx = tasks.dependencies(n_tasks)
    names = ("unit", "queue", "priority", "kind", "cycles", "row", "op", "nbytes", "flops")
    return Program(
        **tasks.in_order(names),
        dep_ptr=dep_ptr,
        dep_idx=dep_idx,
        unit_names=units.names,
        n_queues=units.n_queues,
        switch_cycles=units.switch_cycles,
        row_miss_cycles=units.row_miss_cycles,
    )


def _bounds(
    steps: IntArray, pieces: IntArray, slot: int, major: BoolArray, early: BoolArray
) -> tuple[IntArray, IntArray]:
    """First step and the step after the last of piece ``slot``.

    One piece covers everything. Of several, a major level's first and last cover one step each and the others share
    the rest; a minor level's first covers all but the last step, or only the first step if it is ``early``.
    """
    last = slot == pieces - 1
    middle = np.maximum(pieces - 2, 1)
    begin = np.where(slot == 0, 0, 1 + (steps - 2) * (slot - 1) // middle)
    end = np.where(slot == 0, 1, 1 + (steps - 2) * slot // middle)
    begin = np.where(last, steps - 1, begin)
    end = np.where(last, steps, end)
    end = np.where(~major & ~early & (slot == 0), steps - 1, end)
    begin = np.where(early & last & (slot > 0), 1, begin)
    alone = pieces == 1
    return np.where(alone, 0, begin), np.where(alone, steps, end)


def _connect(
    chip: Chip,
    kernels: Kernels,
    pieces: IntArray,
    major: BoolArray,
    count: IntArray,
    piece_id: IntArray,
    start_task: IntArray,
    waits: BoolArray,
    copies: IntArray,
    tasks: _Tasks,
) -> None:
    """Dependencies inside kernels (the pipeline), between them (data and version order) and along streams.

    ``waits`` (n_kernels,): the loads of the kernel must not run ahead of what it depends on.
    """
    n, slots = kernels.n, piece_id.shape[0]
    every = np.arange(n, dtype=np.int64)
    tail = pieces - 1

    def wait(task: IntArray, level: int, need: IntArray, need_level: int) -> None:
        """Every copy of ``task`` waits for every copy of ``need``."""
        for a in range(int(copies[level])):
            for b in range(int(copies[need_level])):
                tasks.wait(task + a, need + b)

    before = np.full(n, -1, dtype=np.int64)  # nearest level before, by kernel
    head_level = np.full(n, -1, dtype=np.int64)  # level whose first piece lets the next level start
    major_before = np.full(n, -1, dtype=np.int64)
    first_level = np.full(n, -1, dtype=np.int64)
    for level in range(len(LEVELS)):
        here = count[:, level] > 0
        if not here.any():
            continue
        first_level[here & (before < 0)] = level
        for source in range(level):
            k = np.flatnonzero(here & (head_level == source))
            wait(piece_id[0, level, k], level, piece_id[0, source, k], source)
            k = np.flatnonzero(here & (before == source) & (tail > 0))
            wait(piece_id[tail[k], level, k], level, piece_id[tail[k], source, k], source)
            streaming = np.flatnonzero(here & major[:, level] & (major_before == source))
            for slot in range(1, slots if streaming.size else 0):
                k = streaming[slot < tail[streaming]]
                wait(piece_id[slot, level, k], level, piece_id[slot - 1, source, k], source)
                if source <= READ and slot >= 2:  # the consumer's buffers bound how far loads run ahead
                    k = streaming[slot <= tail[streaming]]
                    wait(piece_id[slot, source, k], source, piece_id[slot - 2, level, k], level)
        leads = here & (major[:, level] | (major_before < 0) | (tail == 0))
        head_level[leads] = level
        major_before[here & major[:, level]] = level
        before[here] = level

    # The last task of a kernel is the tail of its last level, or its overhead task where it has nothing else.
    end = np.where(before >= 0, piece_id[tail, np.maximum(before, 0), every], start_task)
    end_copies = np.where(before >= 0, copies[np.maximum(before, 0)], 1)

    def wait_for_kernels(task: IntArray, task_copies: IntArray, needed: IntArray) -> None:
        """Each ``task`` (with its copies) waits for the end of kernel ``needed``."""
        for a in range(int(task_copies.max(initial=0))):
            for b in range(int(end_copies[needed].max(initial=0))):
                valid = (a < task_copies) & (b < end_copies[needed])
                tasks.wait(task[valid] + a, end[needed[valid]] + b)

    # A kernel is entered by its overhead task, else by the head of its first level.
    started = start_task >= 0
    entry = np.where(started, start_task, piece_id[0, np.maximum(first_level, 0), every])
    entry_copies = np.where(started, 1, copies[np.maximum(first_level, 0)])
    for level in range(len(LEVELS)):
        k = np.flatnonzero(started & (first_level == level))
        for copy in range(int(copies[level])):
            tasks.wait(piece_id[0, level, k] + copy, start_task[k])

    edges, ahead = kernels.edges, np.zeros(n, dtype=np.bool_)
    if chip.mapping.serial_kernels:
        k = np.flatnonzero(kernels.before >= 0)
        wait_for_kernels(entry[k], entry_copies[k], kernels.before[k])
        other_stream = kernels.stream[edges[:, 0]] != kernels.stream[edges[:, 1]]
        edges = edges[other_stream]  # order inside a stream is implied
    else:
        # Frozen operands may be fetched ahead, but no further than the buffers of the kernel before last allow.
        grand = np.where(kernels.before >= 0, kernels.before[np.maximum(kernels.before, 0)], -1)
        k = np.flatnonzero(grand >= 0)
        wait_for_kernels(entry[k], entry_copies[k], grand[k])
        ahead = ~started & ~waits & (first_level >= 0) & (first_level <= READ) & (before > READ)
    # One batch per occurrence of a waiting kernel, so that tasks are unique inside a batch.
    waiting, needed = edges[:, 0], edges[:, 1]
    rank = np.arange(waiting.size) - np.searchsorted(waiting, waiting, side="left")
    for r in range(int(rank.max(initial=-1)) + 1):
        k, need = waiting[rank == r], needed[rank == r]
        whole = ~ahead[k]
        wait_for_kernels(entry[k[whole]], entry_copies[k[whole]], need[whole])
        for level in range(READ + 1, len(LEVELS)):  # all but the loads
            here = ahead[k] & (count[k, level] > 0)
            heads = piece_id[0, level, k[here]]
            wait_for_kernels(heads, np.full(heads.size, copies[level]), need[here])
