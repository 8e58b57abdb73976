"""The three file formats of a trace, to and from bytes; :mod:`ttt_sim.trace_io` says what they hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.ops import Trace
from ttt_sim.trace_io.table import COLUMNS, TENSOR_COLUMNS, RawTable, cells_of, check_columns, tensor_row


def _meta_json(trace: Trace) -> str:
    try:
        return json.dumps(dict(trace.meta))
    except TypeError as error:
        raise WorkloadError(f"the trace's meta data cannot be written as JSON: {error}") from None


def to_csv(trace: Trace) -> bytes:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("#meta", _meta_json(trace)))
    for tensor in trace.tensors:
        row = tensor_row(tensor)
        out.writerow(
            ("#tensor", *(str(row[name]).lower() if name == "in_place" else row[name] for name in TENSOR_COLUMNS))
        )
    table = cells_of(trace)
    out.writerow(COLUMNS)
    out.writerows(zip(*(table[name] for name in COLUMNS), strict=True))
    return text.getvalue().encode()


def to_json(trace: Trace) -> bytes:
    table = cells_of(trace)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(table[name] for name in COLUMNS), strict=True)]

    def lines(items: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"

    tensors = lines([tensor_row(tensor) for tensor in trace.tensors])
    return f'{{"meta": {_meta_json(trace)},\n"tensors": {tensors},\n"ops": {lines(rows)}}}\n'.encode()


def to_parquet(trace: Trace) -> bytes:
    pa, parquet = _pyarrow()
    header = json.dumps({"meta": json.loads(_meta_json(trace)), "tensors": [tensor_row(t) for t in trace.tensors]})
    table = pa.table(cells_of(trace)).replace_schema_metadata({"ttt_sim": header})
    out = pa.BufferOutputStream()
    parquet.write_table(table, out)
    content: bytes = out.getvalue().to_pybytes()
    return content


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet files need pyarrow: pip install 'ttt-sim[parquet]', or use .csv or .json") from None
    return pyarrow, pyarrow.parquet


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise WorkloadError(f"{path}:{line}: is not UTF-8 text") from None


def from_csv(path: Path, raw: bytes) -> RawTable:
    reader = csv.reader(io.StringIO(_decode(path, raw), newline=""))
    tensors: list[tuple[str, dict[str, Any]]] = []
    meta: dict[str, Any] = {}
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    end = 0
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num
            while cells and not cells[-1].strip():
                cells.pop()
            if not cells:
                continue
            place = f"{path}:{line}"
            if cells[0] == "#meta":
                meta = _meta(place, ",".join(cells[1:]))
            elif cells[0] == "#tensor":
                if len(cells) != 1 + len(TENSOR_COLUMNS):
                    raise WorkloadError(
                        f"{place}: #tensor has {len(cells) - 1} cells, expected {','.join(TENSOR_COLUMNS)}"
                    )
                tensors.append((place, dict(zip(TENSOR_COLUMNS, cells[1:], strict=True))))
            elif cells[0].startswith("#"):
                continue
            elif header is None:
                header = [cell.strip() for cell in cells]
                check_columns(place, header)
            elif len(cells) > len(header):
                raise WorkloadError(f"{place}: has {len(cells)} cells, but the header names {len(header)} columns")
            else:
                rows.append(cells + [""] * (len(header) - len(cells)))
                lines.append(line)
    except csv.Error as error:
        raise WorkloadError(f"{path}:{reader.line_num}: is not valid CSV: {error}") from None
    if header is None:
        raise WorkloadError(f"{path}: has no header line with the columns {', '.join(COLUMNS)}")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return RawTable(
        path=path,
        columns=columns,
        n_ops=len(rows),
        place_of_op=lambda op: f"{path}:{lines[op]}",
        tensors=tensors or None,
        meta=meta,
    )


def _meta(place: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise WorkloadError(f"{place}: meta is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WorkloadError(f"{place}: meta is not a JSON object")
    return value


def from_json(path: Path, raw: bytes) -> RawTable:
    try:
        content = json.loads(_decode(path, raw))
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise WorkloadError(f"{path}: is nested too deeply") from None
    allowed = ("meta", "tensors", "ops")
    if not isinstance(content, dict) or not isinstance(content.get("ops"), list):
        raise WorkloadError(f"{path}: must be a JSON object with a list of ops under the key 'ops'")
    for key in content:
        if key not in allowed:
            raise WorkloadError(f"{path}: unknown key {key!r}{did_you_mean(key, allowed)}; keys: {', '.join(allowed)}")
    ops = content["ops"]
    for i, op in enumerate(ops):
        if not isinstance(op, dict):
            raise WorkloadError(f"{path}: ops[{i}] is not an object")
        check_columns(f"{path}: ops[{i}]", list(op))
    columns = {name: [op.get(name, "") for op in ops] for name in COLUMNS}
    return RawTable(
        path=path, columns=columns, n_ops=len(ops), place_of_op=lambda op: f"{path}: ops[{op}]",
        tensors=_tensor_list(path, content.get("tensors")), meta=_meta(str(path), json.dumps(content.get("meta", {}))),
    )  # fmt: skip


def _tensor_list(path: Path, value: object) -> list[tuple[str, dict[str, Any]]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(row, dict) and set(row) == set(TENSOR_COLUMNS) for row in value
    ):
        raise WorkloadError(f"{path}: tensors must be a list of objects with the keys {', '.join(TENSOR_COLUMNS)}")
    return [(f"{path}: tensors[{i}]", row) for i, row in enumerate(value)]


def from_parquet(path: Path, raw: bytes) -> RawTable:
    pa, parquet = _pyarrow()
    try:
        table = parquet.read_table(pa.BufferReader(raw))
    except (pa.ArrowException, OSError) as error:
        raise WorkloadError(f"{path}: is not a Parquet file: {error}") from None
    check_columns(str(path), table.column_names)
    header = (table.schema.metadata or {}).get(b"ttt_sim", b"{}")
    content = _meta(str(path), _decode(path, header))
    columns = {name: ["" if cell is None else cell for cell in cells] for name, cells in table.to_pydict().items()}
    return RawTable(
        path=path, columns=columns, n_ops=table.num_rows, place_of_op=lambda op: f"{path}: row {op}",
        tensors=_tensor_list(path, content.get("tensors")), meta=_meta(str(path), json.dumps(content.get("meta", {}))),
    )  # fmt: skip
