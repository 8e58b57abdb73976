"""What one update of a fast weight costs, how often it happens, and how long memory that wears out lasts.

All of it comes from a simulated :class:`Result`: its update kernels, and the writes that its traffic sends to a memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttt_sim.chip import MemoryLevel
from ttt_sim.lower.placement import pinned_names
from ttt_sim.lower.traffic import CACHED, MAIN
from ttt_sim.ops import IntArray, Phase, Role, is_update, owners
from ttt_sim.results import FloatArray, Result

SECONDS_PER_DAY = 86400
#: Tensors that have cells of their own; temporaries take whatever cells are free.
_STATE = (Role.FAST_WEIGHT, Role.KV, Role.CARRY, Role.OPTIMISER, Role.INDEX)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCost:
    """Means over the updates of a simulation, each of one layer and one sequence. Where a trace says so (``updates`` of
    its ``meta``) an update is that of all layers (``together``), and of all sequences too (``once``).

    ``count``           updates in the span that the step weights add up to, all layers and sequences
    ``per_layer``       those of one layer
    ``span_cycles``     first start to last finish of its kernels; sequences of a batch, updated together, share it
    ``added_cycles``    of the whole time: those in which the forward stream waits for it (all of it without overlap)
    ``energy_j``        dynamic energy of its kernels
    ``read_bytes, write_bytes``  of main memory and the one behind it
    """

    count: float
    per_layer: float
    span_cycles: float
    added_cycles: float
    energy_j: float
    read_bytes: float
    write_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CellWrites:
    """How often each cell of a tensor is written in the span of the step weights, in the memory that holds it.

    ``tensor`` is the name without its layer; ``per_cell`` of the layer whose cells are written most.
    """

    tensor: str
    role: Role
    memory: MemoryLevel
    per_cell: float


def update_cost(result: Result, weights: FloatArray, batch: int) -> UpdateCost | None:
    """Cost of one update; None where nothing is updated.

    ``weights`` (n_steps,): what each simulated step counts for; ``batch`` sequences are updated by each op.
    """
    trace, work, lead = result.trace, result.lowered.work, result.lowered.kernels.lead
    written = np.flatnonzero(trace.phase == int(Phase.WEIGHT_WRITE))
    layer = trace.layer
    if trace.meta.get("updates"):
        layer = np.zeros_like(layer)
    if trace.meta.get("updates") == "once":
        batch = 1
    place = np.stack([trace.step, layer, trace.chunk], axis=1)
    updates = np.unique(place[written], axis=0)  # the first of a chip's part of a context adds earlier deltas besides
    count = batch * float(weights[updates[:, 0]].sum())
    if not count:
        return None
    chosen = np.flatnonzero(is_update(trace)[lead])
    first = lead[chosen]
    by_kernel = weights[trace.step[first]]

    def mean(values: IntArray) -> float:
        return float((values[chosen] * by_kernel).sum()) / count

    groups, group = np.unique(place[first], axis=0, return_inverse=True)
    start, finish = result.kernel_span()
    begins = np.full(groups.shape[0], np.iinfo(np.int64).max, dtype=np.int64)
    ends = np.zeros(groups.shape[0], dtype=np.int64)
    np.minimum.at(begins, group.reshape(-1), start[chosen])
    np.maximum.at(ends, group.reshape(-1), finish[chosen])
    return UpdateCost(
        count=count,
        per_layer=count / np.unique(updates[:, 1]).size,
        span_cycles=float(((ends - begins) * weights[groups[:, 0]]).sum()) / count,
        added_cycles=mean(result.kernel_advance()),
        energy_j=float((result.update_energy_j() * weights).sum()) / count,
        read_bytes=mean(work.main_read_bytes + work.far_read_bytes),
        write_bytes=mean(work.main_write_bytes + work.far_write_bytes),
    )


def cell_writes(result: Result, weights: FloatArray) -> list[CellWrites]:
    """Writes per cell of every tensor that keeps state, in main memory, behind it or, pinned, in the cache.

    Appends go to new cells until a buffer is full: a window is written once in its length, a full cache once in a
    context, an index once when it is built. So each cell of a buffer takes the bytes that are written over the bytes of
    the buffer.
    """
    trace, chip, traffic = result.trace, result.chip, result.lowered.traffic
    step = trace.step[owners(trace.write_ptr)]
    far = traffic.write_far_bytes
    near = trace.write_bytes - traffic.write_hit_bytes + traffic.padding_bytes - far
    pinned = set(pinned_names(trace))
    most: dict[tuple[str, str], CellWrites] = {}
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)
    spilled = traffic.spilled_bytes
    levels = (
        (chip.main_memory, MAIN, near, size - spilled),
        (chip.backing, MAIN, far, spilled),
        (chip.cache, CACHED, near, size),
    )
    for memory, place, stored, held in levels:
        if memory is None:
            continue
        reached = traffic.write_place == place
        moved = np.zeros(size.size, dtype=np.float64)
        np.add.at(moved, trace.write_tensor[reached], (stored * weights[step])[reached])
        for i in np.flatnonzero(moved):
            tensor = trace.tensors[i]
            if tensor.role not in _STATE or (place == CACHED and tensor.name not in pinned):
                continue
            name = tensor.name.split(".", 2)[2] if tensor.name.startswith("layers.") else tensor.name
            per_cell = float(moved[i]) / int(held[i])
            known = most.get((name, memory.name))
            if known is None or known.per_cell < per_cell:
                most[name, memory.name] = CellWrites(tensor=name, role=tensor.role, memory=memory, per_cell=per_cell)
    return list(most.values())


def lifetime_days(writes: CellWrites, seconds: float) -> float | None:
    """Days until the cells are worn out, the span of ``seconds`` repeated for ever; None where wear does not matter."""
    endurance = writes.memory.endurance_writes
    if endurance is None or not writes.per_cell:
        return None
    return endurance / (writes.per_cell / seconds) / SECONDS_PER_DAY


def update_record(
    result: Result,
    weights: FloatArray,
    *,
    batch: int,
    seconds: float,
    cycle_s: float,
    shards: int = 1,
    copies: float = 1,
) -> dict[str, object]:
    """Columns of the record of a point whose span takes ``seconds``, in cycles of ``cycle_s``.

    ``result`` is the part of one of ``shards`` chips in each update, and ``copies`` like it update other sequences or
    chunks in the span; the last may have fewer sequences, which makes it less than one.
    """
    out: dict[str, object] = dict.fromkeys(
        ("update_seconds", "update_added_seconds", "update_energy_j", "update_read_bytes", "update_write_bytes",
         "updates_per_s", "cell_writes_per_s", "lifetime_days", "lifetime_limited_by")
    )  # fmt: skip
    writes = cell_writes(result, weights)
    cost = update_cost(result, weights, batch)
    if cost is not None:
        out |= {
            "update_seconds": cost.span_cycles * cycle_s,
            "update_added_seconds": cost.added_cycles * cycle_s,
            "update_energy_j": shards * cost.energy_j,
            "update_read_bytes": shards * cost.read_bytes,
            "update_write_bytes": shards * cost.write_bytes,
            "updates_per_s": copies * cost.per_layer / seconds,
        }
    changed = [w.per_cell / seconds for w in writes if w.role == Role.FAST_WEIGHT]
    if changed or cost is not None:  # states are rewritten at every token, without updates that could be told apart
        out["cell_writes_per_s"] = max(changed, default=0.0)
    lasts = [(days, w) for w in writes if (days := lifetime_days(w, seconds)) is not None]
    if lasts:
        days, first = min(lasts, key=lambda pair: pair[0])
        out |= {
            "cell_writes_per_s": first.per_cell / seconds,
            "lifetime_days": days,
            "lifetime_limited_by": f"{first.tensor} in {first.memory.name}",
        }
    return out
