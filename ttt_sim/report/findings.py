"""What the numbers say, in words and small tables; the terminal and the report's front page share them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ttt_sim.report.data import (
    Headline,
    ReportData,
    fitting,
    numbers,
    select,
    tokens_label,
)
from ttt_sim.report.names import kernel_group, method_title, short_parameter, three_digits
from ttt_sim.units import format_bytes, format_seconds, format_si

BASELINE = "kv"


def answers(data: ReportData) -> list[str]:
    """The main results, a sentence each: state, time of each phase, the boundary step, what does not fit."""
    out = [*_system(data), *_state(data)]
    for phase, at in data.headlines.items():
        out += _times(data, phase, at)
    out += _boundary(data)
    unfit = select(data.points, fits=False)
    missing = unfit["missing"].astype(object).fillna("").astype(str)
    for reason, rows in unfit[missing != ""].groupby(missing[missing != ""], sort=False):
        methods = ", ".join(method_title(data, method) for method in dict.fromkeys(rows["method"]))
        out.append(f"{len(rows)} of {len(data.points)} points cannot run ({methods}): {reason}.")
    unfit = unfit[missing == ""]
    if len(unfit):
        smallest = unfit.sort_values(["bytes_needed", "context_tokens"], kind="stable").iloc[0]
        held = unfit["chips"].dropna()
        here = chips_text(int(held.iloc[0])) if len(held) and int(held.iloc[0]) > 1 else "one chip"
        out.append(
            f"{len(unfit)} of {len(data.points)} points do not fit {here}; the smallest is "
            f"{method_title(data, str(smallest['method']))}, {smallest['phase']} at "
            f"{tokens_label(smallest['context_tokens'])} tokens, batch {smallest['batch']}, "
            f"which needs {chips_text(smallest['chips_needed'])}."
        )
    return out + _throttled(data) + _updates(data) + _certainty(data)


def _updates(data: ReportData) -> list[str]:
    """What one update costs at the headline points, and how long memory that wears out lasts there."""
    if "update_seconds" not in data.points:
        return []
    out = []
    for phase, at in data.headlines.items():
        rows = fitting(select(data.points, phase=phase, context_tokens=at.context_tokens, batch=at.batch))
        parts = []
        for row in rows[rows["update_seconds"].notna()].to_dict("records"):
            read, written = (format_bytes(float(row[f"update_{way}_bytes"])) for way in ("read", "write"))
            spent = f"{seconds_text(float(row['update_seconds']))}, {format_si(float(row['update_energy_j']), 'J')}"
            text = f"{method_title(data, str(row['method']))}: {spent}, {read} read and {written} written"
            if not pd.isna(row["lifetime_days"]):
                lasts = format_seconds(float(row["lifetime_days"]) * 86400)
                text += f" ({row['lifetime_limited_by']} lasts {lasts} of this)"
            parts.append(text)
        if parts:
            out.append(f"One update of one layer and sequence, {phase}: {'; '.join(parts)}.")
    return out


def _throttled(data: ReportData) -> list[str]:
    """Points that the power limit slows down, and the one that it slows most."""
    if "throttled" not in data.points:
        return []
    held = select(fitting(data.points), throttled=True)
    if not len(held):
        return []
    slower = numbers(held, "seconds") / numbers(held, "unthrottled_seconds")
    most = held.iloc[int(slower.argmax())]
    return [
        f"{len(held)} of {len(data.points)} points run at the power limit of {float(most['power_limit_w']):g} W and "
        f"take longer for it; the most slowed is {method_title(data, str(most['method']))}, {most['phase']} at "
        f"{tokens_label(most['context_tokens'])} tokens, batch {most['batch']}, {float(slower.max()):.2f} times its "
        "time without a limit."
    ]


def _system(data: ReportData) -> list[str]:
    """How many chips work together, if more than one."""
    if data.parallel.chips == 1:
        return []
    sizes = {
        "tensor-parallel": data.parallel.tp, "pipeline stages": data.parallel.pp, "context-parallel": data.parallel.cp
    }  # fmt: skip
    how = ", ".join(f"{size} {way}" for way, size in sizes.items() if size > 1)
    return [f"System: {data.parallel.chips} chips ({how}). Times, energy and cost are those of all of them."]


def _certainty(data: ReportData) -> list[str]:
    """Error bars of the headline times, and what no measurement stands behind."""
    out = []
    for phase, at in data.headlines.items():
        rows = fitting(select(data.points, phase=phase, context_tokens=at.context_tokens, batch=at.batch))
        if not len(rows) or "seconds_low" not in rows:
            continue
        low = [100 * (float(r["seconds_low"]) / float(r["seconds"]) - 1) for r in rows.to_dict("records")]
        high = [100 * (float(r["seconds_high"]) / float(r["seconds"]) - 1) for r in rows.to_dict("records")]
        share = 100 * max(float(r["unmeasured_share"]) for r in rows.to_dict("records"))
        text = f"Error bars, {phase}: 80 % of measurements are {min(low):+.0f} to {max(high):+.0f} % off this"
        if share >= 0.5:
            text += (
                f"; kernels of TTT alone, up to {share:.0f} % of it, have no published measurement: nearest are the "
                "gated delta rule and plain products of their shapes"
            )
        out.append(text + ".")
    return out


def _state(data: ReportData) -> list[str]:
    rows = select(data.crossovers, quantity="state memory", baseline=BASELINE)
    out = []
    for row in rows[rows["method"].isin(data.with_fast_weights)].to_dict("records"):
        method = str(row["method"])
        name, base = method_title(data, method), method_title(data, BASELINE)
        if pd.isna(row["simulated_tokens"]):
            out.append(f"State: {name} never keeps less per sequence than the {base}.")
            continue
        text = f"State: {name} keeps less per sequence than the {base} from {int(row['first_whole_token']):,} tokens on"
        text += f" (equal at {float(row['simulated_tokens']):,.2f})"
        longest = _last(select(data.state, method=method)), _last(select(data.state, method=BASELINE))
        if longest[0] is not None and longest[1] is not None and longest[0][0] == longest[1][0]:
            tokens, mine = longest[0]
            theirs = longest[1][1]
            text += f"; at {tokens_label(tokens)} tokens {format_bytes(mine)} against {format_bytes(theirs)}"
            text += f", {three_digits(theirs / mine)} times less" if theirs > mine else ""
        out.append(text + ".")
    return out


def _last(rows: pd.DataFrame) -> tuple[int, float] | None:
    """(context, bytes) of the longest context."""
    if not len(rows):
        return None
    row = rows.sort_values("context_tokens").iloc[-1]
    return int(row["context_tokens"]), float(row["total_bytes"])


def _times(data: ReportData, phase: str, at: Headline) -> list[str]:
    rows = select(data.points, phase=phase, context_tokens=at.context_tokens, batch=at.batch)
    seconds = dict(zip(fitting(rows)["method"], numbers(fitting(rows), "seconds"), strict=True))
    if not seconds:
        return []
    base = seconds.get(BASELINE)
    parts = []
    for method in data.methods:
        if method in seconds:
            text = f"{method_title(data, method)}: {seconds_text(seconds[method])}"
            if base is not None and method != BASELINE:
                text += f" ({_ratio_text(base / seconds[method])})"
            parts.append(text)
        elif len(without := select(rows, method=method)):
            why = "cannot run" if _missing(without.iloc[0].to_dict()) else "does not fit"
            parts.append(f"{method_title(data, method)}: {why}")
    what = "whole prompt" if phase == "prefill" else "mean step"
    where = data.headline_text(phase)
    return [f"{where[0].upper()}{where[1:]}, {what}: {'; '.join(parts)}."]


def _missing(row: Mapping[Hashable, Any]) -> bool:
    """Whether a point cannot run at all, rather than not fit."""
    reason = row.get("missing")
    return isinstance(reason, str) and reason != ""


def _ratio_text(speedup: float) -> str:
    """How a time compares with the baseline's, from baseline / time."""
    if abs(speedup - 1) < 0.005:
        return "as fast"
    return f"{speedup:.2f} times as fast" if speedup > 1 else f"takes {1 / speedup:.2f} times as long"


