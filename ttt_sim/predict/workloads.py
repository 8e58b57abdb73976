"""Rows to traces: every row becomes one *step* of a trace, a few ops on tensors of its own.

Many rows share one trace, so that lowering and engine work on all of them at once. On a chip that runs one kernel after
another (``serial_kernels``) the rows of a trace follow each other and nothing of one is left when the next begins, so
the time between two finishes is that of the row alone; other chips get a trace for each row,
which takes from its first start to its last finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ttt_sim.dtypes import DTYPE_BITS, DTYPES
from ttt_sim.ops import KIND, OP_COLUMNS, IntArray, Phase, Role, Tensor, Trace, op_cost
from ttt_sim.predict.harness import Harness
from ttt_sim.predict.rows import ROW_DTYPES, Row
from ttt_sim.units import ceil_div

#: Row-wise ops: op kind and operands of a row's elements that it reads.
ROW_OPS: dict[str, tuple[str, int]] = {
    "softmax": ("softmax", 1),
    "layernorm": ("layernorm", 1),
    "rmsnorm": ("mlp_norm", 1),
    "gelu": ("gelu", 1),
    "silu_mul": ("silu_mul", 2),
    "elementwise_add": ("mlp_residual", 2),
}
#: Copies of a weight that a harness rotates through at most.
MOST_COPIES = 5
STATE_BYTES = 4  # recurrent states are fp32
_DTYPE = {name: index for index, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Operand:
    """Bytes of one tensor that an op reads or writes. ``distance`` bytes are touched between two uses of it by a loop
    around the step; None: it is not kept."""

    name: str
    nbytes: int
    role: Role = Role.ACTIVATION
    distance: int | None = None


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op of a step, hashable, so that equal steps are simulated once."""

    kind: str
    dtype: str
    m: int
    n: int
    k: int = 0
    batch: int = 1
    heads: int = 0
    kv_heads: int = 0
    pairs: int = 0
    position: int = 0
    reads: tuple[Operand, ...] = ()
    writes: tuple[Operand, ...] = ()


Step = tuple[OpSpec, ...]


def size(elements: int, dtype: str) -> int:
    """Bytes of packed elements."""
    return ceil_div(elements * DTYPE_BITS[dtype], 8)


def step_of(row: Row, harness: Harness, cache_bytes: int) -> Step:
    """The ops of one operator row as ``harness`` runs it on a chip whose shared cache has ``cache_bytes``."""
    dtype = ROW_DTYPES[row.dtype]
    if row.op in ("gemm", "bmm"):
        return product_step(row.m, row.n, row.k, max(row.batch, 1), dtype, harness, cache_bytes)
    if row.op in ("attention_prefill", "attention_decode"):
        return attention_step(row, dtype, harness)
    if row.op in ("gdn_chunk_prefill", "gdn_recurrent_decode"):
        return delta_rule_step(row, dtype)
    if row.op in ROW_OPS:
        kind, n_read = ROW_OPS[row.op]
        m, n = (1, row.m) if row.n == 1 else (row.m, row.n)
        return row_step(kind, n_read, m, n, dtype)
    return allreduce_step(row.m, row.tp, dtype)


def product_step(m: int, n: int, k: int, batch: int, dtype: str, harness: Harness, cache_bytes: int) -> Step:
    """C[m,n] = A[m,k] B[k,n], ``batch`` times; results of 8 and 4 bit products are 16 bits wide."""
    narrow = DTYPE_BITS[dtype] < 16
    a, b, c = size(batch * m * k, dtype), size(batch * n * k, dtype), size(batch * m * n, "bf16" if narrow else dtype)
    copies = 1
    if harness.weights == "rotated":
        copies = max(1, min(MOST_COPIES, ceil_div(cache_bytes, b)))
    weight_distance = None if harness.weights == "cold" else copies * b + a + c
    ops: list[OpSpec] = []
    wide = size(batch * m * k, "bf16")
    if harness.quantise and narrow:
        ops += quantise_ops(batch * m, k, wide, a, wide + a + copies * b + c)
    ops.append(
        OpSpec(
            "product", dtype, m, n, k, batch,
            reads=(Operand("a", a, Role.ACTIVATION, a + b + c), Operand("b", b, Role.WEIGHT, weight_distance)),
            writes=(Operand("c", c, Role.ACTIVATION, a + copies * b + c),),
        )
    )  # fmt: skip
    return tuple(ops)


