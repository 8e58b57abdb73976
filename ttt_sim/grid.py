"""Many points at once: resolve names to points, run them on all cores, return one frame."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.lower import DEFAULT_DETAIL
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, Scenario, TTTSettings
from ttt_sim.model_config import load_model, load_ttt
from ttt_sim.ops import Role
from ttt_sim.parallel import run_all
from ttt_sim.simulation import (
    DEFAULT_CALL_TOKENS,
    DEFAULT_QUESTION_TOKENS,
    PHASES,
    Point,
    PointResult,
    rows_at_once,
    simulate_point,
)
from ttt_sim.system import arrange, least_system
from ttt_sim.units import parse_tokens
from ttt_sim.workload import CONTEXT_METHODS, build_trace, find_method
from ttt_sim.workload.method import PHASE_NAMES, PhaseName, set_options

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

T = TypeVar("T")

#: Points handed to a worker at a time: enough to hide the hand-over, few enough to keep workers even.
BATCH_POINTS = 4


def make_point(
    chip: Chip | str | Path,
    model: Model | str | Path,
    method: str,
    *,
    phase: PhaseName = "decode",
    context: int | str = 32768,
    batch: int = 1,
    chunk: int | str | None = None,
    window: int | str | None = None,
    ttt: TTTSettings | str | Path | None = None,
    kv_dtype: str | None = None,
    dtype: str | None = None,
    call_tokens: int | str = DEFAULT_CALL_TOKENS,
    engine: str = "compiled",
    detail: int = DEFAULT_DETAIL,
    overlap: bool = True,
    chips: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    cp: int | None = None,
    parallel: Parallel | None = None,
    question: int | str = DEFAULT_QUESTION_TOKENS,
    options: Mapping[str, object] | None = None,
) -> Point:
    """A point from names or loaded objects. Token counts read as ``131072`` or ``128k``.

    ``question``: tokens of a question (phase ask); ``options`` of the method, by name.

    ``chunk`` and ``window`` override the TTT settings and the method's default window. ``dtype``: by default the
    chip's own (:attr:`ttt_sim.chip.Chip.default_dtype`), in which a chip without bf16 also keeps caches and fast
    weights. ``chips, tp, pp, cp`` arrange a system (:func:`ttt_sim.system.arrange`), or ``parallel`` is one; by default
    the least number of chips that holds the model and one sequence.

    Raises:
        ConfigError: a name is unknown or a value is out of range.
    """
    if phase not in PHASE_NAMES:
        raise ConfigError(f"phase: {phase!r} is not one of {', '.join(PHASE_NAMES)}{did_you_mean(phase, PHASE_NAMES)}")
    settings = ttt if isinstance(ttt, TTTSettings) else load_ttt(ttt or "default")
    if chunk is not None:
        settings = replace(settings, chunk_tokens=_tokens("chunk", chunk))
    window_tokens = None if window is None else _tokens("window", window)
    numbers: Mapping[str, object] = {"batch": batch, "chips": chips, "tp": tp, "pp": pp, "cp": cp}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{name}: {value!r} is not a whole number")
    if batch < 1:
        raise ConfigError(f"batch: {batch} must be at least 1")
    loaded = chip if isinstance(chip, Chip) else load_chip(chip)
    shape = model if isinstance(model, Model) else load_model(model)
    dtype = dtype or loaded.default_dtype
    chosen = method_on(loaded, method, window_tokens=window_tokens, kv_dtype=kv_dtype, ttt=settings, dtype=dtype)
    chosen = set_options(chosen, {name: _text(value) for name, value in (options or {}).items()})
    phases = find_method(method).phases
    if phase not in phases:
        raise ConfigError(f"phase: method {method} has no phase {phase}; it has {', '.join(phases)}")
    tokens = _tokens("context", context)
    call = _tokens("call", call_tokens)
    asked = any(value is not None for value in (chips, tp, pp, cp))
    if parallel is not None and asked:
        raise ConfigError("parallel: says how many chips there are, give either it or chips, tp, pp, cp")
    point = Point(
        chip=loaded,
        model=shape,
        method=chosen,
        phase=phase,
        context_tokens=tokens,
        batch=batch,
        dtype=dtype,
        chunk_tokens=settings.chunk_tokens,
        call_tokens=call,
        question_tokens=_tokens("question", question),
        engine=engine,
        detail=detail,
        overlap=overlap,
        parallel=parallel or ONE_CHIP,
    )
    if parallel is not None:
        return point
    if asked:
        return replace(point, parallel=arrange(shape, chips=chips, tp=tp, pp=pp, cp=cp))
    if phase in ("train", "index"):
        return point
    held = tokens if phase == "prefill" else find_method(method).held_tokens(chosen, tokens)
    held = max(held + (settings.chunk_tokens if phase == "decode" else 0), 1)
    least = least_system(loaded, shape, [chosen], context_tokens=held, rows=rows_at_once(point), dtype=dtype)
    return replace(point, parallel=least or ONE_CHIP)


def method_on(
    chip: Chip, name: str, *, window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings, dtype: str
) -> MethodSettings:
    """The method as it runs on ``chip``: without bf16 there, caches and fast weights have ``dtype`` by default.

    Raises:
        ConfigError: an unknown method.
    """
    if not chip.runs("bf16"):
        ttt = replace(ttt, fast_dtype=dtype) if ttt.fast_dtype == "bf16" else ttt
        kv_dtype = kv_dtype or (None if name == "kv_quant" else dtype)
    return find_method(name).settings(window_tokens, kv_dtype, ttt)


def _text(value: object) -> str:
    """An option's value as it would be written."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tokens(name: str, value: int | str) -> int:
    tokens = parse_tokens(value) if isinstance(value, str) else value
    if tokens < 1:
        raise ConfigError(f"{name}: {value} must be at least 1 token")
    return tokens


