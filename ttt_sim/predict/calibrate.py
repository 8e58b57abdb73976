"""Constants of a chip file from measured rows: least squares on the logarithm of predicted over measured.

Only few constants can be fitted, each with a meaning (docs/chip_files.md). What the rows do not determine keeps the
value of the file and is reported: a constant that changes no row, or one that another can stand in for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError
from ttt_sim.predict.harness import GROUP_OF_OP
from ttt_sim.predict.predictions import Devices, predict_rows
from ttt_sim.predict.rows import Row
from ttt_sim.predict.validation import FOLDS, fold_of

FloatArray = npt.NDArray[np.float64]


class Constant(NamedTuple):
    """Bounds of a calibratable constant, the ops whose rows can tell it, and the unit in a chip file."""

    low: float
    high: float
    ops: tuple[str, ...]
    unit: str = ""


_PRODUCT, _PREFILL, _DECODE = ("gemm", "bmm"), ("attention_prefill",), ("attention_decode",)
_ATTENTION = _PREFILL + _DECODE
_CHUNK, _STEP = ("gdn_chunk_prefill",), ("gdn_recurrent_decode",)
#: Constants that may be fitted, by their path in a chip file. ``cycles`` are whole.
CALIBRATABLE: Mapping[str, Constant] = {
    "library.kernel": Constant(100, 12000, _PRODUCT, " cycles"),
    "library.reduction": Constant(50, 12000, _PRODUCT, " cycles"),
    "library.small_tile_loss": Constant(0.05, 4, _PRODUCT),
    "library.drain_fraction": Constant(0.02, 1, _PRODUCT),
    "library.warm_fraction": Constant(0.02, 1, _PRODUCT),
    "library.stream_fraction.product": Constant(0.3, 1, _PRODUCT),
    "library.stream_fraction.kv_append": Constant(0.1, 1, _PREFILL),
    "library.stream_fraction.attention": Constant(0.3, 1, _DECODE),
    "library.stream_fraction.delta_rule": Constant(0.3, 1, _STEP),
    "library.stream_fraction.softmax": Constant(0.1, 1, ("softmax",)),
    "library.stream_fraction.layernorm": Constant(0.1, 1, ("layernorm",)),
    "library.stream_fraction.mlp_norm": Constant(0.1, 1, ("rmsnorm",)),
    "library.stream_fraction.gelu": Constant(0.1, 1, ("gelu",)),
    "library.stream_fraction.silu_mul": Constant(0.1, 1, ("silu_mul",)),
    "library.row": Constant(5, 2000, _PREFILL, " cycles"),
    "mapping.attention_efficiency": Constant(0.1, 1, _PREFILL),
    "library.attention_setup": Constant(100, 20000, _ATTENTION, " cycles"),
    "library.attention_start": Constant(100, 20000, _PREFILL, " cycles"),
    "library.decode_start": Constant(100, 20000, _DECODE, " cycles"),
    "library.decode_row": Constant(1, 1000, _DECODE, " cycles"),
    "library.softmax_exposed": Constant(0.01, 1, _PREFILL),
    "library.scan_start": Constant(100, 60000, _CHUNK, " cycles"),
    "library.scan_chunk": Constant(100, 30000, _CHUNK, " cycles"),
    "library.scan_setup": Constant(50, 20000, _STEP, " cycles"),
    "library.scan_fetch": Constant(2, 128, _STEP),
}
#: A constant must move some row by this much (natural logarithm) when it changes by a tenth.
LEAST_EFFECT = 2e-3
#: Two constants that are correlated more than this cannot be told apart.
MOST_CORRELATION = 0.985
#: Rows per constant that are needed.
ROWS_PER_CONSTANT = 4
#: Residuals beyond this (natural logarithm) count less than their square: outliers, poor kernels of the library.
SOFT = 0.1
#: Step of finite differences and least distance of a start from the bounds, in parts of a constant's range.
STEP, INSIDE = 0.01, 0.02
CALIBRATION_SOURCE = "calibration of this project on published measurements, docs/validation.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``values`` by path; ``before, after, held_out``: mean absolute percentage error, the last from fits to the other
    folds of shapes; ``correlation`` (n, n) between the fitted constants; ``refused``: path to reason."""

    values: Mapping[str, float]
    before: float
    after: float
    held_out: float
    correlation: FloatArray
    refused: Mapping[str, str]
    n_rows: int


def value_of(chip: Chip, path: str) -> float:
    """The value of a calibratable constant in a chip."""
    rules = chip.library
    if path == "mapping.attention_efficiency":
        return chip.mapping.attention_efficiency
    if path.startswith("library.stream_fraction."):
        return rules.stream_frac.get(path.rpartition(".")[2], 1.0)
    return float(getattr(rules, _attribute(path)))


