"""Is a trace possible? Checks everything that later stages take for granted, and says what is wrong in one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import WorkloadError
from ttt_sim.ops import OP_COLUMNS, OP_KINDS, IntArray, OpClass, Phase, Trace, owners

#: Problems listed in one message, and of one kind.
_MOST_PROBLEMS, _MOST_ALIKE = 12, 4

#: Least value of each scalar column, for every op.
_LEAST = {"layer": -1, "chunk": -1, "batch": 1, "m": 1, "n": 1}


def least_value(column: str) -> int:
    """The least number that a scalar column may hold."""
    return _LEAST.get(column, 0)


#: Columns that must be positive for an op of a class.
_NEEDED = {
    OpClass.MATMUL: ("k",),
    OpClass.ATTENTION: ("k", "heads", "kv_heads", "pairs"),
    OpClass.SCAN: ("k", "heads"),
    OpClass.COLLECTIVE: ("heads",),
}
_CODES = {"kind": len(OP_KINDS), "phase": len(Phase), "dtype": len(DTYPES)}

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """``op`` -1: a problem of the trace as a whole. ``column``: as trace files name it, or ``tensors``."""

    op: int
    column: str
    text: str


def verify(trace: Trace) -> None:
    """Raise :class:`WorkloadError` that lists what is impossible about ``trace``."""
    found = problems(trace)
    if found:
        raise WorkloadError(describe(found, lambda problem: _op_name(trace, problem.op)))


def describe(found: list[Problem], place: Callable[[Problem], str]) -> str:
    """The message: one line per problem, ``place(problem)`` in front, the rest counted."""
    lines = [f"{place(problem)}: {problem.text}" for problem in found[:_MOST_PROBLEMS]]
    if len(found) > _MOST_PROBLEMS:
        lines.append(f"and {len(found) - _MOST_PROBLEMS} more")
    return "\n".join(lines)


def _op_name(trace: Trace, op: int) -> str:
    if op < 0:
        return "trace"
    code = int(trace.kind[op])
    return f"op {op} ({OP_KINDS[code].name})" if 0 <= code < len(OP_KINDS) else f"op {op}"


def problems(trace: Trace) -> list[Problem]:
    """What is wrong, in op order; at most a few of each kind. Later checks need what earlier ones establish."""
    for check in (_columns, _values, _operands, _versions):
        found = sorted(check(trace), key=lambda problem: problem.op)
        if found:
            return found
    return []


def _where(bad: BoolArray) -> list[int]:
    return [int(i) for i in np.flatnonzero(bad)[:_MOST_ALIKE]]


def _columns(trace: Trace) -> Iterator[Problem]:
    """Shapes and offsets of the columns, and the tensor table."""
    n = trace.n_ops
    for name in OP_COLUMNS:
        column = getattr(trace, name)
        if column.dtype != np.int64 or column.shape != (n,):
            yield Problem(
                op=-1,
                column=name,
                text=f"column {name} is {column.dtype} of shape {column.shape}, expected ({n},) int64",
            )
    for ptr_name, entries in (
        ("read_ptr", ("read_tensor", "read_version", "read_bytes")),
        ("write_ptr", ("write_tensor", "write_version", "write_bytes")),
        ("after_ptr", ("after_idx",)),
    ):
        ptr = getattr(trace, ptr_name)
        if ptr.dtype != np.int64 or ptr.shape != (n + 1,) or ptr[0] != 0 or (np.diff(ptr) < 0).any():
            yield Problem(op=-1, column=ptr_name, text=f"{ptr_name} is not {n + 1} rising offsets from 0")
            continue
        for name in entries:
            column = getattr(trace, name)
            if column.dtype != np.int64 or column.shape != (int(ptr[-1]),):
                text = f"column {name} is {column.dtype} of shape {column.shape}, expected ({int(ptr[-1])},) int64"
                yield Problem(op=-1, column=name, text=text)
    seen: set[str] = set()
    for tensor in trace.tensors:
        if tensor.name in seen:
            yield Problem(op=-1, column="tensors", text=f"tensor {tensor.name} is declared twice")
        seen.add(tensor.name)
        if tensor.nbytes < 0 or tensor.initial_version < -1 or any(length < 1 for length in tensor.shape):
            text = f"tensor {tensor.name} has {tensor.nbytes} bytes, shape {tensor.shape}, initial version "
            text += f"{tensor.initial_version}"
            yield Problem(op=-1, column="tensors", text=f"{text}; expected bytes >= 0, version >= -1, lengths >= 1")


def _values(trace: Trace) -> Iterator[Problem]:
    """Scalar columns, each by itself."""
    for name, n_codes in _CODES.items():
        column: IntArray = getattr(trace, name)
        for i in _where((column < 0) | (column >= n_codes)):
            yield Problem(op=i, column=name, text=f"{name} code {int(column[i])}, expected 0 to {n_codes - 1}")
    for name in OP_COLUMNS:
        column, least = getattr(trace, name), least_value(name)
        if name not in _CODES:
            for i in _where(column < least):
                yield Problem(op=i, column=name, text=f"{name} is {int(column[i])}, expected at least {least}")
    classes = np.array([int(kind.op_class) for kind in OP_KINDS], dtype=np.int64)
    op_class = classes[np.clip(trace.kind, 0, len(OP_KINDS) - 1)]
    for wanted, names in _NEEDED.items():
        for name in names:
            column = getattr(trace, name)
            for i in _where((op_class == int(wanted)) & (column == 0)):
                yield Problem(op=i, column=name, text=f"{name} is 0, expected at least 1")
    parts = trace.exp_ops + trace.rsqrt_ops + trace.div_ops
    for i in _where(parts > trace.vector_ops):
        text = (
            f"{int(parts[i])} exp, rsqrt and div operations, more than the {int(trace.vector_ops[i])} vector operations"
        )
        yield Problem(op=i, column="vector_ops", text=text)


def _operands(trace: Trace) -> Iterator[Problem]:
    """Tensors and bytes of operands."""
    size = np.array([tensor.nbytes for tensor in trace.tensors], dtype=np.int64)
    for name, ptr, tensor, version, nbytes in (
        ("reads", trace.read_ptr, trace.read_tensor, trace.read_version, trace.read_bytes),
        ("writes", trace.write_ptr, trace.write_tensor, trace.write_version, trace.write_bytes),
    ):
        op = owners(ptr)
        unknown = (tensor < 0) | (tensor >= len(trace.tensors))
        for i in _where(unknown):
            text = f"operand names tensor {int(tensor[i])}, expected 0 to {len(trace.tensors) - 1}"
            yield Problem(op=int(op[i]), column=name, text=text)
        for i in _where((version < 0) | (nbytes < 0)):
            text = f"operand has version {int(version[i])} and {int(nbytes[i])} bytes, expected at least 0"
            yield Problem(op=int(op[i]), column=name, text=text)
        if not unknown.any():
            for i in _where(nbytes > size[tensor]):
                t = trace.tensors[int(tensor[i])]
                text = f"moves {int(nbytes[i])} bytes of {t.name}, which has {t.nbytes}"
                yield Problem(op=int(op[i]), column=name, text=text)


def _versions(trace: Trace) -> Iterator[Problem]:
    """Every version is written once, in order, before it is read, and is not read after it was overwritten."""
    initial = np.array([tensor.initial_version for tensor in trace.tensors], dtype=np.int64)
    reader, writer = owners(trace.read_ptr), owners(trace.write_ptr)

    def label(tensor: int, version: int) -> str:
        return f"{trace.tensors[tensor].name} version {version}"

    # Writes by tensor and version; the n-th written version of a tensor is initial + 1 + n.
    order = np.lexsort((trace.write_version, trace.write_tensor))
    tensor, version, op = trace.write_tensor[order], trace.write_version[order], writer[order]
    twice = np.zeros(order.size, dtype=np.bool_)
    twice[1:] = (tensor[1:] == tensor[:-1]) & (version[1:] == version[:-1])
    for i in _where(twice):
        text = f"writes {label(int(tensor[i]), int(version[i]))}, which {_op_name(trace, int(op[i - 1]))} writes too"
        yield Problem(op=int(op[i]), column="writes", text=text)
    if twice.any():
        return
    rank = np.arange(order.size) - np.searchsorted(tensor, tensor, side="left")
    expected = initial[tensor] + 1 + rank
    skips = np.flatnonzero(version != expected)
    _, firsts = np.unique(tensor[skips], return_index=True)  # one report per tensor: the rest follows from it
    for i in skips[firsts][:_MOST_ALIKE]:
        text = f"writes {label(int(tensor[i]), int(version[i]))}; the next version to be written is {int(expected[i])}"
        yield Problem(op=int(op[i]), column="writes", text=text)
    if skips.size:
        return

    # From here on, versions of a tensor are dense, so a write is found by counting.
    start = np.searchsorted(tensor, np.arange(len(trace.tensors)))
    count = np.bincount(tensor, minlength=len(trace.tensors))

    def write_of(tensors: IntArray, versions: IntArray) -> IntArray:
        """Op that writes a version; -1: it is there from the start; -2: nobody."""
        nth = versions - initial[tensors] - 1
        found = np.full(tensors.size, -2, dtype=np.int64)
        inside = (nth >= 0) & (nth < count[tensors])
        found[inside] = op[(start[tensors] + nth)[inside]]
        found[nth == -1] = np.where(initial[tensors][nth == -1] >= 0, -1, -2)
        return found

    def operand(i: int) -> str:
        return f"reads {label(int(trace.read_tensor[i]), int(trace.read_version[i]))}"

    maker = write_of(trace.read_tensor, trace.read_version)
    for i in _where(maker == -2):
        yield Problem(op=int(reader[i]), column="reads", text=f"{operand(i)}, which no op writes")
    loop = _cycle(trace, reader, maker)
    if loop:
        chain = " waits for ".join(_op_name(trace, i) for i in loop)
        yield Problem(op=loop[0], column="reads", text=f"dependencies form a cycle: {chain}")
        return
    for i in _where(maker >= reader):
        yield Problem(
            op=int(reader[i]), column="reads", text=f"{operand(i)} before {_op_name(trace, int(maker[i]))} writes it"
        )
    after = owners(trace.after_ptr)
    for i in _where((trace.after_idx < 0) | (trace.after_idx >= after)):
        text = f"runs after op {int(trace.after_idx[i])}, which is not an earlier op"
        yield Problem(op=int(after[i]), column="after", text=text)
    in_place = np.array([t.in_place for t in trace.tensors], dtype=np.bool_)
    breaker = write_of(trace.read_tensor, trace.read_version + 1)
    for i in _where(in_place[trace.read_tensor] & (breaker >= 0) & (breaker < reader)):
        text = f"{operand(i)} after {_op_name(trace, int(breaker[i]))} overwrote it in place"
        yield Problem(op=int(reader[i]), column="reads", text=text)
    disorder = np.zeros(order.size, dtype=np.bool_)
    disorder[1:] = in_place[tensor[1:]] & (tensor[1:] == tensor[:-1]) & (op[1:] <= op[:-1])
    for i in _where(disorder):
        earlier = _op_name(trace, int(op[i - 1]))
        text = f"writes {label(int(tensor[i]), int(version[i]))} before {earlier} writes the version before it"
        yield Problem(op=int(op[i]), column="writes", text=text)


def _cycle(trace: Trace, reader: IntArray, maker: IntArray) -> list[int]:
    """Ops of a dependency cycle, the first one repeated at the end; empty if there is none."""
    after = owners(trace.after_ptr)
    valid = (trace.after_idx >= 0) & (trace.after_idx < trace.n_ops)
    waiting = np.concatenate([reader[maker >= 0], after[valid]])
    needed = np.concatenate([maker[maker >= 0], trace.after_idx[valid]])
    if not (needed >= waiting).any():
        return []
    needs: dict[int, list[int]] = {}
    for i, on in zip(waiting.tolist(), needed.tolist(), strict=True):
        needs.setdefault(i, []).append(on)
    done: set[int] = set()
    for root in sorted(set(waiting[needed >= waiting].tolist())):
        path, on_path, stack = [root], {root}, [iter(needs.get(root, ()))]
        while stack:
            following = next(stack[-1], None)
            if following is None:
                stack.pop()
                left = path.pop()
                on_path.discard(left)
                done.add(left)
            elif following in on_path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                path.append(following)
                on_path.add(following)
                stack.append(iter(needs.get(following, ())))
    return []
