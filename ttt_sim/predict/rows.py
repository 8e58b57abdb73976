"""Rows of measurements or of shapes to predict: one CSV schema, read strictly, all bad rows reported with their lines.

The schema is documented in docs/validation.md. Columns that it does not know pass through to the output.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError

#: Number formats of rows and what they are to the simulator (block-scaled 4-bit formats are fp4 plus their scales).
ROW_DTYPES: Mapping[str, str] = {
    "bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "tf32": "tf32", "fp8": "fp8", "int8": "int8", "fp4": "fp4",
    "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip

_ATTENTION = ("batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim")
_GDN = ("batch", "seq_q", "n_heads", "n_kv_heads", "head_dim")
#: Ops that can be predicted and the columns that each needs.
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "bmm": ("m", "n", "k", "batch"),
    "attention_prefill": (*_ATTENTION, "causal"),
    "attention_decode": _ATTENTION,
    "gdn_chunk_prefill": _GDN,
    "gdn_recurrent_decode": _GDN,
    "softmax": ("m", "n"),
    "layernorm": ("m", "n"),
    "rmsnorm": ("m", "n"),
    "gelu": ("m", "n"),
    "silu_mul": ("m", "n"),
    "elementwise_add": ("m", "n"),
    "allreduce": ("m", "tp"),
}
WHOLE_MODEL: Mapping[str, tuple[str, ...]] = {
    "e2e_prefill": ("model", "batch", "tp", "context"),
    "e2e_generate": ("model", "batch", "tp", "context", "out_len"),
    "e2e_decode_step": ("model", "batch", "tp", "context"),
    "e2e_train_step": ("model", "batch", "tp", "context"),
}
OPS: Mapping[str, tuple[str, ...]] = {**OPERATORS, **WHOLE_MODEL}

TEXT_COLUMNS = ("row_id", "source", "software", "device", "dtype", "op", "model", "note")
WHOLE_COLUMNS = (
    "m", "n", "k", "batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim", "causal", "tp", "context",
    "out_len",
)  # fmt: skip
#: Columns that every file must have; the others only where a row needs them.
REQUIRED_COLUMNS = ("device", "dtype", "op")
SCHEMA = (*TEXT_COLUMNS[:6], *WHOLE_COLUMNS[:10], "model", *WHOLE_COLUMNS[10:], "latency_us", "note")
#: No dimension of a row may be larger: its operands would not fit any machine, and products of three fit 64 bits.
LARGEST = 1 << 40
#: Nor may the elements or multiply-adds of a row (9e15 take an H100 a minute), or the tokens of a whole-model row.
MOST_WORK = 1 << 53
MOST_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a file. Whole numbers are 0 where a row does not state them; ``latency_us`` None if not measured.

    ``cells`` are the cells as they were, in the order of the file's header.
    """

    line: int
    op: str
    device: str
    dtype: str
    source: str = ""
    software: str = ""
    row_id: str = ""
    note: str = ""
    model: str = ""
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 0
    seq_q: int = 0
    seq_kv: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    causal: int = 0
    tp: int = 0
    context: int = 0
    out_len: int = 0
    latency_us: float | None = None
    cells: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """``rows`` that can be used, and ``problems``: one message with file, line and column for everything else."""

    path: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]


def read_rows(path: Path, *, models: Sequence[str] = ()) -> RowFile:
    """Read ``path``. Rows with faults are left out and listed in ``problems``.

    Raises:
        ConfigError: the file cannot be read, is no CSV with a header, or lacks a required column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_rows(text, str(path), models=models)


def parse_rows(text: str, path: str, *, models: Sequence[str] = ()) -> RowFile:
    """Rows of a file's ``text``; ``path`` stands in messages. Raises as :func:`read_rows` does."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = tuple(name.strip() for name in next(cells for cells in reader if cells))
        top = reader.line_num
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except StopIteration:
        raise ConfigError(f"{path}: is empty, expected a header with {', '.join(REQUIRED_COLUMNS)}") from None
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}") from None
    separator = next((sign for sign in ";\t" if len(header) == 1 and sign in header[0]), None)
    if separator is not None:
        raise ConfigError(f"{path}:{top}: cells are separated by {separator!r}, expected commas")
    for name in header:
        if header.count(name) > 1:
            raise ConfigError(f"{path}:{top}: the column {name!r} is given twice")
    for name in REQUIRED_COLUMNS:
        if name not in header:
            raise ConfigError(f"{path}:{top}: the column {name!r} is missing{did_you_mean(name, header)}")
    rows: list[Row] = []
    problems: list[str] = []
    for line, cells in lines:
        found: list[str] = []
        row = _read_row(line, header, cells, models, found)
        problems += [f"{path}:{line}: {text}" for text in found]
        if row is not None and not found:
            rows.append(row)
    return RowFile(path=path, header=header, rows=tuple(rows), problems=tuple(problems))


