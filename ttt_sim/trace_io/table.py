"""The documented table of a trace as cells, and back from cells to a verified trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ttt_sim.data_files import did_you_mean
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import WorkloadError
from ttt_sim.ops import OP_COLUMNS, OP_KINDS, IntArray, Phase, Role, Tensor, Trace, op_cost
from ttt_sim.trace_check import Problem, describe, least_value, problems

_LIST_COLUMNS = ("reads", "writes", "after")
COLUMNS: tuple[str, ...] = ("op", *OP_COLUMNS, *_LIST_COLUMNS)
TENSOR_COLUMNS: tuple[str, ...] = ("name", "shape", "dtype", "role", "nbytes", "initial_version", "in_place")

_NAMES: Mapping[str, tuple[str, ...]] = {
    "kind": tuple(kind.name for kind in OP_KINDS),
    "phase": tuple(phase.name.lower() for phase in Phase),
    "dtype": DTYPES,
}
_ROLES: Mapping[str, Role] = {role.name.lower(): role for role in Role}
_COST_COLUMNS = ("flops", "vector_ops", "exp_ops", "rsqrt_ops", "div_ops")
_REQUIRED = ("kind", "m", "n")
_DEFAULTS: Mapping[str, int] = {"phase": 0, "layer": -1, "chunk": -1, "dtype": DTYPES.index("bf16"), "batch": 1}
_OPERAND = re.compile(r"\s*(\S(?:.*\S)?)@(\d{1,18}):(\d{1,18})\s*")
_WHOLE_NUMBER = re.compile(r"-?\d{1,18}")


def cells_of(trace: Trace) -> dict[str, list[Any]]:
    """The documented table, by column."""
    table: dict[str, list[Any]] = {"op": list(range(trace.n_ops))}
    for name in OP_COLUMNS:
        values = getattr(trace, name).tolist()
        table[name] = [_NAMES[name][code] for code in values] if name in _NAMES else values
    names = [tensor.name for tensor in trace.tensors]
    for name in names:
        if ";" in name or "\n" in name or name != name.strip() or not name:
            raise WorkloadError(
                f"tensor name {name!r} cannot be written: it is empty, or has a semicolon, a line end or outer blanks"
            )
    for column, ptr, tensor, version, nbytes in (
        ("reads", trace.read_ptr, trace.read_tensor, trace.read_version, trace.read_bytes),
        ("writes", trace.write_ptr, trace.write_tensor, trace.write_version, trace.write_bytes),
    ):
        entries = zip(tensor.tolist(), version.tolist(), nbytes.tolist(), strict=True)
        table[column] = _joined(ptr, [f"{names[t]}@{v}:{b}" for t, v, b in entries])
    table["after"] = _joined(trace.after_ptr, [str(op) for op in trace.after_idx.tolist()])
    return table


def _joined(ptr: IntArray, entries: Sequence[str]) -> list[str]:
    offsets = ptr.tolist()
    return [";".join(entries[a:b]) for a, b in pairwise(offsets)]


def tensor_row(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": "x".join(map(str, tensor.shape)),
        "dtype": tensor.dtype,
        "role": tensor.role.name.lower(),
        "nbytes": tensor.nbytes,
        "initial_version": tensor.initial_version,
        "in_place": tensor.in_place,
    }


@dataclass(slots=True, kw_only=True)
class RawTable:
    """A file's cells, not yet understood. ``place_of_op``: where the row of an op stands, for messages."""

    path: Path
    columns: dict[str, list[Any]]
    n_ops: int
    place_of_op: Callable[[int], str]
    tensors: list[tuple[str, dict[str, Any]]] | None = None  # (place, row)
    meta: dict[str, Any] = field(default_factory=dict)

    def fail(self, found: list[Problem]) -> None:
        """Raise all problems, if there are any."""
        if found:
            found = sorted(found, key=lambda problem: problem.op)
            raise WorkloadError(
                describe(found, lambda p: f"{self.place_of_op(p.op) if p.op >= 0 else self.path}: {p.column}")
            )


