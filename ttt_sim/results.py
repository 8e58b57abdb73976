"""What a simulation says, as tidy frames and one summary row.

Columns carry their unit in the name; see docs/results.md for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ttt_sim.bounds import busy_cycles
from ttt_sim.chip import Chip, ComputeUnit, MemoryLevel
from ttt_sim.dtypes import DTYPES
from ttt_sim.lower import Lowered
from ttt_sim.lower.kernels import FORWARD_STREAM, STREAMS
from ttt_sim.lower.traffic import FUSED, MAIN
from ttt_sim.lower.work import LEVELS, READ, WRITE, busiest_level
from ttt_sim.ops import (
    CLASS_OF_ROLE,
    OP_KINDS,
    TEMPORARY_ROLES,
    TRAFFIC_CLASSES,
    IntArray,
    OpClass,
    Phase,
    Trace,
    is_update,
    lane_ops,
    op_classes,
    owners,
    persistent_bytes,
    total_by,
    version_slots,
)
from ttt_sim.program import Timeline

if TYPE_CHECKING:
    import pandas as pd

FloatArray = npt.NDArray[np.float64]
#: Bits of a word of flags; the sign is not one of them.
_BITS = 62


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One simulated trace on one chip."""

    chip: Chip
    trace: Trace
    lowered: Lowered
    timeline: Timeline

    @property
    def cycles(self) -> int:
        return self.timeline.total_cycles

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.clock_hz

    @property
    def spilled_bytes(self) -> int:
        """Bytes of weights and state in the backing memory."""
        return int(self.lowered.traffic.spilled_bytes.sum())

    # --- per kernel -------------------------------------------------------------------------------------------------

    def kernel_span(self) -> tuple[IntArray, IntArray]:
        """(start, finish) cycle of every kernel, its launch included."""
        program, n = self.lowered.program, self.lowered.kernels.n
        start = np.full(n, np.iinfo(np.int64).max, dtype=np.int64)
        finish = np.zeros(n, dtype=np.int64)
        np.minimum.at(start, program.op, self.timeline.start_cycles)
        np.maximum.at(finish, program.op, self.timeline.finish_cycles)
        return start, finish

    def kernel_advance(self) -> IntArray:
        """Cycles of the whole time that each kernel accounts for; they add up to the total.

        Time in which the forward stream runs belongs to its kernels, in order of finish. Time in which it waits for
        updates or transfers, and what is left after its last kernel, belongs to the kernels that finish in the wait, in
        order of finish, and what follows the last of these to that one, which ended the wait.
        """
        start, finish = self.kernel_span()
        stream = self.lowered.kernels.stream
        forward, update = np.flatnonzero(stream == FORWARD_STREAM), np.flatnonzero(stream != FORWARD_STREAM)
        forward = forward[np.argsort(finish[forward], kind="stable")]
        update = update[np.argsort(finish[update], kind="stable")]
        before = np.r_[0, finish[forward]][: forward.size]
        # Idle: none of the kernels that are still to finish has started.
        soonest = np.minimum.accumulate(start[forward][::-1])[::-1]
        gap = np.maximum(soonest - before, 0)
        advance = np.zeros(stream.size, dtype=np.int64)
        advance[forward] = finish[forward] - before - gap
        end = int(finish[forward].max(initial=0))
        if update.size:
            waited_until = np.r_[soonest, self.cycles]
            waits = np.r_[gap, self.cycles - end]
            ends = finish[update]
            blamed = np.maximum(np.searchsorted(ends, waited_until, side="right") - 1, 0)
            begin = waited_until - waits
            shared = np.clip(ends[blamed] - begin, 0, waits)  # of each wait, up to the finish that ended it
            np.add.at(advance, update[blamed], waits - shared)
            # Shared time before each finish: that of all waits that began before, of the last one in part.
            total = np.r_[0, np.cumsum(shared)]
            last = np.searchsorted(begin, ends, side="left") - 1
            passed = np.where(last < 0, 0, total[last] + np.clip(ends - begin[last], 0, shared[last]))
            advance[update] += np.diff(passed, prepend=0)
        return advance

    def kernel_labels(self) -> list[str]:
        """Label of each kernel; see :meth:`label_index`."""
        index, names = self.label_index()
        return [names[i] for i in index.tolist()]

    def label_index(self) -> tuple[IntArray, list[str]]:
        """(index of each kernel's label, labels): the names of the op kinds in a kernel joined by +."""
        kernels = self.lowered.kernels
        words = -(-len(OP_KINDS) // _BITS)
        kinds = np.zeros((words, kernels.n), dtype=np.int64)  # one bit per kind
        word, bit = self.trace.kind // _BITS, self.trace.kind % _BITS
        np.bitwise_or.at(kinds, (word, kernels.of_op), np.int64(1) << bit)
        index = np.zeros(kernels.n, dtype=np.int64)
        for bits in kinds[::-1]:
            values, place = np.unique(bits, return_inverse=True)
            index = index * values.size + place.reshape(-1)
        _, first, index = np.unique(index, return_index=True, return_inverse=True)
        names = [
            "+".join(kind.name for code, kind in enumerate(OP_KINDS) if bits[code // _BITS] >> code % _BITS & 1)
            for bits in kinds[:, first].T.tolist()
        ]
        return index.astype(np.int64).reshape(-1), names

    def busiest_unit(self) -> tuple[IntArray, list[str]]:
        """(cycles, name) of the unit that each kernel keeps busy longest; on a shared bus reads and writes add up."""
        cycles = self.lowered.work.cycles.copy()
        if self.chip.main_memory.shared_bus:
            cycles[:, READ] += cycles[:, WRITE]
            cycles[:, WRITE] = 0
        names = level_names(self.chip)
        return cycles.max(axis=1), [names[level] for level in busiest_level(cycles).tolist()]

    def bound_by(self) -> list[str]:
        """What decides each kernel's time: a unit, or ``launch`` when its overhead exceeds its busiest unit."""
        amount, names = self.busiest_unit()
        launches = self.lowered.work.launch_cycles
        return [
            "launch" if launch > most else name
            for launch, most, name in zip(launches.tolist(), amount.tolist(), names, strict=True)
        ]

    # --- per step of the scenario -------------------------------------------------------------------------------------

    def step_finish_cycles(self) -> IntArray:
        """Finish of the forward work of each step (call) of the scenario, (n_steps,)."""
        kernels = self.lowered.kernels
        _, finish = self.kernel_span()
        forward = ~is_update(self.trace)
        out = np.zeros(int(self.trace.step.max()) + 1, dtype=np.int64)
        np.maximum.at(out, self.trace.step[forward], finish[kernels.of_op[forward]])
        return out

    def main_bytes(self) -> dict[tuple[str, str], IntArray]:
        """Main-memory bytes per step by (direction, traffic class), re-streaming and what lies in the backing memory
        included."""
        trace = self.trace
        n_steps = int(trace.step.max()) + 1
        classes = np.array([TRAFFIC_CLASSES.index(CLASS_OF_ROLE[t.role]) for t in trace.tensors], dtype=np.int64)
        out: dict[tuple[str, str], IntArray] = {}
        traffic = self.lowered.traffic
        missed, stored = trace.read_bytes - traffic.read_hit_bytes, trace.write_bytes - traffic.write_hit_bytes
        for direction, ptr, tensor, nbytes, place in (
            ("read", trace.read_ptr, trace.read_tensor, missed, traffic.read_place),
            ("write", trace.write_ptr, trace.write_tensor, stored, traffic.write_place),
        ):
            step = trace.step[owners(ptr)]
            table = np.zeros((len(TRAFFIC_CLASSES), n_steps), dtype=np.int64)
            main = place == MAIN
            np.add.at(table, (classes[tensor[main]], step[main]), nbytes[main])
            for i, name in enumerate(TRAFFIC_CLASSES):
                out[direction, name] = table[i]
        # What a memory replaces beside a small write is read and written.
        padding, written = traffic.padding_bytes, classes[trace.write_tensor]
        padded = np.zeros((len(TRAFFIC_CLASSES), n_steps), dtype=np.int64)
        np.add.at(padded, (written, trace.step[owners(trace.write_ptr)]), padding)
        for i, name in enumerate(TRAFFIC_CLASSES):
            out["read", name] += padded[i]
            out["write", name] += padded[i]
        lead_step = trace.step[self.lowered.kernels.lead]
        # What is read again: keys and values by attention, rows by norms and softmax.
        again = self.lowered.work.restream_bytes
        attends = np.zeros(again.size, dtype=np.bool_)
        attends[self.lowered.kernels.of_op[op_classes(trace) == int(OpClass.ATTENTION)]] = True
        np.add.at(out["read", "kv"], lead_step, np.where(attends, again, 0))
        np.add.at(out["read", "activations"], lead_step, np.where(attends, 0, again))
        np.add.at(out["write", "activations"], lead_step, self.lowered.work.staged_bytes)
        return out

    def far_bytes(self) -> dict[str, IntArray]:
        """Those of :meth:`main_bytes` that cross the backing memory, per step by direction."""
        work, step = self.lowered.work, self.trace.step[self.lowered.kernels.lead]
        n_steps = int(self.trace.step.max()) + 1
        moved = {"read": work.far_read_bytes, "write": work.far_write_bytes}
        return {direction: total_by(step, nbytes, n_steps) for direction, nbytes in moved.items()}

    def dynamic_energy_j(self) -> dict[str, FloatArray]:
        """Dynamic energy per step by where it is spent: memory levels, kinds of unit, links off the chip."""
        return self._energy_by(self.trace.step[self.lowered.kernels.lead], int(self.trace.step.max()) + 1)

    def update_energy_j(self) -> FloatArray:
        """Dynamic energy per step of the update kernels, (n_steps,)."""
        lead, n_steps = self.lowered.kernels.lead, int(self.trace.step.max()) + 1
        group = np.where(is_update(self.trace)[lead], self.trace.step[lead], n_steps)
        total = np.zeros(n_steps, dtype=np.float64)
        for values in self._energy_by(group, n_steps + 1).values():
            total += values[:n_steps]
        return total

    def _energy_by(self, group: IntArray, n: int) -> dict[str, FloatArray]:
        """Dynamic energy by group of kernels, (n,) each; ``group`` (n_kernels,) of each kernel."""
        trace, work, chip = self.trace, self.lowered.work, self.chip

        def per_group(values: IntArray) -> FloatArray:
            return total_by(group, values, n).astype(np.float64)

        main = chip.main_memory
        out = {
            main.name: per_group(work.main_read_bytes) * main.read_energy_j_per_byte
            + per_group(work.main_write_bytes) * main.write_energy_j_per_byte
        }
        if chip.backing is not None:
            out[chip.backing.name] = (
                per_group(work.far_read_bytes) * chip.backing.read_energy_j_per_byte
                + per_group(work.far_write_bytes) * chip.backing.write_energy_j_per_byte
            )
        for level, nbytes in ((chip.cache, work.cache_bytes), (chip.core_memory, work.core_bytes)):
            if level is not None and level is not main:
                out[level.name] = per_group(nbytes) * _energy_per_byte(level)
        if chip.has_unit("matrix"):
            unit = chip.unit("matrix")
            energy = np.zeros(n, dtype=np.float64)
            of_op = group[self.lowered.kernels.of_op]
            multiplied = (op_classes(trace) != int(OpClass.VECTOR)) & ~work.on_lanes
            for code in np.unique(trace.dtype):
                chosen = (trace.dtype == code) & multiplied
                flops = total_by(of_op[chosen], trace.flops[chosen], n)
                energy += flops * _energy_per_op(unit, DTYPES[int(code)])
            out[unit.name] = energy
        if chip.has_unit("vector"):
            unit = chip.unit("vector")
            out[unit.name] = per_group(work.lane_ops) * _energy_per_op(unit, "fp32")
        if chip.has_unit("special"):
            unit = chip.unit("special")
            out[unit.name] = per_group(work.special_ops) * _energy_per_op(unit, "fp32")
        for i, link in enumerate(chip.links):
            if link.scope == "chip":
                sent = per_group(work.link_bytes[:, i]) * link.energy_j_per_byte
                out[link.name] = out.get(link.name, 0.0) + sent  # the memory of the host has the name of its link
        return out

    # --- memory over time ---------------------------------------------------------------------------------------------

    def memory_events(self) -> tuple[IntArray, IntArray]:
        """(cycle, change of allocated bytes by class): rows (n_events, n_classes) sorted by cycle.

        Persistent tensors are there from cycle 0; an activation lives from the start of the kernel that makes it to
        the end of the last kernel that uses it. What never leaves a kernel takes no main memory.
        """
        trace, kernels = self.trace, self.lowered.kernels
        start, finish = self.kernel_span()
        classes = np.array([TRAFFIC_CLASSES.index(CLASS_OF_ROLE[t.role]) for t in trace.tensors], dtype=np.int64)
        temporary = np.array([t.role in TEMPORARY_ROLES for t in trace.tensors], dtype=np.bool_)
        size = np.array([t.nbytes for t in trace.tensors], dtype=np.int64)
        base = total_by(classes[~temporary], size[~temporary], len(TRAFFIC_CLASSES))

        write_kernel = kernels.of_op[owners(trace.write_ptr)]
        read_kernel = kernels.of_op[owners(trace.read_ptr)]
        read_slot, write_slot, n_slots = version_slots(trace)
        made = np.flatnonzero(temporary[trace.write_tensor] & (self.lowered.traffic.write_place != FUSED))
        last_use = np.zeros(n_slots, dtype=np.int64)
        np.maximum.at(last_use, read_slot, finish[read_kernel])
        died = np.maximum(finish[write_kernel[made]], last_use[write_slot[made]])
        nbytes, group = trace.write_bytes[made], classes[trace.write_tensor[made]]

        times = np.concatenate([[0], start[write_kernel[made]], died])
        change = np.zeros((times.size, len(TRAFFIC_CLASSES)), dtype=np.int64)
        change[0] = base
        n = made.size
        change[np.arange(1, n + 1), group] = nbytes
        change[np.arange(n + 1, 2 * n + 1), group] = -nbytes
        frees = np.r_[np.zeros(n + 1, dtype=np.int64), np.ones(n, dtype=np.int64)]
        by_time = np.lexsort((1 - frees, times))  # in one cycle buffers are freed before others are taken
        return times[by_time], change[by_time]

    def peak_memory_bytes(self) -> int:
        """Largest allocation at any time, with what lies in the backing memory."""
        _, change = self.memory_events()
        return int(np.cumsum(change.sum(axis=1)).max())

    def peak_temporary_bytes(self) -> int:
        """Largest allocation of activations and other temporaries, which the main memory alone must hold."""
        return self.peak_memory_bytes() - persistent_bytes(self.trace)

    # --- frames -------------------------------------------------------------------------------------------------------

    def ops(self) -> pd.DataFrame:
        """One row per op, in program order."""
        import pandas as pd

        trace, kernels, work = self.trace, self.lowered.kernels, self.lowered.work
        start, finish = self.kernel_span()
        of_op = kernels.of_op
        lead = np.zeros(trace.n_ops, dtype=np.bool_)
        lead[kernels.lead] = True
        busiest, unit_names = self.busiest_unit()
        units = np.array(unit_names, dtype=object)
        bound = np.array(self.bound_by(), dtype=object)
        read = owners(trace.read_ptr)
        write = owners(trace.write_ptr)
        from_main = self.lowered.traffic.read_place == MAIN
        to_main = self.lowered.traffic.write_place == MAIN
        traffic = self.lowered.traffic
        missed, stored = trace.read_bytes - traffic.read_hit_bytes, trace.write_bytes - traffic.write_hit_bytes
        main_read = total_by(read[from_main], missed[from_main], trace.n_ops)
        main_write = total_by(write[to_main], stored[to_main], trace.n_ops)
        main_read[kernels.lead] += work.restream_bytes
        main_write[kernels.lead] += work.staged_bytes
        padding = total_by(write, traffic.padding_bytes, trace.n_ops)
        main_read, main_write = main_read + padding, main_write + padding
        far_read = total_by(read, traffic.read_far_bytes, trace.n_ops)
        far_read[kernels.lead] += work.far_restream_bytes
        at_lead = {
            "cache_bytes": work.cache_bytes, "core_bytes": work.core_bytes, "advance_cycles": self.kernel_advance(),
            "launch_cycles": work.launch_cycles, "busy_cycles": busiest,
            "stall_cycles": np.maximum(finish - start - work.launch_cycles - busiest, 0),
        }  # fmt: skip
        columns: dict[str, object] = {
            "op": np.arange(trace.n_ops),
            "kind": [OP_KINDS[code].name for code in trace.kind.tolist()],
            "phase": [Phase(code).name.lower() for code in trace.phase.tolist()],
            "step": trace.step, "layer": trace.layer, "chunk": trace.chunk, "position": trace.position,
            "kernel": of_op, "stream": [STREAMS[s] for s in kernels.stream[of_op].tolist()],
            "unit": units[of_op], "bound_by": bound[of_op],
            "start_cycles": start[of_op], "finish_cycles": finish[of_op],
            "tile_rows": work.tile_rows[of_op], "tile_cols": work.tile_cols[of_op], "split_k": work.split[of_op],
            "n_tiles": work.items[of_op], "n_waves": work.waves[of_op],
            "flops": trace.flops, "vector_ops": trace.vector_ops,
            "trace_read_bytes": total_by(read, trace.read_bytes, trace.n_ops),
            "trace_write_bytes": total_by(write, trace.write_bytes, trace.n_ops),
            "main_read_bytes": main_read, "main_write_bytes": main_write,
            "far_read_bytes": far_read, "far_write_bytes": total_by(write, traffic.write_far_bytes, trace.n_ops),
        }  # fmt: skip
        for name, values in at_lead.items():  # a kernel's own figures stand at its first op
            columns[name] = np.where(lead, values[of_op], 0)
        frame = pd.DataFrame(columns)
        frame["energy_j"] = self._op_energy_j(frame)
        return frame

    def _op_energy_j(self, frame: pd.DataFrame) -> pd.Series[float]:
        chip, trace = self.chip, self.trace
        main = chip.main_memory
        energy = (frame["main_read_bytes"] - frame["far_read_bytes"]) * main.read_energy_j_per_byte
        energy = energy + (frame["main_write_bytes"] - frame["far_write_bytes"]) * main.write_energy_j_per_byte
        if chip.backing is not None:
            energy = energy + frame["far_read_bytes"] * chip.backing.read_energy_j_per_byte
            energy = energy + frame["far_write_bytes"] * chip.backing.write_energy_j_per_byte
        for level, column in ((chip.cache, "cache_bytes"), (chip.core_memory, "core_bytes")):
            if level is not None and level is not main:
                energy = energy + frame[column] * _energy_per_byte(level)
        lanes, special = lane_ops(trace)
        on_lanes = self.lowered.work.on_lanes
        lanes = lanes + np.where(on_lanes, trace.flops // 2, 0)
        if chip.has_unit("matrix"):
            per_flop = np.array([_energy_per_op(chip.unit("matrix"), dtype) for dtype in DTYPES])
            multiplied = (op_classes(trace) != int(OpClass.VECTOR)) & ~on_lanes
            energy = energy + np.where(multiplied, trace.flops, 0) * per_flop[trace.dtype]
        if chip.has_unit("vector"):
            energy = energy + lanes * _energy_per_op(chip.unit("vector"), "fp32")
        if chip.has_unit("special"):
            energy = energy + special * _energy_per_op(chip.unit("special"), "fp32")
        sent = np.zeros(trace.n_ops, dtype=np.float64)
        for i, link in enumerate(chip.links):
            sent[self.lowered.kernels.lead] += self.lowered.work.link_bytes[:, i] * link.energy_j_per_byte
        return energy + sent

    def units(self) -> pd.DataFrame:
        """One row per unit of the engine: busy cycles, utilisation, tasks, bytes."""
        import pandas as pd

        program = self.lowered.program
        busy = busy_cycles(program, self.timeline)
        return pd.DataFrame(
            {
                "unit": list(program.unit_names),
                "busy_cycles": busy,
                "utilisation_frac": busy / max(self.cycles, 1),
                "n_tasks": np.bincount(program.unit, minlength=program.n_units),
                "moved_bytes": total_by(program.unit, program.nbytes, program.n_units),
            }
        )

    def memory(self) -> pd.DataFrame:
        """Allocated main memory by class after every change, one row per (cycle, class)."""
        import pandas as pd

        times, change = self.memory_events()
        held = np.cumsum(change, axis=0)
        last = np.r_[np.diff(times) != 0, True]
        wide = pd.DataFrame(held[last], columns=list(TRAFFIC_CLASSES))
        wide.insert(0, "cycle", times[last])
        return wide.melt(id_vars="cycle", var_name="memory_class", value_name="allocated_bytes")

    def summary(self) -> Mapping[str, object]:
        """Totals of the whole simulation."""
        main, work = self.main_bytes(), self.lowered.work
        energy = {name: float(values.sum()) for name, values in self.dynamic_energy_j().items()}
        idle = self.chip.power.idle_w * self.seconds
        units = self.units()
        launches = units["unit"].str.startswith("launch")
        top = units[~launches].sort_values("busy_cycles", ascending=False).iloc[0]
        out: dict[str, object] = {
            "cycles": self.cycles,
            "seconds": self.seconds,
            "flops": int(self.trace.flops.sum()),
            "vector_ops": int(self.trace.vector_ops.sum()),
            "main_read_bytes": int((work.main_read_bytes + work.far_read_bytes).sum()),
            "main_write_bytes": int((work.main_write_bytes + work.far_write_bytes).sum()),
            "far_read_bytes": int(work.far_read_bytes.sum()),
            "far_write_bytes": int(work.far_write_bytes.sum()),
            "peak_memory_bytes": self.peak_memory_bytes(),
            "spilled_bytes": self.spilled_bytes,
            "energy_j": sum(energy.values()) + idle,
            "idle_energy_j": idle,
            "busiest_unit": str(top["unit"]),
            "busiest_utilisation_frac": float(top["utilisation_frac"]),
            "n_ops": self.trace.n_ops,
            "n_kernels": self.lowered.kernels.n,
            "n_tasks": self.lowered.program.n_tasks,
        }
        for (direction, name), values in main.items():
            out[f"{direction}_{name}_bytes"] = int(values.sum())
        for name, value in energy.items():
            out[f"energy_{name}_j"] = value
        return out


def level_names(chip: Chip) -> list[str]:
    """Name of the unit behind each level of a kernel, in the order of ``LEVELS``."""
    names: dict[str, str] = {unit.kind: unit.name for unit in chip.units}
    names |= {"read": chip.main_memory.name, "write": chip.main_memory.name}
    if chip.cache is not None:
        names["cache"] = chip.cache.name
    if chip.backing is not None:
        names["far"] = chip.backing.name
    return [names.get(level, level) for level in LEVELS]


def _energy_per_byte(level: MemoryLevel) -> float:
    """Mean of reading and writing: what passes through an inner level is written once and read once."""
    return (level.read_energy_j_per_byte + level.write_energy_j_per_byte) / 2


def _energy_per_op(unit: ComputeUnit, dtype: str) -> float:
    """Energy of one FLOP or lane operation; a dtype without an entry costs what the dearest listed one does."""
    return unit.energy_j_per_op.get(dtype, max(unit.energy_j_per_op.values(), default=0.0))
