"""What a report is made of: tidy frames and the facts beside them. Filled by the experiment, read by figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ttt_sim.chip import Chip
from ttt_sim.model import ONE_CHIP, Parallel

FloatArray = npt.NDArray[np.float64]

#: What a figure says where windowed attention stands beside full attention.
QUALITY_CAVEAT = (
    "Not an equal-quality trade: a windowed model forgets what full attention still sees. Published for a 4B model "
    "on RULER-16k: 7.57 with window and TTT, 5.07 with the window alone, 19.99 with full attention and TTT "
    "(arXiv 2604.06169)."
)

_POINT_KEY = ("method", "phase", "context_tokens", "batch")

#: Columns that each frame has; more are welcome and end up in the CSV files.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "points": (
        *_POINT_KEY, "window_tokens", "chips", "tp", "pp", "cp", "fits", "reason", "missing", "bytes_needed",
        "chips_needed", "cycles", "seconds", "tokens",
        "seconds_per_token", "tokens_per_s", "flops", "main_bytes_per_token", "state_bytes_per_sequence",
        "energy_j_per_token", "cost_usd_per_million_tokens", "bound_by", "bound_share", "boundary_step_seconds",
        "ordinary_step_seconds",
    ),
    "breakdown": (*_POINT_KEY, "kernel", "cycles"),
    "roofline": (*_POINT_KEY, "kernel", "stream", "flops", "main_bytes", "cycles", "span_cycles", "n_kernels"),
    "step_times": ("method", "batch", "offset_tokens", "seconds"),
    "chunk_timeline": (
        "method", "batch", "unit", "stream", "kernel", "kind", "start_cycles", "finish_cycles", "layer", "chunk",
        "op_phase", "own",
    ),
    "state": ("method", "context_tokens", "kv_bytes", "fast_weight_bytes", "carry_bytes", "total_bytes"),
    "crossovers": (
        "quantity", "method", "baseline", "batch", "simulated_tokens", "low_tokens", "high_tokens",
        "first_whole_token", "below_tokens", "closed_form_tokens", "closed_form", "remark",
    ),
    "sensitivity": (*_POINT_KEY, "parameter", "change_frac", "seconds", "changed_seconds", "gain_frac"),
    "critical_path": (*_POINT_KEY, "unit", "cycles", "share_frac"),
    "write_variants": ("weight_write", "fits", "seconds", "update_busy_cycles", "update_main_bytes"),
}  # fmt: skip

#: Columns of ``points`` that hold whole numbers, some of them missing where a point does not fit.
WHOLE_NUMBERS: tuple[str, ...] = (
    "context_tokens", "batch", "chunk_tokens", "window_tokens", "call_tokens", "tokens", "bytes_needed", "chips_needed",
    "chips", "tp", "pp", "cp", "cycles", "state_bytes_per_sequence",
    "state_kv_bytes", "state_fast_weight_bytes", "state_carry_bytes",
    "peak_memory_bytes", "spilled_bytes", "n_ops", "n_kernels", "n_tasks",
)  # fmt: skip

PHASES: tuple[str, ...] = ("prefill", "decode")

#: Order of methods in every figure and table; others follow as they come.
_METHOD_ORDER: tuple[str, ...] = ("kv", "kv_quant", "kv_window", "ttt", "ttt_window")


def empty(name: str) -> pd.DataFrame:
    """The frame ``name`` of :class:`ReportData` without rows."""
    return pd.DataFrame({column: [] for column in COLUMNS[name]})


def _complete(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with every column of :data:`COLUMNS`; whole numbers stay whole beside missing ones."""
    wanted = [*COLUMNS[name], *(column for column in frame.columns if column not in COLUMNS[name])]
    frame = frame.reindex(columns=wanted)
    return whole_numbers(frame) if name == "points" else frame


def plain(value: object) -> object:
    """A value as strict JSON knows it: missing and not finite numbers become null, numpy scalars plain ones."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if hasattr(value, "item"):  # numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def whole_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with :data:`WHOLE_NUMBERS` as integers, missing ones among them too."""
    return frame.assign(**{column: _whole(frame[column]) for column in WHOLE_NUMBERS if column in frame})