def _boundary(data: ReportData) -> list[str]:
    at = data.headlines.get("decode")
    if at is None:
        return []
    rows = fitting(select(data.points, phase="decode", context_tokens=at.context_tokens, batch=at.batch))
    parts = []
    for row in rows.to_dict("records"):
        boundary, ordinary = float(row["boundary_step_seconds"]), float(row["ordinary_step_seconds"])
        if math.isfinite(boundary) and ordinary > 0 and str(row["method"]) in data.with_fast_weights:
            parts.append(
                f"{method_title(data, str(row['method']))}: {seconds_text(boundary)}, "
                f"{boundary / ordinary:.2f} times an ordinary step"
            )
    return [f"Decode step that completes a chunk: {'; '.join(parts)}."] if parts else []


def chips_text(chips: object) -> str:
    n = 1 if chips is None or pd.isna(chips) else int(str(chips))  # type: ignore[call-overload]
    return f"{n} chip" if n == 1 else f"{n} chips"


# --- tables -----------------------------------------------------------------------------------------------------------


class TimeRow(NamedTuple):
    """One context and batch of the table of a phase; a cell per method."""

    batch: int
    context_tokens: int
    cells: tuple[str, ...]


#: A table of a phase lists every batch up to this many rows, and the headline batch alone beyond.
MOST_ROWS = 32