def with_values(chip: Chip, values: Mapping[str, float]) -> Chip:
    """``chip`` with constants replaced."""
    rules, streams = {}, dict(chip.library.stream_frac)
    mapping = chip.mapping
    for path, value in values.items():
        if path == "mapping.attention_efficiency":
            mapping = replace(mapping, attention_efficiency=value)
        elif path.startswith("library.stream_fraction."):
            streams[path.rpartition(".")[2]] = value
        else:
            name = _attribute(path)
            rules[name] = round(value) if name.endswith("_cycles") else value
    library = replace(chip.library, stream_frac=streams, **rules)  # type: ignore[arg-type]
    return replace(chip, library=library, mapping=mapping)


def _attribute(path: str) -> str:
    """Field of :class:`ttt_sim.chip.Library` behind a path."""
    key = path.rpartition(".")[2]
    special = {
        "drain_fraction": "drain_frac", "warm_fraction": "warm_frac", "small_tile_loss": "small_tile_loss",
        "softmax_exposed": "softmax_exposed", "scan_fetch": "scan_fetch_bytes_per_cycle",
    }  # fmt: skip
    return special.get(key, f"{key}_cycles")


def calibrate(chips: Mapping[str, Chip], rows: Sequence[Row]) -> Fit:
    """Fit the constants that ``rows`` determine; ``chips`` by device of the rows share them.

    Raises:
        ConfigError: too few rows, or rows that determine nothing.
    """
    counted = [row for row in rows if row.latency_us is not None and row.op in GROUP_OF_OP]
    paths, refused = _identifiable(chips, counted)
    if not paths:
        reasons = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "no rows with a latency"
        raise ConfigError(f"the rows determine none of the constants: {reasons}")
    first = next(iter(chips.values()))
    start = {path: value_of(first, path) for path in paths}
    before = _mape(chips, counted, start)
    values, jacobian = _solve(chips, counted, start)
    held_out = []
    for k in range(FOLDS):
        train = [row for row in counted if fold_of(row) != k]
        test = [row for row in counted if fold_of(row) == k]
        if train and test:
            found, _ = _solve(chips, train, start)
            held_out.append((_mape(chips, test, found), len(test)))
    error = sum(mape * n for mape, n in held_out) / max(sum(n for _, n in held_out), 1)
    return Fit(
        values=values,
        before=before,
        after=_mape(chips, counted, values),
        held_out=error,
        correlation=_correlation(jacobian),
        refused=refused,
        n_rows=len(counted),
    )


def fit_values(chips: Mapping[str, Chip], rows: Sequence[Row]) -> dict[str, float]:
    """Only the values of :func:`calibrate`, without held-out folds."""
    paths, _ = _identifiable(chips, rows)
    first = next(iter(chips.values()))
    return _solve(chips, rows, {path: value_of(first, path) for path in paths})[0]


def _identifiable(chips: Mapping[str, Chip], rows: Sequence[Row]) -> tuple[list[str], dict[str, str]]:
    """Paths that the rows determine, and why each other one that their ops concern does not."""
    ops = {row.op for row in rows}
    first = next(iter(chips.values()))
    effects: dict[str, FloatArray] = {}
    refused: dict[str, str] = {}
    for path, constant in CALIBRATABLE.items():
        if not ops & set(constant.ops):
            continue
        value = min(max(value_of(first, path), constant.low), constant.high)
        other = value * 1.1 if value * 1.1 <= constant.high else value * 0.9
        effect = _logs(chips, rows, {path: other}) - _logs(chips, rows, {path: value})
        if float(np.abs(effect).max(initial=0.0)) < LEAST_EFFECT:
            refused[path] = "no row depends on it"
        else:
            effects[path] = effect
    paths = list(effects)
    while len(paths) > 1:
        correlation = np.abs(_correlation(np.stack([effects[path] for path in paths], axis=1)))
        np.fill_diagonal(correlation, 0.0)
        i, j = np.unravel_index(int(correlation.argmax()), correlation.shape)
        if correlation[i, j] <= MOST_CORRELATION:
            break
        weaker = max((paths[i], paths[j]), key=lambda path: -float(np.square(effects[path]).sum()))
        other_path = paths[i] if weaker == paths[j] else paths[j]
        refused[weaker] = f"the rows cannot tell it from {other_path} (correlation {correlation[i, j]:.3f})"
        paths.remove(weaker)
    while paths and len(rows) < ROWS_PER_CONSTANT * len(paths):
        weakest = min(paths, key=lambda path: float(np.square(effects[path]).sum()))
        refused[weakest] = f"{len(rows)} rows are too few for {len(paths)} constants"
        paths.remove(weakest)
    return paths, refused