#: Bytes of the scale of a tensor, and of what else a small kernel stores.
SCALE_BYTES = 32


def _small(name: str, distance: int) -> Operand:
    return Operand(name, SCALE_BYTES, Role.ACTIVATION, distance)


def quantise_ops(m: int, k: int, wide: int, narrow: int, distance: int) -> list[OpSpec]:
    """Dynamic quantisation of m rows of width k: clear the maximum, find it, make the scale of it, convert.

    Each is a kernel of its own, as in the framework that the rows with quantisation were measured with.
    """
    x = Operand("x", wide, Role.ACTIVATION, distance)
    return [
        OpSpec("quantise", "bf16", 1, 1, writes=(_small("zero", distance),)),
        OpSpec("quantise", "bf16", m, k, reads=(x,), writes=(_small("max", distance),)),
        OpSpec(
            "quantise", "bf16", 1, 1, reads=(Operand("max", SCALE_BYTES),),
            writes=(_small("scale", distance),),
        ),
        OpSpec(
            "quantise", "bf16", m, k, reads=(x, Operand("scale", SCALE_BYTES)),
            writes=(Operand("a", narrow, Role.ACTIVATION, distance),),
        ),
    ]  # fmt: skip


def visible_pairs(queries: int, keys: int, causal: bool) -> int:
    """Query-key pairs of one sequence and head: all, or those up to the diagonal that ends at the last key."""
    if not causal:
        return queries * keys
    return queries * (keys - queries) + queries * (queries + 1) // 2


def attention_step(row: Row, dtype: str, harness: Harness) -> Step:
    """Attention of ``seq_q`` new tokens over ``seq_kv`` keys, with the kernel that stores the new ones."""
    batch, m, n, width = row.batch, row.seq_q, row.seq_kv, row.n_kv_heads * row.head_dim
    q = size(batch * m * row.n_heads * row.head_dim, dtype)
    fresh, kv = size(batch * m * width, dtype), size(2 * batch * n * width, dtype)
    ops: list[OpSpec] = []
    if harness.kv_write:
        ops.append(
            OpSpec(
                "kv_append", dtype, batch * m, 2 * width,
                reads=tuple(Operand(name, fresh, Role.ACTIVATION, 4 * fresh) for name in ("k", "v")),
                writes=(Operand("fresh", 2 * fresh, Role.GRADIENT),),
            )
        )  # fmt: skip
    ops.append(
        OpSpec(
            "attention", dtype, m, n, row.head_dim, batch, row.n_heads, row.n_kv_heads,
            visible_pairs(m, n, bool(row.causal) and m > 1), n - m,
            reads=(Operand("q", q, Role.ACTIVATION, 2 * q + kv), Operand("kv", kv, Role.KV, 2 * q + kv)),
            writes=(Operand("out", q),),
        )
    )  # fmt: skip
    return tuple(ops)


def delta_rule_step(row: Row, dtype: str) -> Step:
    """The gated delta rule over ``seq_q`` tokens: keys of ``n_kv_heads`` heads, values and states of ``n_heads``."""
    batch, m, d = row.batch, row.seq_q, row.head_dim
    tokens = size(batch * m * (2 * row.n_kv_heads + row.n_heads) * d, dtype)
    out, state = size(batch * m * row.n_heads * d, dtype), batch * row.n_heads * d * d * STATE_BYTES
    kind = "delta_step" if row.op == "gdn_recurrent_decode" else "delta_rule"
    return (
        OpSpec(
            kind, dtype, m, d, d, batch, row.n_heads, row.n_kv_heads,
            reads=(
                Operand("qkv", tokens, Role.ACTIVATION, tokens + out + state),
                Operand("state", state, Role.FAST_WEIGHT, tokens + out + state),
            ),
            writes=(Operand("out", out), Operand("state", state, Role.FAST_WEIGHT, tokens + out + state)),
        ),
    )  # fmt: skip


def row_step(kind: str, n_read: int, m: int, n: int, dtype: str) -> Step:
    """A row-wise op on m rows of width n that reads ``n_read`` operands of that shape."""
    one = size(m * n, dtype)
    reads = tuple(Operand(f"x{i}", one, Role.ACTIVATION, (n_read + 1) * one) for i in range(n_read))
    return (OpSpec(kind, dtype, m, n, reads=reads, writes=(Operand("y", one),)),)


