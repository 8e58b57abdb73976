"""Every way to adapt on one workload and chip: a user's context is taken in, a question is asked, tokens come back.

For each method three things are simulated: its adaptation (a prefill, a number of training steps or the building of an
index), a question about the context, and decode steps after it. What a user keeps in between is its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ttt_sim.chip import Chip
from ttt_sim.comparison import record_or_reason, why
from ttt_sim.crossover import Record
from ttt_sim.engine import prepare
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.grid import make_point, weight_bytes
from ttt_sim.model import ONE_CHIP, Model, Parallel, TTTSettings
from ttt_sim.parallel import Progress, run_all
from ttt_sim.simulation import Point, rows_at_once
from ttt_sim.system import least_system, tensor_parallel_sizes
from ttt_sim.workload import METHODS, find_method, state_of_context
from ttt_sim.workload.method import Method, PhaseName

if TYPE_CHECKING:
    import pandas as pd

#: Most chips that a step of training is spread over to find room for it.
MOST_TRAINING_CHIPS = 64

#: Prefill calls where the memory has no room for the activations of the usual ones.
SHORTER_CALLS = (1024, 256)

#: Columns of the table, one row per method. Adaptation is that of one user; decode is of the whole batch.
COLUMNS: tuple[str, ...] = (
    "method", "title", "adapts", "why", "needs", "caveat", "chips", "tp", "pp", "adapt_chips",
    "state_bytes", "state_kv_bytes", "state_fast_weight_bytes", "state_carry_bytes", "state_index_bytes",
    "adapt_steps", "adapt_call_tokens", "adapt_seconds", "adapt_seconds_low", "adapt_seconds_high", "adapt_energy_j",
    "adapt_usd", "adapt_bound_by", "adapt_why",
    "ask_seconds", "ask_seconds_low", "ask_seconds_high", "ask_energy_j", "ask_bound_by", "ask_why",
    "step_seconds", "step_seconds_low", "step_seconds_high", "tokens_per_s", "energy_j_per_token",
    "cost_usd_per_million_tokens", "bound_by", "decode_why", "boundary_added_seconds", "unmeasured_share",
    "answer_seconds", "peak_memory_bytes", "users", "lifetime_days", "lifetime_limited_by",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Approaches:
    """What ``approaches`` simulates: each of ``methods`` with a context, a question and an answer, in tokens.

    ``batch`` users decode at once, or in turns where each has a model of its own; adaptation and question are those of
    one user. ``options`` of methods, by name.
    ``dtype`` None: that which the chip prefers; ``window`` None: that of each method.
    """

    chip: Chip
    model: Model
    methods: tuple[str, ...]
    context: int
    question: int
    answer: int
    batch: int
    ttt: TTTSettings
    window: int | None
    dtype: str | None
    kv_dtype: str | None
    call_tokens: int
    options: Mapping[str, Mapping[str, str]]
    workers: int | None

    def point(
        self, method: str, phase: PhaseName, *, batch: int = 1, tp: int | None = None, call: int | None = None,
        room_for: int | None = None,
    ) -> Point:  # fmt: skip
        """A point on ``tp`` chips; by default on the least number that holds the model and ``room_for`` sequences,
        those of the batch unless said. ``call``: tokens of a prefill call, if not the usual ones."""
        point = make_point(
            self.chip, self.model, method, phase=phase, context=self.context, batch=batch, window=self.window,
            ttt=self.ttt, kv_dtype=self.kv_dtype, dtype=self.dtype or self.chip.default_dtype,
            call_tokens=call or self.call_tokens, question=self.question, options=self.options.get(method),
            parallel=ONE_CHIP if tp is None else Parallel(tp=tp),
        )  # fmt: skip
        if tp is not None:
            return point
        found = find_method(method)
        tokens = self.context if found.adapts == "index" else found.held_tokens(point.method, self.context)
        least = least_system(
            self.chip, self.model, [point.method], context_tokens=tokens + self.question + self.answer,
            batch=room_for or batch, rows=rows_at_once(point), dtype=point.dtype,
        )  # fmt: skip
        return replace(point, parallel=least or ONE_CHIP)

    def fitting(self, method: str, phase: PhaseName, *, batch: int = 1) -> tuple[Point, Mapping[str, object]]:
        """The point and its record on the first system that holds it: where the usual one does not, with shorter
        prefill calls, or with room for more sequences than there are, as activations of some methods need more than
        :func:`ttt_sim.system.least_system` leaves for them."""
        long = phase in ("prefill", "index")
        calls = [self.call_tokens, *(call for call in SHORTER_CALLS if long and call < self.call_tokens)]
        tried: dict[tuple[int, Parallel], tuple[Point, Mapping[str, object]]] = {}
        for call in calls:
            for room_for in (batch, batch + batch // 4 + 1, 2 * batch + 1):
                point = self.point(method, phase, batch=batch, call=call, room_for=room_for)
                if (call, point.parallel) in tried:
                    continue
                record = record_or_reason(point)
                tried[call, point.parallel] = point, record
                if record["fits"] or record.get("missing"):
                    return point, record
        return next(iter(tried.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One phase of one method."""

    settings: Approaches
    method: str
    part: str  # adapt, ask or decode

    def run(self) -> Mapping[str, object]:
        """Its record, with ``steps`` that it is repeated and the ``capacity`` behind it."""
        method = find_method(self.method)
        try:
            if self.part == "adapt":
                return _adaptation(self.settings, method)
            phase: PhaseName = "ask" if self.part == "ask" else "decode"
            if phase not in method.phases:
                return {"fits": False, "reason": "", "missing": f"{method.title} has no phase {phase}"}
            batch = 1 if phase == "ask" or not method.batched else self.settings.batch
            point, record = self.settings.fitting(self.method, phase, batch=batch)
            return {**record, **_held(point), "steps": 1}
        except (ConfigError, WorkloadError) as error:
            return {"fits": False, "reason": "", "missing": str(error)}