def _read_row(
    line: int, header: tuple[str, ...], cells: list[str], models: Sequence[str], problems: list[str]
) -> Row | None:
    if len(cells) != len(header):
        problems.append(f"has {len(cells)} cells, the header has {len(header)}")
        return None
    by_name = dict(zip(header, cells, strict=True))
    values: dict[str, str] = {name: by_name.get(name, "").strip() for name in (*TEXT_COLUMNS, *WHOLE_COLUMNS)}
    op, dtype = values["op"], values["dtype"]
    if op not in OPS:
        problems.append(f"op: {op!r} is unknown{did_you_mean(op, tuple(OPS))}; ops: {', '.join(OPS)}")
        return None
    if dtype not in ROW_DTYPES:
        known = tuple(ROW_DTYPES)
        problems.append(f"dtype: {dtype!r} is unknown{did_you_mean(dtype, known)}; dtypes: {', '.join(known)}")
    if not values["device"]:
        problems.append("device: is empty")
    if "model" in OPS[op] and values["model"] not in models:
        known = tuple(models)
        problems.append(
            f"model: {values['model']!r} is unknown{did_you_mean(values['model'], known)}; models: {', '.join(known)}"
        )
    numbers: dict[str, int] = {}
    for name in WHOLE_COLUMNS:
        text = values[name]
        least = 0 if name == "causal" else 1
        most = 1 if name == "causal" else LARGEST
        if not text:
            if name in OPS[op] and name != "model":
                near = did_you_mean(name, _unknown(header))
                missing = "is empty" if name in header else f"the file has no such column{near}"
                problems.append(f"{name}: {missing}, a row of {op} needs it")
            continue
        number = _whole(text)
        if number is None or not least <= number <= most:
            problems.append(f"{name}: {text!r} is not a whole number from {least} to {most}")
        else:
            numbers[name] = number
    latency = _latency(by_name.get("latency_us", "").strip(), problems)
    row = Row(
        line=line, op=op, device=values["device"], dtype=dtype, source=values["source"], software=values["software"],
        row_id=values["row_id"], note=values["note"], model=values["model"], latency_us=latency, cells=by_name,
        **numbers,
    )  # fmt: skip
    if not problems:
        problems += _impossible(row)
    return row


def _unknown(header: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in header if name not in SCHEMA)


def _number(text: str) -> float:
    """A number in ASCII digits; NaN for anything else that Python would read as one, such as 1_000."""
    if not text.isascii() or "_" in text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str) -> int | None:
    """A whole number, also written as 128.0; None for anything else."""
    if text.isascii() and text.isdecimal() and len(text) <= 15:
        return int(text)
    value = _number(text)
    return int(value) if math.isfinite(value) and value == int(value) else None


def _latency(text: str, problems: list[str]) -> float | None:
    if not text:
        return None
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        problems.append(f"latency_us: {text!r} is not a number greater than 0")
        return None
    return value


def _impossible(row: Row) -> list[str]:
    """Shapes that no op has."""
    problems: list[str] = []
    if row.op.startswith("attention"):
        if row.seq_kv < row.seq_q:
            problems.append(f"seq_kv: {row.seq_kv} is less than seq_q {row.seq_q}; it counts the new tokens too")
        if row.op == "attention_decode" and row.seq_q != 1:
            problems.append(f"seq_q: {row.seq_q}, a decode step has one query token per sequence")
    if row.n_kv_heads and row.n_heads % row.n_kv_heads:
        problems.append(f"n_heads: {row.n_heads} is not a multiple of n_kv_heads {row.n_kv_heads}")
    if row.op == "allreduce" and row.tp < 2:
        problems.append(f"tp: {row.tp}, an allreduce needs at least 2 chips")
    work = max(row.batch, 1) * max(
        row.m * max(row.n, 1) * max(row.k, 1),
        row.seq_q * max(row.seq_kv, 1) * row.n_heads * row.head_dim,
        row.seq_kv * row.n_kv_heads * row.head_dim,
        row.seq_q * row.n_heads * row.head_dim * row.head_dim,
    )
    if row.model and row.batch * max(row.context, row.out_len, 1) > MOST_TOKENS:
        problems.append(f"batch: {row.batch} sequences of {row.context} tokens are more than {MOST_TOKENS} tokens")
    if work > MOST_WORK:
        problems.append(f"the row has {work:.3g} operations or elements, more than {MOST_WORK:.3g}")
    return problems
