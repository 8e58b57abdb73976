"""The same workload on many chips: one row per chip and method, as a whole and per chip, per watt and per dollar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ttt_sim.chip import Chip
from ttt_sim.config import chip_names, load_chip
from ttt_sim.config.chip_file import split_variant
from ttt_sim.crossover import BASELINE, Record, interpolated_crossing, state_crossing
from ttt_sim.engine import prepare
from ttt_sim.errors import CapacityError, ConfigError, WorkloadError
from ttt_sim.grid import BATCH_POINTS, make_point, weight_bytes
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, Scenario, TTTSettings, shard, stage_starts
from ttt_sim.model_config import check_ttt
from ttt_sim.parallel import Progress, run_all
from ttt_sim.simulation import PHASES, Point, simulate_point
from ttt_sim.system import holdings, least_system
from ttt_sim.workload import build_trace, state_per_sequence

if TYPE_CHECKING:
    import pandas as pd

ENGINE = "compiled"
#: Contexts at which decode is simulated to find where a method overtakes the KV cache. Costs are affine in the context
#: between the kinks of a window, so that a few are enough.
CROSSING_CONTEXTS = (1024, 2048, 4096, 16384)

#: What the reason of a point says where more chips would not help.
UNLINKED = "no number of linked chips"
#: What a record says of one update of one layer and sequence, None without updates.
UPDATE_FIELDS = ("update_seconds", "update_energy_j", "lifetime_days", "lifetime_limited_by")
#: Columns of the table, one row per chip and method.
COLUMNS: tuple[str, ...] = (
    "chip", "title", "kind", "execution", "method", "dtype", "chips", "tp", "pp", "chips_needed",
    "prefill_fits", "prefill_why", "prefill_seconds", "prefill_seconds_low", "prefill_seconds_high",
    "prefill_tokens_per_s", "prefill_tokens_per_s_per_chip", "prefill_energy_j_per_token", "prefill_bound_by",
    "prefill_bound_kind", "prefill_weak_inputs",
    "decode_fits", "decode_why", "step_seconds", "step_seconds_low", "step_seconds_high",
    "tokens_per_s", "tokens_per_s_per_user", "tokens_per_s_per_chip", "tokens_per_s_per_w", "tokens_per_usd",
    "energy_j_per_token", "average_power_w", "power_limit_w", "throttled", "cost_usd_per_million_tokens",
    "bound_by", "bound_kind", "bound_share", "weak_inputs", "energy_weak_inputs", "decode_gain",
    "weight_bytes", "state_bytes_per_sequence", "capacity_bytes", "sequences", "sequences_per_chip",
    "sequences_with_backing",
    "write_mode", "boundary_added_seconds", "update_seconds", "update_energy_j", "lifetime_days", "lifetime_limited_by",
    "state_crossing_tokens", "decode_crossing_tokens", "decode_crossing_note", "ridge_flop_per_byte",
)  # fmt: skip


# --- which chips ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Chips to compare, and the labels of examples that were left out."""

    chips: tuple[Chip, ...]
    left_out: tuple[str, ...]


def label_of(chip: Chip) -> str:
    """Name of a chip, with its variant where it is one."""
    return f"{chip.name}:{chip.variant}" if chip.variant else chip.name


