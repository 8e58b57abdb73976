"""Traces as files: CSV, JSON or Parquet by file ending, one table with a row per op.

Columns: ``op`` (its number, counted from 0; may be left out), the scalar columns of :data:`ttt_sim.ops.OP_COLUMNS` with
``kind``, ``phase`` and ``dtype`` as names, ``reads`` and ``writes`` as ``tensor@version:bytes`` separated by ``;``, and
``after`` as op numbers separated by ``;``. In a hand-written file only ``kind``, ``m`` and ``n`` are needed: what a
cell leaves out is the default (phase forward, dtype bf16, batch 1, layer and chunk -1, else 0), and FLOPs and vector
operations follow from the kind and dimensions.

The tensor table stands before the ops. In CSV each tensor is a line
``#tensor,name,shape,dtype,role,nbytes,initial_version,in_place`` with a shape such as ``1x64x192``, and ``#meta,{...}``
holds the trace's meta data as JSON; JSON has the keys ``meta``, ``tensors`` and ``ops``; Parquet keeps ``{"meta": ...,
"tensors": ...}`` as JSON under the schema key ``ttt_sim``.

Without a tensor table the tensors are derived from the operands: as large as the largest operand; the role is the first
part of a name such as ``fast_weight.0`` (weight, fast_weight, kv, carry, gradient, activation), else weight for what no
op writes and activation for the rest; fast weights and carries are overwritten in place; the version before the first
written one (or the lowest that is read) is there from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ttt_sim.data_files import write_whole
from ttt_sim.errors import ConfigError
from ttt_sim.ops import Trace
from ttt_sim.trace_io import files
from ttt_sim.trace_io.table import RawTable, assemble


class _Format(NamedTuple):
    encode: Callable[[Trace], bytes]
    parse: Callable[[Path, bytes], RawTable]


#: Trace file formats by ending.
FORMATS: Mapping[str, _Format] = {
    ".csv": _Format(files.to_csv, files.from_csv),
    ".json": _Format(files.to_json, files.from_json),
    ".parquet": _Format(files.to_parquet, files.from_parquet),
}


def save(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` to ``path``, whole or not at all.

    Raises :class:`ConfigError` for an unknown ending, a path that cannot be written, or Parquet without pyarrow.
    """
    path = Path(path)
    write_whole(path, _format(path).encode(trace))


def load(path: str | Path) -> Trace:
    """Read and verify a trace.

    Raises :class:`WorkloadError` that lists what is wrong with file, line (CSV) or op, column, value and what is
    allowed; :class:`ConfigError` for an unknown ending, an unreadable file, or Parquet without pyarrow.
    """
    path = Path(path)
    form = _format(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    return assemble(form.parse(path, raw))


def _format(path: Path) -> _Format:
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(f"{path}: a trace file ends in {', '.join(FORMATS)}, not in {ending or 'nothing'!r}")
    return FORMATS[ending]
