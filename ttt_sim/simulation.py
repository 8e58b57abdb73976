"""One trace on one chip, and one *point*: a model, a method and a phase at one context length, as a flat record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from ttt_sim.bounds import check
from ttt_sim.chip import Chip
from ttt_sim.engine import run
from ttt_sim.errors import CapacityError, ConservationError, UnsupportedError, WorkloadError
from ttt_sim.intervals import ANY_OP, interval
from ttt_sim.lower import DEFAULT_DETAIL, find_mapper, lower
from ttt_sim.lower.spill import with_host_memory
from ttt_sim.lower.writes import check_mode
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, Scenario, shard, stage_starts
from ttt_sim.ops import KIND, OP_KINDS, IntArray, Trace, persistent_bytes, total_by
from ttt_sim.power import throttled_seconds
from ttt_sim.results import FloatArray, Result
from ttt_sim.system import holdings, least_system, microbatches_of, period_cycles, pipeline_cycles, stage_cycles
from ttt_sim.units import ceil_div, format_bytes
from ttt_sim.update_cost import update_record
from ttt_sim.workload import build_trace, find_method, state_of_context, state_per_sequence
from ttt_sim.workload.fast_state import CONV_TAPS
from ttt_sim.workload.method import PhaseName

#: Phases that every method has and that grids go through.
PHASES: tuple[PhaseName, ...] = ("prefill", "decode")

#: New tokens per sequence in one prefill call. Serving engines cut long prompts into calls of this order so that
#: activations stay small; it is a multiple of the usual chunk sizes.
DEFAULT_CALL_TOKENS = 8192
#: A question about a context, in tokens.
DEFAULT_QUESTION_TOKENS = 128


def simulate_trace(
    chip: Chip,
    trace: Trace,
    *,
    engine: str = "compiled",
    detail: int = DEFAULT_DETAIL,
    overlap: bool = True,
    compare_engines: bool = False,
    held_bytes: Sequence[int] = (),
) -> Result:
    """Lower ``trace`` to ``chip``, run it, hold it against the conservation laws.

    ``compare_engines`` runs the other engine too and demands the same cycles for every task.

    What does not fit the main memory is spilled, if there is a backing memory: how much is known only when activations
    have been placed in time, so more is spilled until the main memory holds the rest. Each round spills more, and none
    more than all weights and state. Whether the backing memory has room for it is left to the caller. ``held_bytes``:
    weights and state of each of the chips that the trace stands for, if not one; the trace spills the share of its own
    that they spill of theirs.

    Raises:
        ConfigError, CapacityError: the chip cannot run the trace.
        ConservationError: the simulation broke a law, or the engines differ.
    """
    chip = with_host_memory(chip, trace)
    spilled = _excess(trace, chip, held_bytes, temporary=0)
    while True:
        lowered = lower(trace, chip, detail=detail, overlap=overlap, spill_bytes=spilled)
        timeline = run(lowered.program, engine)
        result = Result(chip=chip, trace=trace, lowered=lowered, timeline=timeline)
        excess = (
            0 if chip.backing is None else _excess(trace, chip, held_bytes, temporary=result.peak_temporary_bytes())
        )
        if excess <= spilled:
            break
        spilled = excess
    if compare_engines:
        other = "simpy" if engine == "compiled" else "compiled"
        again = run(lowered.program, other)
        differ = (timeline.start_cycles != again.start_cycles) | (timeline.finish_cycles != again.finish_cycles)
        if differ.any():
            task = int(np.argmax(differ))
            raise ConservationError(
                f"engines differ at task {task}: {engine} starts it at {timeline.start_cycles[task]}, "
                f"{other} at {again.start_cycles[task]}"
            )
    check(trace, chip, lowered, timeline)
    return result


def _excess(trace: Trace, chip: Chip, held_bytes: Sequence[int], *, temporary: int) -> int:
    """Bytes of weights and state of the trace that the main memory cannot hold beside ``temporary`` bytes."""
    own, room = persistent_bytes(trace), chip.main_memory.capacity_bytes
    if chip.backing is None or not own:
        return 0
    held = held_bytes or (own,)
    over = sum(max(nbytes + temporary - room, 0) for nbytes in held)
    return min(ceil_div(over * own, sum(held)), own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What to simulate. ``context_tokens``: prompt length (prefill), tokens that were taken in (ask, decode), tokens of
    each sequence that is trained on (train), or of the documents (index). ``question_tokens``: of a question (ask).

    Decode stands for the next ``chunk_tokens`` tokens, of which a few steps are simulated; see :func:`decode_plan`.
    """

    chip: Chip
    model: Model
    method: MethodSettings
    phase: PhaseName
    context_tokens: int
    batch: int = 1
    dtype: str = "bf16"
    chunk_tokens: int = 1024
    call_tokens: int = DEFAULT_CALL_TOKENS
    question_tokens: int = DEFAULT_QUESTION_TOKENS
    engine: str = "compiled"
    detail: int = DEFAULT_DETAIL
    overlap: bool = True
    compare_engines: bool = False
    parallel: Parallel = ONE_CHIP

    @property
    def microbatches(self) -> int:
        """Parts of the batch that follow each other through a pipeline."""
        return microbatches_of(self.batch, self.parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Decode steps to simulate and how often each stands for a step of the span.

    The span is ``span_tokens`` consecutive steps. A step costs an affine function of its position between breakpoints
    (the cache and the carry grow by one row a step), so the two ends of a run of steps stand for half of it each. The
    step that completes a chunk and the one after it, which the update may hold up, stand for themselves.

    Steps of weight 0 are simulated for their neighbours: the step before the span fills the caches, the step after it
    overwrites what else would have to leave them, and the two steps after a chunk tell how long the update holds up
    the first of them.
    ``twice_weights`` are integers: twice the number of steps that a step stands for.
    """

    positions: tuple[int, ...]
    twice_weights: tuple[int, ...]
    span_tokens: int
    boundary: int | None  # index of the step that completes a chunk


def decode_plan(
    context_tokens: int,
    *,
    span_tokens: int,
    chunk_tokens: int | None,
    window_tokens: int | None,
    uneven_tokens: int = 1,
) -> DecodePlan:
    """Steps for decoding ``span_tokens`` tokens after ``context_tokens``.

    ``chunk_tokens`` None: no chunk boundary matters. ``window_tokens``: where a window fills up, growth stops.
    ``uneven_tokens``: steps at the start of a chunk that stand for themselves.
    """
    first, end = context_tokens, context_tokens + span_tokens
    weights: dict[int, int] = {}

    def add(position: int, twice: int) -> None:
        weights[position] = weights.get(position, 0) + twice

    cuts = {first, end}
    boundaries: list[int] = []
    if chunk_tokens is not None:
        completing = [p for p in range(first - uneven_tokens, end) if (p + 1) % chunk_tokens == 0]
        boundaries = [p for p in completing if p >= first]
        alone = {p + i for p in completing for i in range(uneven_tokens + 1)}
        cuts |= {p for step in alone for p in (step, step + 1) if first < p < end}
    if window_tokens is not None and first < window_tokens - 1 < end:
        cuts.add(window_tokens - 1)
    for begin, stop in pairwise(sorted(cuts)):
        add(begin, stop - begin)
        add(stop - 1, stop - begin)
    beside = {p for p in (first - 1, end) if p >= 0} | {p + i for p in boundaries for i in (1, 2)}
    for p in beside:
        add(p, 0)
    positions = tuple(sorted(weights))
    return DecodePlan(
        positions=positions,
        twice_weights=tuple(weights[p] for p in positions),
        span_tokens=span_tokens,
        boundary=positions.index(boundaries[0]) if boundaries else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """A point's flat record, the cycles by kernel label, and the full result (None when the point does not fit).

    ``step_weights`` (n_steps,): what each simulated step counts for in the record; decode steps stand for a whole span.
    """

    point: Point
    record: Mapping[str, object]
    cycles_by_kernel: Mapping[str, float] = field(default_factory=dict)
    step_weights: FloatArray = field(default_factory=lambda: np.zeros(0))
    result: Result | None = None

    def mean_cycles(self, result: Result) -> float:
        """Cycles of the mean decode step, or of all calls of another phase, in a simulation of this point's trace."""
        if self.point.phase != "decode":
            return float(prefill_cycles(self.point, result))
        return float((step_cycles(self.point, result) * self.step_weights).sum())

    def mean_seconds(self, result: Result) -> float:
        """Seconds of the same, throttled where the chip of ``result`` would draw more than its limit."""
        dynamic = sum(float((values * self.step_weights).sum()) for values in result.dynamic_energy_j().values())
        dynamic *= self.point.microbatches / self.point.parallel.pp  # of the mean chip
        return throttled_seconds(result.chip, self.mean_cycles(result) / result.chip.clock_hz, dynamic)


def _scenario(point: Point) -> tuple[Scenario, DecodePlan | None]:
    """The calls that a point simulates, of one microbatch, and for decode what each stands for."""
    batch = ceil_div(point.batch, point.microbatches)
    method = find_method(point.method.name)
    if point.phase not in method.phases:
        raise WorkloadError(
            f"phase is {point.phase!r}, which method {method.name} does not have; phases: {', '.join(method.phases)}"
        )
    if point.phase == "train":
        step = method.step_call(point.method, point.context_tokens)
        scenario = Scenario(batch=batch, dtype=point.dtype, calls=(step,), parallel=point.parallel, task="train")
        return scenario, None
    if point.phase in ("prefill", "index"):
        scenario = Scenario.prefill(
            point.context_tokens, batch=batch, dtype=point.dtype, call_tokens=point.call_tokens,
            parallel=point.parallel,
        )  # fmt: skip
        return replace(scenario, task="index" if point.phase == "index" else "infer"), None
    held = method.held_tokens(point.method, point.context_tokens)
    if point.phase == "ask":
        scenario = Scenario.ask(held, point.question_tokens, batch=batch, dtype=point.dtype, parallel=point.parallel)
        return replace(scenario, taken_tokens=point.context_tokens), None
    ttt, chunk = point.method.ttt, method.chunk_tokens(point.method)
    plan = decode_plan(
        held,
        span_tokens=chunk or point.chunk_tokens,
        chunk_tokens=chunk,
        window_tokens=point.method.kv.window_tokens,
        uneven_tokens=CONV_TAPS - 1 if ttt is not None and ttt.carry == "online" else method.uneven_tokens,
    )
    scenario = Scenario.decode(plan.positions, batch=batch, dtype=point.dtype, parallel=point.parallel)
    return replace(scenario, taken_tokens=point.context_tokens), plan


def held_bytes(point: Point, trace: Trace) -> list[int]:
    """Weights and state of a chip of each pipeline stage, of all microbatches; ``trace`` is of one of them."""
    starts = _starts(point)
    held = holdings(trace, point.model.n_layers, pipelined=bool(starts))
    return held.by_stage(starts, point.microbatches)


def prefill_cycles(point: Point, result: Result) -> int:
    """Cycles of a whole prefill, of all microbatches; ``result`` is of one of them."""
    if point.parallel.pp == 1:
        return result.cycles
    return pipeline_cycles(_stage_cycles(point, result), point.microbatches)


def step_cycles(point: Point, result: Result) -> IntArray:
    """Cycles between two tokens of a sequence, by step of ``result``, which is of one microbatch."""
    cycles: IntArray = np.diff(result.step_finish_cycles(), prepend=0)
    if point.parallel.pp == 1:
        return cycles
    return period_cycles(cycles, _stage_cycles(point, result), point.microbatches)


def _starts(point: Point) -> tuple[int, ...]:
    return stage_starts(shard(point.model, point.parallel.tp), point.parallel.pp)


def _stage_cycles(point: Point, result: Result) -> IntArray:
    return stage_cycles(result.trace, result.lowered.kernels.lead, result.kernel_advance(), _starts(point))


def simulate_point(point: Point) -> PointResult:
    """Simulate one point. A point that does not fit, or needs what the chip does not have, is a record with ``fits``
    False and ``reason`` or ``missing`` that says why, not an error."""
    find_mapper(point.chip)
    record = _identity(point)
    try:
        scenario, plan = _scenario(point)
        trace = build_trace(point.model, point.method, scenario)
        point = replace(point, chip=with_host_memory(point.chip, trace))
        check_mode(trace, point.chip)  # before anything is found not to fit
    except UnsupportedError as error:
        return PointResult(point=point, record=record | {"missing": str(error)})
    capacity = point.chip.capacity_bytes
    held = held_bytes(point, trace)
    persistent = max(held)
    if persistent > capacity:
        return PointResult(point=point, record=_does_not_fit(point, record, persistent, "weights and state"))
    try:
        result = simulate_trace(
            point.chip, trace, engine=point.engine, detail=point.detail, overlap=point.overlap,
            compare_engines=point.compare_engines, held_bytes=held,
        )  # fmt: skip
    except UnsupportedError as error:
        return PointResult(point=point, record=record | {"missing": str(error)})
    except CapacityError as error:
        return PointResult(point=point, record=_does_not_fit(point, record, persistent, str(error)))
    temporary, room = result.peak_temporary_bytes(), point.chip.main_memory.capacity_bytes
    peak = persistent + temporary
    if peak > capacity:
        return PointResult(point=point, record=_does_not_fit(point, record, peak, "weights, state and activations"))
    if temporary > room:
        return PointResult(point=point, record=_does_not_fit(point, record, temporary, "activations", room))

    steps = int(trace.step.max()) + 1
    around: dict[str, float] = {}  # cycles of steps that decode names
    advance = result.kernel_advance()
    # the trace is one chip's part of one microbatch
    parts = point.parallel.tp * point.parallel.cp * point.microbatches
    if plan is None:
        twice = np.full(steps, 2, dtype=np.int64)
        new = {"ask": point.question_tokens, "train": scenario.calls[0].tokens}.get(point.phase, point.context_tokens)
        tokens, span = point.batch * new, 1
        twice_cycles = 2 * prefill_cycles(point, result)
    else:
        twice = np.array(plan.twice_weights, dtype=np.int64)
        tokens, span = point.batch, plan.span_tokens
        by_step = step_cycles(point, result)
        twice_cycles = int((twice * by_step).sum())
        if plan.boundary is not None:
            b = plan.boundary
            boundary = int(by_step[b] + max(by_step[b + 1] - by_step[b + 2], 0))
            ordinary = (twice_cycles / 2 - boundary) / max(span - 1, 1)
            around = {"boundary_step_seconds": boundary, "ordinary_step_seconds": ordinary}
    # Totals over the span, then per call (prefill) or per step (decode); of all chips.
    cycles = ceil_div(twice_cycles, 2 * span)
    chips = point.parallel.chips
    energy = {name: parts * _mean(values, twice, span) for name, values in result.dynamic_energy_j().items()}
    dynamic = sum(energy.values())
    counted = twice_cycles / (2 * span) / point.chip.clock_hz
    seconds = throttled_seconds(point.chip, counted, dynamic / chips)
    stretch = seconds / counted
    record |= {name: n / point.chip.clock_hz * stretch for name, n in around.items()}
    record |= {"fits": True, "cycles": cycles, "seconds": seconds, "tokens": tokens}
    record |= {"unthrottled_seconds": counted, "throttled": seconds > counted}
    record |= {"seconds_per_token": seconds / tokens, "tokens_per_s": tokens / seconds}
    record |= _weighted(result, twice, span, tokens, parts)
    spent = {f"energy_{name}_j": value for name, value in energy.items()}
    spent["idle_energy_j"] = chips * point.chip.power.idle_w * seconds
    spent["energy_j"] = dynamic + spent["idle_energy_j"]
    record |= {
        "peak_memory_bytes": peak,
        "spilled_bytes": max(peak - room, 0) if point.parallel.pp > 1 else result.spilled_bytes,
        **spent,
        **{f"{name}_per_token": value / tokens for name, value in spent.items()},
        "average_power_w": spent["energy_j"] / seconds,
        "power_limit_w": chips * point.chip.power.limit_w,
    }
    record |= update_record(
        result, twice / (2 * span), batch=ceil_div(point.batch, point.microbatches), seconds=seconds,
        cycle_s=stretch / point.chip.clock_hz, shards=point.parallel.tp,
        copies=point.batch / ceil_div(point.batch, point.microbatches) * (point.parallel.cp if plan is None else 1),
    )  # fmt: skip
    rent, price = point.chip.price.per_hour_usd, point.chip.price.purchase_usd
    record["cost_usd_per_million_tokens"] = None if rent is None else chips * rent / 3600 * seconds / tokens * 1e6
    record["purchase_usd"] = None if price is None else chips * price
    twice_advance = advance * twice[trace.step[result.lowered.kernels.lead]]
    record |= _error_bar(point, result, twice_advance, seconds)
    by_kernel = _cycles_by_kernel(result, twice_advance, span)
    record |= _bound(result, twice_advance)
    record |= {"n_ops": trace.n_ops, "n_kernels": result.lowered.kernels.n, "n_tasks": result.lowered.program.n_tasks}
    return PointResult(
        point=point, record=record, cycles_by_kernel=by_kernel, step_weights=twice / (2 * span), result=result
    )


def call_tokens(point: Point) -> int:
    """Most tokens of a sequence that one call of a point takes."""
    method, asked = find_method(point.method.name), point.question_tokens
    step = method.step_call(point.method, point.context_tokens)
    if method.adapts == "index":  # what was found is read with the question
        asked = min(asked + method.held_tokens(point.method, point.context_tokens), DEFAULT_CALL_TOKENS)
    longest = {"decode": 1, "ask": asked, "train": step.tokens}
    return longest.get(point.phase, point.call_tokens)


def rows_at_once(point: Point) -> int:
    """Most rows of a sequence that one call computes with: its tokens, or the whole chunk that a decode step runs the
    MLP or fast weights on again."""
    ttt, chunk = point.method.ttt, find_method(point.method.name).chunk_tokens(point.method)
    if point.phase == "decode" and chunk is not None and (ttt is None or ttt.carry in ("official", "ring")):
        return chunk
    return min(point.context_tokens, call_tokens(point))


def _identity(point: Point) -> dict[str, object]:
    """Fields that say what was simulated, and the state that it keeps per sequence."""
    kept = state_of_context if point.phase in ("ask", "decode") else state_per_sequence
    state = kept(point.model, point.method, point.context_tokens, point.dtype)
    return {
        "chip": point.chip.name,
        "variant": point.chip.variant,
        "model": point.model.name,
        "method": point.method.name,
        "phase": point.phase,
        "context_tokens": point.context_tokens,
        "batch": point.batch,
        "dtype": point.dtype,
        "kv_dtype": point.method.kv.dtype,
        "chunk_tokens": find_method(point.method.name).chunk_tokens(point.method),
        "window_tokens": point.method.kv.window_tokens,
        "call_tokens": call_tokens(point),
        "chips": point.parallel.chips,
        "tp": point.parallel.tp,
        "pp": point.parallel.pp,
        "cp": point.parallel.cp,
        "microbatches": point.microbatches,
        "engine": point.engine,
        "overlap": point.overlap,
        "state_bytes_per_sequence": state.total_bytes,
        "state_kv_bytes": state.kv_bytes,
        "state_fast_weight_bytes": state.fast_weight_bytes,
        "state_carry_bytes": state.carry_bytes,
        "fits": False,
        "reason": "",
        "missing": "",
        "bytes_needed": None,
        "chips_needed": point.parallel.chips,
        "cycles": None,
        "seconds": None,
    }


def _does_not_fit(
    point: Point, record: dict[str, object], needed: int, what: str, capacity: int | None = None
) -> dict[str, object]:
    """``needed``: bytes on the fullest chip. ``chips_needed``: those of the least larger system found, else at least
    that many. ``capacity`` of one chip for what is needed; its main and backing memory if not said."""
    capacity = point.chip.capacity_bytes if capacity is None else capacity
    least = None if point.phase == "train" else least_system(
        point.chip, point.model, [point.method], context_tokens=point.context_tokens, batch=point.batch,
        rows=rows_at_once(point), dtype=point.dtype,
    )  # fmt: skip
    here = point.parallel.chips
    chips = least.chips if least is not None and least.chips > here else ceil_div(needed, capacity) * here
    reason = f"{what} need {format_bytes(needed)} of {format_bytes(capacity)}" if needed > capacity else what
    if least is None and point.phase != "train":
        reason += "; no number of linked chips holds it"
    return record | {
        "fits": False,
        "reason": reason,
        "bytes_needed": needed,
        "chips_needed": chips,
    }


def _mean(values: FloatArray, twice: IntArray, span: int) -> float:
    return float((values * twice).sum()) / (2 * span)


def _weighted(result: Result, twice: IntArray, span: int, tokens: int, parts: int) -> dict[str, object]:
    """Bytes and operations of the mean step, on all chips: ``parts`` times those of the trace."""
    trace = result.trace
    out: dict[str, object] = {}
    for column in ("flops", "vector_ops"):
        per_step = total_by(trace.step, getattr(trace, column), twice.size)
        out[column] = parts * _mean(per_step.astype(np.float64), twice, span)
    totals = {"read": 0.0, "write": 0.0}
    for (direction, name), per_step in result.main_bytes().items():
        value = parts * _mean(per_step.astype(np.float64), twice, span)
        out[f"{direction}_{name}_bytes"] = value
        totals[direction] += value
    out["main_read_bytes"], out["main_write_bytes"] = totals["read"], totals["write"]
    for direction, per_step in result.far_bytes().items():
        out[f"far_{direction}_bytes"] = parts * _mean(per_step.astype(np.float64), twice, span)
    out["main_bytes_per_token"] = (totals["read"] + totals["write"]) / tokens
    return out


def _cycles_by_kernel(result: Result, twice_advance: IntArray, span: int) -> dict[str, float]:
    """Cycles of the mean step by kernel label; they add up to the step."""
    index, names = result.label_index()
    total = total_by(index, twice_advance, len(names))
    return {name: cycles / (2 * span) for name, cycles in zip(names, total.tolist(), strict=True)}


#: Kinds of op of which no published measurement is used (docs/validation.md): all but those of a plain transformer and
#: of measured rows.
UNMEASURED_KINDS: tuple[str, ...] = (
    *(kind.name for kind in OP_KINDS if kind.spec[0] not in "FMP"), "fast_apply", "delta_sum", "delta_scan",
    "state_join", "state_read",
)  # fmt: skip


def _error_bar(point: Point, result: Result, twice_advance: IntArray, seconds: float) -> dict[str, object]:
    """80 % interval of the time: that of whole models, widened by the share of kernels that nobody has measured."""
    own = np.isin(result.trace.kind[result.lowered.kernels.lead], [KIND[name] for name in UNMEASURED_KINDS])
    share = int(twice_advance[own].sum()) / max(int(twice_advance.sum()), 1)
    known = interval("e2e_decode_step" if point.phase == "decode" else "e2e_prefill", seconds * 1e6, point.chip)
    low = (1 - share) * known.low + share * min(known.low, ANY_OP.low)
    high = (1 - share) * known.high + share * max(known.high, ANY_OP.high)
    return {"seconds_low": seconds * low, "seconds_high": seconds * high, "unmeasured_share": share}


def _bound(result: Result, twice_advance: IntArray) -> dict[str, object]:
    """The unit that bounds the kernels which take most of the mean step, and the share of time that they take."""
    by_unit: dict[str, int] = {}
    for unit, cycles in zip(result.bound_by(), twice_advance.tolist(), strict=True):
        by_unit[unit] = by_unit.get(unit, 0) + cycles
    unit = max(sorted(by_unit), key=lambda name: by_unit[name])
    return {"bound_by": unit, "bound_share": by_unit[unit] / max(sum(by_unit.values()), 1)}
