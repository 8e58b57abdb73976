"""Predictions against measurements: a table by device and op, beside two simple predictors on the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError
from ttt_sim.intervals import MEASURED_CHIPS, SIZES_US, Interval
from ttt_sim.lower.tiles import product_rate
from ttt_sim.ops import OP_KINDS, OpClass, op_cost
from ttt_sim.predict.harness import HARNESSES, harness_of
from ttt_sim.predict.models import MODELS, Part, parts_of
from ttt_sim.predict.predictions import Devices, Prediction, predict_rows
from ttt_sim.predict.rows import OPERATORS, Row, read_rows
from ttt_sim.predict.workloads import step_of

FloatArray = npt.NDArray[np.float64]

#: Tables of other things in a folder of measurements.
NOT_ROWS = ("models.csv",)
FOLDS = 4
#: Rows that no model of one batch on one device can match, by a word of their note or software: told apart.
APART: Mapping[str, str] = {
    "FASTER THAN HBM PEAK": "faster than the memory: cached",
    "KV OVERFLOW": "does not fit, served in waves",
    "closed-loop": "loaded serving",
}
APART_SOFTWARE = ("Deepspeed-MII",)
#: Sources of rows that are told apart: what they time is not known well enough.
APART_SOURCES: Mapping[tuple[str, str], str] = {
    ("LLMServingSim", "attention_prefill"): "does not depend on the new tokens",
    ("vidur", "allreduce"): "scatter of 7 to 61 us between like sizes",
}
#: Columns that tell shapes apart, for folds.
SHAPE = (
    "op", "m", "n", "k", "batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim", "model", "tp", "context",
    "out_len",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: ratios are predicted over measured, shares and errors in per cent."""

    device: str
    op: str
    apart: str
    n: int
    mape: float
    median: float
    mean_ratio: float
    rank: float
    within_10: float
    within_20: float
    within_50: float
    coverage: float
    roofline_mape: float
    two_number_mape: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Predictions of measured rows, the lines of the table, and rows that were left out with the reason."""

    predictions: tuple[Prediction, ...]
    roofline_us: FloatArray
    two_number_us: FloatArray
    lines: tuple[Line, ...]
    left_out: tuple[str, ...]


def read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    """Rows of every CSV file of a folder that have a latency, and what is wrong with the others.

    Raises:
        ConfigError: no such folder, or no CSV files in it.
    """
    files = sorted(path for path in folder.glob("*.csv") if path.name not in NOT_ROWS) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder}: is not a folder with CSV files of measurements")
    rows: list[Row] = []
    problems: list[str] = []
    for path in files:
        found = read_rows(path, models=tuple(MODELS))
        rows += [row for row in found.rows if row.latency_us is not None]
        problems += found.problems
    return rows, problems


def apart(row: Row) -> str:
    """Why a row is told apart; empty for one that counts."""
    for word, reason in APART.items():
        if word in row.note:
            return reason
    if row.software in APART_SOFTWARE:
        return f"{row.software}: twice the others"
    return APART_SOURCES.get((row.source, row.op), "")


def validate(rows: Sequence[Row], devices: Devices, left_out: Sequence[str] = ()) -> Validation:
    """Predict ``rows``, which have latencies, and compare."""
    found, problems = predict_rows(rows, devices)
    predictions = [prediction for prediction in found if prediction is not None]
    roof = np.array([roofline_us(p.row, devices.chip(p.row.device)) for p in predictions])
    two = two_numbers([p.row for p in predictions], roof)
    return Validation(
        predictions=tuple(predictions),
        roofline_us=roof,
        two_number_us=two,
        lines=tuple(_lines(predictions, roof, two)),
        left_out=(*left_out, *problems),
    )


# --- simple predictors ------------------------------------------------------------------------------------------------


def roofline_us(row: Row, chip: Chip) -> float:
    """Microseconds at data-sheet peaks: the larger of FLOPs over peak and compulsory bytes over bandwidth."""
    if row.op in OPERATORS:
        parts = [Part(step_of(row, HARNESSES[harness_of(row.source)], 0), 1)]
    else:
        parts, _ = parts_of(row)
    total = 0.0
    for part in parts:
        flops = nbytes = linked = 0.0
        for op in part.step:
            op_class = OP_KINDS[[kind.name for kind in OP_KINDS].index(op.kind)].op_class
            if op_class in (OpClass.MATMUL, OpClass.ATTENTION):
                cost = op_cost(op.kind, batch=op.batch, m=op.m, n=op.n, k=op.k, heads=op.heads, pairs=op.pairs)
                flops += float(cost.flops) / (product_rate(chip, op.dtype, sustained=False) * chip.clock_hz)
            if op_class == OpClass.COLLECTIVE:
                link = next(link for link in chip.links if link.scope == "chip")
                linked += 2 * (op.heads - 1) / op.heads * op.reads[0].nbytes / link.bytes_per_s
            nbytes += sum(operand.nbytes for operand in (*op.reads, *op.writes) if len(part.step) <= 5)
        if len(part.step) > 5:  # a layer: weights and keys and values only, all else stays on chip
            roles = ("WEIGHT", "KV")
            nbytes = sum(o.nbytes for op in part.step for o in op.reads if o.role.name in roles)
        seconds = max(flops, nbytes / chip.main_memory.read_bytes_per_s) + linked
        total += seconds * 1e6 * part.count
    return total


def fold_of(row: Row, folds: int = FOLDS) -> int:
    """Fold of a row by its shape, so that a shape is never both fitted and predicted."""
    text = "x".join(str(getattr(row, name)) for name in SHAPE)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % folds


def two_numbers(rows: Sequence[Row], roof: FloatArray) -> FloatArray:
    """A floor and an efficiency per source, dtype and op, fitted to the other folds: floor + roofline / efficiency."""
    out = np.zeros(len(rows))
    measured = np.array([row.latency_us or 1.0 for row in rows])
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.source, row.dtype, row.op), []).append(i)
    fold = np.array([fold_of(row) for row in rows], dtype=np.int64)
    for members in groups.values():
        index = np.array(members)
        for k in range(FOLDS):
            train, test = index[fold[index] != k], index[fold[index] == k]
            if test.size:
                floor, slope = _fit_line(roof[train if train.size else index], measured[train if train.size else index])
                out[test] = floor + slope * roof[test]
    return out


def _fit_line(x: FloatArray, y: FloatArray) -> tuple[float, float]:
    """Floor and slope of least mean relative error, on a grid that is refined several times."""
    ratio = np.sort(y / np.maximum(x, 1e-9))
    slopes = np.geomspace(max(ratio[0], 0.5), max(ratio[-1], 1.0) + 0.5, 40)
    floors = np.concatenate([[0.0], np.geomspace(max(y.min() / 20, 1e-3), y.max(), 60)])
    best = (0.0, 1.0)
    least = np.inf
    for width in (0.3, 0.2, 0.1, 0.05, 0.02):
        errors = np.abs((floors[:, None, None] + slopes[None, :, None] * x) / y - 1).mean(axis=2)
        i, j = np.unravel_index(int(errors.argmin()), errors.shape)
        if errors[i, j] < least:
            least, best = errors[i, j], (float(floors[i]), float(slopes[j]))
        floors = best[0] * np.linspace(1 - width, 1 + width, 25)
        slopes = best[1] * np.linspace(1 - width, 1 + width, 25)
    return best


# --- the table --------------------------------------------------------------------------------------------------------


def _lines(predictions: Sequence[Prediction], roof: FloatArray, two: FloatArray) -> Iterable[Line]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, p in enumerate(predictions):
        groups.setdefault((p.row.op, p.row.device, apart(p.row)), []).append(i)
    for (op, device, reason), members in sorted(groups.items()):
        yield line(device, op, reason, [predictions[i] for i in members], roof[members], two[members])


def line(device: str, op: str, reason: str, members: Sequence[Prediction], roof: FloatArray, two: FloatArray) -> Line:
    """One line of the table."""
    measured = np.array([p.row.latency_us or 1.0 for p in members])
    predicted = np.array([p.predicted_us for p in members])
    low, high = np.array([p.low_us for p in members]), np.array([p.high_us for p in members])
    error = np.abs(predicted / measured - 1)
    return Line(
        device=device,
        op=op,
        apart=reason,
        n=len(members),
        mape=100 * float(error.mean()),
        median=100 * float(np.median(error)),
        mean_ratio=float(np.exp(np.log(predicted / measured).mean())),
        rank=rank_correlation(predicted, measured),
        within_10=100 * float((error <= 0.1).mean()),
        within_20=100 * float((error <= 0.2).mean()),
        within_50=100 * float((error <= 0.5).mean()),
        coverage=100 * float(((measured >= low) & (measured <= high)).mean()),
        roofline_mape=100 * float(np.abs(roof / measured - 1).mean()),
        two_number_mape=100 * float(np.abs(two / measured - 1).mean()),
    )


def rank_correlation(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation with mean ranks for ties; 1 for fewer than two values."""
    if a.size < 2:
        return 1.0
    from scipy.stats import rankdata

    first, second = (rank - rank.mean() for rank in (rankdata(a), rankdata(b)))
    scale = float(np.sqrt((first * first).sum() * (second * second).sum()))
    return float((first * second).sum()) / scale if scale else 1.0