def choose_chips(names: Sequence[str]) -> Chosen:
    """Load chips by name or file. Files of kind ``example`` are left out, unless there are no others; an example that
    is asked for by its name stays.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    problems: list[str] = []
    found: dict[str, tuple[str, Chip]] = {}
    built_in = chip_names()
    for name in names:
        try:
            chip = load_chip(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        label = label_of(chip)
        if label in found:
            first = found[label][0]
            what = "is given twice" if first == name else f"and {first} are both named {label}"
            problems.append(f"{name}: {what}" if first == name else f"{name} {what}")
        else:
            found[label] = (name, chip)
    if problems:
        head = f"{len(problems)} of {len(names)} chips cannot be compared\n" if len(problems) > 1 else ""
        raise ConfigError(head + "\n".join(problems))
    by_path = [
        label
        for label, (name, chip) in found.items()
        if chip.kind == "example" and str(split_variant(name)[0]) not in built_in
    ]
    left_out = by_path if len(by_path) < len(found) else []
    return Chosen(
        chips=tuple(chip for label, (_, chip) in found.items() if label not in left_out), left_out=tuple(left_out)
    )


# --- the simulation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How many chips of a kind work together, and the least that would do for each method; None: no number does."""

    parallel: Parallel
    needed: Mapping[str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What ``compare`` simulates. ``dtype`` None: that which each chip prefers."""

    chips: tuple[Chip, ...]
    model: Model
    methods: tuple[str, ...]
    context: int
    batch: int
    ttt: TTTSettings
    window: int
    dtype: str | None
    kv_dtype: str | None
    call_tokens: int
    workers: int | None

    def dtype_of(self, chip: Chip) -> str:
        return chip.default_dtype if self.dtype is None else self.dtype

    def point(self, chip: Chip, method: str, phase: str, context: int, parallel: Parallel = ONE_CHIP) -> Point:
        return make_point(
            chip, self.model, method, phase=cast(Any, phase), context=context, batch=self.batch, window=self.window,
            ttt=self.ttt, kv_dtype=self.kv_dtype, dtype=self.dtype_of(chip), call_tokens=self.call_tokens,
            engine=ENGINE, parallel=parallel,
        )  # fmt: skip

    def system_of(self, chip: Chip) -> System:
        """The least number of chips that holds the model and the batch with every method that some number can hold.

        That of ``run`` for this context and batch; one for decode alone where no number has room for a prefill call.
        """
        methods = {name: self.point(chip, name, "decode", self.context).method for name in self.methods}
        together = self._least(chip, list(methods.values()))
        if together is not None and together.chips == 1:
            return System(parallel=together, needed=dict.fromkeys(methods, 1))
        alone = {name: self._least(chip, [method]) for name, method in methods.items()}
        if together is None:
            some = [methods[name] for name, found in alone.items() if found is not None]
            together = self._least(chip, some) if some else None
        return System(
            parallel=together or ONE_CHIP,
            needed={name: None if found is None else found.chips for name, found in alone.items()},
        )

    def _least(self, chip: Chip, methods: Sequence[MethodSettings]) -> Parallel | None:
        """With room for the activations of a prefill call if any number of chips has that, else for those of decode."""
        for rows in dict.fromkeys((min(self.call_tokens, self.context), 1)):
            try:
                found = least_system(
                    chip, self.model, methods, context_tokens=self.context + self.ttt.chunk_tokens, batch=self.batch,
                    rows=rows, dtype=self.dtype_of(chip),
                )  # fmt: skip
            except (ConfigError, WorkloadError):  # the points say what is missing
                return None
            if found is not None:
                return found
        return None

    def points(self, systems: Mapping[str, System]) -> list[Point]:
        """Both phases at the context of every chip and method, and decode at the contexts of crossings."""
        out = []
        for chip in self.chips:
            parallel = systems[label_of(chip)].parallel
            for method in self.methods:
                out += [self.point(chip, method, phase, self.context, parallel) for phase in PHASES]
                if BASELINE in self.methods and self._may_cross(out[-1]):
                    contexts = (context for context in CROSSING_CONTEXTS if context != self.context)
                    out += [self.point(chip, method, "decode", context, parallel) for context in contexts]
        return out

    @staticmethod
    def _may_cross(point: Point) -> bool:
        """The baseline, and what forgets and may overtake it; full attention does all that the baseline does."""
        return point.method.name == BASELINE or point.method.kv.window_tokens is not None


#: Records by chip, method, phase and context.
Records = Mapping[tuple[str, str, str, int], Record]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """``table`` has :data:`COLUMNS`; ``points`` the record of every point; ``left_out`` examples that nobody asked
    for."""

    settings: Comparison
    table: pd.DataFrame
    points: pd.DataFrame
    left_out: tuple[str, ...]

    def window_tokens(self, method: str) -> int | None:
        """Window of a method's attention; None where it sees everything."""
        chip = self.settings.chips[0]
        return self.settings.point(chip, method, "decode", 1).method.kv.window_tokens


def compare(settings: Comparison, *, left_out: tuple[str, ...] = (), progress: Progress | None = None) -> Compared:
    """Simulate everything and gather it. What a chip cannot run is a row that says why.

    Raises:
        ConservationError: a simulation broke a law.
    """
    import pandas as pd

    found = run_all(settings.system_of, settings.chips, workers=settings.workers)
    systems = {label_of(chip): system for chip, system in zip(settings.chips, found, strict=True)}
    points = settings.points(systems)
    prepare(ENGINE)
    records = run_all(record_or_reason, points, workers=settings.workers, batch=BATCH_POINTS, progress=progress)
    by_key: Records = {
        (label_of(p.chip), p.method.name, p.phase, p.context_tokens): record
        for p, record in zip(points, records, strict=True)
    }
    rows = [
        _row(settings, chip, systems[label_of(chip)], method, by_key)
        for chip in settings.chips
        for method in settings.methods
    ]
    return Compared(
        settings=settings,
        table=pd.DataFrame(rows, columns=list(COLUMNS)),
        points=pd.DataFrame(records),
        left_out=left_out,
    )


def record_or_reason(point: Point) -> Mapping[str, object]:
    """The record of a point; where the chip cannot run it, one that says what is missing."""
    try:
        if point.method.ttt is not None:
            check_ttt(point.method.ttt, point.model)
        return simulate_point(point).record
    except (ConfigError, CapacityError) as error:
        return {
            "chip": point.chip.name, "variant": point.chip.variant, "model": point.model.name,
            "method": point.method.name, "phase": point.phase, "context_tokens": point.context_tokens,
            "batch": point.batch, "dtype": point.dtype, "fits": False, "reason": "", "missing": str(error),
        }  # fmt: skip


def _row(settings: Comparison, chip: Chip, system: System, method: str, records: Records) -> dict[str, object]:
    label, context = label_of(chip), settings.context
    prefill, decode = (records[label, method, phase, context] for phase in PHASES)
    baseline = records.get((label, BASELINE, "decode", context))
    point = settings.point(chip, method, "decode", context, system.parallel)
    dtype, chips = point.dtype, system.parallel.chips
    row: dict[str, object] = {
        "chip": label, "title": chip.title, "kind": chip.kind, "execution": chip.execution, "method": method,
        "dtype": dtype, "chips": chips, "tp": system.parallel.tp, "pp": system.parallel.pp,
        "chips_needed": _needed(system.needed[method], decode),
        "power_limit_w": chip.power.limit_w * chips,
        "write_mode": chip.writability.mode, "ridge_flop_per_byte": ridge_point(chip, dtype),
        "prefill_fits": prefill["fits"], "prefill_why": why(prefill, chip),
        "decode_fits": decode["fits"], "decode_why": why(decode, chip),
        "prefill_weak_inputs": "", "weak_inputs": "", "energy_weak_inputs": "", "throttled": False,
    }  # fmt: skip
    if prefill["fits"]:
        row |= {
            "prefill_seconds": prefill["seconds"],
            "prefill_seconds_low": prefill["seconds_low"],
            "prefill_seconds_high": prefill["seconds_high"],
            "prefill_tokens_per_s": prefill["tokens_per_s"],
            "prefill_tokens_per_s_per_chip": _number(prefill, "tokens_per_s") / chips,
            "prefill_energy_j_per_token": prefill["energy_j_per_token"],
            "prefill_bound_by": prefill["bound_by"],
            "prefill_bound_kind": bound_kind(chip, str(prefill["bound_by"])),
            "prefill_weak_inputs": " ".join(weak_inputs(chip, dtype, str(prefill["bound_by"]), chips)),
        }
    if decode["fits"]:
        row |= _decode_columns(chip, decode, chips)
        row["weak_inputs"] = " ".join(weak_inputs(chip, dtype, str(decode["bound_by"]), chips))
        row["energy_weak_inputs"] = " ".join(weak_energy_inputs(chip, dtype, decode))
        if baseline is not None and baseline["fits"]:
            row["decode_gain"] = _number(decode, "tokens_per_s") / _number(baseline, "tokens_per_s")
    try:
        return row | _capacity_columns(point) | _crossing_columns(settings, point, records)
    except ConfigError:  # settings that cannot be with the format of this chip; the record says so
        return row


def _needed(alone: int | None, decode: Record) -> int | None:
    """Chips that a method needs: what was found for it ``alone``; else, or where that leaves no room, what its point
    asks for."""
    said = cast("int | None", decode.get("chips_needed"))
    if alone is None or said is None:
        return alone or said
    return alone if decode["fits"] else max(alone, said)


def _number(record: Record, field: str) -> float:
    return float(cast(float, record[field]))


def _decode_columns(chip: Chip, decode: Record, chips: int) -> dict[str, object]:
    """Speed, energy, money and updates of a decode point."""
    tokens_per_s, power = _number(decode, "tokens_per_s"), _number(decode, "average_power_w")
    cost = decode["cost_usd_per_million_tokens"]
    out: dict[str, object] = {
        "step_seconds": decode["seconds"],
        "step_seconds_low": decode["seconds_low"],
        "step_seconds_high": decode["seconds_high"],
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_user": 1 / _number(decode, "seconds"),
        "tokens_per_s_per_chip": tokens_per_s / chips,
        "tokens_per_s_per_w": tokens_per_s / power if power > 0 else None,
        "tokens_per_usd": None if not cost else 1e6 / float(cast(float, cost)),
        "energy_j_per_token": decode["energy_j_per_token"],
        "average_power_w": power,
        "throttled": decode["throttled"],
        "cost_usd_per_million_tokens": cost,
        "bound_by": decode["bound_by"],
        "bound_kind": bound_kind(chip, str(decode["bound_by"])),
        "bound_share": decode["bound_share"],
    }
    out |= {name: decode.get(name) for name in UPDATE_FIELDS}
    if decode.get("boundary_step_seconds") is not None:
        added = _number(decode, "boundary_step_seconds") - _number(decode, "ordinary_step_seconds")
        out["boundary_added_seconds"] = added
    return out


def _capacity_columns(point: Point) -> dict[str, object]:
    """How many sequences of this context the memory holds beside the weights; room for activations is not counted."""
    state = state_per_sequence(point.model, point.method, point.context_tokens, dtype=point.dtype).total_bytes
    weights, main = weight_bytes(point), point.chip.main_memory.capacity_bytes
    chips = point.parallel.chips
    held = [
        max((capacity - weights) // state, 0) if chips == 1 else _held_by_system(point, capacity)
        for capacity in (main, point.chip.capacity_bytes)
    ]
    return {
        "weight_bytes": weights,
        "state_bytes_per_sequence": state,
        "capacity_bytes": main * chips,
        "sequences": held[0],
        "sequences_per_chip": held[0] / chips,
        "sequences_with_backing": held[1],
    }


def _held_by_system(point: Point, capacity: int) -> int:
    """The same of several chips: what the fullest one, with this capacity, holds of its part of the weights and of
    each sequence."""
    alone = Parallel(tp=point.parallel.tp)
    scenario = Scenario.decode((max(point.context_tokens - 1, 0),), batch=1, dtype=point.dtype, parallel=alone)
    pipelined = point.parallel.pp > 1
    held = holdings(build_trace(point.model, point.method, scenario), point.model.n_layers, pipelined=pipelined)
    starts = stage_starts(shard(point.model, point.parallel.tp), point.parallel.pp)
    weights, with_one = held.by_stage(starts, 0), held.by_stage(starts, 1)
    room = [(capacity - fixed) // (full - fixed) for fixed, full in zip(weights, with_one, strict=True) if full > fixed]
    return max(min(room), 0)


def _crossing_columns(settings: Comparison, point: Point, records: Records) -> dict[str, object]:
    """From which context the method needs less than the KV cache, in state (exact) and in decode time."""
    name = point.method.name
    if name == BASELINE or BASELINE not in settings.methods:
        return {}
    baseline = settings.point(point.chip, BASELINE, "decode", point.context_tokens).method
    crossing = state_crossing(point.model, point.method, baseline, dtype=point.dtype)
    out: dict[str, object] = {"state_crossing_tokens": None if crossing is None else float(crossing.tokens)}
    if point.method.kv.window_tokens is None:
        return out | {"decode_crossing_note": "never: it does all that the KV cache does"}
    lead = {}
    for context in {*CROSSING_CONTEXTS, settings.context}:
        theirs, mine = (records[label_of(point.chip), m, "decode", context] for m in (BASELINE, name))
        if theirs["fits"] and mine["fits"]:
            lead[context] = _number(theirs, "seconds_per_token") - _number(mine, "seconds_per_token")
    if not lead:
        return out | {"decode_crossing_note": "none: no context fits both"}
    found = interpolated_crossing(lead)
    if found.between is not None:
        note = f"linear between {found.between[0]} and {found.between[1]} tokens"
    elif found.always == "method":
        note = f"below {min(lead)} tokens, the shortest context simulated"
    else:
        note = f"not up to {max(lead)} tokens, the longest context that fits both"
    return out | {"decode_crossing_tokens": found.tokens, "decode_crossing_note": note}


# --- what a row says about its chip -----------------------------------------------------------------------------------


def why(record: Record, chip: Chip) -> str:
    """Why a point has no time, in words; empty where it has one."""
    if record["fits"]:
        return ""
    missing = str(record.get("missing") or "").removeprefix(f"{chip.name}: ")
    if missing:
        return missing
    needed, reason = int(cast(int, record.get("chips_needed") or 1)), str(record["reason"])
    return f"{reason}: {needed} chips hold it" if needed > 1 and UNLINKED not in reason else reason


def ridge_point(chip: Chip, dtype: str) -> float | None:
    """Peak FLOPs per byte read from main memory at its peak; None without a matrix unit for this format."""
    if not chip.has_unit("matrix") or dtype not in chip.unit("matrix").peak_per_s:
        return None
    return chip.unit("matrix").peak_per_s[dtype] / chip.main_memory.read_bytes_per_s


def bound_kind(chip: Chip, unit: str) -> str:
    """What sort of part a unit is: main memory, on-chip memory, a compute unit, a link or the launch of kernels."""
    if unit == chip.main_memory.name:
        return "main memory"
    if any(level.name == unit for level in chip.memories):
        return "backing memory" if chip.backing is not None and chip.backing.name == unit else "on-chip memory"
    for compute in chip.units:
        if compute.name == unit:
            return {"matrix": "matrix unit", "vector": "vector unit", "special": "special functions"}[compute.kind]
    return "launches" if unit == "launch" else "links"


def weak_inputs(chip: Chip, dtype: str, bound_by: str, chips: int = 1) -> tuple[str, ...]:
    """Numbers of low certainty that a time of ``chips`` chips rests on: the rate of the unit that bounds it, the share
    of that rate which is sustained, and constants fitted to measurements."""
    paths = ["overheads.op_launch"] if bound_by == "launch" else []
    paths += [f"memories.{bound_by}.{key}" for key in ("read_bandwidth", "write_bandwidth", "achievable_fraction")]
    paths += _link_paths(chip, bound_by, chips)
    for unit in chip.units:
        if unit.name == bound_by:
            formats = [dtype] if dtype in unit.peak_per_s else list(unit.peak_per_s)
            paths += [f"compute.{unit.name}.{key}.{name}" for key in ("peak", "efficiency") for name in formats]
    paths += [
        path
        for path, place in chip.provenance.items()
        if place.calibration and path.startswith(("library.", "mapping.", "overheads."))
    ]
    return _low(chip, paths)


def _link_paths(chip: Chip, bound_by: str, chips: int) -> list[str]:
    """Numbers of the links behind a time. Hops between cores count as launches; transfers between cores and between
    chips are one unit, the latter over the links of the file up to the first that reaches all."""
    paths: list[str] = []
    reached = chips == 1
    for link in chip.links:
        if link.scope == "core":
            keys: tuple[str, ...] = {"launch": ("latency",), "link": ("bandwidth", "latency")}.get(bound_by, ())
        elif bound_by == "link" and link.topology != "host" and not reached:
            keys = ("bandwidth", "latency", "start", "short_fraction", "bulk_fraction", "bulk_start")
            reached = link.peers is None or link.peers >= chips - 1
        else:
            keys = ()
        paths += [f"links.{link.name}.{key}" for key in keys]
    return paths


def weak_energy_inputs(chip: Chip, dtype: str, record: Record) -> tuple[str, ...]:
    """Numbers of low certainty behind the largest part of an energy."""
    parts = {"idle": _number(record, "idle_energy_j")}
    links = [link.name for link in chip.links if link.scope == "chip"]
    for name in [*(level.name for level in chip.memories), *(unit.name for unit in chip.units), *links]:
        parts[name] = float(cast(float, record.get(f"energy_{name}_j") or 0.0))
    largest = max(sorted(parts), key=lambda name: parts[name])
    if largest == "idle":
        return _low(chip, ["power.idle"])
    paths = [f"memories.{largest}.{key}" for key in ("read_energy", "write_energy")] + [f"links.{largest}.energy"]
    return _low(chip, [*paths, *(path for path in chip.provenance if path.startswith(f"compute.{largest}.energy."))])


def _low(chip: Chip, paths: Sequence[str]) -> tuple[str, ...]:
    found = dict.fromkeys(path for path in paths if path in chip.provenance)
    return tuple(path for path in found if chip.provenance[path].certainty == "low")
