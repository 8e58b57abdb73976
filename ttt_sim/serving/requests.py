"""Requests: a file of recorded ones, read strictly, or a stream of random ones that is the same on every machine."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.elementary import log
from ttt_sim.reference.randomness import LARGEST_SEED, raw
from ttt_sim.units import NUMBER_PATTERN

#: How lengths of random requests vary around their mean.
Lengths = Literal["fixed", "uniform", "exponential"]
LENGTHS: tuple[Lengths, ...] = get_args(Lengths)
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")

PS_PER_S = 10**12
#: Prompt and output of a request: times are tabulated by position.
LONGEST_TOKENS = 1 << 18
MOST_REQUESTS = 100_000
#: Picoseconds of longer streams would leave 64 bits.
LONGEST_STREAM_S = 1_000_000
#: Random lengths go up to so many times their mean.
LONGEST_TIMES_MEAN = 8
#: Problems of a file that are listed; the others are counted.
_LISTED = 20
_ARRIVALS, _PROMPTS, _OUTPUTS = range(3)
_NUMBER = re.compile(NUMBER_PATTERN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``output_tokens`` after ``prompt_tokens``; the first of them comes with the last call of the prompt."""

    arrival_ps: int
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens whose state the sequence has at its end: the last output is not put in."""
        return self.prompt_tokens + self.output_tokens - 1


def offered_per_s(requests: Sequence[Request]) -> float | None:
    """Arrivals per second, None where all come at once."""
    span = requests[-1].arrival_ps - requests[0].arrival_ps
    return (len(requests) - 1) * PS_PER_S / span if span else None


# --- recorded requests ------------------------------------------------------------------------------------------------


def read_requests(path: Path) -> tuple[Request, ...]:
    """Requests of a CSV file with the columns ``arrival_s,prompt_tokens,output_tokens``, in order of arrival.

    Raises:
        ConfigError: the file cannot be read, or one message with the line, field, value and range of all that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_requests(text, str(path))


