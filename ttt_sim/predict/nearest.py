"""Ops of test-time training that nobody has measured, and the measured shapes nearest to them.

A few dozen published latencies are carried here with their sources, chosen over the range of shapes: enough to say what
stands behind a prediction of a delta GEMM, an apply of fast weights or a weight write, and for a quick check of the
model where no folder of measurements is at hand. Sources: github:ai-dynamo/aiconfigurator@095f58a (Apache-2.0) and
github:sitar-lab/NeuSight@6945927 (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ttt_sim.predict.predictions import Devices, predict_rows
from ttt_sim.predict.rows import Row


class TttOp(NamedTuple):
    """The op of measured rows that stands for an op of TTT, the dimensions that it takes, and the measured ops that are
    alike."""

    row_op: str
    needs: tuple[str, ...]
    alike: tuple[str, ...]
    title: str


#: Ops that ``explain`` takes besides those of rows.
TTT_OPS: Mapping[str, TttOp] = {
    "delta_gemm": TttOp("gemm", ("m", "n", "k"), ("gemm", "gdn_chunk_prefill"),
                        "delta GEMM: m x n output, depth k = tokens of a chunk"),
    "fast_apply": TttOp("bmm", ("m", "n", "k", "batch"), ("bmm", "gemm", "gdn_recurrent_decode"),
                        "apply of a fast weight (k x n) to m tokens of each of batch sequences"),
    "weight_write": TttOp("elementwise_add", ("m", "n"), ("elementwise_add", "gdn_recurrent_decode"),
                          "add of a delta (m x n) into the fast weight"),
}  # fmt: skip


#: Measured rows: op, device, number format and source in a line of their own, then microseconds and shape of each.
_TABLE = """\
gemm A100-SXM4-80GB bf16 aiconfigurator
    12.4245 m=512 n=7168 k=32
    18.9099 m=512 n=8192 k=128
    18.0565 m=512 n=3584 k=512
    17.3397 m=512 n=1536 k=1536
    98.5429 m=4096 n=12288 k=64
    43.7931 m=768 n=4096 k=1536
    295.6629 m=4096 n=8192 k=1024
    455.5776 m=8192 n=12288 k=512
    21.5723 m=1 n=2560 k=5120
    21.7088 m=8 n=5120 k=2560
    35.6352 m=16 n=4096 k=6144
    43.9296 m=48 n=3072 k=8192
gemm H100-SXM5-80GB bf16 aiconfigurator
    3.376 m=768 n=1024 k=32
    5.7653 m=1280 n=3584 k=64
    6.9845 m=3584 n=1536 k=128
    8.2795 m=1793 n=1024 k=1024
    54.6933 m=32768 n=2048 k=64
    28.9422 m=768 n=8192 k=1536
    38.3467 m=1536 n=7168 k=1024
    225.5813 m=3840 n=10240 k=2048
    15.9253 m=2 n=2560 k=6144
    24.448 m=7 n=2560 k=10240
    49.936 m=9 n=12288 k=5120
    30.224 m=49 n=3072 k=10240
bmm H100-SXM5-80GB fp32 NeuSight
    27.5307 m=196 n=196 k=64 batch=32
    351.936 m=128 n=1024 k=1024 batch=64
    2056.1814 m=384 n=384 k=96 batch=2560
    6355.776 m=512 n=128 k=512 batch=4096
gdn_recurrent_decode H100-SXM5-80GB bf16 aiconfigurator
    4.319 batch=1 seq_q=1 seq_kv=1 n_heads=2 n_kv_heads=1 head_dim=128
    4.5133 batch=2 seq_q=1 seq_kv=1 n_heads=8 n_kv_heads=2 head_dim=128
    5.5744 batch=1 seq_q=1 seq_kv=1 n_heads=64 n_kv_heads=16 head_dim=128
    8.4221 batch=4 seq_q=1 seq_kv=1 n_heads=48 n_kv_heads=16 head_dim=128
    50.0259 batch=256 seq_q=1 seq_kv=1 n_heads=4 n_kv_heads=2 head_dim=128
    139.6634 batch=128 seq_q=1 seq_kv=1 n_heads=24 n_kv_heads=8 head_dim=128