def time_rows(data: ReportData, phase: str) -> list[TimeRow]:
    """Time per prompt token, or per decode step (a token for each sequence), and tokens per second, of every method."""
    rows = select(data.points, phase=phase)
    batches = data.batches(phase)
    at = data.headlines.get(phase)
    if at is not None and (phase == "prefill" or len(batches) * len(data.contexts(phase)) > MOST_ROWS):
        batches = [at.batch]
    column = "seconds_per_token" if phase == "prefill" else "seconds"
    cells: dict[tuple[int, int, str], str] = {}
    for row in rows.to_dict("records"):
        key = (int(row["batch"]), int(row["context_tokens"]), str(row["method"]))
        if row["fits"]:
            cells[key] = f"{seconds_text(float(row[column]))} {_count(float(row['tokens_per_s']))}/s"
        else:
            cells[key] = "cannot run" if _missing(row) else f"- ({chips_text(row['chips_needed'])})"
    return [
        TimeRow(batch, context, tuple(cells.get((batch, context, method), "") for method in data.methods))
        for batch in batches
        for context in data.contexts(phase)
    ]


def seconds_text(value: float) -> str:
    """Seconds with three significant digits."""
    return format_seconds(float(f"{value:.3g}")).replace("us", "µs")


def _count(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


class LimitRow(NamedTuple):
    """What limits a method at the headline point of a phase."""

    phase: str
    method: str
    bound: str
    kernels: str
    gain: str


def limit_rows(data: ReportData) -> list[LimitRow]:
    out = []
    for phase in data.headlines:
        points = fitting(data.at_headline(data.points, phase))
        for method in data.methods:
            point = select(points, method=method)
            if not len(point):
                continue
            share = numbers(point, "bound_share")[0]
            bound = (
                f"{point['bound_by'].iloc[0]} ({share:.0%})" if math.isfinite(share) else str(point["bound_by"].iloc[0])
            )
            out.append(
                LimitRow(
                    phase,
                    method,
                    bound,
                    _top_groups(select(data.at_headline(data.breakdown, phase), method=method)),
                    _top_gains(select(data.at_headline(data.sensitivity, phase), method=method)),
                )
            )
    return out


def _top_groups(rows: pd.DataFrame) -> str:
    cycles = numbers(rows, "cycles")
    groups: dict[str, float] = {}
    for label, value in zip(rows["kernel"], cycles, strict=True):
        group = kernel_group(str(label))
        groups[group] = groups.get(group, 0.0) + float(value)
    total = sum(groups.values())
    largest = sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:2]
    return ", ".join(f"{name} {value / total:.0%}" for name, value in largest) if total else ""


