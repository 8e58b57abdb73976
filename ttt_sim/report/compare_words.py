"""What a comparison of chips says, in words and small tables; the terminal, the page and the figures share them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ttt_sim.comparison import UNLINKED, Compared
from ttt_sim.crossover import BASELINE
from ttt_sim.report.data import FloatArray, numbers, select, tokens_label
from ttt_sim.report.names import METHOD_STYLES, style_of_method, three_digits
from ttt_sim.units import format_seconds, format_si

DAGGER = "†"
#: Speeds whose ratio is nearer to one than this count as the same.
SAME = 0.005
#: What the cost of an update is of.
UPDATE = "one update of one layer and sequence"

KIND_TITLES: Mapping[str, str] = {
    "gpu": "GPU", "tpu": "TPU", "accelerator": "accelerator", "dataflow": "dataflow", "wafer_scale": "wafer-scale",
    "npu": "NPU", "fpga": "FPGA", "pim": "PIM", "digital_imc": "digital IMC", "analog_imc": "analogue IMC",
    "neuromorphic": "neuromorphic", "hypothetical": "hypothetical", "example": "example",
}  # fmt: skip

EXECUTION_WORDS: Mapping[str, str] = {
    "tile_wave": "output tiles in waves over many cores",
    "systolic": "rows streamed past weights that stay in arrays",
    "static_dataflow": "a schedule fixed before the run, operands passed from unit to unit",
    "in_memory": "products formed where the weights are stored",
    "event_driven": "events between cores that keep their own weights",
}

WRITE_WORDS: Mapping[str, str] = {
    "free": "ordinary stores",
    "static_schedule": "stores that the compiled program holds",
    "reupload": "a new upload through the host",
    "local_rule": "a local learning rule only",
    "program_verify": "pulses that are verified, cell by cell",
    "none": "not at all",
}

#: Terms of the table, for readers of the page.
TERMS: tuple[tuple[str, str], ...] = (
    ("chips", "how many chips one system is made of; speeds per chip are those of the system divided by it"),
    ("step", "mean decode step, in which each sequence of the batch gets a token; with its 80 % interval"),
    ("tokens/s per W", "decode tokens per second of the system over its average power, idle power included"),
    ("tokens per USD", "decode tokens for the rent of the system; empty where no price is known"),
    ("limited", "power limits the decode speed of the chip"),
    ("sequences", "what main memory holds of this context beside the weights, activations not counted; per chip"),
    ("chunk's end", "time that a decode step takes more if it completes a chunk: all updates of the batch"),
    ("crossover", "context from which the method needs less than the KV cache: state exact, decode time interpolated"),
    ("ridge point", "FLOPs that the chip can do while it reads one byte of main memory, both at their peaks"),
    (DAGGER, "rests on a number of low certainty: rate of the unit that bounds it, share sustained, fitted constant"),
)  # fmt: skip


# --- names ------------------------------------------------------------------------------------------------------------


def method_names(data: Compared) -> list[str]:
    """Methods in the order of figures and tables."""
    methods = data.settings.methods
    return [*(name for name in METHOD_STYLES if name in methods), *(m for m in methods if m not in METHOD_STYLES)]


def method_title_of(data: Compared, method: str) -> str:
    return style_of_method(method, data.settings.methods, data.window_tokens(method)).title


def with_fast_weights(data: Compared) -> list[str]:
    return [m for m in method_names(data) if m.startswith("ttt")]


def kind_title(kind: str) -> str:
    return KIND_TITLES.get(kind, kind)


def chip_label(chip: str, counts: Sequence[object]) -> str:
    """The chip, and how many of them stand for one where that is not a single one."""
    found = sorted({int(str(count)) for count in counts})
    if found == [1] or not found:
        return chip
    return f"{chip} ×{found[0]}" if len(found) == 1 else f"{chip} ×{found[0]} to {found[-1]}"


def context_line(data: Compared) -> str:
    s = data.settings
    return f"{s.model.name}  ·  {tokens_label(s.context)} tokens of context, batch {s.batch}"


# --- helpers ----------------------------------------------------------------------------------------------------------

Row = Mapping[Hashable, Any]


def has(row: Row, column: str) -> bool:
    """Whether a row has a value, neither missing nor not a number."""
    return bool(pd.notna(row[column]))


def _positive(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows[numbers(rows, column) > 0]


def best(data: Compared, column: str, *, largest: bool = True, methods: Sequence[str] = ()) -> Row | None:
    """The row of these methods (none: all) with the largest or smallest positive value; the first of equals."""
    rows = data.table if not methods else data.table[data.table["method"].isin(methods)]
    rows = _positive(rows, column)
    if rows.empty:
        return None
    ordered = rows.assign(value=numbers(rows, column)).sort_values("value", ascending=not largest, kind="stable")
    return ordered.iloc[0].to_dict()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _list(parts: Sequence[str], most: int = 6) -> str:
    if len(parts) <= most:
        return ", ".join(parts)
    return f"{', '.join(parts[:most])} and {len(parts) - most} more"


def _span(values: FloatArray, text: Any) -> str:
    low, high = text(float(values.min())), text(float(values.max()))
    return low if low == high else f"{low} to {high}"


def seconds_text(value: float) -> str:
    return format_seconds(float(f"{value:.3g}")).replace("us", "µs")


# --- findings ---------------------------------------------------------------------------------------------------------


def findings(data: Compared) -> list[str]:
    """The answers first: who is fastest and thriftiest, who holds most, who gains, what an update costs, what is
    uncertain, what does not run."""
    out = [
        *_leaders(data),
        *_held(data),
        *_gains(data),
        *_updates(data),
        *_limited(data),
        *_uncertain(data),
        *_not_run(data),
    ]
    if data.left_out:
        out.append(f"Examples left out: {', '.join(data.left_out)}; give one by its name to include it.")
    return out


def _leaders(data: Compared) -> list[str]:
    out = []
    for method in dict.fromkeys((method_names(data)[0], method_names(data)[-1])):
        parts = []
        for column, what, unit in (
            ("tokens_per_s_per_chip", "per chip", "tokens/s"),
            ("tokens_per_s_per_w", "per watt", "tokens/s per W"),
            ("tokens_per_usd", "per dollar", "tokens per USD"),
            ("tokens_per_s_per_user", "for each user", "tokens/s"),
        ):
            row = best(data, column, methods=[method])
            if row is not None:
                parts.append(f"{what} {_name(row)} ({three_digits(float(row[column]))} {unit})")
        if parts:
            out.append(f"Fastest decode, {method_title_of(data, method)}: {'; '.join(parts)}.")
    rows = best(data, "prefill_tokens_per_s_per_chip")
    if rows is not None:
        out.append(
            f"Fastest prefill per chip: {_name(rows, 'prefill_weak_inputs')} with "
            f"{method_title_of(data, str(rows['method']))}, "
            f"{three_digits(float(rows['prefill_tokens_per_s_per_chip']))} tokens/s."
        )
    return out


def _name(row: Row, weak: str = "weak_inputs") -> str:
    return chip_label(str(row["chip"]), [row["chips"]]) + _mark(row, weak)


def _held(data: Compared) -> list[str]:
    parts = []
    for method in method_names(data):
        row = best(data, "sequences_per_chip", methods=[method])
        if row is not None:
            parts.append(
                f"{method_title_of(data, method)} {chip_label(str(row['chip']), [row['chips']])} "
                f"({three_digits(float(row['sequences_per_chip']))})"
            )
    if not parts:
        return ["No chip holds a sequence of this context beside the weights."]
    return [f"Most sequences of {tokens_label(data.settings.context)} tokens per chip: {'; '.join(parts)}."]


def _gains(data: Compared) -> list[str]:
    method = method_names(data)[-1]
    rows = _positive(select(data.table, method=method), "decode_gain")
    if rows.empty or method == BASELINE:
        return []
    name, base = method_title_of(data, method), method_title_of(data, BASELINE)
    order = rows.assign(value=numbers(rows, "decode_gain")).sort_values("value", ascending=False, kind="stable")
    most, least = order.iloc[0].to_dict(), order.iloc[-1].to_dict()
    bound = select(data.table, method=BASELINE).set_index("chip")["bound_by"].to_dict()

    def text(row: Row) -> str:
        before, after = bound[row["chip"]], row["bound_by"]
        limits = f"bound by {after}" if before == after else f"bound by {after}, the {base} by {before}"
        return f"{_name(row)} ({three_digits(row['value'])} times, {limits})"

    out = f"Gain in decode speed of {name} over the {base}: most on {text(most)}"
    if len(order) > 1:
        out += f", least on {text(least)}"
    losers = order[order["value"] < 1 - SAME]
    out += (
        f"; slower than the {base} on {_list([str(chip) for chip in losers['chip'].iloc[::-1]])}."
        if len(losers) else "; no chip loses."
    )  # fmt: skip
    only = sorted(
        set(select(data.table, method=method, decode_fits=True)["chip"])
        - set(select(data.table, method=BASELINE, decode_fits=True)["chip"])
    )
    said = [out]
    if only and BASELINE in data.settings.methods:
        said.append(f"Runs with {name} and not with the {base}, which does not fit: {_list(only, 12)}.")
    return said


def _updates(data: Compared) -> list[str]:
    methods = with_fast_weights(data)
    rows = _positive(data.table[data.table["method"].isin(methods)], "update_seconds")
    if rows.empty:
        return []
    order = rows.assign(value=numbers(rows, "update_seconds")).sort_values("value", kind="stable")
    cheap, dear = order.iloc[0].to_dict(), order.iloc[-1].to_dict()
    said = [
        f"Weight updates ({UPDATE}) are quickest on {_name(cheap)} ({seconds_text(cheap['value'])}, "
        f"{WRITE_WORDS[str(cheap['write_mode'])]}) and slowest on {_name(dear)} ({seconds_text(dear['value'])}, "
        f"{WRITE_WORDS[str(dear['write_mode'])]})."
    ]
    said += [
        f"Changed by {WRITE_WORDS[mode]}: {_span(numbers(group, 'value'), seconds_text)} on "
        f"{_list(list(dict.fromkeys(group['chip'].astype(str))), 12)}."
        for mode, group in ((m, select(order, write_mode=m)) for m in WRITE_WORDS)
        if len(group) and mode != "free"
    ]
    energy = _positive(rows, "update_energy_j")
    if len(energy):
        order = energy.assign(value=numbers(energy, "update_energy_j")).sort_values("value", kind="stable")
        cheap, dear = order.iloc[0].to_dict(), order.iloc[-1].to_dict()
        said.append(
            f"Energy of an update: {format_si(cheap['value'], 'J')} on {cheap['chip']} to "
            f"{format_si(dear['value'], 'J')} on {dear['chip']}."
        )
    return said + lifetimes(data)


def lifetimes(data: Compared) -> list[str]:
    """How long cells last that wear, with the method that wears them out first; empty where none do."""
    worn = _positive(data.table, "lifetime_days")
    if worn.empty:
        return []
    order = worn.assign(value=numbers(worn, "lifetime_days")).sort_values("value", kind="stable")
    lives = [
        f"{chip!s} {seconds_text(86400 * float(group['value'].iloc[0]))} "
        f"({method_title_of(data, str(group['method'].iloc[0]))})"
        for chip, group in order.groupby("chip", sort=False)
    ]
    return [f"Cells that wear last, at constant use: {_list(lives)}."]


def _uncertain(data: Compared) -> list[str]:
    ran = data.table[data.table["decode_fits"].astype(bool)]
    weak: dict[str, list[str]] = {}
    marked = set()
    for row in ran.to_dict("records"):
        for path in str(row["weak_inputs"]).split():
            marked.add(str(row["chip"]))
            weak.setdefault(_input_words(path), []).append(str(row["chip"]))
    if not weak:
        return []
    parts = [f"{words}: {', '.join(dict.fromkeys(chips))}" for words, chips in weak.items()]
    return [
        f"{DAGGER} Decode rests on numbers of low certainty on {len(marked)} of {ran['chip'].nunique()} chips. "
        f"{'; '.join(parts)}."
    ]


def _input_words(path: str) -> str:
    """What a dotted path of a chip file stands for."""
    keys = path.split(".")
    words = {
        "achievable_fraction": "share of the memory bandwidth that is sustained", "read_bandwidth": "memory bandwidth",
        "write_bandwidth": "memory bandwidth", "peak": "peak rate", "efficiency": "share of the peak that is sustained",
        "op_launch": "gap between kernels", "bandwidth": "bandwidth of links",
    }  # fmt: skip
    found = next((words[key] for key in keys if key in words), f"fitted constant {path}")
    return found[0].upper() + found[1:]


def _limited(data: Compared) -> list[str]:
    """Chips that power limits."""
    rows = data.table[data.table["throttled"].astype(bool)]
    parts = [
        f"{chip} ({', '.join(method_title_of(data, str(m)) for m in group['method'])})"
        for chip, group in rows.groupby("chip", sort=False)
    ]
    return [f"Power limits decode on {_list(parts, 40)}."] if parts else []


def _not_run(data: Compared) -> list[str]:
    """What has no decode time, and why; a chip that runs nothing once."""
    out, short = [], []
    gone = data.table[~data.table["decode_fits"].astype(bool)]
    for chip, rows in gone.groupby("chip", sort=False):
        if len(rows) == len(select(data.table, chip=chip)):
            out.append(f"{chip!s} runs none of the methods: {'; '.join(_reasons(data, rows))}.")
        else:
            short.append(f"{chip!s} {'; '.join(_reasons(data, rows))}")
    return out + ([f"Without a number: {'. '.join(short)}."] if short else [])


def _reasons(data: Compared, rows: pd.DataFrame) -> list[str]:
    """``METHODS: REASON`` for each reason, in which memory is short without its bytes."""
    found: dict[str, list[Row]] = {}
    for row in rows.to_dict("records"):
        found.setdefault(short_reason(str(row["decode_why"])), []).append(row)
    out = []
    for reason, group in found.items():
        needed = np.array([float(row["chips_needed"]) for row in group if has(row, "chips_needed")])
        chips = f" ({_span(needed, lambda n: f'{n:.0f}')} chips)" if needed.size and needed.max() > 1 else ""
        names = ", ".join(method_title_of(data, str(row["method"])) for row in group)
        everything = len(group) == len(method_names(data))
        out.append(f"{reason}{chips}" if everything else f"{names}: {reason}{chips}")
    return out


def short_reason(text: str) -> str:
    """What several chips can share of a reason: the sizes differ, the shortage does not."""
    if not re.search(r" need [\d.]+ \w*B of ", text):
        return text
    alone = f", and {UNLINKED} holds it" if UNLINKED in text else ""
    return f"needs more memory than there is{alone}"


def chips_text(n: int) -> str:
    return _count(n, "chip")


# --- by kind ----------------------------------------------------------------------------------------------------------


def by_kind(data: Compared) -> list[str]:
    """How the workload falls on each kind of hardware: what bounds it, what an update costs, what is gained."""
    out = []
    for kind in KIND_TITLES:
        rows = select(data.table, kind=kind)
        if len(rows):
            out.append(_kind_sentence(data, kind, rows))
    return out


def _kind_sentence(data: Compared, kind: str, rows: pd.DataFrame) -> str:
    chips = rows["chip"].nunique()
    styles = "; ".join(EXECUTION_WORDS[str(e)] for e in dict.fromkeys(rows["execution"]))
    title = kind_title(kind)
    text = f"{title[0].upper()}{title[1:]} ({_count(chips, 'chip')}; {styles}): "
    systems = rows["chips"].to_numpy(dtype=np.float64)
    first, last = method_names(data)[0], method_names(data)[-1]
    parts = []
    if systems.max() > 1:
        parts.append(f"a system takes {_span(systems, lambda n: f'{n:.0f}')} chips")
    for method in dict.fromkeys((first, last)):
        bound = _bounds(select(rows, method=method), "decode_fits", "bound_kind")
        if bound:
            parts.append(f"decode with {method_title_of(data, method)} is bound by {bound}")
    bound = _bounds(select(rows, method=last), "prefill_fits", "prefill_bound_kind")
    if bound:
        parts.append(f"prefill with {method_title_of(data, last)} by {bound}")
    modes = ", ".join(dict.fromkeys(WRITE_WORDS[str(mode)] for mode in rows["write_mode"]))
    updates = _positive(rows[rows["method"].isin(with_fast_weights(data))], "update_seconds")
    if len(updates):
        parts.append(f"weights change by {modes}, {UPDATE} {_takes(numbers(updates, 'update_seconds'))}")
    else:
        parts.append(f"weights change by {modes}" if modes != WRITE_WORDS["none"] else "weights cannot change")
    gains = _positive(select(rows, method=last), "decode_gain")
    if len(gains) and last != BASELINE:
        speed = _span(numbers(gains, "decode_gain"), lambda value: f"{value:.2f}")
        parts.append(
            f"{method_title_of(data, last)} decodes {speed} times as fast as the {method_title_of(data, BASELINE)}"
        )
    if not rows["decode_fits"].astype(bool).any():
        parts.append("none of them runs any of the methods")
    return text + "; ".join(parts) + "."


def _takes(seconds: FloatArray) -> str:
    return f"in {_span(seconds, seconds_text)}"


def _bounds(rows: pd.DataFrame, fits: str, column: str) -> str:
    """``main memory (3 of 4), launches (1 of 4)``; without numbers where all agree."""
    found = rows[rows[fits].astype(bool)][column].astype(str).value_counts(sort=False)
    if not len(found):
        return ""
    total, counts = int(found.sum()), sorted(found.items(), key=lambda item: (-int(item[1]), str(item[0])))
    if len(counts) == 1:
        return str(counts[0][0])
    return ", ".join(f"{name} ({int(n)} of {total})" for name, n in counts)


# --- tables -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def speed_table(data: Compared) -> Table:
    """Decode tokens per second and chip, a row per chip and a column per method; fastest first."""
    methods = method_names(data)
    rows: list[tuple[float, tuple[str, ...]]] = []
    for chip, group in data.table.groupby("chip", sort=False):
        cells = []
        for method in methods:
            row = select(group, method=method).iloc[0].to_dict()
            if row["decode_fits"]:
                cells.append(three_digits(float(row["tokens_per_s_per_chip"])) + _mark(row, "weak_inputs"))
            else:
                cells.append(_shortage(row))
        speeds = numbers(group, "tokens_per_s_per_chip")
        top = max((float(v) for v in speeds if math.isfinite(v)), default=-1.0)
        used = group[group["decode_fits"].astype(bool)]["chips"].tolist() or [1]
        rows.append((top, (chip_label(str(chip), used), kind_title(str(group["kind"].iloc[0])), *cells)))
    rows.sort(key=lambda item: -item[0])
    header = ("chip", "kind", *(method_title_of(data, m) for m in methods))
    return Table(header, tuple(cells for _, cells in rows))


def _mark(row: Row, column: str) -> str:
    return f" {DAGGER}" if row[column] else ""


def _shortage(row: Row) -> str:
    """Why there is no number, short: how many chips it would take, or that it cannot run."""
    if not has(row, "chips_needed") or int(row["chips_needed"]) <= 1:
        return "cannot run"
    return f"- ({chips_text(int(row['chips_needed']))})"


FULL_HEADER = (
    "chip", "method", "format", "chips", "prefill tokens/s", "step", "tokens/s", "per chip", "per W", "per USD",
    "J/token", "power", "USD/M tokens", "bound by", "sequences (system)", "chunk's end", "state crossover",
    "decode crossover", "why not",
)  # fmt: skip


def full_table(data: Compared) -> Table:
    """Everything of each chip and method in a line."""
    return Table(FULL_HEADER, tuple(_full_row(data, row) for row in data.table.to_dict("records")))


def _full_row(data: Compared, row: Row) -> tuple[str, ...]:
    def number(column: str) -> str:
        return three_digits(float(row[column])) if has(row, column) else ""

    def tokens(column: str) -> str:
        return f"{math.floor(float(row[column])) + 1:,}" if has(row, column) else ""

    step = ""
    if row["decode_fits"]:
        middle, low, high = (float(row[f"step_seconds{end}"]) for end in ("", "_low", "_high"))
        step = f"{seconds_text(middle)} ({100 * (low / middle - 1):+.0f} to {100 * (high / middle - 1):+.0f} %)"
    power = f"{number('average_power_w')} W" if row["decode_fits"] else ""
    power += ", limited" if row["throttled"] else ""
    bound = f"{row['bound_by']} ({float(row['bound_share']):.0%})" if row["decode_fits"] else ""
    update = seconds_text(float(row["boundary_added_seconds"])) if has(row, "boundary_added_seconds") else ""
    crossing = tokens("decode_crossing_tokens")
    if not crossing and isinstance(row["decode_crossing_note"], str):
        crossing = row["decode_crossing_note"].partition(",")[0].partition(":")[0]
    state = tokens("state_crossing_tokens")
    if not state and row["method"] != BASELINE and BASELINE in data.settings.methods:
        state = "never"
    sequences = number("sequences_per_chip")
    reasons = dict.fromkeys(text for text in (row["prefill_why"], row["decode_why"]) if text)
    prefill = number("prefill_tokens_per_s") + _mark(row, "prefill_weak_inputs")
    return (
        str(row["chip"]), method_title_of(data, str(row["method"])), str(row["dtype"]), str(row["chips"]), prefill,
        step + _mark(row, "weak_inputs"), number("tokens_per_s"), number("tokens_per_s_per_chip"),
        number("tokens_per_s_per_w"), number("tokens_per_usd"), number("energy_j_per_token"), power,
        number("cost_usd_per_million_tokens"), bound,
        sequences if int(row["chips"]) == 1 else f"{sequences} ({int(row['sequences']):,})", update, state, crossing,
        "; ".join(reasons),
    )  # fmt: skip