gdn_chunk_prefill H100-SXM5-80GB bf16 aiconfigurator
    11.6942 batch=1 seq_q=4 seq_kv=4 n_heads=8 n_kv_heads=8 head_dim=128
    11.6938 batch=1 seq_q=16 seq_kv=16 n_heads=24 n_kv_heads=8 head_dim=128
    14.8336 batch=8 seq_q=128 seq_kv=128 n_heads=2 n_kv_heads=1 head_dim=128
    85.6219 batch=64 seq_q=8 seq_kv=8 n_heads=16 n_kv_heads=4 head_dim=128
    93.672 batch=8 seq_q=256 seq_kv=256 n_heads=64 n_kv_heads=16 head_dim=128
    393.3613 batch=2 seq_q=8192 seq_kv=8192 n_heads=32 n_kv_heads=16 head_dim=128
elementwise_add A100-PCIe-40GB fp32 NeuSight
    3710.9056 m=65536 n=6400
elementwise_add A100-PCIe-80GB fp32 NeuSight
    2386.9376 m=327680 n=1024
    163.136 m=16384 n=1280
    368.6464 m=16384 n=3072
attention_decode H100-SXM5-80GB bf16 aiconfigurator
    11.2267 batch=1 seq_q=1 seq_kv=2 n_heads=1 n_kv_heads=1 head_dim=128
    100.6507 batch=8 seq_q=1 seq_kv=16384 n_heads=12 n_kv_heads=4 head_dim=128
    18.128 batch=128 seq_q=1 seq_kv=8 n_heads=10 n_kv_heads=2 head_dim=128
attention_prefill A100-SXM4-80GB bf16 aiconfigurator
    18.1333 batch=2 seq_q=1 seq_kv=1 n_heads=32 n_kv_heads=4 head_dim=128 causal=1
    32.3253 batch=2 seq_q=256 seq_kv=256 n_heads=32 n_kv_heads=32 head_dim=128 causal=1
    1029.1386 batch=4 seq_q=4096 seq_kv=4096 n_heads=8 n_kv_heads=8 head_dim=128 causal=1
"""


def _rows() -> tuple[Row, ...]:
    found, group = [], Row(line=0, op="", device="", dtype="")
    for line in _TABLE.splitlines():
        first, *rest = line.split()
        if not line.startswith(" "):
            device, dtype, source = rest
            group = Row(line=0, op=first, device=device, dtype=dtype, source=source)
        else:
            numbers = {name: int(value) for name, value in (word.split("=") for word in rest)}
            found.append(replace(group, latency_us=float(first), **numbers))  # type: ignore[arg-type]
    return tuple(found)


MEASURED_ROWS: tuple[Row, ...] = _rows()


class Near(NamedTuple):
    """A measured row, its predicted time, and how far its work is from what was asked, as a factor."""

    row: Row
    predicted_us: float
    factor: float


def work_of(row: Row) -> float:
    """Multiply-adds, or elements of row-wise ops and states: what makes two rows of one op alike."""
    if row.n_heads:
        return float(row.batch * row.n_heads * row.head_dim * row.head_dim * max(row.seq_q, 1))
    return float(max(row.batch, 1) * row.m * row.n * max(row.k, 1))


def nearest(op: str, row: Row, count: int = 3) -> list[Near]:
    """The measured rows of ops alike whose work is nearest to that of ``row``, the most alike op first."""
    alike = TTT_OPS[op].alike
    found = [r for r in MEASURED_ROWS if r.op in alike]
    predictions, _ = predict_rows(found, Devices())

    def distance(r: Row) -> float:
        shape = sum(abs(math.log(getattr(r, name) / getattr(row, name))) for name in ("m", "n", "k")
                    if getattr(r, name) and getattr(row, name))  # fmt: skip
        return shape if shape else abs(math.log(work_of(r) / work_of(row)))

    near = [
        Near(r, p.predicted_us, max(work_of(r) / work_of(row), work_of(row) / work_of(r)))
        for r, p in zip(found, predictions, strict=True)
        if p is not None
    ]
    return sorted(near, key=lambda n: (alike.index(n.row.op) > 0, distance(n.row)))[:count]