def _logs(chips: Mapping[str, Chip], rows: Sequence[Row], values: Mapping[str, float]) -> FloatArray:
    """Natural logarithm of predicted over measured, by row."""
    devices = Devices(chips={device: with_values(chip, values) for device, chip in chips.items()})
    predictions, problems = predict_rows(rows, devices)
    if problems:
        raise ConfigError("\n".join(problems))
    ratios = [p.ratio for p in predictions if p is not None]
    logs: FloatArray = np.log(np.array([ratio for ratio in ratios if ratio is not None]))
    return logs


def _mape(chips: Mapping[str, Chip], rows: Sequence[Row], values: Mapping[str, float]) -> float:
    return 100 * float(np.abs(np.exp(_logs(chips, rows, values)) - 1).mean())


def _solve(
    chips: Mapping[str, Chip], rows: Sequence[Row], start: Mapping[str, float]
) -> tuple[dict[str, float], FloatArray]:
    """Values of least soft squares, and the Jacobian there; constants are searched on a logarithmic scale, on which the
    range of each is 0 to 1."""
    from scipy.optimize import least_squares

    paths = list(start)
    low = np.log(np.array([CALIBRATABLE[path].low for path in paths]))
    span = np.log(np.array([CALIBRATABLE[path].high for path in paths])) - low

    def values(x: FloatArray) -> dict[str, float]:
        return dict(zip(paths, np.exp(low + x * span).tolist(), strict=True))

    def residuals(x: FloatArray) -> FloatArray:
        return _logs(chips, rows, values(x))

    def slopes(x: FloatArray) -> FloatArray:
        """Forward differences; a step of fixed length, as costs are whole cycles."""
        here = residuals(x)
        columns = []
        for i in range(x.size):
            step = STEP if x[i] + STEP <= 1 else -STEP
            moved = x.copy()
            moved[i] += step
            columns.append((residuals(moved) - here) / step)
        return np.stack(columns, axis=1)

    known = np.array([max(start[path], CALIBRATABLE[path].low) for path in paths])
    first = np.clip((np.log(known) - low) / span, INSIDE, 1 - INSIDE)
    solver: Callable[..., object] = least_squares
    solution = solver(
        residuals, first, jac=slopes, bounds=(0.0, 1.0), loss="soft_l1", f_scale=SOFT, xtol=1e-4, ftol=1e-4, max_nfev=40
    )
    x = np.asarray(solution.x, dtype=np.float64)  # type: ignore[attr-defined]
    return values(x), np.asarray(solution.jac, dtype=np.float64)  # type: ignore[attr-defined]


def _correlation(jacobian: FloatArray) -> FloatArray:
    """Correlation between constants that a least-squares fit with this Jacobian has."""
    covariance = np.linalg.pinv(jacobian.T @ jacobian)
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    out: FloatArray = covariance / np.outer(scale, scale)
    return out


# --- the chip file ----------------------------------------------------------------------------------------------------


def data_hash(text: str) -> str:
    """First digits of the SHA-256 of a file of rows."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def updated_file(text: str, chip: Chip, fit: Fit, *, data: str, date: str) -> str:
    """The chip file ``text`` with the fitted constants, each with the record of the fit."""
    lines = text.splitlines()
    record = f'{{data: "{data}", rows: {fit.n_rows}, error: "{fit.held_out:.1f} % MAPE, held out", date: "{date}"}}'
    missing: list[tuple[str, str]] = []
    for path, value in fit.values.items():
        unit = CALIBRATABLE[path].unit
        shown = f"{round(value)}{unit}" if unit else f"{value:.4g}"
        entry = f"{{value: {shown}, source: calibration, certainty: medium, calibration: {record}}}"
        known = chip.provenance.get(path)
        if known is not None and known.line > 0:
            match = re.match(r"\s*[\w-]+: ", lines[known.line - 1])
            if match is None:
                raise ConfigError(f"{chip.name}: line {known.line} of the chip file does not begin with a key")
            lines[known.line - 1] = match.group() + entry
        else:
            missing.append((path, entry))
    for path, entry in missing:
        _insert(lines, path, entry)
    if not any(line.startswith("  calibration:") for line in lines):
        _insert(lines, "sources.calibration", f'"{CALIBRATION_SOURCE}"')
    return "\n".join(lines) + "\n"


def _insert(lines: list[str], path: str, entry: str) -> None:
    """Put a key into its group; the groups are created where they are missing."""
    *groups, key = path.split(".")
    begin, indent = 0, ""
    for depth, group in enumerate(groups):
        indent = "  " * depth
        found = next((i for i in range(begin, len(lines)) if re.match(rf"{indent}{group}:", lines[i])), None)
        if found is None:
            at = begin if depth else len(lines)
            lines.insert(at, f"{indent}{group}:")
            found = at
        begin = found + 1
    lines.insert(begin, f"{indent}  {key}: {entry}")
