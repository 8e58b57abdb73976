"""Traces written by hand, op by op, for tests of the lowering and of what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ttt_sim import trace_check
from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.dtypes import DTYPES
from ttt_sim.ops import KIND, OP_COLUMNS, IntArray, Phase, Role, Tensor, Trace, op_cost
from ttt_sim.program import Program

#: (tensor name, version, bytes)
Operand = tuple[str, int, int]


def chip(name: str = "tiny_gpu", **overrides: str | float | int) -> Chip:
    """A chip of the project; ``a__b`` in a keyword stands for the dotted path ``a.b``."""
    return load_chip(name, overrides={path.replace("__", "."): value for path, value in overrides.items()})


@dataclass
class HandTrace:
    """Collects tensors and ops; :meth:`build` gives a verified trace."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, int]] = field(default_factory=list)
    reads: list[Sequence[Operand]] = field(default_factory=list)
    writes: list[Sequence[Operand]] = field(default_factory=list)

    def tensor(self, name: str, nbytes: int, role: Role = Role.ACTIVATION, *, exists: bool = False) -> str:
        """Declare a tensor. ``exists``: version 0 is there before the first op. State is overwritten in place."""
        self.tensors[name] = Tensor(
            name=name, shape=(nbytes,), dtype="int8", role=role, nbytes=nbytes,
            initial_version=0 if exists else -1, in_place=role in (Role.FAST_WEIGHT, Role.CARRY),
        )  # fmt: skip
        return name

    def weight(self, name: str, nbytes: int) -> str:
        return self.tensor(name, nbytes, Role.WEIGHT, exists=True)

    def op(
        self,
        kind: str,
        *,
        m: int,
        n: int,
        k: int = 0,
        batch: int = 1,
        heads: int = 0,
        kv_heads: int = 0,
        pairs: int = 0,
        reads: Sequence[Operand] = (),
        writes: Sequence[Operand] = (),
        phase: Phase = Phase.FORWARD,
        layer: int = 0,
        chunk: int = -1,
        step: int = 0,
        position: int = 0,
        dtype: str = "bf16",
    ) -> None:
        cost = op_cost(kind, batch=batch, m=m, n=n, k=k, heads=heads, pairs=pairs)
        row: Mapping[str, object] = {
            "kind": KIND[kind], "phase": int(phase), "layer": layer, "chunk": chunk, "step": step,
            "position": position, "dtype": DTYPES.index(dtype), "batch": batch, "m": m, "n": n, "k": k,
            "heads": heads, "kv_heads": kv_heads, "pairs": pairs, **cost._asdict(),
        }  # fmt: skip
        self.rows.append({name: int(str(value)) for name, value in row.items()})
        self.reads.append(reads)
        self.writes.append(writes)

    def build(self, *, pinned: Sequence[str] = ()) -> Trace:
        number = {name: i for i, name in enumerate(self.tensors)}

        def csr(column: list[Sequence[Operand]]) -> tuple[IntArray, ...]:
            flat = [operand for operands in column for operand in operands]
            ptr = np.concatenate([[0], np.cumsum([len(operands) for operands in column])]).astype(np.int64)
            entries = [(number[name], version, nbytes) for name, version, nbytes in flat]
            table = np.array(entries, dtype=np.int64).reshape(-1, 3)
            return ptr, table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()

        read, write = csr(self.reads), csr(self.writes)
        trace = Trace(
            **{name: np.array([row[name] for row in self.rows], dtype=np.int64) for name in OP_COLUMNS},
            read_ptr=read[0], read_tensor=read[1], read_version=read[2], read_bytes=read[3],
            write_ptr=write[0], write_tensor=write[1], write_version=write[2], write_bytes=write[3],
            after_ptr=np.zeros(len(self.rows) + 1, dtype=np.int64), after_idx=np.zeros(0, dtype=np.int64),
            tensors=tuple(self.tensors.values()), meta={"pinned": list(pinned)},
        )  # fmt: skip
        trace_check.verify(trace)
        return trace


def gemm_trace(m: int, n: int, k: int, *, kind: str = "down_proj") -> Trace:
    """C = A B in bf16; both operands in main memory, nobody reads the result."""
    t = HandTrace()
    t.weight("a", 2 * m * k)
    t.weight("b", 2 * k * n)
    t.tensor("c", 2 * m * n)
    t.op(kind, m=m, n=n, k=k, reads=[("a", 0, 2 * m * k), ("b", 0, 2 * k * n)], writes=[("c", 0, 2 * m * n)])
    return t.build()


def add_residual(t: HandTrace, x: str, y: str, z: str, *, m: int = 64, n: int = 512, step: int = 0) -> None:
    """z = x + y in bf16 on m rows of width n; declares z."""
    size = 2 * m * n
    t.tensor(z, size)
    t.op("attn_residual", m=m, n=n, reads=[(x, 0, size), (y, 0, size)], writes=[(z, 0, size)], step=step)


def residual_trace() -> Trace:
    """One residual add of 64 rows of 512: 64 KiB each of x, y and z."""
    t = HandTrace()
    t.weight("x", 65536)
    t.weight("y", 65536)
    add_residual(t, "x", "y", "z")
    return t.build()


def unit_tasks(program: Program, unit: str) -> list[int]:
    """Service cycles of the tasks of a unit, in id order."""
    return [int(c) for c in program.cycles[program.unit == program.unit_names.index(unit)]]
