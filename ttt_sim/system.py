"""Several chips as one system: what each holds, the least number that holds a model, and the pace of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError, UnsupportedError, WorkloadError
from ttt_sim.lower.levels import link_to
from ttt_sim.lower.placement import far_names
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, Scenario, shard, stage_starts
from ttt_sim.ops import KIND, TEMPORARY_ROLES, IntArray, Role, Trace, total_by
from ttt_sim.units import ceil_div
from ttt_sim.workload import build_trace, find_method, state_per_sequence
from ttt_sim.workload.fast_state import value_columns

#: Kinds outside the layers that run on the last stage; all others there run on the first.
_LAST = ("final_norm", "lm_head", "allgather", "carry_append")
#: Norms, tables and buffers add less than this to parameters and state.
_ROUGH = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Bytes that one chip of a tensor-parallel group would hold of each part of a model, if it held all of it.

    ``parts``  (2, L + 2) frozen weights, and what sequences keep, of the embedding, each layer, and the head
    ``everywhere`` (2,) the same of what all stages hold
    """

    parts: IntArray
    everywhere: IntArray

    def by_stage(self, starts: Sequence[int], microbatches: int = 1) -> list[int]:
        """Bytes of each stage; ``starts`` as of :func:`ttt_sim.model.stage_starts`. Stages keep the state of all
        ``microbatches``."""
        times = np.array([1, microbatches], dtype=np.int64)
        parts, shared = times @ self.parts, int(times @ self.everywhere)
        ends = [0, *(start + 1 for start in starts), parts.size]
        return [int(parts[a:b].sum()) + shared for a, b in pairwise(ends)]


