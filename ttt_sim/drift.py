"""What number formats do to a fast weight over a long stream.

The delta of a chunk does not depend on the fast weight (D_i = V_i^T Z_i, both from the layer's inputs), so the deltas
of a stream are computed once, and every format only repeats the write: W <- R(W + R(eta D)). That makes a million
tokens cheap. Arithmetic is that of :mod:`ttt_sim.reference`: each sum is exact and rounded once, so the same settings
give the same bytes on every machine.

What each format is held against is the sum S of the same scaled deltas, D in float32, kept in float64 apart from W_0.
It is off by at most 2**-24 of a delta from the float32, and one part in 2**53 for each addition: far below what any of
the formats could show.

Inputs are random and independent from token to token; they stand for the inputs of a trained layer in size only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.parallel import Progress
from ttt_sim.reference import randomness
from ttt_sim.reference.checks import FloatArray, InputError
from ttt_sim.reference.exact import dot, row_dot
from ttt_sim.reference.formats import (
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    Format,
    round_stochastic,
    round_to,
)
from ttt_sim.reference.in_place_ttt import ChunkRule, MlpWeights, TTTOptions
from ttt_sim.units import ceil_div

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a fast weight is stored and written.

    ``write``: ``official`` rounds delta, scaled delta and sum one after the other, as the released code does; ``fused``
    adds the scaled float32 delta and rounds once; ``master`` does so in float32 and applies a copy rounded to ``fmt``.
    ``stochastic``: that rounding goes up or down at random, so that its mean is the exact sum. ``scaled``: the stored
    numbers are the weight times a power of two, fixed from W_0 (:data:`HEADROOM`).
    """

    title: str
    fmt: Format
    write: Literal["official", "fused", "master"] = "official"
    stochastic: bool = False
    scaled: bool = False

    @property
    def kept_dtype(self) -> Format:
        """Format of what survives from chunk to chunk."""
        return FLOAT32 if self.write == "master" else self.fmt

    @property
    def delta_dtype(self) -> Format:
        return self.fmt if self.write == "official" else FLOAT32


#: The formats by the names that the command line knows.
STORAGES: Mapping[str, Storage] = {
    "fp32": Storage(title="fp32", fmt=FLOAT32),
    "fp32_master": Storage(title="fp32 master", fmt=BFLOAT16, write="master"),
    "bf16": Storage(title="bf16", fmt=BFLOAT16),
    "bf16_stochastic": Storage(title="bf16 stochastic", fmt=BFLOAT16, write="fused", stochastic=True),
    "fp16": Storage(title="fp16", fmt=FLOAT16),
    "fp8_e4m3": Storage(title="fp8 e4m3", fmt=FLOAT8_E4M3, write="fused", scaled=True),
    "fp8_e4m3_stochastic": Storage(
        title="fp8 e4m3 stochastic", fmt=FLOAT8_E4M3, write="fused", stochastic=True, scaled=True
    ),
    "fp8_e5m2": Storage(title="fp8 e5m2", fmt=FLOAT8_E5M2, write="fused", scaled=True),
}

#: The clip that is published (arXiv 2604.06169, evaluation of Qwen3-4B) and the weight (d, f) that it is for.
PUBLISHED_CLIP, PUBLISHED_SHAPE = 1e-5, (2560, 9728)

#: A scaled format starts with its largest weight at most this part of the largest number that it has.
HEADROOM = 16
#: Root mean square of W_0, about that of a trained down projection.
WEIGHT_RMS = 0.02
#: Root mean square of the taps. With the default rate and chunk an update is 0.1 % of W_0.
TAPS_RMS = 1.5e-7
#: Rows of the probe, the inputs by which outputs are compared.
PROBE_ROWS = 64

#: Largest values of the settings: deltas stay in the range of every format, memory within about 1 GB.
LARGEST = {"tokens": 16 << 20, "width": 256, "ff": 1024, "chunk": 8192, "seed": randomness.LARGEST_SEED}
RATES, CLIPS = (1e-12, 1e12), (1e-30, 1e30)

#: Random streams of one seed. Chunk i draws its inputs and its rounding from streams of its own.
_GATE, _UP, _DOWN, _TAPS, _PROJECTION, _PROBE = range(6)
_INPUTS, _ROUNDING = 1 << 32, 1 << 33

#: Most updates of a stream; a million updates of one token each would take hours.
MOST_CHUNKS = 1 << 16