def _run(job: _Job) -> Mapping[str, object]:
    return job.run()


def _adaptation(settings: Approaches, method: Method) -> Mapping[str, object]:
    """The record of taking the context in: of one step where that is training, on as few chips as hold it; of all steps
    and what comes before them where training follows another phase."""
    if "train" not in method.phases:
        return {**settings.fitting(method.name, method.adapts)[1], "steps": 1}
    record: Mapping[str, object] = {}
    for tp in tensor_parallel_sizes(settings.model):
        if tp > MOST_TRAINING_CHIPS:
            break
        point = settings.point(method.name, "train", tp=tp)
        step_tokens = method.step_tokens(point.method, settings.context)
        point = replace(point, context_tokens=step_tokens)
        steps = method.steps(point.method, settings.context)
        record = {**record_or_reason(point), "steps": steps}
        if method.adapts != "train" and record["fits"]:
            first = record_or_reason(settings.point(method.name, method.adapts, tp=tp))
            record = _followed(first, record, steps) if first["fits"] else first
        if record["fits"] or record.get("missing"):
            break
    return record


def _followed(first: Record, step: Mapping[str, object], steps: int) -> Mapping[str, object]:
    """A record of which ``steps`` times is ``first`` and ``steps`` steps after it."""
    summed = ("seconds", "seconds_low", "seconds_high", "energy_j")
    total = {key: _number(step, key) + _number(first, key) / steps for key in summed}
    peak = max(_number(step, "peak_memory_bytes"), _number(first, "peak_memory_bytes"))
    return {**step, **total, "peak_memory_bytes": peak, "steps": steps}