def weight_bytes(point: Point) -> int:
    """Bytes of the frozen weights that the model of a point keeps on the chip."""
    trace = build_trace(point.model, point.method, Scenario.decode((0,), dtype=point.dtype))
    return sum(tensor.nbytes for tensor in trace.tensors if tensor.role == Role.WEIGHT)


def simulate(
    chip: Chip | str | Path, model: Model | str | Path = "Qwen3-4B", method: str = "ttt_window", **options: object
) -> PointResult:
    """Simulate one point; options as for :func:`make_point`."""
    return simulate_point(make_point(chip, model, method, **options))  # type: ignore[arg-type]


def record_of(point: Point) -> Mapping[str, object]:
    """The flat record of a point, without the arrays of the full result."""
    return simulate_point(point).record


def sweep(
    chip: Chip | str | Path = "h100",
    model: str | Path | Sequence[str | Path] = "Qwen3-4B",
    method: str | Sequence[str] = CONTEXT_METHODS,
    *,
    phase: str | Sequence[str] = PHASES,
    context: int | str | Sequence[int | str] = 32768,
    batch: int | Sequence[int] = 1,
    chunk: int | str | Sequence[int | str] | None = None,
    window: int | str | Sequence[int | str] | None = None,
    chips: int | Sequence[int | None] | None = None,
    tp: int | Sequence[int | None] | None = None,
    pp: int | Sequence[int | None] | None = None,
    cp: int | Sequence[int | None] | None = None,
    chip_parameters: Mapping[str, Sequence[str | float | int]] | None = None,
    workers: int | None = None,
    progress: bool = True,
    **options: object,
) -> pd.DataFrame:
    """Simulate the full grid of the given values; one row per point.

    ``chip_parameters`` maps dotted paths of the chip file to values, for instance
    ``{"memories.hbm.read_bandwidth": ["3.35 TB/s", "4.8 TB/s"]}``; each becomes a column of that name. The chip must
    then be a name or a path. ``chips, tp, pp, cp`` arrange systems, each combination of them one; None leaves a number
    open. Other options as for :func:`make_point`.

    Raises:
        ConfigError: a name, a path or a value is wrong, or a combination cannot be; nothing is simulated then.
    """
    import pandas as pd

    parameters = dict(chip_parameters or {})
    if parameters and isinstance(chip, Chip):
        raise ConfigError("chip_parameters: need a chip name or file, not a chip that is loaded already")
    points: list[Point] = []
    columns: list[dict[str, object]] = []
    for values in product(*parameters.values()):
        overrides = dict(zip(parameters, values, strict=True))
        loaded = chip if isinstance(chip, Chip) else load_chip(chip, overrides=overrides)
        axes = {
            "phase": phase, "context": context, "batch": batch, "chunk": chunk, "window": window, "chips": chips,
            "tp": tp, "pp": pp, "cp": cp,
        }  # fmt: skip
        for m, name, *values_of in product(_each(model), _each(method), *map(_each, axes.values())):
            at = dict(zip(axes, values_of, strict=True))
            points.append(make_point(loaded, m, name, **at, **options))  # type: ignore[arg-type]
            columns.append(dict(overrides))
    records = run_all(
        record_of, points, workers=workers, batch=BATCH_POINTS, progress=progress_bar if progress else None
    )
    return pd.DataFrame([{**column, **record} for column, record in zip(columns, records, strict=True)])


def _each(value: Any) -> Iterator[Any]:
    """The items of a list or tuple; any other value is the only item."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        yield from value
    else:
        yield value


def progress_bar(total: int) -> AbstractContextManager[Callable[[], None]]:
    """Progress on standard error: a bar with the time left on a terminal, a counter in a notebook, else nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    return _counter(total) if console.is_jupyter else _bar(total, console)


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("points", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _counter(total: int) -> Iterator[Callable[[], None]]:
    """Rich draws bars in a notebook only with widgets installed; a line that rewrites itself needs nothing."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        print(f"\rsimulated {done} of {total} points", end="", file=sys.stderr, flush=True)

    yield advance
    print(file=sys.stderr)
