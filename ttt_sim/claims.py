"""Public claims about test-time training and hardware, put to the test: each with the simulations that bear on it.

A claim is judged by a rule on simulated numbers, which its text states; nothing here knows the verdict beforehand. What
a cost simulator cannot judge (quality, markets, law) is said to be so, with what it implies technically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ttt_sim.comparison import record_or_reason, why
from ttt_sim.config import load_chip
from ttt_sim.crossover import Record
from ttt_sim.data_files import did_you_mean
from ttt_sim.engine import prepare
from ttt_sim.errors import ConfigError
from ttt_sim.grid import make_point
from ttt_sim.lifecycle import Lifecycle, operation
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.ops import Phase, Role
from ttt_sim.parallel import Progress, run_all
from ttt_sim.serving.serve import Serving, Stream, serve
from ttt_sim.simulation import Point, PointResult, simulate_point
from ttt_sim.workload import closed_forms, find_method, state_per_sequence
from ttt_sim.workload.method import PhaseName

Verdict = Literal["holds", "holds when", "does not hold", "cannot be simulated"]
VERDICTS: tuple[Verdict, ...] = ("holds", "holds when", "does not hold", "cannot be simulated")

MODEL = "Qwen3-4B"
#: The context at which chips and methods are set against each other unless a claim says otherwise.
CONTEXT = 32768
LONG = 131072
#: Lengths of prefill calls, the usual one first.
CALL_TOKENS = (8192, 1024, 256)
#: Contexts at which growth is looked at.
CONTEXTS = (2048, 8192, 32768, 131072)
_BOTH: tuple[PhaseName, ...] = ("decode", "prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """``reason`` continues the verdict in words; ``rows`` the numbers behind it, the first row being a heading;
    ``uncertainty`` how far they may be off."""

    verdict: Verdict
    reason: str
    rows: Sequence[Sequence[str]]
    uncertainty: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """``said``: the claim; ``rule``: what would make it hold; ``command``: a run that shows the same numbers."""

    name: str
    said: str
    rule: str
    command: str
    judge: Callable[[Lab], Judgement]


@dataclass(slots=True)
class Lab:
    """Simulated points, each once."""

    _known: dict[tuple[object, ...], Record] = field(default_factory=dict)

    def point(
        self, chip: str, method: str, phase: PhaseName, context: int = CONTEXT, *, model: str = MODEL, batch: int = 1,
        **more: Any,
    ) -> Point:  # fmt: skip
        overrides = {"memories.hbm.capacity": more.pop("memory")} if "memory" in more else None
        loaded = load_chip(chip, overrides=overrides)
        return make_point(loaded, model, method, phase=phase, context=context, batch=batch, **more)

    def record(
        self, chip: str, method: str, phase: PhaseName, context: int = CONTEXT, *, model: str = MODEL, batch: int = 1,
        **more: Any,
    ) -> Record:  # fmt: skip
        """The record of a point; what cannot run has ``fits`` False and says why."""
        key = (chip, method, phase, context, model, batch, repr(sorted(more.items())))
        if key not in self._known:
            point = self.point(chip, method, phase, context, model=model, batch=batch, **more)
            self._known[key] = record_or_reason(point)
        return self._known[key]

    def prefill(self, chip: str, method: str, context: int, **more: Any) -> Record:
        """The record of a prompt, in calls of the usual length or as long as the memory of the chip allows."""
        record: Record = {}
        for call in CALL_TOKENS:
            record = self.record(chip, method, "prefill", context, call_tokens=call, **more)
            if record["fits"]:
                break
        return record

    def outcome(self, chip: str, method: str, phase: PhaseName, context: int = CONTEXT, **more: Any) -> PointResult:
        """A point with its trace."""
        return simulate_point(self.point(chip, method, phase, context, **more))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    claim: Claim
    judgement: Judgement


def judge_claims(
    names: Sequence[str] | None = None, *, workers: int | None = None, progress: Progress | None = None
) -> list[Judged]:
    """Judge claims, all of them by default, in their order.

    Raises:
        ConfigError: an unknown claim.
    """
    known = tuple(CLAIMS)
    for name in names or ():
        if name not in CLAIMS:
            raise ConfigError(f"unknown claim {name!r}{did_you_mean(name, known)}; claims: {', '.join(known)}")
    chosen = [name for name in known if names is None or name in names]
    prepare("compiled")
    judgements = run_all(_judge, chosen, workers=workers, progress=progress)
    return [Judged(claim=CLAIMS[name], judgement=found) for name, found in zip(chosen, judgements, strict=True)]


def _judge(name: str) -> Judgement:
    return CLAIMS[name].judge(Lab())


# --- numbers and words ------------------------------------------------------------------------------------------------


def _of(record: Record, column: str) -> float:
    """A number of a record, NaN where the point has none."""
    value = record.get(column)
    return math.nan if value is None else float(cast(float, value))


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _range(values: Sequence[float]) -> str:
    low, high = _digits(min(values)), _digits(max(values))
    return low if low == high else f"{low} to {high}"


def _ratio(value: float) -> str:
    return f"{_digits(value)} x" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "-"


def _tokens(tokens: int) -> str:
    return (
        f"{tokens // 1024}K"
        if tokens % 1024 == 0 and tokens < 1 << 20
        else (f"{tokens >> 20}M" if tokens % (1 << 20) == 0 else str(tokens))
    )


def _spread(*records: Record) -> str:
    """How far times may be off, and the share of them that rests on kernels which nobody has measured."""
    known = [record for record in records if record["fits"]]
    if not known:
        return "nothing was simulated"
    low = min(_of(record, "seconds_low") / _of(record, "seconds") for record in known)
    high = max(_of(record, "seconds_high") / _of(record, "seconds") for record in known)
    share = max(_of(record, "unmeasured_share") for record in known)
    return (
        f"80 % intervals of times reach from {low:.2f} to {high:.2f} times; up to {_percent(share)} of a time is "
        "spent in kernels that nobody has measured"
    )


# --- the claims -------------------------------------------------------------------------------------------------------


def _bandwidth_for_compute(lab: Lab) -> Judgement:
    rows = [["context", "bytes per decoded token, TTT / KV", "FLOPs per prompt token, TTT / KV"]]
    traded = []
    last: list[Record] = []
    for context in CONTEXTS:
        records = [lab.record("h100", method, phase, context) for method in ("kv", "ttt_window") for phase in _BOTH]
        kv_decode, kv_prefill, decode, prefill = records
        saved = _of(decode, "main_bytes_per_token") / _of(kv_decode, "main_bytes_per_token")
        paid = _of(prefill, "flops") / _of(kv_prefill, "flops")
        rows.append([_tokens(context), _ratio(saved), _ratio(paid)])
        traded.append(saved < 1 < paid)
        last = records
    crossing = closed_forms.flop_crossover(load_model(MODEL), load_ttt("default"), 1024)
    reason = (
        f"the context is below about {int(crossing)} tokens (equal prefill FLOPs in closed form). Above, a windowed "
        "model with fast weights reads fewer bytes and also computes less than full attention: nothing is traded. "
        "Against a model with the same window it always adds both."
    )
    verdict: Verdict = "holds" if all(traded) else ("holds when" if any(traded) else "does not hold")
    if not any(traded):
        reason = "At none of these contexts do bytes fall while FLOPs rise: " + reason
    return Judgement(
        verdict=verdict, reason=reason, rows=rows,
        uncertainty="bytes and FLOPs are counted, not timed: exact for this model and these methods; " + _spread(*last),
    )  # fmt: skip


def _memory_local(lab: Lab) -> Judgement:
    rows = [["chip", "state TTT / KV", "FLOPs TTT / window", "fast-weight bytes to main memory", "main memory is"]]
    local, chips, all_records = [], ("h100", "tpu_v7", "groq_lpu", "wse3", "ideal_ttt"), []
    for chip in chips:
        kv, window, ttt = (lab.prefill(chip, method, CONTEXT) for method in ("kv", "kv_window", "ttt_window"))
        pinned = lab.prefill(chip, "ttt_window", CONTEXT, ttt=load_ttt("default", weight_write="resident"))
        if pinned["fits"]:  # a cache that holds the fast weights of a user
            ttt = pinned
        memory = load_chip(chip).main_memory
        on_chip = not memory.shared_bus
        moved = _of(ttt, "read_fast_weights_bytes") + _of(ttt, "write_fast_weights_bytes")
        rows.append([
            chip, _ratio(_of(ttt, "state_bytes_per_sequence") / _of(kv, "state_bytes_per_sequence")),
            _ratio(_of(ttt, "flops") / _of(window, "flops")), f"{_digits(moved / CONTEXT / 1024)} KiB per token",
            f"{memory.name}, {'on' if on_chip else 'off'} chip",
        ])  # fmt: skip
        local.append(on_chip or moved == 0)
        all_records.append(ttt)
    where = [chip for chip, ok in zip(chips, local, strict=True) if ok]
    verdict: Verdict = "holds" if all(local) else ("holds when" if any(local) else "does not hold")
    reason = (
        f"weights live on the chip ({', '.join(where) or 'none of these'}). State shrinks everywhere, and FLOPs grow a "
        "little against the same window; but fast weights of megabytes per layer and user are larger than the caches "
        "of chips with HBM, so every chunk reads and writes them through main memory."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*all_records))


def _kv_dropped(lab: Lab) -> Judgement:
    model, rows, kept = load_model(MODEL), [["method", "KV of a user at 128K", "of the full cache"]], {}
    full = state_per_sequence(model, find_method("kv").settings(None, None, None), LONG, "bf16").kv_bytes
    for name in ("ttt", "ttt_window", *(m for m in ("ttt_e2e", "gated_deltanet", "mamba2", "ttt_linear") if _known(m))):
        settings = find_method(name).settings(None, None, None)
        kv = state_per_sequence(model, settings, LONG, "bf16").kv_bytes
        rows.append([find_method(name).title, f"{_digits(kv / 2**20)} MiB", _percent(kv / full)])
        kept[name] = kv / full
    gone = [find_method(name).title for name, share in kept.items() if share == 0]
    small = [find_method(name).title for name, share in kept.items() if 0 < share < 0.5]
    whole = [find_method(name).title for name, share in kept.items() if share >= 0.5]
    verdict: Verdict = "holds" if not whole and not small else ("holds when" if gone or small else "does not hold")
    reason = (
        f"attention itself is replaced or windowed. The whole cache stays with {', '.join(whole) or 'none of these'}; "
        f"a window of it with {', '.join(small) or 'none of these'}; nothing with "
        f"{', '.join(gone) or 'none of these'}. The drop-in form of In-Place TTT saves no memory at all."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty="sizes are exact for this model")


def _known(method: str) -> bool:
    try:
        find_method(method)
    except ConfigError:
        return False
    return True


def _quadratic(lab: Lab) -> Judgement:
    rows, growth = [["method", "prefill 32K", "prefill 128K", "time grows with context to the power"]], {}
    records = []
    for name in ("kv", "ttt", "ttt_window"):
        short, long = (lab.record("h100", name, "prefill", context) for context in (CONTEXT, LONG))
        power = math.log(_of(long, "seconds") / _of(short, "seconds")) / math.log(LONG / CONTEXT)
        rows.append([name, f"{_digits(_of(short, 'seconds'))} s", f"{_digits(_of(long, 'seconds'))} s", f"{power:.2f}"])
        growth[name] = power
        records += [short, long]
    linear = [name for name, power in growth.items() if power < 1.1 and name != "kv"]
    verdict: Verdict = "holds" if len(linear) == 2 else ("holds when" if linear else "does not hold")
    reason = (
        f"attention is windowed ({', '.join(linear) or 'none'}): then time is linear in the context. Over full "
        f"attention, as trained drop-in models have it, the power stays {growth['ttt']:.2f}."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _with_and_without(lab: Lab, chip: str) -> tuple[Record, Record]:
    """Decode over a window without updates and with them, both on the chips that the latter takes."""
    parallel = lab.point(chip, "ttt_window", "decode").parallel
    window, ttt = (lab.record(chip, method, "decode", parallel=parallel) for method in ("kv_window", "ttt_window"))
    return window, ttt


#: Chips sold for inference, or whose weights were never meant to change.
_INFERENCE_CHIPS = ("inferentia2", "ai100_ultra", "groq_lpu", "hexagon_8elite", "npu_xdna2", "northpole", "tpu_v5e")
#: Within this factor a simulated ratio agrees with a published one.
_NEAR = 1.25
_RECALL = "What either recalls is not simulated."
#: A decode step that takes this many times as long as without updates is no longer the same product.
_OBSOLETE = 2.0


def _updates_against_window(lab: Lab, chips: Sequence[str]) -> tuple[list[list[str]], dict[str, float], list[Record]]:
    rows = [["chip", "weights change by", "window", "TTT + window", "slower", "jitter of a boundary step"]]
    slower: dict[str, float] = {}
    records: list[Record] = []
    for chip in chips:
        window, ttt = _with_and_without(lab, chip)
        mode = load_chip(chip).writability.mode
        ratio = _of(ttt, "seconds") / _of(window, "seconds")
        jitter = _of(ttt, "boundary_step_seconds") / _of(ttt, "ordinary_step_seconds")
        rows.append([
            chip, mode.replace("_", " "), f"{_digits(1e3 * _of(window, 'seconds'))} ms",
            f"{_digits(1e3 * _of(ttt, 'seconds'))} ms", _ratio(ratio), _ratio(jitter),
        ])  # fmt: skip
        slower[chip] = ratio if ttt["fits"] else math.inf
        records += [window, ttt]
    return rows, slower, records


def _inference_chips(lab: Lab) -> Judgement:
    rows, slower, records = _updates_against_window(lab, _INFERENCE_CHIPS)
    lost = [chip for chip, ratio in slower.items() if ratio > _OBSOLETE]
    kept = [chip for chip in slower if chip not in lost]
    verdict: Verdict = "holds" if not kept else ("holds when" if lost else "does not hold")
    reason = f"updates cost more than {_ratio(_OBSOLETE)} on {', '.join(lost) or 'none of these'}"
    reason += f" and less on {', '.join(kept) or 'none'}"
    if verdict == "holds when":
        reason = f"a chip cannot change its weights cheaply: {reason}"
    reason += ". That a chip can run updates says nothing of the software that would have to."
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _needed_at_inference(lab: Lab) -> Judgement:
    model = "toy"
    rows = [["method", "weights written per user", "gradient or delta buffers", "optimiser state", "gradient work"]]
    needs: dict[str, tuple[bool, bool, bool]] = {}
    cases: list[tuple[str, str, PhaseName, dict[str, Any]]] = [
        ("KV cache", "kv", "prefill", {}),
        ("In-Place TTT", "ttt_window", "prefill", {"ttt": "toy", "window": 64}),
        ("full fine-tuning, Adam", "fine_tuning", "train", {}),
    ]
    if _known("ttt_e2e"):
        cases.insert(2, ("TTT-E2E", "ttt_e2e", "prefill", {"window": 64, "options": {"mini_batch": 32}}))
    if _known("lora"):
        cases.append(("LoRA, Adam", "lora", "train", {}))
    if _known("gated_deltanet"):
        cases.append(("Gated DeltaNet", "gated_deltanet", "prefill", {}))
    for title, name, phase, more in cases:
        outcome = lab.outcome("h100", name, phase, 320, model=model, **more)
        result = outcome.result
        if result is None:
            rows.append([title, "-", "-", "-", why(outcome.record, load_chip("h100"))])
            continue
        trace = result.trace
        own = sum(t.nbytes for t in trace.tensors if t.role == Role.FAST_WEIGHT)
        buffers = sum(t.nbytes for t in trace.tensors if t.role == Role.GRADIENT)
        state = sum(t.nbytes for t in trace.tensors if t.role == Role.OPTIMISER)
        backward = bool((trace.phase == int(Phase.BACKWARD)).any())
        rows.append([title, *(f"{_digits(n / 1024)} KiB" for n in (own, buffers, state)), "yes" if backward else "no"])
        needs[title] = (own > 0, buffers > 0, state > 0)
    inference = {title: found for title, found in needs.items() if "Adam" not in title and title != "KV cache"}
    everything = [title for title, found in inference.items() if all(found)]
    verdict: Verdict = "holds" if len(everything) == len(inference) else "holds when"
    if not any(any(found[1:]) for found in inference.values()):
        verdict = "does not hold"
    reason = (
        "it is said of each part by itself: update kernels by every method with fast weights; buffers for gradients or "
        "deltas by those that form one before they add it; optimiser state by none of the methods for inference with "
        f"their defaults ({', '.join(everything) or 'none needs all three'}), only by training with Adam."
    )
    return Judgement(
        verdict=verdict, reason=reason, rows=rows,
        uncertainty="counted in traces of the toy model at 320 tokens; exact, also in kind for larger models",
    )  # fmt: skip


def _scheduling(lab: Lab) -> Judgement:
    rows = [["method", "kernels of a prefill call", "kinds", "kinds that inference lacks", "longest step / ordinary"]]
    kinds: dict[str, set[str]] = {}
    records = []
    jitter = 1.0
    for name in ("kv_window", "ttt_window"):
        prefill = lab.outcome("h100", name, "prefill", 8192)
        decode = lab.record("h100", name, "decode", 8192)
        kinds[name] = {part for label in prefill.cycles_by_kernel for part in label.split("+")}
        if name == "ttt_window":
            jitter = _of(decode, "boundary_step_seconds") / _of(decode, "ordinary_step_seconds")
        extra = kinds[name] - kinds["kv_window"]
        rows.append([
            name, str(prefill.record["n_kernels"]), str(len(kinds[name])), ", ".join(sorted(extra)) or "-",
            _ratio(jitter) if name == "ttt_window" else "1 x",
        ])  # fmt: skip
        records.append(decode)
    extra = kinds["ttt_window"] - kinds["kv_window"]
    verdict: Verdict = "does not hold" if extra and jitter > 1.1 else ("holds" if not extra else "holds when")
    reason = (
        f"adaptation adds {len(extra)} kinds of kernels to a decode loop that had none of them, and every "
        f"chunk one step takes {_ratio(jitter)} as long as the others: a scheduler has a second kind of work, "
        "with a deadline of its own, where it had one."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _against(
    lab: Lab, chips: Sequence[str], base: str = "h100"
) -> tuple[list[list[str]], dict[str, dict[str, float]], list[Record]]:
    """One update, its energy and what updates add to a decode step, on each chip."""
    rows = [
        ["chip", "chips", "one update", "its energy", "updates add to a step", "boundary step", "token", "chip time"]
    ]
    found: dict[str, dict[str, float]] = {}
    records = []
    for chip in (base, *(c for c in chips if c != base)):
        window, ttt = _with_and_without(lab, chip)
        records += [window, ttt]
        n = float(cast(int, ttt.get("chips") or 1))
        values = {
            "update": _of(ttt, "update_seconds"), "energy": _of(ttt, "update_energy_j"),
            "added": _of(ttt, "seconds") / _of(window, "seconds") - 1,
            "jitter": _of(ttt, "boundary_step_seconds") / _of(ttt, "ordinary_step_seconds"),
            "token": _of(ttt, "seconds"), "chips": n, "token_energy": _of(ttt, "energy_j_per_token"),
        }  # fmt: skip
        found[chip] = values
        rows.append([
            chip, f"{n:.0f}", f"{_digits(1e6 * values['update'])} us", f"{_digits(1e3 * values['energy'])} mJ",
            _percent(values["added"]), _ratio(values["jitter"]), f"{_digits(1e3 * values['token'])} ms",
            f"{_digits(1e3 * values['token'] * n)} chip-ms",
        ])  # fmt: skip
    return rows, found, records


def _better(found: Mapping[str, Mapping[str, float]], chip: str, base: str = "h100") -> dict[str, bool]:
    return {key: found[chip][key] < found[base][key] for key in ("update", "energy", "added", "jitter")}


_MEASURES = {"update": "time of an update", "energy": "its energy", "added": "share of a step", "jitter": "jitter"}


def _suits(lab: Lab, chip: str, note: str = "") -> Judgement:
    """Whether updates are cheaper on a chip than on an H100 in time, energy, share of a step and jitter."""
    rows, found, records = _against(lab, (chip,))
    ttt = lab.record(chip, "ttt_window", "decode", CONTEXT)
    if not ttt["fits"]:
        return Judgement(
            verdict="does not hold", reason=f"{chip} cannot run it: {why(ttt, load_chip(chip))}.", rows=rows,
            uncertainty=_spread(*records),
        )  # fmt: skip
    score = _better(found, chip)
    better = ", ".join(_MEASURES[name] for name, ok in score.items() if ok)
    worse = ", ".join(_MEASURES[name] for name, ok in score.items() if not ok)
    verdict: Verdict = "holds" if not worse else ("holds when" if better else "does not hold")
    reason = f"all four are better than on one H100: {better}."
    if better and worse:
        reason = f"it is a matter of {better}; worse than on one H100: {worse}."
    elif worse:
        reason = f"all four are worse than on one H100: {worse}."
    return Judgement(verdict=verdict, reason=f"{reason}{note}", rows=rows, uncertainty=_spread(*records))


def _groq(lab: Lab) -> Judgement:
    return _suits(
        lab, "groq_lpu", " The model takes many of these chips, whose fixed schedule adds no jitter of its own."
    )


def _wafer(lab: Lab) -> Judgement:
    return _suits(lab, "wse3", " A whole wafer is set against one GPU.")


def _fpga(lab: Lab) -> Judgement:
    return _suits(lab, "versal_vhk158")


_EDGE = ("hexagon_8elite", "npu_xdna2")
_SERVERS = ("h100", "h200", "b200", "mi300x", "tpu_v7", "trainium2")


def _edge(lab: Lab) -> Judgement:
    rows = [["chip", "where", "KV cache", "TTT + window", "faster", "window alone", "users at 32K, KV", "TTT + window"]]
    gains: dict[str, float] = {}
    records: dict[str, Record] = {}
    for chip in (*_EDGE, *_SERVERS):
        kv, window, ttt = (lab.record(chip, method, "decode", CONTEXT) for method in ("kv", "kv_window", "ttt_window"))
        gain = _of(kv, "seconds") / _of(ttt, "seconds")
        gains[chip] = gain
        records[chip] = ttt
        room = load_chip(chip).main_memory.capacity_bytes - 2 * load_model(MODEL).parameters
        held = [max(int(room // _of(record, "state_bytes_per_sequence")), 0) for record in (kv, ttt)]
        rows.append([
            chip, "edge" if chip in _EDGE else "server",
            *(f"{_digits(1e3 * _of(record, 'seconds'))} ms" for record in (kv, ttt)), _ratio(gain),
            _ratio(_of(kv, "seconds") / _of(window, "seconds")), *map(str, held),
        ])  # fmt: skip
    known = {chip: gain for chip, gain in gains.items() if math.isfinite(gain)}
    edge = [known[c] for c in _EDGE if c in known]
    servers = [known[c] for c in _SERVERS if c in known]
    most = bool(edge) and bool(servers) and min(edge) > max(servers)
    some = bool(edge) and bool(servers) and max(edge) > min(servers)
    verdict: Verdict = "holds" if most else ("holds when" if some else "does not hold")
    alone = [c for c in _EDGE if not lab.record(c, "kv", "decode", CONTEXT)["fits"] and records[c]["fits"]]
    below = [c for c in _SERVERS if c in known and edge and known[c] < min(edge)]
    above = [c for c in _SERVERS if c in known and c not in below]
    reason = (
        f"set against {', '.join(below) or 'none of these servers'}: the step of a single user gets {_range(edge)} "
        f"times as fast on edge chips, {_range(servers)} on servers (as much or more: {', '.join(above) or 'none'})."
        if edge and servers
        else "there is no pair to compare."
    )
    if alone:
        reason += f" On {', '.join(alone)} the KV cache does not fit at all and TTT does."
    reason += " The gain comes from the window; fast weights add to its cost."
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records.values()))


def _ten_times(lab: Lab) -> Judgement:
    rows = [["", "ideal_ttt", "h100", "h200", "best of today's / ideal_ttt"]]
    ratios: dict[str, float] = {}
    records = [
        lab.record(chip, "ttt_window", phase, CONTEXT) for chip in ("ideal_ttt", "h100", "h200") for phase in _BOTH
    ]
    measures = (
        ("one update, s", 0, "update_seconds"), ("energy of an update, J", 0, "update_energy_j"),
        ("prefill with adaptation, s", 1, "seconds"), ("decode step, s", 0, "seconds"),
    )  # fmt: skip
    for title, offset, column in measures:
        values = [_of(records[2 * i + offset], column) for i in range(3)]
        ratios[title] = min(values[1:]) / values[0]
        rows.append([title, *(_digits(value) for value in values), _ratio(ratios[title])])
    reached = [title for title, ratio in ratios.items() if ratio >= 10]
    verdict: Verdict = "holds" if len(reached) == len(ratios) else ("holds when" if reached else "does not hold")
    most = max(ratios, key=lambda title: ratios[title])
    reason = (
        f"measured by {', '.join(reached)}."
        if reached
        else "the most that the hypothetical chip of this project gains over the better of two GPUs is "
        f"{_ratio(ratios[most])} ({most.partition(',')[0]}). Its memory and peak are near those of an H100."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _five_to_ten(lab: Lab) -> Judgement:
    rows = [["method", "context", "seconds per answer", "of a KV cache", "of a window"]]
    ratios: dict[str, float] = {}
    answer = 256
    names = ["ttt", "ttt_window", *(m for m in ("ttt_e2e", "lora_ttt", "q_ttt") if _known(m)), "fine_tuning"]
    records: list[Record] = []

    def total(name: str, context: int) -> float:
        method = find_method(name)
        more: dict[str, Any] = {}
        adapt = lab.record("h100", name, method.adapts, context, **more)
        steps = 1
        if method.adapts == "train":
            point = lab.point("h100", name, "train", context)
            tokens = method.step_tokens(point.method, context)
            adapt, steps = lab.record("h100", name, "train", tokens, **more), method.steps(point.method, context)
        ask, decode = (lab.record("h100", name, phase, context) for phase in ("ask", "decode"))
        records.extend((adapt, ask, decode))
        return steps * _of(adapt, "seconds") + _of(ask, "seconds") + answer * _of(decode, "seconds")

    for context in (8192, CONTEXT):
        base, window = total("kv", context), total("kv_window", context)
        for name in names:
            seconds = total(name, context)
            rows.append([name, _tokens(context), _digits(seconds), _ratio(seconds / base), _ratio(seconds / window)])
            ratios[f"{name} at {_tokens(context)}"] = seconds / base
    for name, premium in _premiums(("ttt", "ttt_window")).items():
        rows.append([f"{name}, served at full load", "2K on average", "-", _ratio(premium), "-"])
        ratios[f"{name} served at full load"] = premium
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    inside = [name for name, ratio in finite.items() if 5 <= ratio <= 10]
    verdict: Verdict = "holds" if len(inside) == len(finite) else ("holds when" if inside else "does not hold")
    reason = (
        f"it is {', '.join(inside)}. " if inside else
        "no method lies between 5 and 10 times a KV cache, taking the context in, a question and an answer of "
        f"{answer} tokens together. "
    ) + f"The range is {_ratio(min(finite.values()))} to {_ratio(max(finite.values()))}."  # fmt: skip
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _premiums(methods: Sequence[str]) -> dict[str, float]:
    """Chip time of a token over that of a KV cache, by method, of a server at full load."""
    chip = load_chip("h100")
    settings = Serving(
        chip=chip, model=load_model(MODEL), methods=("kv", *methods), stream=Stream(count=200), ttt=load_ttt("default"),
        window=1024, dtype=chip.default_dtype,
    )  # fmt: skip
    records = {str(record["method"]): record for record in serve(settings).records.to_dict("records")}
    return {name: _of(records[name], "cost_ratio") for name in methods}


def _context_parallel(lab: Lab) -> Judgement:
    rows = [["chips", "KV, ring attention", "speed-up", "TTT + window, prefix sum", "speed-up", "efficiency"]]
    base: dict[str, float] = {}
    efficiency: dict[str, float] = {}
    records = []
    for cp in (1, 2, 4, 8):
        cells = [str(cp)]
        for name in ("kv", "ttt_window"):
            more: dict[str, Any] = {"chips": cp, "cp": cp} if cp > 1 else {}
            record = lab.record("h100", name, "prefill", LONG, **more)
            seconds = _of(record, "seconds")
            base.setdefault(name, seconds)
            efficiency[name] = base[name] / seconds / cp
            cells += [f"{_digits(seconds)} s", _ratio(base[name] / seconds)]
            records.append(record)
        rows.append([*cells, _percent(efficiency["ttt_window"])])
    good = efficiency["ttt_window"] >= 0.7
    verdict: Verdict = "holds" if good else ("holds when" if efficiency["ttt_window"] >= 0.4 else "does not hold")
    reason = (
        f"eight H100s of one node take a prompt of 128K in with {_percent(efficiency['ttt_window'])} efficiency, ring "
        f"attention with {_percent(efficiency['kv'])}; 70 % is asked for."
    )
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _retrieval(lab: Lab) -> Judgement:
    rows = [
        ["context", "TTT takes it in", "index of it", "question, TTT", "question, retrieval", "questions to break even"]
    ]
    records, breaks = [], []
    for context in (LONG, 1 << 20):
        ttt, index = (lab.record("h100", m, find_method(m).adapts, context) for m in ("ttt_window", "rag"))
        asked, searched = (lab.record("h100", m, "ask", context) for m in ("ttt_window", "rag"))
        records += [ttt, index, asked, searched]
        dearer = _of(ttt, "seconds") - _of(index, "seconds")
        saved = _of(searched, "seconds") - _of(asked, "seconds")
        questions = max(dearer / saved, 0.0) if saved > 0 else math.inf
        breaks.append(questions)
        rows.append([
            _tokens(context), *(f"{_digits(_of(r, 'seconds'))} s" for r in (ttt, index, asked, searched)),
            f"{questions:.0f}" if math.isfinite(questions) else "never",
        ])  # fmt: skip
    verdict: Verdict = "holds" if max(breaks) == 0 else ("holds when" if min(breaks) < math.inf else "does not hold")
    reason = (
        f"a context is asked more than {_digits(min(breaks))} to {_digits(max(breaks))} questions, by cost alone: an "
        f"index is built sooner, and each question then takes longer. {_RECALL}"
    )
    if verdict == "does not hold":
        reason = "an index is cheaper to build and to ask. " + _RECALL
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _end_to_end(lab: Lab) -> Judgement:
    rows = [["context", "full attention", "its chips", "TTT-E2E", "its chips", "ratio of chip time", "published"]]
    records, off = [], []
    cases: tuple[tuple[int, float, dict[str, Any]], ...] = (
        (LONG, 2.7, {}), (2 << 20, 35.0, {}), (2 << 20, 35.0, {"memory": "2 TiB"}),
    )  # fmt: skip
    for context, published, memory in cases:
        full = lab.record("h100", "kv", "prefill", context, model="ttt-e2e-3b", **memory)
        e2e = lab.record("h100", "ttt_e2e", "prefill", context, model="ttt-e2e-3b")
        ratio = _of(full, "seconds") * _of(full, "chips") / (_of(e2e, "seconds") * _of(e2e, "chips"))
        cells = [f"{_digits(_of(full, 'seconds'))} s", f"{_of(full, 'chips'):.0f}{' of 2 TiB' if memory else ''}"]
        cells += [f"{_digits(_of(e2e, 'seconds'))} s", f"{_of(e2e, 'chips'):.0f}"]
        rows.append([_tokens(context), *cells, _ratio(ratio), _ratio(published)])
        off.append(ratio / published)
        records += [full, e2e]
    within = [1 / _NEAR <= value <= _NEAR for value in off]
    verdict: Verdict = "holds" if all(within) else ("holds when" if any(within) else "does not hold")
    reason = (
        f"the simulated ratio is {_digits(off[0])} times the published one at 128K. At 2M it is {_digits(off[1])} "
        f"times in the time of the chips that the cache takes, {_digits(off[2])} times if one chip had memory enough; "
        "what was counted for the published figure is not stated."
    )
    if verdict == "holds when":
        reason = f"chip time is counted at 2M and 128K is left out: {reason}" if within[1] else f"in part: {reason}"
    return Judgement(verdict=verdict, reason=reason, rows=rows, uncertainty=_spread(*records))


def _audit(lab: Lab) -> Judgement:
    chip = load_chip("h100")
    settings = Lifecycle(
        chip=chip, model=load_model(MODEL), method="ttt_window", ttt=load_ttt("default"), window=1024, context=CONTEXT,
        batch=8, dtype=chip.default_dtype, workers=1,
    )  # fmt: skip
    rows = [["per chunk of 8 users", "bytes", "time", "of the time of a chunk", "energy"]]
    share = 0.0
    step = lab.record("h100", "ttt_window", "decode", CONTEXT, batch=settings.batch)
    chunk = settings.ttt.chunk_tokens * _of(step, "seconds")
    for name in ("hash_weights", "log_record", "log_tokens"):
        row = operation(settings, name)
        moved = sum(_of(row, key) for key in ("read_bytes", "write_bytes", "outside_bytes"))
        rows.append([
            str(row["title"]), f"{_digits(moved / 2**20)} MiB", f"{_digits(1e6 * _of(row, 'seconds'))} us",
            _percent(_of(row, "seconds") / chunk), f"{_digits(1e3 * _of(row, 'energy_j'))} mJ",
        ])  # fmt: skip
        share += _of(row, "seconds") / chunk
    reason = (
        "what law will ask is no matter of cost. A hash of the weights, a record and the token ids of every chunk, "
        f"which permit an exact replay, take {_percent(share)} of the time in which a chunk is decoded."
    )
    return Judgement(
        verdict="cannot be simulated", reason=reason, rows=rows,
        uncertainty="hash and log are kernels that nobody has measured here; bytes are exact",
    )  # fmt: skip


def _not_simulated(reason: str) -> Callable[[Lab], Judgement]:
    def judge(lab: Lab) -> Judgement:
        return Judgement(verdict="cannot be simulated", reason=reason, rows=[], uncertainty="-")

    return judge


_RUN = "python -m ttt_sim"
_ALL: tuple[Claim, ...] = (
    Claim(
        name="bandwidth_for_compute", said="Context in weights trades memory bandwidth for compute.",
        rule="Bytes per decoded token fall and FLOPs per prompt token rise against a full KV cache, at every context.",
        command=f"{_RUN} run h100 --context 2k,8k,32k,128k --batch 1", judge=_bandwidth_for_compute,
    ),
    Claim(
        name="memory_shrinks_locally", said="Memory shrinks while compute grows but stays local.",
        rule="State is below that of a KV cache, and no byte of a fast weight crosses an off-chip memory.",
        command=f"{_RUN} compare h100 tpu_v7 groq_lpu wse3 ideal_ttt --batch 1", judge=_memory_local,
    ),
    Claim(
        name="kv_dropped", said="The KV cache can be dropped.",
        rule="No method that adapts at test time keeps keys and values.",
        command=f"{_RUN} approaches h100", judge=_kv_dropped,
    ),
    Claim(
        name="no_quadratic_growth", said="Attention's quadratic growth goes.",
        rule="From 32K to 128K prefill time grows with a power below 1.1 of the context in every form of In-Place TTT.",
        command=f"{_RUN} run h100 --method kv,ttt,ttt_window --context 32k,128k --batch 1", judge=_quadratic,
    ),
    Claim(
        name="inference_chips_obsolete", said="Inference-only chips become obsolete.",
        rule=f"On every chip sold for inference a decode step with updates takes over {_OBSOLETE:g} times one without.",
        command=f"{_RUN} compare {' '.join(_INFERENCE_CHIPS)} --method kv_window,ttt_window --batch 1",
        judge=_inference_chips,
    ),
    Claim(
        name="training_machinery_at_inference",
        said="Update kernels, gradient buffers and optimiser state are needed at inference.",
        rule="Each of the three appears in the trace of every method that adapts at inference.",
        command=f"{_RUN} approaches h100 --context 8k", judge=_needed_at_inference,
    ),
    Claim(
        name="easier_scheduling", said="The same kernels for training and inference make scheduling easier.",
        rule="Adaptation adds no kind of kernel to those of inference, and no step is longer than the others.",
        command=f"{_RUN} run h100 --method kv_window,ttt_window --context 8k --batch 1", judge=_scheduling,
    ),
    Claim(
        name="deterministic_chips", said="Deterministic (Groq-like) chips suit weight updates better than GPUs.",
        rule="Time and energy of an update, its share of a step and the jitter are all below those of an H100.",
        command=f"{_RUN} compare h100 groq_lpu --method kv_window,ttt_window --batch 1", judge=_groq,
    ),
    Claim(
        name="wafer_scale", said="Wafer-scale bandwidth suits fast weight modification.",
        rule="The same four numbers, WSE-3 against an H100.",
        command=f"{_RUN} compare h100 wse3 --method kv_window,ttt_window --batch 1", judge=_wafer,
    ),
    Claim(
        name="fpgas", said="FPGAs suit test-time training.", rule="The same four numbers, VHK158 against an H100.",
        command=f"{_RUN} compare h100 versal_vhk158 --method kv_window,ttt_window --batch 1", judge=_fpga,
    ),
    Claim(
        name="edge_benefits_most", said="Edge devices benefit most.",
        rule="TTT with a window gains more over a KV cache at 32K on every edge chip than on every server chip.",
        command=f"{_RUN} compare {' '.join((*_EDGE, *_SERVERS))} --batch 1", judge=_edge,
    ),
    Claim(
        name="ten_times_faster_chip", said="A TTT chip adapts 10 times faster than software on today's hardware.",
        rule="The hypothetical chip is 10 times better than the better of H100 and H200 in each of four measures.",
        command=f"{_RUN} compare ideal_ttt h100 h200 --batch 1", judge=_ten_times,
    ),
    Claim(
        name="five_to_ten_times_cost", said="Adaptive inference costs 5 to 10 times standard inference.",
        rule="Every method that adapts takes 5 to 10 times the chip time of a KV cache for a context and an answer.",
        command=f"{_RUN} approaches h100 --context 32k --batch 1", judge=_five_to_ten,
    ),
    Claim(
        name="retrieval_unnecessary", said="Retrieval becomes unnecessary.",
        rule="Taking a context in and asking about it both take less time with TTT than with an index.",
        command=f"{_RUN} approaches h100 --method ttt_window,rag --context 1M --batch 1", judge=_retrieval,
    ),
    Claim(
        name="context_parallelism", said="Chunk-wise updates scale under context parallelism.",
        rule="Eight H100s take in 128K tokens with at least 70 % of eight times the speed of one.",
        command=f"{_RUN} run h100 --chips 8 --cp 8 --context 128k --batch 1 --method kv,ttt_window",
        judge=_context_parallel,
    ),
    Claim(
        name="end_to_end_speed", said="TTT-E2E is 2.7 times as fast as full attention at 128K, 35 times at 2M (H100).",
        rule=f"The simulated ratios of chip time of a prompt, 3B model and twin, are within {_NEAR:g} times of both.",
        command=f"{_RUN} run h100 --model ttt-e2e-3b --method kv,ttt_e2e --context 128k,2M --batch 1",
        judge=_end_to_end,
    ),
    Claim(
        name="audit_trail", said="Law will ask for a trail of what changed a model.",
        rule="None for the law; the cost of a trail that permits an exact replay is simulated.",
        command=f"{_RUN} lifecycle h100", judge=_audit,
    ),
    Claim(
        name="markets_and_dates", said="Forecasts of market shares, prices and dates.",
        rule="None: no simulation bears on them.", command="-",
        judge=_not_simulated("costs are inputs of a market, not its outcome."),
    ),
)  # fmt: skip
CLAIMS: Mapping[str, Claim] = {claim.name: claim for claim in _ALL}