def check_columns(place: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            raise WorkloadError(
                f"{place}: unknown column {name!r}{did_you_mean(name, COLUMNS)}; columns: {', '.join(COLUMNS)}"
            )
        if list(names).count(name) > 1:
            raise WorkloadError(f"{place}: column {name!r} is there twice")
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise WorkloadError(f"{place}: missing column {', '.join(missing)}")


def assemble(table: RawTable) -> Trace:
    found: list[Problem] = []
    columns = {name: _scalar_column(table, name, found) for name in OP_COLUMNS}
    numbers = _scalar_column(table, "op", found)
    for i in range(table.n_ops if "op" in table.columns else 0):
        if table.columns["op"][i] != "" and int(numbers[i]) != i:
            found.append(
                Problem(op=i, column="op", text=f"is {int(numbers[i])}, expected {i}: ops are numbered from 0 in order")
            )
            break
    operands = {name: _operands(table, name, found) for name in ("reads", "writes")}
    after = _after(table, found)
    table.fail(found)
    _derive_costs(table, columns)
    tensors = _declared(table) if table.tensors is not None else _derived(operands)
    ids = {tensor.name: i for i, tensor in enumerate(tensors)}
    for column, entries in operands.items():
        for op, name, _, _ in entries:
            if name not in ids:
                text = f"unknown tensor {name!r}{did_you_mean(name, tuple(ids))}; it is not in the tensor table"
                found.append(Problem(op=op, column=column, text=text))
    table.fail(found)

    def csr(entries: Sequence[tuple[int, Any]] | Sequence[tuple[int, Any, Any, Any]]) -> IntArray:
        counts = (
            np.bincount([entry[0] for entry in entries], minlength=table.n_ops) if entries else np.zeros(table.n_ops)
        )
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def column_of(entries: list[tuple[int, str, int, int]], index: int) -> IntArray:
        return np.array([entry[index] for entry in entries], dtype=np.int64)

    reads, writes = operands["reads"], operands["writes"]
    trace = Trace(
        **columns,
        read_ptr=csr(reads),
        read_tensor=np.array([ids[entry[1]] for entry in reads], dtype=np.int64),
        read_version=column_of(reads, 2),
        read_bytes=column_of(reads, 3),
        write_ptr=csr(writes),
        write_tensor=np.array([ids[entry[1]] for entry in writes], dtype=np.int64),
        write_version=column_of(writes, 2),
        write_bytes=column_of(writes, 3),
        after_ptr=csr(after),
        after_idx=np.array([entry[1] for entry in after], dtype=np.int64),
        tensors=tensors,
        meta=table.meta,
    )
    table.fail(problems(trace))
    if not trace.n_ops:
        raise WorkloadError(f"{table.path}: has no ops")
    return trace


def _scalar_column(table: RawTable, name: str, found: list[Problem]) -> IntArray:
    """Numbers or codes of a column; empty cells take the default."""
    default, codes = _DEFAULTS.get(name, 0), _NAMES.get(name)
    values = np.full(table.n_ops, default, dtype=np.int64)
    code_of = {text: code for code, text in enumerate(codes or ())}
    for i, cell in enumerate(table.columns.get(name, ())):
        text = cell.strip() if isinstance(cell, str) else cell
        if text == "":
            if name in _REQUIRED:
                found.append(Problem(op=i, column=name, text="is missing"))
        elif codes is not None:
            if text in code_of:
                values[i] = code_of[text]
            else:
                hint = did_you_mean(str(text), codes)
                found.append(
                    Problem(op=i, column=name, text=f"unknown {name} {text!r}{hint}; allowed: {', '.join(codes)}")
                )
        elif isinstance(text, bool) or not _WHOLE_NUMBER.fullmatch(str(text)):
            found.append(Problem(op=i, column=name, text=f"is {text!r}, expected a whole number"))
        else:
            values[i] = int(text)
            if values[i] < least_value(name):
                text = f"is {int(values[i])}, expected at least {least_value(name)}"
                found.append(Problem(op=i, column=name, text=text))
    return values


def _parts(table: RawTable, column: str, found: list[Problem]) -> list[tuple[int, str]]:
    """(op, entry) of a column of lists separated by semicolons."""
    parts: list[tuple[int, str]] = []
    for i, cell in enumerate(table.columns.get(column, ())):
        if isinstance(cell, str):
            parts += [(i, part) for part in cell.split(";") if part.strip()]
        elif column == "after" and isinstance(cell, int) and not isinstance(cell, bool):
            parts.append((i, str(cell)))
        else:
            found.append(Problem(op=i, column=column, text=f"is {cell!r}, expected text"))
    return parts


def _operands(table: RawTable, column: str, found: list[Problem]) -> list[tuple[int, str, int, int]]:
    """(op, tensor name, version, bytes) of every operand of a column."""
    entries = []
    for op, part in _parts(table, column, found):
        match = _OPERAND.fullmatch(part)
        if match is None:
            text = f"{part.strip()!r} is not an operand, write tensor@version:bytes, e.g. fast_weight.0@3:24576"
            found.append(Problem(op=op, column=column, text=text))
        else:
            entries.append((op, match.group(1), int(match.group(2)), int(match.group(3))))
    return entries


def _after(table: RawTable, found: list[Problem]) -> list[tuple[int, int]]:
    entries = []
    for op, part in _parts(table, "after", found):
        if _WHOLE_NUMBER.fullmatch(part.strip()):
            entries.append((op, int(part)))
        else:
            found.append(Problem(op=op, column="after", text=f"{part.strip()!r} is not an op number"))
    return entries


def _derive_costs(table: RawTable, columns: dict[str, IntArray]) -> None:
    """Fill FLOPs and vector operations that the file leaves out by the cost rule of the kind."""
    empty = {
        name: [cell == "" for cell in table.columns.get(name, [""] * table.n_ops)] for name in _COST_COLUMNS
    }  # fmt: skip
    for i in range(table.n_ops):
        missing = [name for name in _COST_COLUMNS if empty[name][i]]
        if missing:
            row = {name: int(columns[name][i]) for name in ("batch", "m", "n", "k", "heads", "pairs")}
            cost = op_cost(OP_KINDS[int(columns["kind"][i])].name, **row)
            for name in missing:
                columns[name][i] = getattr(cost, name)


def _declared(table: RawTable) -> tuple[Tensor, ...]:
    """The tensor table of the file."""
    tensors, wrong = [], []
    for place, row in table.tensors or ():
        try:
            tensors.append(_tensor(row))
        except ValueError as error:
            wrong.append(f"{place}: {error}")
    if wrong:
        raise WorkloadError("\n".join(wrong[:12]))
    return tuple(tensors)


def _tensor(row: Mapping[str, Any]) -> Tensor:
    """One row of the tensor table; raises ValueError with column, value and what is allowed."""

    def choice(name: str, allowed: Sequence[str]) -> str:
        text = str(row[name]).strip().lower()
        if text not in allowed:
            raise ValueError(
                f"{name} {row[name]!r} is unknown{did_you_mean(text, tuple(allowed))}; allowed: {', '.join(allowed)}"
            )
        return text

    def number(name: str) -> int:
        text = str(row[name]).strip()
        if not _WHOLE_NUMBER.fullmatch(text):
            raise ValueError(f"{name} is {row[name]!r}, expected a whole number")
        return int(text)

    if not re.fullmatch(r"\s*\d{1,18}(x\d{1,18})*\s*", str(row["shape"])):
        raise ValueError(f"shape is {row['shape']!r}, expected lengths such as 1x64x192")
    return Tensor(
        name=str(row["name"]).strip(),
        shape=tuple(int(length) for length in str(row["shape"]).split("x")),
        dtype=choice("dtype", DTYPES),
        role=_ROLES[choice("role", tuple(_ROLES))],
        nbytes=number("nbytes"),
        initial_version=number("initial_version"),
        in_place=choice("in_place", ("true", "false")) == "true",
    )


def _derived(operands: Mapping[str, list[tuple[int, str, int, int]]]) -> tuple[Tensor, ...]:
    """Tensors from operands alone; see the module text."""
    size: dict[str, int] = {}
    versions: dict[str, dict[str, int]] = {"reads": {}, "writes": {}}
    for column, entries in operands.items():
        for _, name, version, nbytes in entries:
            size[name] = max(size.get(name, 0), nbytes)
            versions[column][name] = min(versions[column].get(name, version), version)
    tensors = []
    for name, nbytes in size.items():
        written = versions["writes"].get(name)
        first = versions["reads"][name] if written is None else written - 1
        role = _ROLES.get(name.partition(".")[0], Role.WEIGHT if written is None else Role.ACTIVATION)
        tensors.append(
            Tensor(
                name=name,
                shape=(max(nbytes, 1),),
                dtype="int8",
                role=role,
                nbytes=nbytes,
                initial_version=first,
                in_place=role in (Role.FAST_WEIGHT, Role.CARRY),
            )
        )
    return tuple(tensors)