def _top_gains(rows: pd.DataFrame) -> str:
    best = sorted(
        zip(numbers(rows, "gain_frac").tolist(), rows["parameter"].astype(str), strict=True),
        key=lambda g: (-g[0], g[1]),
    )
    return ", ".join(f"{short_parameter(name)} {gain:.1%}" for gain, name in best[:2] if gain >= 0.0005)


def sensitivity_step(data: ReportData) -> str:
    changes = sorted({float(c) for c in data.sensitivity["change_frac"]})
    return f"{changes[0]:.0%}" if changes else "10%"


def merged_crossings(data: ReportData) -> pd.DataFrame:
    """Crossings of methods with fast weights; batches that cross at the same context share a row and its ``label``."""
    table = data.crossovers
    rows = table[table["method"].isin(data.with_fast_weights)]
    merged: dict[tuple[object, ...], dict[str, object]] = {}
    batches: dict[tuple[object, ...], list[int]] = {}
    for row in rows.to_dict("records"):
        places = tuple(f"{float(row[c]):.2f}" for c in ("simulated_tokens", "closed_form_tokens"))
        key = (row["quantity"], row["baseline"], *places)
        if places == ("nan", "nan"):
            key = (*key, row["method"])
        merged.setdefault(key, {str(name): value for name, value in row.items()})
        if pd.notna(row["batch"]) and int(row["batch"]) not in batches.setdefault(key, []):
            batches[key].append(int(row["batch"]))
    for key, merged_row in merged.items():
        at = batches.get(key)
        text = str(merged_row["quantity"])
        merged_row["label"] = f"{text}, batch {', '.join(map(str, at))}" if at else text
    return pd.DataFrame(list(merged.values()), columns=[*table.columns, "label"])


class CrossingRow(NamedTuple):
    """A crossover as text; ``note`` is the number of its remark, 0 for none."""

    label: str
    method: str
    baseline: str
    simulated: str
    closed: str
    note: int


def crossing_rows(data: ReportData) -> tuple[list[CrossingRow], list[str]]:
    """Crossovers of methods with fast weights, and the remarks that they refer to, each once."""
    rows, remarks = [], []
    for row in merged_crossings(data).to_dict("records"):
        remark = "" if pd.isna(row["remark"]) else str(row["remark"])
        if remark and remark not in remarks:
            remarks.append(remark)
        closed = float(row["closed_form_tokens"])
        formula = "" if pd.isna(row["closed_form"]) else f"  {row['closed_form']}"
        rows.append(
            CrossingRow(
                str(row["label"]),
                method_title(data, str(row["method"])),
                method_title(data, str(row["baseline"])),
                _tokens(float(row["simulated_tokens"]), no_crossing(row)),
                f"{_tokens(closed, '')}{formula}" if math.isfinite(closed) else "",
                remarks.index(remark) + 1 if remark else 0,
            )
        )
    return rows, remarks


def no_crossing(row: Mapping[Hashable, Any]) -> str:
    """What stands where a crossover has no number: it lies before the simulated contexts, or there is none in them."""
    below = row.get("below_tokens")
    return "none in range" if below is None or pd.isna(below) else f"below {int(below):,}"


def _tokens(value: float, missing: str) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else missing


def quality_note(data: ReportData) -> Sequence[str]:
    return [data.quality_caveat] if data.mixes_quality else []