def _held(point: Point) -> dict[str, object]:
    """How many users the memory holds beside the weights; of what lies behind it, so does the memory there."""
    state = state_of_context(point.model, point.method, point.context_tokens, point.dtype)
    chips, backing = point.parallel.chips, point.chip.backing
    room = point.chip.main_memory.capacity_bytes * chips - weight_bytes(point) - state.shared_bytes
    parts = [(room, state.total_bytes - state.far_bytes)]
    if backing is not None:
        parts.append((backing.capacity_bytes * chips, state.far_bytes))
    users = [max(capacity // held, 0) for capacity, held in parts if held]
    return {"state": state, "users": min(users) if users else None}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Approached:
    """``table`` has :data:`COLUMNS`."""

    settings: Approaches
    table: pd.DataFrame


def approach(settings: Approaches, *, progress: Progress | None = None) -> Approached:
    """Simulate every method. What the chip cannot run is a row that says why.

    Raises:
        ConservationError: a simulation broke a law.
    """
    import pandas as pd

    prepare("compiled")
    jobs = [
        _Job(settings=settings, method=method, part=part)
        for part in ("adapt", "ask", "decode")  # the longest first
        for method in settings.methods
    ]
    records = dict(
        zip(
            [(job.method, job.part) for job in jobs],
            run_all(_run, jobs, workers=settings.workers, progress=progress),
            strict=True,
        )
    )
    rows = [
        _row(settings, name, *(records[name, part] for part in ("adapt", "ask", "decode"))) for name in settings.methods
    ]
    return Approached(settings=settings, table=pd.DataFrame(rows, columns=list(COLUMNS)))


def methods_of(names: Sequence[str] | None) -> tuple[str, ...]:
    """Methods that can answer a question, all of them by default.

    Raises:
        ConfigError: an unknown method, or one that cannot.
    """
    if names is None:
        return tuple(name for name, method in METHODS.items() if {"ask", "decode"} <= set(method.phases))
    for name in names:
        lacking = [phase for phase in ("ask", "decode") if phase not in find_method(name).phases]
        if lacking:
            raise ConfigError(f"method {name} cannot be asked: it has no phase {' or '.join(lacking)}")
    return tuple(names)


def _row(settings: Approaches, name: str, adapt: Record, ask: Record, decode: Record) -> dict[str, object]:
    method, chip = find_method(name), settings.chip
    row: dict[str, object] = {
        "method": name, "title": method.title, "adapts": method.adapts, "needs": "; ".join(method.needs),
        "caveat": method.caveat, "chips": decode.get("chips"), "tp": decode.get("tp"), "pp": decode.get("pp"),
        "adapt_chips": adapt.get("chips"), "adapt_steps": adapt.get("steps"),
        "adapt_call_tokens": adapt.get("call_tokens"),
        "adapt_why": why(adapt, chip), "ask_why": why(ask, chip), "decode_why": why(decode, chip),
        "users": decode.get("users"),
    }  # fmt: skip
    row["why"] = row["adapt_why"] or row["ask_why"] or row["decode_why"]
    state: Any = decode.get("state")
    if state is not None:
        row |= {
            "state_bytes": state.total_bytes, "state_kv_bytes": state.kv_bytes,
            "state_fast_weight_bytes": state.fast_weight_bytes, "state_carry_bytes": state.carry_bytes,
            "state_index_bytes": state.index_bytes,
        }  # fmt: skip
    if adapt["fits"]:
        steps = cast(int, adapt["steps"])
        row |= {f"adapt_{key}": _number(adapt, key) * steps for key in ("seconds", "seconds_low", "seconds_high")}
        row |= {"adapt_energy_j": _number(adapt, "energy_j") * steps, "adapt_bound_by": adapt["bound_by"]}
        rent = chip.price.per_hour_usd
        if rent is not None:
            row["adapt_usd"] = cast(int, adapt["chips"]) * rent / 3600 * cast(float, row["adapt_seconds"])
    if ask["fits"]:
        row |= {f"ask_{key}": ask[key] for key in ("seconds", "seconds_low", "seconds_high", "energy_j", "bound_by")}
    turns = 1 if method.batched else settings.batch
    if decode["fits"]:
        row |= {f"step_{key}": _number(decode, key) * turns for key in ("seconds", "seconds_low", "seconds_high")}
        row |= {
            key: decode[key]
            for key in (
                "tokens_per_s", "energy_j_per_token", "cost_usd_per_million_tokens", "bound_by", "unmeasured_share",
            )
        }  # fmt: skip
        row["lifetime_limited_by"] = decode.get("lifetime_limited_by")
        if decode.get("lifetime_days") is not None:  # in the turns of others nothing of a user is written
            row["lifetime_days"] = _number(decode, "lifetime_days") * turns
        if decode.get("boundary_step_seconds") is not None:
            row["boundary_added_seconds"] = _number(decode, "boundary_step_seconds") - _number(
                decode, "ordinary_step_seconds"
            )
    if adapt["fits"] and ask["fits"] and decode["fits"]:
        row["answer_seconds"] = (
            cast(float, row["adapt_seconds"])
            + _number(ask, "seconds")
            + settings.answer * cast(float, row["step_seconds"])
        )
    peaks = [_number(record, "peak_memory_bytes") for record in (adapt, ask, decode) if record["fits"]]
    row["peak_memory_bytes"] = max(peaks) if peaks else None
    return row


def _number(record: Record, field: str) -> float:
    return float(cast(float, record[field]))
