"""The main job: a grid of points on one chip, headline points in depth, crossovers, sensitivities; everything a
report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from ttt_sim.bounds import critical_path
from ttt_sim.chip import Chip, MemoryLevel
from ttt_sim.crossover import crossover_table
from ttt_sim.engine import prepare
from ttt_sim.errors import CapacityError
from ttt_sim.grid import make_point, method_on, weight_bytes
from ttt_sim.lower.kernels import STREAMS
from ttt_sim.model import ONE_CHIP, Model, Parallel, Scenario, TTTSettings, WeightWrite
from ttt_sim.ops import Phase, is_update
from ttt_sim.parallel import Progress, run_all
from ttt_sim.program import TASK_KINDS
from ttt_sim.report.data import ReportData
from ttt_sim.results import Result
from ttt_sim.simulation import (
    PHASES,
    Point,
    PointResult,
    held_bytes,
    simulate_point,
    simulate_trace,
    step_cycles,
)
from ttt_sim.units import ceil_div
from ttt_sim.workload import build_trace, state_per_sequence

if TYPE_CHECKING:
    import pandas as pd

#: Change of a chip parameter in a sensitivity run.
SENSITIVITY_STEP = 0.10
#: Longest context of the headline points: long enough for the trade to show, short enough to fit.
HEADLINE_CONTEXT_TOKENS = 32768
#: Decode steps shown on either side of a chunk boundary.
STEPS_AROUND_BOUNDARY = 6
#: Prompt over which the ways to write a weight are compared.
VARIANT_CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What ``run`` simulates: the full grid of methods, phases, contexts and batches on one chip and model."""

    chip: Chip
    model: Model
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    ttt: TTTSettings
    window: int
    dtype: str
    kv_dtype: str | None
    call_tokens: int
    engine: str
    detail: int
    overlap: bool
    sensitivity: bool
    workers: int | None
    parallel: Parallel = ONE_CHIP

    def points(self) -> list[Point]:
        """The grid, in the order of its records."""
        return [
            make_point(
                self.chip, self.model, method, phase=phase, context=context, batch=batch, window=self.window,
                ttt=self.ttt, kv_dtype=self.kv_dtype, dtype=self.dtype, call_tokens=self.call_tokens,
                engine=self.engine, detail=self.detail, overlap=self.overlap, parallel=self.parallel,
            )
            for method in self.methods
            for phase in PHASES
            for batch in self.batches
            for context in self.contexts
        ]  # fmt: skip

    def headline(self) -> tuple[int, int]:
        """(context, batch) that is looked at closely: the longest context up to 32K tokens, the middle batch."""
        short = [context for context in self.contexts if context <= HEADLINE_CONTEXT_TOKENS] or [min(self.contexts)]
        return max(short), self.batches[len(self.batches) // 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Depth:
    """What a headline point adds to its record."""

    roofline: list[dict[str, object]]
    critical_path: list[dict[str, object]]
    sensitivity: list[dict[str, object]]
    chunk_timeline: list[dict[str, object]]
    step_times: list[dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    record: Mapping[str, object]
    cycles_by_kernel: Mapping[str, float]
    depth: _Depth | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Runs one point in a worker; headline points in depth."""

    headline: frozenset[tuple[str, str, int, int]]
    sensitive: bool

    def __call__(self, point: Point) -> _Outcome:
        result = simulate_point(point)
        key = (point.method.name, point.phase, point.context_tokens, point.batch)
        depth = None
        if result.result is not None:
            headline = key in self.headline
            sensitivity = _sensitivity(result) if headline or self.sensitive else []
            if headline or sensitivity:
                depth = _in_depth(result, headline=headline, sensitivity=sensitivity)
        return _Outcome(record=result.record, cycles_by_kernel=result.cycles_by_kernel, depth=depth)


def run_experiment(
    experiment: Experiment, *, command: str, version: str, progress: Progress | None = None
) -> ReportData:
    """Simulate everything and gather it.

    Raises:
        ConfigError, WorkloadError: the chip cannot run a method, or the scenario is impossible.
        ConservationError: a simulation broke a law, or the two engines disagree on a sampled point.
    """
    import pandas as pd

    points = experiment.points()
    prefill = _PrefillRecords(points)
    context, batch = experiment.headline()
    headline = frozenset((method, phase, context, batch) for method in experiment.methods for phase in PHASES)
    points = _compare_some(points, experiment)
    prepare(experiment.engine)
    task = _Task(headline=headline, sensitive=experiment.sensitivity)
    outcomes = run_all(task, points, workers=experiment.workers, progress=progress)
    records = pd.DataFrame([outcome.record for outcome in outcomes])
    breakdown = [
        {**_key(point), "kernel": label, "cycles": cycles}
        for point, outcome in zip(points, outcomes, strict=True)
        for label, cycles in outcome.cycles_by_kernel.items()
    ]
    depths = [outcome.depth for outcome in outcomes if outcome.depth is not None]

    def gather(name: str) -> pd.DataFrame:
        return pd.DataFrame([row for depth in depths for row in getattr(depth, name)])

    compared = [
        f"{p.method.name} {p.phase} at {p.context_tokens} tokens, batch {p.batch}"
        for p, outcome in zip(points, outcomes, strict=True)
        if p.compare_engines and outcome.record["fits"]
    ]
    return ReportData.of(
        provenance={
            "ttt_sim_version": version,
            "command": command,
            "chip": experiment.chip.name,
            "chip_title": experiment.chip.title,
            "variant": experiment.chip.variant,
            "chip_file_sha256": experiment.chip.file_sha256,
            "chip_overrides": dict(experiment.chip.overrides),
            "parallel": asdict(experiment.parallel),
            "model": experiment.model.name,
            "dtype": experiment.dtype,
            "ttt": asdict(experiment.ttt),
            "ttt_layers": list(experiment.ttt.layers_of(experiment.model)),
            "engine": experiment.engine,
            "detail": experiment.detail,
            "overlap": experiment.overlap,
            "call_tokens": experiment.call_tokens,
            "engines_compared_on": compared,
        },
        chip=experiment.chip,
        weight_bytes=weight_bytes(points[0]),
        points=records,
        breakdown=pd.DataFrame(breakdown),
        state=pd.DataFrame(_state_curves(experiment)),
        crossovers=crossover_table(
            experiment.model,
            {p.method.name: p.method for p in points},
            records,
            dtype=experiment.dtype,
            prefill=prefill,
            parallel=experiment.parallel,
        ),
        roofline=gather("roofline"),
        critical_path=gather("critical_path"),
        sensitivity=gather("sensitivity"),
        chunk_timeline=gather("chunk_timeline"),
        step_times=gather("step_times"),
        write_variants=pd.DataFrame(_write_variants(experiment)),
        notes=_notes(experiment),
    )


def _notes(experiment: Experiment) -> list[str]:
    """What a reader must know beside the numbers."""
    limit, longest = experiment.model.max_context_tokens, max(experiment.contexts)
    if longest <= limit:
        return []
    return [
        f"the configuration of {experiment.model.name} names {limit:,} positions; contexts up to {longest:,} tokens "
        "are simulated as if it were extended (by rescaled rotary positions, say), which costs the same"
    ]


class _PrefillRecords:
    """Records of further prefill points, simulated when asked for and kept."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = {(p.method.name, p.batch): p for p in points if p.phase == "prefill"}
        self._records: dict[tuple[str, int, int], Mapping[str, object]] = {}

    def __call__(self, method: str, batch: int, context: int) -> Mapping[str, object]:
        key = (method, batch, context)
        if key not in self._records:
            point = replace(self._points[method, batch], context_tokens=context, compare_engines=False)
            self._records[key] = simulate_point(point).record
        return self._records[key]


def _key(point: Point) -> dict[str, object]:
    return {
        "method": point.method.name, "phase": point.phase, "context_tokens": point.context_tokens, "batch": point.batch,
    }  # fmt: skip


def _compare_some(points: Sequence[Point], experiment: Experiment) -> list[Point]:
    """Mark a sample of points for a second simulation in the other engine.

    The shortest context and smallest batch of the first and the last method, in both phases.
    """
    if experiment.engine == "simpy":
        return list(points)
    context, batch = min(experiment.contexts), min(experiment.batches)
    ends = dict.fromkeys((experiment.methods[-1], experiment.methods[0]))
    chosen = [(method, phase) for method in ends for phase in PHASES]
    return [
        replace(
            point,
            compare_engines=(point.method.name, point.phase) in chosen
            and (point.context_tokens, point.batch) == (context, batch),
        )
        for point in points
    ]


# --- headline points
# ------------------------------------------------------------------------------------------------------


def _in_depth(outcome: PointResult, *, headline: bool, sensitivity: list[dict[str, object]]) -> _Depth:
    result, point = outcome.result, outcome.point
    assert result is not None
    if not headline:
        return _Depth(roofline=[], critical_path=[], sensitivity=sensitivity, chunk_timeline=[], step_times=[])
    is_ttt = point.method.ttt is not None
    return _Depth(
        roofline=_roofline(outcome, result),
        critical_path=_critical_path(outcome, result),
        sensitivity=sensitivity,
        chunk_timeline=_chunk_timeline(point, result) if is_ttt and point.phase == "prefill" else [],
        step_times=_steps_around_boundary(outcome) if point.phase == "decode" else [],
    )


def _roofline(outcome: PointResult, result: Result) -> list[dict[str, object]]:
    """FLOPs, main-memory bytes, cycles accounted for and cycles from start to finish, by kernel label.

    Of a decode point these are the figures of the mean step.
    """
    work, stream = result.lowered.work, result.lowered.kernels.stream
    start, finish = result.kernel_span()
    index, labels = result.label_index()
    group = index * len(STREAMS) + stream
    weight = outcome.step_weights[result.trace.step[result.lowered.kernels.lead]]
    columns = {
        "flops": work.flops,
        "main_bytes": work.main_read_bytes + work.main_write_bytes,
        "cycles": result.kernel_advance(),
        "span_cycles": finish - start,
        "n_kernels": np.ones_like(stream),
    }
    n_groups = len(labels) * len(STREAMS)
    sums = {name: np.bincount(group, weight * values, minlength=n_groups) for name, values in columns.items()}
    return [
        {
            **_key(outcome.point),
            "kernel": labels[g // len(STREAMS)],
            "stream": STREAMS[g % len(STREAMS)],
            **{name: float(values[g]) for name, values in sums.items()},
        }
        for g in np.unique(group).tolist()
    ]


def _critical_path(outcome: PointResult, result: Result) -> list[dict[str, object]]:
    """Cycles of the critical path by unit; of a decode point, those of the mean step."""
    program, timeline = result.lowered.program, result.timeline
    path = critical_path(program, timeline)
    weight = outcome.step_weights[result.trace.step[result.lowered.kernels.lead[program.op[path]]]]
    cycles = np.bincount(
        program.unit[path],
        weight * (timeline.finish_cycles[path] - timeline.start_cycles[path]),
        minlength=program.n_units,
    )
    total = max(float(cycles.sum()), 1.0)
    return [
        {**_key(outcome.point), "unit": unit, "cycles": c, "share_frac": c / total}
        for unit, c in zip(program.unit_names, cycles.tolist(), strict=True)
        if c
    ]


def _chunk_timeline(point: Point, result: Result) -> list[dict[str, object]]:
    """Tasks of the last chunk of one TTT layer in the first call, until its weight is written, and what runs beside.

    The last chunk of a call is shown because its update can overlap the layers that follow.
    """
    trace, program, timeline = result.trace, result.lowered.program, result.timeline
    kernels = result.lowered.kernels
    writes = np.flatnonzero((trace.phase == int(Phase.WEIGHT_WRITE)) & (trace.chunk >= 0) & (trace.step == 0))
    if not writes.size:
        return []
    layers = np.unique(trace.layer[writes])
    layer = int(layers[layers.size // 2])
    chunk = int(trace.chunk[writes[trace.layer[writes] == layer]].max())
    mine = (trace.layer == layer) & (trace.chunk == chunk)
    own = np.isin(program.op, np.unique(kernels.of_op[mine]))
    begin, end = int(timeline.start_cycles[own].min()), int(timeline.finish_cycles[own].max())
    shown = np.flatnonzero((timeline.finish_cycles > begin) & (timeline.start_cycles < end))
    index, labels = result.label_index()
    rows: list[dict[str, object]] = []
    for task in shown.tolist():
        kernel = int(program.op[task])
        lead = int(kernels.lead[kernel])
        rows.append(
            {
                "method": point.method.name,
                "context_tokens": point.context_tokens,
                "batch": point.batch,
                "unit": program.unit_names[int(program.unit[task])],
                "stream": STREAMS[int(kernels.stream[kernel])],
                "kernel": labels[index[kernel]],
                "kind": TASK_KINDS[int(program.kind[task])],
                "start_cycles": int(timeline.start_cycles[task]),
                "finish_cycles": int(timeline.finish_cycles[task]),
                "layer": int(trace.layer[lead]),
                "chunk": int(trace.chunk[lead]),
                "op_phase": Phase(int(trace.phase[lead])).name.lower(),
                "own": bool(own[task]),
            }
        )
    return rows


def _steps_around_boundary(outcome: PointResult) -> list[dict[str, object]]:
    """Times of consecutive decode steps around the first chunk boundary after the context."""
    assert outcome.result is not None
    point, chunk = outcome.point, outcome.point.chunk_tokens
    cycle_s = outcome.mean_seconds(outcome.result) / outcome.mean_cycles(outcome.result)
    boundary = point.context_tokens + (-point.context_tokens - 1) % chunk
    first = max(boundary - STEPS_AROUND_BOUNDARY - 1, 0)
    positions = range(first, boundary + STEPS_AROUND_BOUNDARY + 1)
    batch = ceil_div(point.batch, point.microbatches)
    scenario = Scenario.decode(positions, batch=batch, dtype=point.dtype, parallel=point.parallel)
    trace = build_trace(point.model, point.method, scenario)
    try:
        result = simulate_trace(
            point.chip, trace, engine=point.engine, detail=point.detail, overlap=point.overlap,
            held_bytes=held_bytes(point, trace),
        )  # fmt: skip
    except CapacityError:
        return []
    cycles = step_cycles(point, result)
    return [
        {**_key(point), "offset_tokens": position - boundary, "seconds": int(c) * cycle_s}
        for position, c in list(zip(positions, cycles, strict=True))[1:]  # the first step fills the pipeline
    ]


# --- sensitivity
# ------------------------------------------------------------------------------------------------------------


def scaled_chips(chip: Chip, step: float, *, linked: bool = False) -> dict[str, Chip]:
    """The chip with one main parameter made better by ``step`` (0.1 = 10 %), by dotted path of the chip file.

    ``linked``: the links to other chips too.
    """
    better = 1 + step
    out: dict[str, Chip] = {}
    for i, level in enumerate(chip.memories):
        faster = replace(
            level,
            read_bytes_per_s=level.read_bytes_per_s * better,
            write_bytes_per_s=level.write_bytes_per_s * better,
        )
        out[f"memories.{level.name}.bandwidth"] = _with_memory(chip, i, faster)
    main = chip.main_memory
    if main.latency_s and chip.mapping.serial_kernels:
        shorter = replace(main, latency_s=main.latency_s / better)
        out[f"memories.{main.name}.latency"] = _with_memory(chip, chip.memories.index(main), shorter)
    if chip.cache is not None:
        larger = replace(chip.cache, capacity_bytes=int(chip.cache.capacity_bytes * better))
        out[f"memories.{chip.cache.name}.capacity"] = _with_memory(chip, chip.memories.index(chip.cache), larger)
    for i, unit in enumerate(chip.units):
        peak = {dtype: value * better for dtype, value in unit.peak_per_s.items()}
        units = (*chip.units[:i], replace(unit, peak_per_s=peak), *chip.units[i + 1 :])
        out[f"compute.{unit.name}.peak"] = replace(chip, units=units)
    if chip.overheads.op_launch_s:
        overheads = replace(chip.overheads, op_launch_s=chip.overheads.op_launch_s / better)
        out["overheads.op_launch"] = replace(chip, overheads=overheads)
    for i, link in enumerate(chip.links):
        if linked and link.scope == "chip" and link.topology != "host":
            faster_link = replace(link, bytes_per_s=link.bytes_per_s * better)
            links = (*chip.links[:i], faster_link, *chip.links[i + 1 :])
            out[f"links.{link.name}.bandwidth"] = replace(chip, links=links)
    return out


def _with_memory(chip: Chip, index: int, level: MemoryLevel) -> Chip:
    memories = (*chip.memories[:index], level, *chip.memories[index + 1 :])
    return replace(chip, memories=memories)


def _sensitivity(outcome: PointResult) -> list[dict[str, object]]:
    """Time of the point with each parameter 10 % better (shorter, for times)."""
    assert outcome.result is not None
    point, trace = outcome.point, outcome.result.trace
    before = outcome.mean_seconds(outcome.result)
    rows: list[dict[str, object]] = []
    held = held_bytes(point, trace)
    for parameter, chip in scaled_chips(point.chip, SENSITIVITY_STEP, linked=point.parallel.chips > 1).items():
        result = simulate_trace(
            chip, trace, engine=point.engine, detail=point.detail, overlap=point.overlap, held_bytes=held
        )
        after = outcome.mean_seconds(result)
        rows.append(
            {
                **_key(point),
                "parameter": parameter,
                "change_frac": SENSITIVITY_STEP,
                "seconds": before,
                "changed_seconds": after,
                "gain_frac": before / after - 1,
            }
        )
    return rows


# --- state and weight writes
# ----------------------------------------------------------------------------------------------


def _state_curves(experiment: Experiment) -> list[dict[str, object]]:
    """State per sequence by class over a fine grid of contexts."""
    low, high = min(experiment.contexts), max(experiment.contexts)
    contexts = {*experiment.contexts}
    value = low
    while value < high:  # eight steps per doubling
        contexts.add(value)
        value += max(value // 8, 1)
    rows: list[dict[str, object]] = []
    for name in experiment.methods:
        method = make_point(
            experiment.chip, experiment.model, name, window=experiment.window, ttt=experiment.ttt,
            kv_dtype=experiment.kv_dtype, dtype=experiment.dtype, parallel=experiment.parallel,
        ).method  # fmt: skip
        for tokens in sorted(contexts):
            state = state_per_sequence(experiment.model, method, tokens, dtype=experiment.dtype)
            rows.append(
                {
                    "method": name,
                    "context_tokens": tokens,
                    "kv_bytes": state.kv_bytes,
                    "fast_weight_bytes": state.fast_weight_bytes,
                    "carry_bytes": state.carry_bytes,
                    "total_bytes": state.total_bytes,
                }
            )
    return rows


def _write_variants(experiment: Experiment) -> list[dict[str, object]]:
    """One prompt through windowed TTT with every way to write the weight: time, and what the update moves and costs."""
    name = next((m for m in ("ttt_window", "ttt") if m in experiment.methods), None)
    if name is None:
        return []
    rows: list[dict[str, object]] = []
    chosen = method_on(
        experiment.chip, name, window_tokens=experiment.window, kv_dtype=experiment.kv_dtype, ttt=experiment.ttt,
        dtype=experiment.dtype,
    )  # fmt: skip
    wide = chosen.ttt is not None and chosen.ttt.fast_dtype == "fp32"  # a weight in fp32 is its own master
    variants: tuple[WeightWrite, ...] = get_args(WeightWrite)
    ways = [(variant, True) for variant in variants if not (wide and variant == "master")]
    for variant, overlap in [*ways, (experiment.ttt.weight_write, False)]:
        point = make_point(
            experiment.chip, experiment.model, name, phase="prefill", context=VARIANT_CONTEXT_TOKENS,
            window=experiment.window, ttt=replace(experiment.ttt, weight_write=variant), dtype=experiment.dtype,
            kv_dtype=experiment.kv_dtype, call_tokens=experiment.call_tokens, detail=experiment.detail, overlap=overlap,
            parallel=experiment.parallel,
        )  # fmt: skip
        outcome = simulate_point(point)
        record = outcome.record
        row: dict[str, object] = {
            "weight_write": variant if overlap else f"{variant}, no overlap",
            "method": name, "context_tokens": VARIANT_CONTEXT_TOKENS,
            "fits": record["fits"], "reason": record["reason"], "seconds": record["seconds"],
            "update_busy_cycles": None, "update_main_bytes": None,
        }  # fmt: skip
        if outcome.result is not None:
            work = outcome.result.lowered.work
            moved = work.main_read_bytes + work.main_write_bytes
            update = is_update(outcome.result.trace)[outcome.result.lowered.kernels.lead]
            n_updates = len(experiment.ttt.layers_of(experiment.model)) * (VARIANT_CONTEXT_TOKENS // point.chunk_tokens)
            row |= {
                "update_busy_cycles": float(outcome.result.busiest_unit()[0][update].sum()) / max(n_updates, 1),
                "update_main_bytes": float((moved + work.far_read_bytes + work.far_write_bytes)[update].sum())
                / max(n_updates, 1),
            }
        rows.append(row)
    return rows
