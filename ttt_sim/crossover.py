"""Where two methods change places: exactly for state, by interpolation between simulated contexts for everything
else."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from ttt_sim.intervals import ANY_OP
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, TTTSettings
from ttt_sim.system import microbatches_of
from ttt_sim.units import ceil_div
from ttt_sim.workload import closed_forms, state_per_sequence

if TYPE_CHECKING:
    import pandas as pd

#: No model keeps more tokens than this; a search ends here.
LONGEST_CONTEXT_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """``tokens``: where both sides are equal, a rational number; ``first_whole_token``: the first context at which the
    challenger is smaller."""

    tokens: Fraction
    first_whole_token: int


def exact_crossing(lead: Callable[[int], int]) -> Crossing | None:
    """First context at which ``lead(tokens)`` > 0, found by bisection; None when that never happens.

    ``lead`` is how many bytes the challenger saves at a context. It must not fall as the context grows, and be affine
    between whole tokens, so that the point of equality between two of them is a rational number.
    """
    low, high = 0, 1
    if lead(high) > 0:
        return Crossing(tokens=_equality(lead, high), first_whole_token=high)
    while lead(high) <= 0:
        low, high = high, 2 * high
        if high > LONGEST_CONTEXT_TOKENS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if lead(middle) > 0:
            high = middle
        else:
            low = middle
    return Crossing(tokens=_equality(lead, high), first_whole_token=high)


def _equality(lead: Callable[[int], int], first: int) -> Fraction:
    below, above = lead(first - 1), lead(first)
    return Fraction(first - 1) + Fraction(-below, above - below) if below <= 0 else Fraction(first - 1)


def state_crossing(model: Model, method: MethodSettings, baseline: MethodSettings, *, dtype: str) -> Crossing | None:
    """Context from which ``method`` keeps fewer bytes per sequence than ``baseline``, the carry at its largest."""
    return exact_crossing(
        lambda tokens: (
            state_per_sequence(model, baseline, tokens, dtype=dtype).total_bytes
            - state_per_sequence(model, method, tokens, dtype=dtype).total_bytes
        )
    )


def fast_weight_crossing(
    model: Model, method: MethodSettings, baseline: MethodSettings, *, dtype: str
) -> Crossing | None:
    """Context at which the baseline's KV cache outgrows the fast weights alone."""
    fast = state_per_sequence(model, method, 1, dtype=dtype).fast_weight_bytes
    return exact_crossing(lambda tokens: state_per_sequence(model, baseline, tokens, dtype=dtype).kv_bytes - fast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolated:
    """Crossing of two simulated curves. ``tokens`` None when they do not cross inside the simulated range.

    ``always``: which side is smaller at every simulated context when they do not cross ("method", "baseline" or
    "neither").
    ``between``: the simulated contexts around the crossing.
    """

    tokens: float | None
    always: str
    between: tuple[int, int] | None


def interpolated_crossing(lead: Mapping[int, float]) -> Interpolated:
    """Context from which ``lead`` (what the method saves, by context) stays positive, linear between contexts."""
    contexts = sorted(lead)
    values = [lead[context] for context in contexts]
    if not values:
        return Interpolated(tokens=None, always="neither", between=None)
    if all(value > 0 for value in values):
        return Interpolated(tokens=None, always="method", between=None)
    if values[-1] <= 0:
        return Interpolated(tokens=None, always="baseline", between=None)
    last = max(i for i, value in enumerate(values) if value <= 0)
    x0, x1, y0, y1 = contexts[last], contexts[last + 1], values[last], values[last + 1]
    return Interpolated(tokens=x0 + (x1 - x0) * (-y0) / (y1 - y0), always="neither", between=(x0, x1))


# --- the table of a report
# ------------------------------------------------------------------------------------------------

CROSSOVER_COLUMNS = (
    "quantity", "method", "baseline", "batch", "simulated_tokens", "low_tokens", "high_tokens", "first_whole_token",
    "below_tokens", "closed_form_tokens", "closed_form", "remark",
)  # fmt: skip

#: (quantity, phase, record field per token) of curves whose crossings are interpolated.
_CURVES = (
    ("decode traffic", "decode", "main_bytes_per_token"),
    ("decode time", "decode", "seconds_per_token"),
    ("decode energy", "decode", "energy_j_per_token"),
    ("prefill FLOPs", "prefill", "flops"),
    ("prefill time", "prefill", "seconds_per_token"),
    ("prefill energy", "prefill", "energy_j_per_token"),
)
BASELINE = "kv"


#: Record of a simulated point.
Record = Mapping[Hashable, Any] | Mapping[str, object]
#: Gives the prefill record of (method, batch, context).
PrefillRecord = Callable[[str, int, int], Mapping[str, object]]


def crossover_table(
    model: Model,
    methods: Mapping[str, MethodSettings],
    records: pd.DataFrame,
    *,
    dtype: str,
    prefill: PrefillRecord,
    parallel: Parallel = ONE_CHIP,
) -> pd.DataFrame:
    """Crossings of every TTT method and the windowed cache with full attention, beside the closed forms.

    State crossings are exact. The others are linear between simulated contexts: ``records`` of the grid and, for
    prefill, points that ``prefill`` simulates at whole chunks (on every chip that shares a prompt) until neighbours are
    one chunk apart. Decode costs are affine in the context, so there the grid suffices. ``parallel``: the system that
    all records are of.
    """
    import pandas as pd

    if BASELINE not in methods:
        return pd.DataFrame(columns=list(CROSSOVER_COLUMNS))
    rows: list[dict[str, object]] = []
    baseline = methods[BASELINE]
    for name, method in methods.items():
        if name == BASELINE:
            continue
        rows += _state_rows(model, name, method, baseline, dtype, parallel)
        if method.ttt is not None and method.kv.window_tokens is not None:
            rows += _curve_rows(model, name, method, method.ttt, baseline, records, prefill, parallel)
    return pd.DataFrame(rows, columns=list(CROSSOVER_COLUMNS))


def _state_rows(
    model: Model, name: str, method: MethodSettings, baseline: MethodSettings, dtype: str, parallel: Parallel
) -> list[dict[str, object]]:
    base = {"method": name, "baseline": BASELINE, "batch": None}
    rows: list[dict[str, object]] = []
    if method.ttt is not None:
        crossing = fast_weight_crossing(model, method, baseline, dtype=dtype)
        rows.append(
            {
                **base, **_exact(crossing), "quantity": "fast weights alone",
                "closed_form_tokens": float(closed_forms.state_crossover(model, method.ttt, baseline.kv.dtype)),
                "closed_form": "Phi / kappa",
                "remark": "KV cache of this many tokens takes as many bytes as the fast weights",
            }
        )  # fmt: skip
    crossing = state_crossing(model, method, baseline, dtype=dtype)
    row: dict[str, object] = {**base, **_exact(crossing), "quantity": "state memory"}
    window = method.kv.window_tokens
    if method.ttt is not None and window is not None and method.kv == replace(baseline.kv, window_tokens=window):
        if method.ttt.carry == "official":
            closed = closed_forms.windowed_state_crossover(
                model, method.ttt, window, dtype=dtype, kv_dtype=baseline.kv.dtype
            )
            row |= {"closed_form_tokens": float(closed), "closed_form": "w + (Phi + carry) / kappa"}
        copies = "" if parallel.chips == 1 else "; what several chips have copies of counts once"
        row["remark"] = f"all state of a sequence, open chunk one token short of full{copies}"
    elif crossing is None:
        what = "the drop-in form keeps its whole KV cache and adds fast weights"
        row["remark"] = f"never smaller: {what if method.ttt is not None else 'it keeps all that the KV cache keeps'}"
    elif window is not None and method.ttt is None and method.options is None:
        row |= {"closed_form_tokens": float(window), "closed_form": "w", "remark": "the window caps the cache"}
    return [*rows, row]


def _exact(crossing: Crossing | None) -> dict[str, object]:
    if crossing is None:
        return {"simulated_tokens": None, "first_whole_token": None}
    return {"simulated_tokens": float(crossing.tokens), "first_whole_token": crossing.first_whole_token}


def _curve_rows(
    model: Model,
    name: str,
    method: MethodSettings,
    ttt: TTTSettings,
    baseline: MethodSettings,
    records: pd.DataFrame,
    prefill: PrefillRecord,
    parallel: Parallel,
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    fitting = records[records["fits"].astype(bool)].to_dict("records")
    for quantity, phase, field in _CURVES:
        for batch in sorted(int(b) for b in records["batch"].unique()):
            mine, theirs = (
                {
                    int(record["context_tokens"]): record
                    for record in fitting
                    if (record["method"], record["phase"], record["batch"]) == (chosen, phase, batch)
                }
                for chosen in (name, BASELINE)
            )
            contexts = sorted(mine.keys() & theirs.keys())
            if not contexts:
                continue
            lead = {c: _per_token(theirs[c], field) - _per_token(mine[c], field) for c in contexts}
            found = interpolated_crossing(lead)
            if phase == "prefill" and found.between is not None:
                _refine(lead, found.between, parallel.cp * ttt.chunk_tokens, field, name, batch, prefill)
                found = interpolated_crossing(lead)
            row: dict[str, object] = {
                "quantity": quantity, "method": name, "baseline": BASELINE, "batch": batch,
                "simulated_tokens": found.tokens,
                "first_whole_token": None if found.tokens is None else int(found.tokens) + 1,
                "below_tokens": contexts[0] if found.always == "method" else None,
                "remark": _where(found, contexts),
            }  # fmt: skip
            if field == "seconds_per_token":
                row |= _band(lead, mine)
            row |= _closed_curve(quantity, model, method, ttt, baseline, batch, found, mine, theirs, parallel)
            rows.append(row)
    return rows


def _number(record: Record, field: str) -> float:
    return float(cast(float, record[field]))


def _per_token(record: Record, field: str) -> float:
    """The field per token; totals are divided by the tokens of the point."""
    return _number(record, field) / (_number(record, "tokens") if field == "flops" else 1)


def _refine(
    lead: dict[int, float],
    between: tuple[int, int],
    chunk_tokens: int,
    field: str,
    name: str,
    batch: int,
    prefill: PrefillRecord,
) -> None:
    """Add whole-chunk contexts to ``lead`` by bisection until the crossing lies between neighbouring chunks."""
    low, high = (-(-between[0] // chunk_tokens), between[1] // chunk_tokens)
    while high - low > 1:
        middle = (low + high) // 2
        context = middle * chunk_tokens
        theirs, mine = prefill(BASELINE, batch, context), prefill(name, batch, context)
        if not (theirs["fits"] and mine["fits"]):
            return
        lead[context] = _per_token(theirs, field) - _per_token(mine, field)
        low, high = (low, middle) if lead[context] > 0 else (middle, high)


def _band(lead: Mapping[int, float], mine: Mapping[int, Record]) -> dict[str, object]:
    """Where the curves would cross if the kernels that only the method has, which nobody has measured, were as much
    faster or slower as 80 % of measurements are. Errors of kernels that both methods run move both curves alike.
    """
    out: dict[str, object] = {}
    shared = [context for context in lead if context in mine and "unmeasured_share" in mine[context]]
    for name, factor in (("low_tokens", ANY_OP.low), ("high_tokens", ANY_OP.high)):
        moved = {}
        for context in shared:
            record = mine[context]
            own = _number(record, "seconds_per_token") * _number(record, "unmeasured_share")
            moved[context] = lead[context] - own * (factor - 1)
        out[name] = interpolated_crossing(moved).tokens
    return out


def _where(found: Interpolated, contexts: Sequence[int]) -> str:
    if found.between is not None:
        return f"linear between the simulated contexts {found.between[0]} and {found.between[1]}"
    if found.always == "method":
        return f"already smaller at the shortest simulated context ({contexts[0]})"
    return f"not smaller at any context that both fit (up to {contexts[-1]})"


def _closed_curve(
    quantity: str, model: Model, method: MethodSettings, ttt: TTTSettings, baseline: MethodSettings, batch: int,
    found: Interpolated, mine: Mapping[int, Record], theirs: Mapping[int, Record], parallel: Parallel,
) -> dict[str, object]:  # fmt: skip
    """The closed form that bears on a quantity, and an account of the difference."""
    window = method.kv.window_tokens
    assert window is not None
    parts, copies = microbatches_of(batch, parallel), closed_forms.kv_copies(model, parallel)
    together = ceil_div(batch, parts)
    if quantity.startswith("decode"):
        closed = closed_forms.traffic_crossover(model, ttt, window, together, baseline.kv.dtype, parallel)
        formula = _traffic_formula(None if parts == 1 else together, parallel.cp, copies)
    else:
        closed = closed_forms.flop_crossover(model, ttt, window, parallel)
        formula = _flop_formula(model, ttt, parallel)
    out: dict[str, object] = {"closed_form_tokens": float(closed), "closed_form": formula}
    if found.between is None or found.tokens is None:
        return out
    where = f"linear between {found.between[0]} and {found.between[1]} tokens"
    if quantity == "decode traffic":
        at = next(context for context in sorted(mine) if context >= found.tokens)
        kappa = copies * float(closed_forms.kv_bytes_per_token(model, baseline.kv.dtype))

        def extra(*fields: str) -> float:
            return sum(_number(mine[at], f) - _number(theirs[at], f) for f in fields) / (parts * together * kappa)

        carry = extra("read_activations_bytes", "write_activations_bytes")
        update = extra("read_gradients_bytes", "write_gradients_bytes", "write_fast_weights_bytes")
        account = (
            "the closed form counts frozen weights, fast weights and KV of one plain step; the mean over a chunk has "
            f"half a chunk more cache ({-ttt.chunk_tokens / 2:+.0f} tokens), the open chunk's copies, rows recomputed "
            f"at the boundary and activations{_everywhere(parallel)} ({carry:+.0f}), deltas and weight writes "
            f"({update:+.0f}), re-read weights (the rest)"
        )
    elif quantity.startswith("decode"):
        account = (
            "bytes alone would cross at the closed form; what the traffic crossover differs by, launches, computation"
            f"{_transfers(parallel)}, the boundary step and (for energy) idle power move it"
        )
    elif quantity == "prefill FLOPs" and parallel.cp > 1:
        account = (
            "the closed form counts every chip as the last, whose tokens see all before them, and leaves out "
            "convolutions of targets"
        )
    elif quantity == "prefill FLOPs":
        account = (
            "the closed form holds for prompts much longer than the window; with the tokens that see less than a "
            f"window counted, T/2 + sqrt((T/2)^2 - w^2) = {_short_prompt(closed, window):.0f}"
        )
    else:
        account = (
            "FLOPs alone would cross at the closed form for a long prompt; what the FLOP crossover differs by, bytes "
            f"and launches of updates{_transfers(parallel)} and (for energy) idle power move it"
        )
    return out | {"remark": f"{account}; {where}"}


def _traffic_formula(together: int | None, cp: int, copies: int) -> str:
    """The decode closed form; ``together``: sequences of one of several microbatches."""
    phi = f"{cp} Phi" if cp > 1 else "Phi"
    kappa = f"({copies} kappa)" if copies > 1 else "kappa"
    return f"w + (1 - 1/{together or 'B'}) {phi} / {kappa}"


def _flop_formula(model: Model, ttt: TTTSettings, parallel: Parallel) -> str:
    tp, cp = parallel.tp, parallel.cp
    fast = "d" if ttt.update_rows is None else str(ttt.update_rows)
    if not ttt.projection:
        update = f"{fast} f"
    elif closed_forms.outer_comes_first(model, ttt, Fraction(model.d_ff, tp)):
        update = f"d ({fast} f / C + f)"
    else:
        update = f"{fast} ({tp} d + f)" if tp > 1 else f"{fast} (d + f)"
    whole = f"2w + s {update} / (L H h)"
    return whole if cp == 1 else f"{cp}/{2 * cp - 1} ({whole})"


def _everywhere(parallel: Parallel) -> str:
    """Which chips the traffic is that of, where there are several."""
    return "" if parallel.chips == 1 else f" of all {parallel.chips} chips"


def _transfers(parallel: Parallel) -> str:
    return "" if parallel.chips == 1 else ", transfers between chips"


def _short_prompt(closed: Fraction, window_tokens: int) -> float:
    """Larger root of T'^2 - T T' + w^2 = 0: equal FLOPs when the first w tokens are counted with what they see."""
    half = float(closed) / 2
    return half + math.sqrt(max(half * half - window_tokens * window_tokens, 0.0))