def parse_requests(text: str, path: str) -> tuple[Request, ...]:
    """Requests of a file's ``text``; ``path`` stands in messages. Raises as :func:`read_requests` does."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = tuple(name.strip() for name in next(cells for cells in reader if cells))
        top = reader.line_num
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except StopIteration:
        raise ConfigError(f"{path}: is empty, expected a header with {', '.join(COLUMNS)}") from None
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}") from None
    for name in header:
        if name not in COLUMNS:
            raise ConfigError(
                f"{path}:{top}: unknown column {name!r}{did_you_mean(name, COLUMNS)}; columns: {', '.join(COLUMNS)}"
            )
        if header.count(name) > 1:
            raise ConfigError(f"{path}:{top}: the column {name!r} is given twice")
    for name in COLUMNS:
        if name not in header:
            raise ConfigError(f"{path}:{top}: the column {name!r} is missing")
    if not lines:
        raise ConfigError(f"{path}: has no requests")
    if len(lines) > MOST_REQUESTS:
        raise ConfigError(f"{path}: {len(lines)} requests are more than {MOST_REQUESTS}")
    requests: list[Request] = []
    problems: list[str] = []
    before = 0
    for line, cells in lines:
        found: list[str] = []
        request = _read(header, cells, before, found)
        problems += [f"{path}:{line}: {problem}" for problem in found]
        if request is not None:
            requests.append(request)
            before = request.arrival_ps
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ConfigError("\n".join(problems[:_LISTED] + more))
    return tuple(requests)


def _read(header: Sequence[str], cells: Sequence[str], before_ps: int, problems: list[str]) -> Request | None:
    if len(cells) != len(header):
        problems.append(f"has {len(cells)} cells, expected {len(header)}: {', '.join(header)}")
        return None
    texts = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    arrival, tokens = texts["arrival_s"], {}
    arrival_ps = 0
    if _NUMBER.fullmatch(arrival) is None or not 0 <= Decimal(arrival) <= LONGEST_STREAM_S:
        problems.append(f"arrival_s: {arrival!r} is not a number of seconds from 0 to {LONGEST_STREAM_S}")
    else:
        arrival_ps = int((Decimal(arrival) * PS_PER_S).to_integral_value())
        if arrival_ps < before_ps:
            problems.append(
                f"arrival_s: {arrival} is before {Decimal(before_ps) / PS_PER_S} of an earlier row; "
                "rows stand in order of arrival"
            )
    for name in COLUMNS[1:]:
        text = texts[name]
        tokens[name] = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
        if not 1 <= tokens[name] <= LONGEST_TOKENS:
            problems.append(f"{name}: {text!r} is not a whole number from 1 to {LONGEST_TOKENS}")
    if problems:
        return None
    if sum(tokens.values()) > LONGEST_TOKENS:
        problems.append(
            f"prompt_tokens + output_tokens: {sum(tokens.values())} is more than {LONGEST_TOKENS} tokens of a request"
        )
        return None
    return Request(arrival_ps=arrival_ps, **tokens)


# --- random requests --------------------------------------------------------------------------------------------------


def poisson_requests(
    *, count: int, rate_per_s: float, prompt: int, output: int, lengths: Lengths = "exponential", seed: int = 0
) -> tuple[Request, ...]:
    """``count`` requests that arrive independently of each other, ``rate_per_s`` on average.

    ``prompt``, ``output``: mean tokens. ``lengths``: all equal, evenly spread from half to one and a half of the mean,
    or exponential, at least 1 and at most 8 times the mean. Another rate stretches the same stream.

    Raises:
        ConfigError: a value is out of range.
    """
    if lengths not in LENGTHS:
        raise ConfigError(f"lengths: {lengths!r} is not one of {', '.join(LENGTHS)}{did_you_mean(lengths, LENGTHS)}")
    if not 1 <= count <= MOST_REQUESTS:
        raise ConfigError(f"count: {count} must be from 1 to {MOST_REQUESTS}")
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed: {seed} must be from 0 to {LARGEST_SEED}")
    largest = {"fixed": 1.0, "uniform": 1.5, "exponential": float(LONGEST_TIMES_MEAN)}[lengths]
    for name, mean in (("prompt", prompt), ("output", output)):
        if mean < 1:
            raise ConfigError(f"{name}: {mean} must be at least 1 token")
    if largest * (prompt + output) > LONGEST_TOKENS:
        raise ConfigError(
            f"prompt: with {lengths} lengths up to {largest:g} x ({prompt} + {output}) tokens of prompt and output are "
            f"more than {LONGEST_TOKENS}"
        )
    if not 0 < rate_per_s < float("inf") or count / rate_per_s > LONGEST_STREAM_S / 2:
        raise ConfigError(
            f"rate: {rate_per_s:g} must be at least {2 * count / LONGEST_STREAM_S:g} requests/s for a stream of "
            f"{count} requests"
        )
    gaps = -log(_uniform(seed, _ARRIVALS, count)) / rate_per_s
    arrivals = np.cumsum(np.rint(gaps * PS_PER_S).astype(np.int64))
    prompts, outputs = (
        _lengths(lengths, mean, _uniform(seed, stream, count))
        for stream, mean in ((_PROMPTS, prompt), (_OUTPUTS, output))
    )
    return tuple(
        Request(arrival_ps=arrival, prompt_tokens=p, output_tokens=o)
        for arrival, p, o in zip(arrivals.tolist(), prompts, outputs, strict=True)
    )


def _uniform(seed: int, stream: int, count: int) -> FloatArray:
    """Numbers above 0, up to 1."""
    bits = raw(seed, stream, (count,)) >> np.uint64(11)
    return np.asarray((bits.astype(np.float64) + 1) * 2.0**-53)


def _lengths(lengths: Lengths, mean: int, uniform: FloatArray) -> list[int]:
    if lengths == "fixed":
        return [mean] * uniform.size
    spread = 0.5 + uniform if lengths == "uniform" else np.minimum(-log(uniform), LONGEST_TIMES_MEAN)
    found: list[int] = np.maximum(np.rint(mean * spread), 1).astype(np.int64).tolist()
    return found