def holdings(trace: Trace, n_layers: int, *, pipelined: bool, near: bool = False) -> Holdings:
    """What the tensors of a trace that are there all the time take. ``pipelined``: the head has a table of its own;
    ``near``: without those that the workload wants behind the main memory, but with buffers that are used again."""
    parts = np.zeros((2, n_layers + 2), dtype=np.int64)
    everywhere = np.zeros(2, dtype=np.int64)
    names = {tensor.name for tensor in trace.tensors}
    far = set(far_names(trace)) if near else set()
    encoder_layers = sum(name.startswith("encoder.") and name.endswith(".norms.weight") for name in names)
    for tensor in trace.tensors:
        if tensor.name in far or (tensor.role in TEMPORARY_ROLES and not (near and tensor.in_place)):
            continue
        kept = int(tensor.role != Role.WEIGHT)
        first, _, rest = tensor.name.partition(".")
        if first == "layers":
            parts[kept, 1 + int(rest.partition(".")[0])] += tensor.nbytes
        elif first == "encoder" and rest.partition(".")[0].isdecimal():  # its layers lie beside those of the model
            parts[kept, 1 + int(rest.partition(".")[0]) * n_layers // encoder_layers] += tensor.nbytes
        elif first in ("encoder", "index"):  # of retrieval, before the first layer
            parts[kept, 0] += tensor.nbytes
        elif first == "embedding":
            parts[kept, 0] += tensor.nbytes
            if pipelined and "lm_head.weight" not in names:
                parts[kept, -1] += tensor.nbytes
        elif first in ("lm_head", "final_norm"):
            parts[kept, -1] += tensor.nbytes
        else:
            everywhere[kept] += tensor.nbytes
    return Holdings(parts=parts, everywhere=everywhere)


def microbatches_of(batch: int, parallel: Parallel) -> int:
    """Equal parts of a batch that follow each other through the stages: as many as there are stages, or fewer where
    that takes no longer. The last part may have places to spare, which are simulated as if they were filled."""
    return ceil_div(batch, ceil_div(batch, parallel.pp))


def tensor_parallel_sizes(model: Model) -> Iterator[int]:
    """Numbers of chips that can share the layers of ``model`` evenly."""
    for tp in range(1, model.n_heads + 1):
        try:
            shard(model, tp)
        except WorkloadError:
            continue
        yield tp


def least_system(
    chip: Chip,
    model: Model,
    methods: Sequence[MethodSettings],
    *,
    context_tokens: int = 1,
    batch: int = 1,
    rows: int = 1,
    dtype: str | None = None,
) -> Parallel | None:
    """The least number of chips that hold ``model`` and ``batch`` sequences of each of the methods; None if none do.

    They hold it in their main memories; where no number of chips does, one chip may use the memory behind its own.
    Room is left for activations of ``rows`` tokens of each sequence and for a delta and its scaled copy. Of equal
    numbers, the largest tensor-parallel group.
    """
    best: Parallel | None = None
    dtype = dtype or chip.default_dtype
    weights = tensor_bytes(model.parameters, dtype)
    states = [state_per_sequence(model, method, context_tokens, dtype=dtype) for method in methods]
    state = max(held.total_bytes - held.far_bytes for held in states)
    shared = max(held.shared_bytes for held in states)
    if (
        weights + shared + batch * (state + _room(chip, model, methods, rows, dtype))
    ) * _ROUGH <= chip.main_memory.capacity_bytes:
        return ONE_CHIP
    for tp in tensor_parallel_sizes(model):
        if best is not None and tp > best.chips:
            break
        scenario = Scenario.decode((max(context_tokens - 1, 0),), batch=batch, dtype=dtype, parallel=Parallel(tp=tp))
        traces = [build_trace(model, method, scenario) for method in methods]
        part = shard(model, tp)
        pp = _least_stages(
            chip.main_memory.capacity_bytes,
            part,
            batch,
            _room(chip, part, methods, rows, dtype),
            [holdings(trace, model.n_layers, pipelined=False, near=True) for trace in traces],
            [holdings(trace, model.n_layers, pipelined=True, near=True) for trace in traces],
        )
        found = None if pp is None else Parallel(tp=tp, pp=pp)
        if found is not None and (best is None or (found.chips, -found.tp) < (best.chips, -best.tp)):
            best = found if _linked(chip, found.chips) else best
    behind = chip.backing is not None and (weights + shared + batch * state) * _ROUGH <= chip.capacity_bytes
    return ONE_CHIP if best is None and behind else best


def _room(chip: Chip, part: Model, methods: Sequence[MethodSettings], rows: int, dtype: str) -> int:
    """Bytes of activations of one sequence on one chip, which holds ``part``; a little more than simulations take.

    Rows of the residual stream before and after norms and sums over chips, and of hidden rows that an update keeps;
    where a layer is several kernels, no less than the rows of attention (queries, keys and values, rotated ones, the
    output) or of the MLP (gate, up, hidden) beside two of the stream. A delta and its scaled copy, or the outer product
    that it is the projection of.
    """
    q, kv, d, f = part.n_heads * part.head_dim, part.n_kv_heads * part.head_dim, part.d_model, part.d_ff
    row = 5 * d + f
    if chip.mapping.fusion != "layer":
        row = max(row, 2 * d + max(3 * q + 4 * kv, 3 * f))
    delta_rows = 0
    for method in methods:
        if find_method(method.name).chunk_tokens(method) is None:
            continue
        if method.ttt is None:
            delta_rows = max(delta_rows, 2 * d)
        else:
            delta_rows = max(delta_rows, method.ttt.rows_of(part) + value_columns(part, method.ttt))
    return tensor_bytes(rows * row + delta_rows * f, dtype)


def _least_stages(
    capacity: int, part: Model, batch: int, room: int, alone: Sequence[Holdings], piped: Sequence[Holdings]
) -> int | None:
    """Least stages of which each fits ``capacity`` bytes, beside ``room`` for each sequence that is at work there.

    ``part``: what one chip of a tensor-parallel group holds of the model.
    """
    if all(max(held.by_stage(())) + batch * room <= capacity for held in alone):
        return 1
    fewest = max(ceil_div(int(held.parts.sum() + held.everywhere.sum()), capacity) for held in piped)
    for pp in range(max(fewest, 2), part.n_layers + 3):
        starts = stage_starts(part, pp)
        at_work = ceil_div(batch, microbatches_of(batch, Parallel(pp=pp)))
        if all(max(held.by_stage(starts)) + at_work * room <= capacity for held in piped):
            return pp
    return None


def _linked(chip: Chip, chips: int) -> bool:
    try:
        return chips == 1 or bool(link_to(chip, chips - 1))
    except UnsupportedError:
        return False


def arrange(
    model: Model, *, chips: int | None = None, tp: int | None = None, pp: int | None = None, cp: int | None = None
) -> Parallel:
    """The arrangement that the given numbers describe: of ``chips`` alone, the largest tensor-parallel group that
    divides them, and a pipeline of such groups.

    Raises:
        ConfigError: they contradict each other, or the chips cannot share the model.
    """
    for name, value in (("chips", chips), ("tp", tp), ("pp", pp), ("cp", cp)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} must be at least 1")
    known = (tp or 1) * (pp or 1) * (cp or 1)
    rest = 1
    if chips is not None:
        rest, left = divmod(chips, known)
        if left or (rest > 1 and tp is not None and pp is not None):
            given = " x ".join(f"{name} {value}" for name, value in (("tp", tp), ("pp", pp), ("cp", cp)) if value)
            raise ConfigError(f"chips: {chips} is not {given} = {known}")
    sizes = tuple(tensor_parallel_sizes(model))
    if tp is None:
        tp = max(size for size in sizes if rest % size == 0) if pp is None else rest
        pp = pp or rest // tp
    elif pp is None:
        pp = rest
    if tp not in sizes:
        near = ", ".join(map(str, sizes))
        raise ConfigError(f"tp: {tp} chips cannot share {model.name} evenly; numbers that can: {near}")
    if pp > model.n_layers + 2:
        stated = f"pp: {pp} stages" if chips is None else f"chips: {chips} would be {pp} stages"
        raise ConfigError(f"{stated}, but {model.name} has {model.n_layers + 2} parts: layers, embedding, head")
    if cp is not None and cp > model.max_context_tokens:
        raise ConfigError(
            f"cp: {cp} chips, but contexts of {model.name} have {model.max_context_tokens} tokens at most"
        )
    return Parallel(tp=tp, pp=pp, cp=cp or 1)


# --- the pace of a pipeline -------------------------------------------------------------------------------------------


def stage_cycles(trace: Trace, lead: IntArray, advance: IntArray, starts: Sequence[int]) -> IntArray:
    """Cycles of each step on each stage, (steps, stages), from those that each kernel accounts for (``advance``).

    ``lead``  first op of each kernel
    """
    last = np.isin(trace.kind[lead], [KIND[name] for name in _LAST]) & (trace.layer[lead] < 0)
    part = np.where(trace.layer[lead] >= 0, trace.layer[lead], np.where(last, np.iinfo(np.int64).max, -1))
    stage = np.searchsorted(np.array(starts, dtype=np.int64), part, side="right")
    n_steps, n_stages = int(trace.step.max()) + 1, len(starts) + 1
    return total_by(trace.step[lead] * n_stages + stage, advance, n_steps * n_stages).reshape(n_steps, n_stages)


def pipeline_cycles(stages: IntArray, microbatches: int) -> int:
    """Time in which all calls (rows of ``stages``) of all microbatches pass the stages, one at a time in each."""
    free = [0] * stages.shape[1]
    for call in stages.tolist():
        for _ in range(microbatches):
            ready = 0
            for stage, cycles in enumerate(call):
                ready = free[stage] = max(free[stage], ready) + cycles
    return free[-1]


def period_cycles(step_cycles: IntArray, stages: IntArray, microbatches: int) -> IntArray:
    """Time between two tokens of a sequence, by step: its way through all stages, or the time in which the slowest
    stage serves every microbatch."""
    slowest: IntArray = stages.max(axis=1) * microbatches
    return np.maximum(step_cycles, slowest)