# --- intervals --------------------------------------------------------------------------------------------------------

#: A little beyond 10 and 90 %, as residuals of rows that were fitted are a little small.
QUANTILES = (0.08, 0.92)
#: A class of sizes needs this many rows for quantiles of its own.
ENOUGH = 12


def residual_bands(predictions: Sequence[Prediction]) -> dict[str, tuple[Interval, ...]]:
    """Quantiles of measured over predicted by op and size class; classes with few rows get those of the whole op."""
    bands: dict[str, tuple[Interval, ...]] = {}
    for op in dict.fromkeys(p.row.op for p in predictions):
        mine = [p for p in predictions if p.row.op == op and not _never_counted(p.row)]
        if len(mine) < ENOUGH:
            continue
        ratio = np.array([(p.row.latency_us or 1.0) / p.predicted_us for p in mine])
        size = np.array([sum(p.predicted_us >= edge for edge in SIZES_US) for p in mine])
        classes = []
        for k in range(len(SIZES_US) + 1):
            chosen = ratio[size == k] if (size == k).sum() >= ENOUGH else ratio
            low, high = np.quantile(chosen, QUANTILES)
            classes.append(Interval(round(float(low), 3), round(float(high), 3)))
        bands[op] = tuple(classes)
    return bands


def _never_counted(row: Row) -> bool:
    return apart(row) not in ("", "loaded serving")