def allreduce_step(nbytes: int, ranks: int, dtype: str) -> Step:
    """The sum of ``nbytes`` on each of ``ranks`` chips."""
    elements = ceil_div(nbytes * 8, DTYPE_BITS[dtype])
    message = Operand("x", nbytes, Role.ACTIVATION, 2 * nbytes)
    return (OpSpec("allreduce", dtype, elements, 1, heads=ranks, reads=(message,), writes=(Operand("y", nbytes),)),)


@dataclass(slots=True)
class _Columns:
    scalars: list[tuple[int, ...]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)
    read_ptr: list[int] = field(default_factory=lambda: [0])
    write_ptr: list[int] = field(default_factory=lambda: [0])
    held: dict[str, int] = field(default_factory=dict)


def trace_of(steps: Sequence[Step]) -> Trace:
    """One trace of all steps in order, after a step 0 that only stores a few bytes: the traffic before the first of
    them, so that every step follows a store and none depends on its place."""
    lead_in: Step = (OpSpec("fast_init", "bf16", 1, 1, writes=(Operand("before", 32),)),)
    columns = _Columns()
    for index, step in enumerate((lead_in, *steps)):
        _add_step(columns, index, step)
    table = np.array(columns.scalars, dtype=np.int64)
    return Trace(
        **{name: table[:, i].copy() for i, name in enumerate(OP_COLUMNS)},
        **_csr("read", columns.read_ptr, columns.reads),
        **_csr("write", columns.write_ptr, columns.writes),
        after_ptr=np.zeros(table.shape[0] + 1, dtype=np.int64),
        after_idx=np.zeros(0, dtype=np.int64),
        tensors=tuple(columns.tensors),
        meta={"held": columns.held},
    )


def _add_step(columns: _Columns, index: int, step: Step) -> None:
    numbers: dict[str, int] = {}
    versions: dict[str, int] = {}
    largest: dict[str, int] = {}
    for op in step:
        for operand in (*op.reads, *op.writes):
            largest[operand.name] = max(largest.get(operand.name, 0), operand.nbytes)

    def place(operand: Operand, *, written: bool) -> tuple[int, int, int]:
        name = operand.name
        if name not in numbers:
            numbers[name] = len(columns.tensors)
            versions[name] = -1 if written else 0
            full = f"{index}.{name}"
            columns.tensors.append(
                Tensor(
                    name=full, shape=(largest[name],), dtype="int8", role=operand.role, nbytes=largest[name],
                    initial_version=versions[name], in_place=operand.role == Role.FAST_WEIGHT,
                )
            )  # fmt: skip
            if operand.distance is not None:
                columns.held[full] = operand.distance
        if written:
            versions[name] += 1
        return numbers[name], versions[name], operand.nbytes

    for op in step:
        cost = op_cost(op.kind, batch=op.batch, m=op.m, n=op.n, k=op.k, heads=op.heads, pairs=op.pairs)
        values = {
            "kind": KIND[op.kind], "phase": int(Phase.FORWARD), "layer": -1, "chunk": -1, "step": index,
            "position": op.position, "dtype": _DTYPE[op.dtype], "batch": op.batch, "m": op.m, "n": op.n, "k": op.k,
            "heads": op.heads, "kv_heads": op.kv_heads, "pairs": op.pairs, **cost._asdict(),
        }  # fmt: skip
        columns.scalars.append(tuple(int(str(values[name])) for name in OP_COLUMNS))
        columns.reads += [place(operand, written=False) for operand in op.reads]
        columns.writes += [place(operand, written=True) for operand in op.writes]
        columns.read_ptr.append(len(columns.reads))
        columns.write_ptr.append(len(columns.writes))


def _csr(name: str, ptr: list[int], entries: list[tuple[int, int, int]]) -> dict[str, IntArray]:
    table = np.array(entries, dtype=np.int64).reshape(-1, 3)
    return {
        f"{name}_ptr": np.array(ptr, dtype=np.int64),
        f"{name}_tensor": table[:, 0].copy(),
        f"{name}_version": table[:, 1].copy(),
        f"{name}_bytes": table[:, 2].copy(),
    }