#: Rows that are computed at once: few enough for the caches. And most elements of all their deltas in one format.
BLOCK_ROWS = 1024
_BLOCK_ELEMENTS = 1 << 20

#: Columns of the frame, in order; docs/number_formats.md explains them.
COLUMNS = (
    "format", "clip", "chunk", "tokens", "distance", "exact_distance", "change_error", "output_error", "swamped_frac",
    "swamped_so_far_frac", "underflow_frac", "underflow_so_far_frac", "largest_weight", "ended",
)  # fmt: skip


def published_clip(width: int, ff: int) -> float:
    """The published clip for a (width, ff) weight, with the same size per element as at the published shape.

    A Frobenius norm grows with the root of the number of elements; unscaled, the same number would clip a small weight
    less.
    """
    return PUBLISHED_CLIP * math.sqrt(width * ff / (PUBLISHED_SHAPE[0] * PUBLISHED_SHAPE[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSettings:
    """One stream of ``tokens`` tokens through one TTT layer, and the formats that it is written in.

    ``width`` and ``ff`` are the d and f of the layer, ``chunk`` the tokens of an update, ``rate`` its eta. Only whole
    chunks update. ``clips``: largest Frobenius norms of a delta, before the rate; None for no clip, and
    :func:`published_clip` for the default. ``formats``: names from :data:`STORAGES`.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    tokens: int = 256 << 10
    width: int = 64
    ff: int = 192
    chunk: int = 1024
    rate: float = 3.0
    clips: tuple[float | None, ...] = ()
    formats: tuple[str, ...] = tuple(STORAGES)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("width", 1), ("ff", 1), ("chunk", 1), ("seed", 0)):
            value = getattr(self, name)
            if not least <= value <= LARGEST[name]:
                raise ConfigError(f"{name}: {value} is not between {least} and {LARGEST[name]}")
        if self.tokens < self.chunk:
            raise ConfigError(f"tokens: {self.tokens} must be at least one chunk of {self.chunk} tokens")
        if self.n_chunks > MOST_CHUNKS:
            raise ConfigError(
                f"chunk: {self.chunk} makes {self.n_chunks} updates, at most {MOST_CHUNKS}; "
                f"expected at least {ceil_div(self.tokens, MOST_CHUNKS)}"
            )
        for name, (least_size, largest_size), sizes in (
            ("rate", RATES, (self.rate,)),
            ("clip", CLIPS, [clip for clip in self.clips if clip is not None]),
        ):
            for size in sizes:
                if not least_size <= size <= largest_size:  # not a number compares false
                    raise ConfigError(f"{name}: {size:g} is not between {least_size:g} and {largest_size:g}")
        if not self.clips:
            object.__setattr__(self, "clips", (None, published_clip(self.width, self.ff)))
        if not self.formats:
            raise ConfigError(f"formats: expected at least one of {', '.join(STORAGES)}")
        for name in self.formats:
            if name not in STORAGES:
                near = did_you_mean(name, ["all", *STORAGES])
                raise ConfigError(f"formats: {name!r} is unknown{near}; known: all, {', '.join(STORAGES)}")
        for name, values in (("clip", self.clips), ("formats", self.formats)):
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(f"{name}: {'none' if value is None else repr(value)} is given twice")

    @property
    def n_chunks(self) -> int:
        """Whole chunks, each of which updates the weight."""
        return self.tokens // self.chunk


def parse_clips(text: str, width: int, ff: int) -> tuple[float | None, ...]:
    """Clips for a (width, ff) weight from a list with commas: ``none``, ``published``, or norms.

    Raises:
        ConfigError: an item is none of these.
    """
    known: dict[str, float | None] = {"none": None, "published": published_clip(max(width, 1), max(ff, 1))}
    found: list[float | None] = []
    for word in text.split(","):
        word = word.strip()
        try:
            found.append(known[word] if word in known else float(word))
        except ValueError:
            near = did_you_mean(word, list(known))
            raise ConfigError(f"clip: {word!r} is not none, published or a number{near}") from None
    return tuple(found)


def parse_formats(text: str) -> tuple[str, ...]:
    """Names of formats from a list with commas, in the order of :data:`STORAGES` for ``all``; not yet checked."""
    return tuple(STORAGES) if text.strip() == "all" else tuple(word.strip() for word in text.split(","))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drift:
    """What a stream did. ``frame`` has :data:`COLUMNS`, a row per format, clip and recorded chunk.

    ``start_norm``: Frobenius norm of W_0. By clip: ``first_step``, norm of the first scaled delta; ``clipped_chunks``,
    how many deltas were longer than the clip.
    """

    settings: DriftSettings
    frame: pd.DataFrame
    start_norm: float
    first_step: Mapping[float | None, float]
    clipped_chunks: Mapping[float | None, int]


def recorded_chunks(n_chunks: int) -> tuple[int, ...]:
    """Chunk counts at which a run is recorded: those of at most five significant bits, and the last.

    1 to 32 one by one, then 16 in every doubling: evenly spread on a logarithmic axis, and the same for a longer run.
    """
    found = {m << shift for m in range(1, 33) for shift in range(max(n_chunks.bit_length() - 4, 1))}
    return tuple(sorted({m for m in found if m < n_chunks} | {n_chunks}))


def frobenius(x: FloatArray) -> float:
    """Frobenius norm; the sum of squares is correctly rounded to float32."""
    exponent = _exponent(x)
    flat = np.ldexp(x.reshape(1, -1), -exponent)  # exact, and no square leaves the range of float32
    return math.ldexp(math.sqrt(float(row_dot(flat, flat, FLOAT32, "norm")[0])), exponent)


def _exponent(x: FloatArray) -> int:
    """The smallest e with all |x| < 2**e; 0 where all are zero."""
    return math.frexp(float(np.abs(x).max(initial=0)))[1]


# --- the stream -------------------------------------------------------------------------------------------------------


def layer_weights(settings: DriftSettings) -> MlpWeights:
    """Random weights of one TTT layer, all in bf16, of such sizes that hidden rows and values have a size of about 1
    and that of the taps."""
    d, f, seed = settings.width, settings.ff, settings.seed

    def draw(stream: int, shape: tuple[int, ...], rms: float) -> FloatArray:
        return round_to(rms * randomness.normal(seed, stream, shape), BFLOAT16)

    return MlpWeights(
        gate=draw(_GATE, (f, d), 1 / math.sqrt(d)),
        up=draw(_UP, (f, d), 1 / math.sqrt(d)),
        down=draw(_DOWN, (d, f), WEIGHT_RMS),
        conv=draw(_TAPS, (d, 5), TAPS_RMS),
        projection=draw(_PROJECTION, (d, d), 1 / math.sqrt(d)),
    )


def layer_inputs(settings: DriftSettings, stream: int, rows: int) -> FloatArray:
    """Random rows (rows, d) with a root mean square of 1, as an RMS norm leaves them, in bf16."""
    x = randomness.normal(settings.seed, stream, (rows, settings.width))
    rms = np.sqrt(row_dot(x, x, FLOAT32, "norm") / settings.width)
    return round_to(x / np.where(rms > 0, rms, 1.0)[:, None], BFLOAT16)


def chunk_inputs(settings: DriftSettings, chunk: int) -> FloatArray:
    """Inputs (C, d) of a chunk, counted from 0. They are its targets too."""
    return layer_inputs(settings, _INPUTS + chunk, settings.chunk)


def _rule(settings: DriftSettings, weights: MlpWeights, clip: float | None) -> ChunkRule:
    """The reference's equations. The projection comes first, as it does at full width, where a chunk is shorter than
    f."""
    options = TTTOptions(chunk=settings.chunk, rate=settings.rate, contraction="project_first", clip=clip)
    return ChunkRule(weights=weights, options=options)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Deltas of some consecutive chunks: ``deltas`` (n, d, f) by their format, ``rates`` by format and clip, one for
    each chunk."""

    first: int
    deltas: Mapping[str, FloatArray]
    rates: Mapping[tuple[str, float | None], list[float]]


def _blocks(settings: DriftSettings, weights: MlpWeights, block_rows: int) -> Iterator[_Block]:
    """The deltas of the stream, as many chunks at once as fit ``block_rows``, at least one."""
    formats = {FLOAT32.name: FLOAT32}
    formats |= {s.delta_dtype.name: s.delta_dtype for s in (STORAGES[name] for name in settings.formats)}
    size = settings.chunk
    per_block = max(min(block_rows // size, _BLOCK_ELEMENTS // (settings.width * settings.ff)), 1)
    for first in range(0, settings.n_chunks, per_block):
        chunks = range(first, min(first + per_block, settings.n_chunks))
        rules = {clip: _rule(settings, weights, clip) for clip in (None, *settings.clips)}
        rule = rules[None]
        x = np.stack([chunk_inputs(settings, chunk) for chunk in chunks])
        z = np.concatenate([rule.hidden(x[:, at : at + block_rows]) for at in range(0, size, block_rows)], axis=1)
        v_t = np.swapaxes(rule.target_values(rule.convolved(x)), -1, -2)
        deltas = {name: dot(v_t, z, fmt, "delta") for name, fmt in formats.items()}
        rates = {
            (name, clip): np.broadcast_to(
                np.asarray(rules[clip].clipped_rate(deltas[name], fmt)).reshape(-1), len(chunks)
            ).tolist()
            for name, fmt in formats.items()
            for clip in settings.clips
        }
        yield _Block(first=first, deltas=deltas, rates=rates)


# --- writing in a format ----------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class FastWeight:
    """A fast weight (d, f) in one format, updated chunk by chunk; counts what its updates lost.

    ``kept`` is what survives from chunk to chunk; ``start`` and ``applied`` are the weights that outputs are computed
    with, at first and now. All are in units of the weight, also where a scaled number is stored. Counts are of elements
    whose delta is not zero: ``swamped`` ones left the kept weight where it was, of these ``underflown`` ones were zero
    once they were in the format. ``last_`` counts are those of the last chunk.
    """

    storage: Storage
    scale: float
    start: FloatArray
    kept: FloatArray
    applied: FloatArray
    nonzero: int = 0
    swamped: int = 0
    underflown: int = 0
    last_nonzero: int = 0
    last_swamped: int = 0
    last_underflown: int = 0

    @staticmethod
    def of(storage: Storage, w_0: FloatArray) -> FastWeight:
        """The trained weight ``w_0`` (d, f) in this format.

        Raises:
            InputError: it does not fit the format.
        """
        scale, largest = 1.0, float(np.abs(w_0).max())
        if storage.scaled and largest:  # the largest power of two that leaves the headroom
            scale = math.ldexp(1.0, math.frexp(storage.fmt.largest / (HEADROOM * largest))[1] - 1)
        kept = round_to(w_0 * scale, storage.kept_dtype, "weight") / scale
        applied = round_to(kept * scale, storage.fmt, "weight") / scale
        return FastWeight(storage=storage, scale=scale, start=applied, kept=kept, applied=applied)

    def update(self, exact: FloatArray, delta: FloatArray, rate: float, random: npt.NDArray[np.uint64]) -> None:
        """Add ``rate`` times a delta: ``delta`` is in the delta format of the storage, ``exact`` the same in float32.
        ``random`` (d, f) decides a stochastic rounding.

        Raises:
            InputError: the result is beyond the format; the weight stays as it was.
        """
        s, moves, scaled = self.storage, exact != 0, rate * delta
        if s.write == "official":
            scaled = round_to(scaled, s.fmt, "scaled delta")
        total = (self.kept + scaled) * self.scale
        name = "stored weight" if s.scaled else "weight"
        if s.stochastic:
            stored = round_stochastic(total, s.kept_dtype, random, name)
        else:
            stored = round_to(total, s.kept_dtype, name)
        kept = stored / self.scale
        self.applied = kept if s.write != "master" else round_to(stored, s.fmt, "weight") / self.scale
        self.last_nonzero = int(np.count_nonzero(moves))
        self.last_swamped = int(np.count_nonzero(moves & (kept == self.kept)))
        self.last_underflown = int(np.count_nonzero(moves & (scaled == 0)))
        self.nonzero += self.last_nonzero
        self.swamped += self.last_swamped
        self.underflown += self.last_underflown
        self.kept = kept


@dataclass(slots=True, kw_only=True, eq=False)
class _Series:
    """One format under one clip: its weight, and its rows of the frame so far. ``ended``: it left its format."""

    name: str
    clip: float | None
    weight: FastWeight
    rows: list[dict[str, object]] = field(default_factory=list)
    ended: bool = False

    def add_row(self, settings: DriftSettings, chunks: int, **values: object) -> None:
        clip = math.nan if self.clip is None else self.clip
        tokens = chunks * settings.chunk
        self.rows.append({"format": self.name, "clip": clip, "chunk": chunks, "tokens": tokens, "ended": "", **values})

    def update(self, settings: DriftSettings, block: _Block, i: int, random: npt.NDArray[np.uint64]) -> None:
        """Write chunk ``i`` of a block; ends the series where the format is left."""
        name = self.weight.storage.delta_dtype.name
        try:
            self.weight.update(
                block.deltas[FLOAT32.name][i], block.deltas[name][i], block.rates[name, self.clip][i], random
            )
        except InputError as error:
            self.ended = True
            self.add_row(settings, block.first + i + 1, ended=str(error))


def run_drift(settings: DriftSettings, *, block_rows: int = BLOCK_ROWS, progress: Progress | None = None) -> Drift:
    """Write one stream in every format. Nothing in the result depends on ``block_rows``.

    A format that a weight leaves ends its series with a row that says so; the others go on.

    Raises:
        ConfigError: the deltas themselves cannot be computed.
    """
    import pandas as pd

    weights = layer_weights(settings)
    all_series = [
        _Series(name=name, clip=clip, weight=FastWeight.of(STORAGES[name], weights.down))
        for clip in settings.clips
        for name in settings.formats
    ]
    stream = _Stream(settings=settings, weights=weights, series=all_series)
    try:
        with (progress or _silent)(settings.n_chunks) as advance:
            for block in _blocks(settings, weights, block_rows):
                stream.write(block, advance)
    except InputError as error:
        raise ConfigError(f"the stream cannot be computed: {error}") from None
    return Drift(
        settings=settings,
        frame=pd.DataFrame([row for series in all_series for row in series.rows], columns=list(COLUMNS)),
        start_norm=frobenius(weights.down),
        first_step=stream.first_step,
        clipped_chunks=stream.clipped_chunks,
    )


def _silent(_total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


@dataclass(slots=True, kw_only=True, eq=False)
class _Stream:
    """A run on its way: the series, and by clip the exact sum of scaled deltas (d, f) so far."""

    settings: DriftSettings
    weights: MlpWeights
    series: list[_Series]
    change: dict[float | None, FloatArray] = field(init=False)
    first_step: dict[float | None, float] = field(default_factory=dict)
    clipped_chunks: dict[float | None, int] = field(init=False)
    probe: FloatArray = field(init=False)
    recorded: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.change = {clip: np.zeros_like(self.weights.down) for clip in self.settings.clips}
        self.clipped_chunks = dict.fromkeys(self.settings.clips, 0)
        rule = _rule(self.settings, self.weights, None)
        self.probe = rule.hidden(layer_inputs(self.settings, _PROBE, PROBE_ROWS)[None])[0]
        self.recorded = frozenset(recorded_chunks(self.settings.n_chunks))

    def write(self, block: _Block, advance: Callable[[], None]) -> None:
        """Every update of a block, in every series."""
        shape, seed = self.weights.down.shape, self.settings.seed
        for i, delta in enumerate(block.deltas[FLOAT32.name]):
            chunk = block.first + i
            for clip, change in self.change.items():
                rate = block.rates[FLOAT32.name, clip][i]
                self.change[clip] = change + rate * delta
                self.clipped_chunks[clip] += rate < self.settings.rate
                if not chunk:
                    self.first_step[clip] = frobenius(self.change[clip])
            random = randomness.raw(seed, _ROUNDING + chunk, shape)
            running = [series for series in self.series if not series.ended]
            for series in running:
                series.update(self.settings, block, i, random)
            if chunk + 1 in self.recorded:
                self.record([series for series in running if not series.ended], chunk + 1)
            advance()

    def record(self, running: list[_Series], chunks: int) -> None:
        """A row for every series that goes on, after so many chunks."""
        w_0 = self.weights.down
        exact = {clip: frobenius(change) for clip, change in self.change.items()}
        output = {clip: self.output_norm(w_0 + change) for clip, change in self.change.items()}
        for series in running:
            w, clip = series.weight, series.clip
            moved, change = w.applied - w.start, self.change[clip]
            off = self.output_norm((w.applied - w_0) - change)
            series.add_row(
                self.settings, chunks, distance=frobenius(moved), exact_distance=exact[clip],
                change_error=_ratio(frobenius(moved - change), exact[clip]),
                output_error=_ratio(off, output[clip]),
                swamped_frac=_ratio(w.last_swamped, w.last_nonzero), swamped_so_far_frac=_ratio(w.swamped, w.nonzero),
                underflow_frac=_ratio(w.last_underflown, w.last_nonzero),
                underflow_so_far_frac=_ratio(w.underflown, w.nonzero), largest_weight=float(np.abs(w.applied).max()),
            )  # fmt: skip

    def output_norm(self, weight: FloatArray) -> float:
        """Norm of the probe's outputs Z W^T for a weight (d, f)."""
        exponent = _exponent(weight)
        outputs = dot(self.probe, np.ldexp(weight, -exponent).T, FLOAT32, "output")
        return math.ldexp(frobenius(outputs), exponent)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