def held_out_coverage(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Per cent of the rows of each op inside intervals made from the other folds."""
    counted = [p for p in predictions if not _never_counted(p.row)]
    inside: dict[str, list[bool]] = {}
    for k in range(FOLDS):
        bands = residual_bands([p for p in counted if fold_of(p.row) != k])
        for p in counted:
            if fold_of(p.row) == k and p.row.op in bands:
                size = sum(p.predicted_us >= edge for edge in SIZES_US)
                ratio = (p.row.latency_us or 1.0) / p.predicted_us
                band = bands[p.row.op][size]
                inside.setdefault(p.row.op, []).append(band.low <= ratio <= band.high)
    return {op: 100 * float(np.mean(flags)) for op, flags in inside.items()}


def swapped(chips: Mapping[str, Chip]) -> Callable[[str], Chip | None]:
    """Chip of a device with the calibrated constants of the other measured chip: what a transfer would predict."""
    other = {"a100": "h100", "h100": "a100"}

    def chip_of(device: str) -> Chip | None:
        chip = chips.get(device)
        if chip is None or chip.name not in MEASURED_CHIPS:
            return None
        source = next((c for c in chips.values() if c.name == other[chip.name]), None)
        return None if source is None else with_library_of(chip, source)

    return chip_of


def with_library_of(chip: Chip, source: Chip) -> Chip:
    """``chip`` by its data sheet, with everything that was calibrated on ``source``."""
    startup = source.unit("matrix").startup_cycles
    links = tuple(
        replace(link, start_s=other.start_s, latency_s=other.latency_s, short_frac=other.short_frac,
                bulk_frac=other.bulk_frac, bulk_start_s=other.bulk_start_s)
        for link, other in zip(chip.links, source.links, strict=False)
    )  # fmt: skip
    return replace(
        chip,
        library=source.library,
        mapping=replace(chip.mapping, attention_efficiency=source.mapping.attention_efficiency),
        units=tuple(replace(u, startup_cycles=startup) if u.kind == "matrix" else u for u in chip.units),
        links=links,
    )


def transfer_bands(rows: Sequence[Row], devices: Devices) -> dict[str, Interval]:
    """Quantiles of measured over predicted by op when the constants come from the other measured chip."""
    names = dict.fromkeys(row.device for row in rows)
    chip_of = swapped({name: devices.chip(name) for name in names})
    moved = {name: chip for name in names if (chip := chip_of(name)) is not None}
    counted = [row for row in rows if row.device in moved and not _never_counted(row)]
    found, _ = predict_rows(counted, Devices(chips=moved))
    ratios: dict[str, list[float]] = {}
    for p in found:
        if p is not None:
            ratios.setdefault(p.row.op, []).append((p.row.latency_us or 1.0) / p.predicted_us)
    out = {}
    for op, values in ratios.items():
        if len(values) >= ENOUGH:
            low, high = np.quantile(np.array(values), QUANTILES)
            out[op] = Interval(round(float(low), 3), round(float(high), 3))
    return out