def _whole(column: pd.Series[Any]) -> pd.Series[Any]:
    values = pd.to_numeric(column)
    return values.astype("Int64" if values.isna().any() else "int64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What figures need to know of the chip. FLOP rates are None without a matrix unit that multiplies ``dtype``.

    Bandwidth is that of reading main memory; ``achievable`` rates are what long streams and full tiles sustain.
    """

    name: str
    title: str
    dtype: str
    clock_hz: float
    memory_name: str
    capacity_bytes: int
    peak_bytes_per_s: float
    achievable_bytes_per_s: float
    peak_flops_per_s: float | None
    achievable_flops_per_s: float | None

    @staticmethod
    def of(chip: Chip, dtype: str = "bf16") -> Machine:
        """The facts of ``chip`` for products of ``dtype``."""
        peak = sustained = None
        if chip.has_unit("matrix"):
            unit = chip.unit("matrix")
            peak = unit.peak_per_s.get(dtype)
            sustained = None if peak is None else peak * unit.efficiency.get(dtype, 1.0)
        main = chip.main_memory
        return Machine(
            name=chip.name,
            title=chip.title,
            dtype=dtype,
            clock_hz=chip.clock_hz,
            memory_name=main.name,
            capacity_bytes=main.capacity_bytes,
            peak_bytes_per_s=main.read_bytes_per_s,
            achievable_bytes_per_s=main.read_bytes_per_s * main.achievable_frac,
            peak_flops_per_s=peak,
            achievable_flops_per_s=sustained,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The point at which a phase is looked at closely."""

    context_tokens: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportData:
    """Everything in a report; frames have at least the columns of :data:`COLUMNS`. Build it with :meth:`of`.

    ``provenance``     version, chip, file hash, overrides, model, command, options, points compared in both engines
    ``weight_bytes``   frozen weights of the model; None when unknown
    ``headlines``      by phase: the point that the figures on kernels, traffic and sensitivity look at
    ``points``         one row per simulated point, as :func:`ttt_sim.simulation.simulate_point` records it
    ``breakdown``      cycles by kernel label, of the mean decode step or the whole prefill
    ``roofline``       kernels of the headline points by label; ``cycles`` add up to the total; ``span_cycles`` run from
                       start to finish, summed over the kernels, and are more where these run beside others
    ``step_times``     seconds of the decode steps around a chunk boundary; step 0 completes the chunk
    ``chunk_timeline`` tasks of one chunk of one TTT layer (``own``) and of what runs beside them
    ``state``          bytes per sequence against context, the carry at its largest
    ``crossovers``     contexts from which ``method`` needs less than ``baseline``; ``batch`` missing where it plays no
                       part, ``simulated_tokens`` missing where the curves do not cross in range,
                       ``below_tokens`` the shortest simulated context where they cross before it
    ``sensitivity``    time after improving one chip parameter by ``change_frac``; ``gain_frac`` is the speed gained
    ``critical_path``  cycles of the tasks that decide the total, by unit
    ``write_variants`` cost of the updates of one prompt by weight-write variant
    """

    provenance: Mapping[str, object]
    machine: Machine
    weight_bytes: int | None
    headlines: Mapping[str, Headline]
    points: pd.DataFrame
    breakdown: pd.DataFrame
    roofline: pd.DataFrame
    step_times: pd.DataFrame
    chunk_timeline: pd.DataFrame
    state: pd.DataFrame
    crossovers: pd.DataFrame
    sensitivity: pd.DataFrame
    critical_path: pd.DataFrame
    write_variants: pd.DataFrame
    notes: tuple[str, ...]
    quality_caveat: str

    @staticmethod
    def of(
        *,
        provenance: Mapping[str, object],
        chip: Chip,
        points: pd.DataFrame,
        weight_bytes: int | None = None,
        quality_caveat: str = QUALITY_CAVEAT,
        notes: Sequence[str] = (),
        **frames: pd.DataFrame,
    ) -> ReportData:
        """Report data from frames by field name; those left out or without rows become empty ones.

        Raises:
            TypeError: a frame has a name that no field has.
        """
        unknown = sorted(set(frames) - set(COLUMNS))
        if unknown:
            raise TypeError(f"report has no frame {', '.join(unknown)}")
        complete = {name: _complete(name, frames.get(name, empty(name))) for name in COLUMNS if name != "points"}
        points = _complete("points", points)
        return ReportData(
            provenance=provenance,
            machine=Machine.of(chip, str(provenance.get("dtype", "bf16"))),
            weight_bytes=weight_bytes,
            headlines=_headlines(complete["roofline"] if len(complete["roofline"]) else points),
            points=points,
            notes=(*_chip_notes(chip), *notes),
            quality_caveat=quality_caveat,
            **complete,
        )

    @property
    def model(self) -> str:
        return str(self.provenance.get("model", "model"))

    @property
    def parallel(self) -> Parallel:
        """The system that all points are of."""
        sizes = self.provenance.get("parallel")
        if not isinstance(sizes, Mapping):
            return ONE_CHIP
        return Parallel(**{name: int(str(sizes[name])) for name in ("tp", "pp", "cp")})

    @property
    def chips_noun(self) -> str:
        """What figures call what the points run on."""
        return "chip" if self.parallel.chips == 1 else "chips"

    @property
    def methods(self) -> list[str]:
        """Methods of the report in the order of figures and tables."""
        seen = [str(m) for frame in (self.points, self.state) for m in frame["method"].unique()]
        return [m for m in _METHOD_ORDER if m in seen] + [m for m in dict.fromkeys(seen) if m not in _METHOD_ORDER]

    def window_tokens(self, method: str) -> int | None:
        """Window of a method's attention; None where it sees everything."""
        windows = select(self.points, method=method)["window_tokens"].dropna()
        return int(windows.iloc[0]) if len(windows) else None

    @property
    def windowed(self) -> list[str]:
        """Methods whose attention sees a window only."""
        return [m for m in self.methods if self.window_tokens(m) is not None]

    @property
    def with_fast_weights(self) -> list[str]:
        """Methods that keep fast weights."""
        rows = self.state[numbers(self.state, "fast_weight_bytes") > 0]
        return [m for m in self.methods if m in set(rows["method"])]

    @property
    def mixes_quality(self) -> bool:
        """Windowed attention stands beside full attention."""
        return 0 < len(self.windowed) < len(self.methods)

    def batches(self, phase: str) -> list[int]:
        return sorted({int(b) for b in select(self.points, phase=phase)["batch"]})

    def contexts(self, phase: str) -> list[int]:
        return sorted({int(t) for t in select(self.points, phase=phase)["context_tokens"]})

    def at_headline(self, frame: pd.DataFrame, phase: str) -> pd.DataFrame:
        """Rows of ``frame`` at the headline point of ``phase``."""
        at = self.headlines.get(phase)
        if at is None:
            return frame.iloc[:0]
        return select(frame, phase=phase, context_tokens=at.context_tokens, batch=at.batch)

    def headline_text(self, phase: str) -> str:
        at = self.headlines.get(phase)
        return f"{phase} at {tokens_label(at.context_tokens)} tokens, batch {at.batch}" if at else phase


def _headlines(frame: pd.DataFrame) -> dict[str, Headline]:
    """The longest context of each phase; prefill with the fewest sequences (latency counts), decode with the most."""
    out = {}
    for phase, pick in zip(PHASES, (min, max), strict=True):
        rows = select(frame, phase=phase)
        if len(rows):
            longest = int(rows["context_tokens"].max())
            out[phase] = Headline(
                context_tokens=longest, batch=int(pick(select(rows, context_tokens=longest)["batch"].tolist()))
            )
    return out


def _chip_notes(chip: Chip) -> tuple[str, ...]:
    """What a reader should know about the numbers behind the chip."""
    weak = [path for path, place in chip.provenance.items() if place.certainty == "low"]
    notes = [f"{path} is set to {value} on request" for path, value in chip.overrides.items()]
    if weak:
        notes.append(
            f"{len(weak)} of the {len(chip.provenance)} numbers in the chip file have low certainty: {', '.join(weak)}"
        )
    return tuple(notes)


def select(frame: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """Rows in which every named column, none of it missing, has the given value."""
    keep = np.ones(len(frame), dtype=np.bool_)
    for column, value in equal.items():
        keep &= np.asarray(frame[column].to_numpy() == value, dtype=np.bool_)
    return frame[keep]


def numbers(frame: pd.DataFrame, column: str) -> FloatArray:
    """A column as floats, NaN where a value is missing."""
    values = pd.to_numeric(frame[column], errors="coerce")
    return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan), dtype=np.float64)


def fitting(frame: pd.DataFrame) -> pd.DataFrame:
    """Points that fit the chip."""
    return select(frame, fits=True)


def tokens_label(tokens: float) -> str:
    """``128K`` for 131072 (K = 1024), plain digits where that is not exact."""
    for suffix, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{int(tokens) // size}{suffix}"
    return f"{tokens:,.0f}"
