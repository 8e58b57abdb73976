"""Lower bounds on time, conservation laws, the critical path. Every simulation is held against them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConservationError
from ttt_sim.lower import Lowered
from ttt_sim.lower.emit import has_transfers, units_of
from ttt_sim.lower.tiles import product_rate
from ttt_sim.lower.traffic import CACHED, FUSED, IN_PLACE, MAIN, SHARED
from ttt_sim.lower.work import LINK
from ttt_sim.lower.writes import reupload_bytes
from ttt_sim.ops import KIND, IntArray, OpClass, Trace, op_classes, total_by
from ttt_sim.program import READ, WRITE, Program, Timeline
from ttt_sim.units import ceil_div


def roofline_cycles(trace: Trace, chip: Chip, lowered: Lowered) -> dict[str, float]:
    """Cycles that each resource needs at its datasheet peak for the bytes that travel and the FLOPs of the trace.

    No schedule can be shorter than the largest of them.
    """
    work, main = lowered.work, chip.main_memory
    read = float(work.main_read_bytes.sum()) / (main.read_bytes_per_s / chip.clock_hz)
    write = float(work.main_write_bytes.sum()) / (main.write_bytes_per_s / chip.clock_hz)
    bounds = {main.name: read + write if main.shared_bus else max(read, write)}
    backing = chip.backing
    if backing is not None:
        read = float(work.far_read_bytes.sum()) / (backing.read_bytes_per_s / chip.clock_hz)
        write = float(work.far_write_bytes.sum()) / (backing.write_bytes_per_s / chip.clock_hz)
        bounds[backing.name] = read + write if backing.shared_bus else max(read, write)
    tiled = np.isin(op_classes(trace), [int(OpClass.MATMUL), int(OpClass.ATTENTION)]) & ~work.on_lanes
    matrix = 0.0
    for code in np.unique(trace.dtype[tiled]):
        flops = int(trace.flops[tiled & (trace.dtype == code)].sum())
        matrix += flops / product_rate(chip, DTYPES[int(code)], sustained=False)
    if tiled.any():
        bounds[chip.unit("matrix").name] = matrix
    return bounds


def busy_cycles(program: Program, timeline: Timeline) -> IntArray:
    """Cycles in which each unit serves a task, (n_units,)."""
    return total_by(program.unit, timeline.finish_cycles - timeline.start_cycles, program.n_units)


def check(trace: Trace, chip: Chip, lowered: Lowered, timeline: Timeline) -> None:
    """Hold a finished simulation against the laws that every schedule obeys.

    Raises:
        ConservationError: bytes or FLOPs were lost or made between trace and engine, a unit was busy for more than
            the whole time, a task started before something it needs, or the result beats the roofline.
    """
    program, work = lowered.program, lowered.work

    def equal(what: str, have: int, want: int) -> None:
        if have != want:
            raise ConservationError(f"{what}: {have} in the program, {want} in the trace (difference {have - want})")

    places = lowered.traffic.read_place
    skipped = sum(int(trace.read_bytes[places == place].sum()) for place in (CACHED, FUSED, SHARED, IN_PLACE))
    skipped += int(lowered.traffic.read_hit_bytes.sum())
    on_main = _on(program, chip.main_memory.name)
    far_read, far_write = int(work.far_read_bytes.sum()), int(work.far_write_bytes.sum())
    reads = int(program.nbytes[on_main & (program.kind == READ)].sum())
    padding = int(lowered.traffic.padding_bytes.sum())
    again = int(work.restream_bytes.sum()) + padding
    equal("bytes read from main memory", reads, int(trace.read_bytes.sum()) - skipped + again - far_read)
    writes = int(program.nbytes[on_main & (program.kind == WRITE)].sum())
    kept = int(trace.write_bytes[lowered.traffic.write_place != MAIN].sum())
    kept += int(lowered.traffic.write_hit_bytes.sum())
    extra = int(work.staged_bytes.sum()) + padding
    equal("bytes written to main memory", writes, int(trace.write_bytes.sum()) - kept + extra - far_write)
    if chip.backing is not None:
        moved = int(program.nbytes[_on(program, chip.backing.name)].sum())
        equal("bytes of the backing memory", moved, far_read + far_write)
        again = int(work.far_restream_bytes.sum())
        equal("bytes read of spilled tensors", far_read - again, int(lowered.traffic.read_far_bytes.sum()))
        equal("bytes written of spilled tensors", far_write, int(lowered.traffic.write_far_bytes.sum()))
    equal("FLOPs", int(program.flops.sum()), int(trace.flops.sum()))
    on_link = np.isin(program.unit, units_of(chip, linked=has_transfers(lowered.kernels, work)).level_unit[LINK])
    sent = _link_bytes(trace)
    if any(link.topology == "host" for link in chip.links):
        sent += int(reupload_bytes(trace, chip, lowered.kernels.of_op, lowered.kernels.n).sum())
    equal("bytes sent over links", int(program.nbytes[on_link].sum()), sent)

    total = timeline.total_cycles
    busy = busy_cycles(program, timeline)
    if (busy > total).any():
        unit = int(np.argmax(busy - total))
        raise ConservationError(f"unit {program.unit_names[unit]} is busy for {busy[unit]} of {total} cycles")
    owner = np.repeat(np.arange(program.n_tasks), np.diff(program.dep_ptr))
    early = timeline.start_cycles[owner] < timeline.finish_cycles[program.dep_idx]
    if early.any():
        i = int(np.argmax(early))
        raise ConservationError(
            f"task {owner[i]} starts before task {program.dep_idx[i]}, which it needs, has finished"
        )
    for name, bound in roofline_cycles(trace, chip, lowered).items():
        if total < bound * (1 - 1e-12):
            raise ConservationError(f"{total} cycles beat the roofline bound of {bound:.1f} cycles on {name}")


def _on(program: Program, memory: str) -> npt.NDArray[np.bool_]:
    """Whether each task runs on this memory."""
    return np.array([name.split(".")[0] == memory for name in program.unit_names], dtype=np.bool_)[program.unit]


def _link_bytes(trace: Trace) -> int:
    """Bytes that this chip sends. A ring of n chips passes on 2 (n - 1) parts of 1 / n of a sum, rounded up, and n - 1
    whole parts of a gathered tensor; other transfers go to one partner."""
    total = 0
    for op in np.flatnonzero(op_classes(trace) == int(OpClass.COLLECTIVE)):
        nbytes = int(trace.read_bytes[trace.read_ptr[op] : trace.read_ptr[op + 1]].sum())
        ranks = int(trace.heads[op])
        if trace.kind[op] == KIND["allreduce"]:
            total += ceil_div(2 * (ranks - 1) * nbytes, ranks)
        else:
            total += nbytes * (ranks - 1 if trace.kind[op] == KIND["allgather"] else 1)
    return total


def critical_path(program: Program, timeline: Timeline) -> IntArray:
    """Ids of the tasks that decide the total, first to last.

    Walking back from the task that finishes last: a task that started when a dependency finished was held up by it,
    any other by the task before it on its unit.
    """
    n = program.n_tasks
    if not n:
        return np.zeros(0, dtype=np.int64)
    start, finish = timeline.start_cycles, timeline.finish_cycles
    order = np.lexsort((start, program.unit))
    before = np.full(n, -1, dtype=np.int64)
    same = program.unit[order][1:] == program.unit[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    path = [int(np.argmax(finish))]
    while start[path[-1]] > 0:
        task = path[-1]
        needs = program.dep_idx[program.dep_ptr[task] : program.dep_ptr[task + 1]]
        held = needs[finish[needs] == start[task]]
        path.append(int(held[0]) if held.size else int(before[task]))
    return np.array(path[::-1], dtype=np.int64)
