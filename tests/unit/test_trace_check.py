"""What a possible trace is, and what its ops wait for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY, kv_trace
from ttt_sim.errors import WorkloadError
from ttt_sim.model import Scenario
from ttt_sim.ops import (
    KIND,
    LANE_COST,
    OP_COLUMNS,
    OP_KINDS,
    Hazard,
    OpClass,
    Role,
    Tensor,
    Trace,
    dependencies,
    op_cost,
)
from ttt_sim.trace_check import problems, verify

Operand = tuple[str, int, int]


def make_trace(
    ops: list[tuple[str, list[Operand], list[Operand]]],
    tensors: dict[str, tuple[int, bool]],
    after: dict[int, list[int]] | None = None,
) -> Trace:
    """Ops as (kind, reads, writes); tensors as (initial version, in place), 100 bytes each."""
    table = tuple(
        Tensor(
            name=name, shape=(100,), dtype="int8", role=Role.ACTIVATION, nbytes=100,
            initial_version=version, in_place=flag,
        )
        for name, (version, flag) in tensors.items()
    )  # fmt: skip
    ids = {name: i for i, name in enumerate(tensors)}
    n = len(ops)
    columns = {name: np.zeros(n, dtype=np.int64) for name in OP_COLUMNS}
    columns["kind"] = np.array([KIND[kind] for kind, _, _ in ops], dtype=np.int64)
    for name in ("batch", "m", "n", "k", "heads", "kv_heads", "pairs"):
        columns[name] += 1

    def csr(lists: list[list[Operand]]) -> list[np.ndarray]:
        flat = [entry for entries in lists for entry in entries]
        ptr = np.cumsum([0, *(len(entries) for entries in lists)])
        parts = [ptr, [ids[name] for name, _, _ in flat], [v for _, v, _ in flat], [b for _, _, b in flat]]
        return [np.array(part, dtype=np.int64) for part in parts]

    reads, writes = csr([r for _, r, _ in ops]), csr([w for _, _, w in ops])
    waits = [(after or {}).get(i, []) for i in range(n)]
    return Trace(
        **columns,  # type: ignore[arg-type]
        tensors=table,
        read_ptr=reads[0], read_tensor=reads[1], read_version=reads[2], read_bytes=reads[3],
        write_ptr=writes[0], write_tensor=writes[1], write_version=writes[2], write_bytes=writes[3],
        after_ptr=np.cumsum([0, *map(len, waits)]).astype(np.int64),
        after_idx=np.array([i for wait in waits for i in wait], dtype=np.int64),
    )  # fmt: skip


def edges(trace: Trace) -> list[tuple[int, int, str]]:
    found = dependencies(trace)
    return [
        (op, int(found.idx[i]), Hazard(int(found.hazard[i])).name)
        for op in range(trace.n_ops)
        for i in range(int(found.ptr[op]), int(found.ptr[op + 1]))
    ]


def norm(reads: list[Operand], writes: list[Operand]) -> tuple[str, list[Operand], list[Operand]]:
    return "attn_norm", reads, writes


# --- dependencies -----------------------------------------------------------------------------------------------------


def test_in_place_weight_waits_for_its_readers():
    """Two applies read version 0, the write makes version 1, a third apply reads it, a second write overwrites it."""
    trace = make_trace(
        [
            norm([("w", 0, 8)], [("y", 0, 8)]),
            norm([("w", 0, 8)], [("y", 1, 8)]),
            norm([("w", 0, 8)], [("w", 1, 8)]),
            norm([("w", 1, 8)], [("y", 2, 8)]),
            norm([], [("w", 2, 8)]),
        ],
        {"w": (0, True), "y": (-1, False)},
    )
    assert edges(trace) == [(2, 0, "WAR"), (2, 1, "WAR"), (3, 2, "RAW"), (4, 2, "WAW"), (4, 3, "WAR")]


def test_versions_of_an_activation_are_separate_buffers():
    trace = make_trace([norm([], [("y", 0, 8)]), norm([("y", 0, 8)], []), norm([], [("y", 1, 8)])], {"y": (-1, False)})
    assert edges(trace) == [(1, 0, "RAW")]


def test_one_reason_per_pair_the_strongest():
    trace = make_trace(
        [norm([("w", 0, 8)], [("w", 1, 8), ("y", 0, 8)]), norm([("y", 0, 8), ("w", 1, 8)], [("w", 2, 8)])],
        {"w": (0, True), "y": (-1, False)},
        after={1: [0]},
    )
    assert edges(trace) == [(1, 0, "RAW")]


def test_explicit_order():
    trace = make_trace([norm([], []), norm([], []), norm([], [])], {}, after={2: [0, 1, 1]})
    assert edges(trace) == [(2, 0, "AFTER"), (2, 1, "AFTER")]


def test_no_ops_no_dependencies():
    assert edges(make_trace([], {"w": (0, True)})) == []


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_generated_trace_is_possible():
    verify(kv_trace(TOY, Scenario.prefill(40, call_tokens=16)))


W = {"w": (0, True), "y": (-1, False)}


@pytest.mark.parametrize(
    ("ops", "after", "message"),
    [
        ([norm([("y", 0, 8)], [])], {}, r"op 0 \(attn_norm\): reads y version 0, which no op writes"),
        ([norm([("w", 3, 8)], [])], {}, r"op 0 .*reads w version 3, which no op writes"),
        ([norm([("y", 0, 8)], []), norm([], [("y", 0, 8)])], {}, r"op 0 .*reads y version 0 before op 1 \(attn_norm\)"),
        ([norm([], [("y", 0, 8)]), norm([], [("y", 0, 8)])], {}, r"op 1 .*y version 0, which op 0 .* writes too"),
        ([norm([], [("w", 0, 8)])], {}, r"op 0 .*writes w version 0; the next version to be written is 1"),
        ([norm([], [("y", 1, 8)])], {}, r"op 0 .*writes y version 1; the next version to be written is 0"),
        ([norm([], [("w", 1, 8)]), norm([("w", 0, 8)], [])], {}, r"op 1 .*w version 0 after op 0 .* overwrote it"),
        ([norm([], [("w", 2, 8)]), norm([], [("w", 1, 8)])], {}, r"op 0 .*w version 2 before op 1 .* writes the"),
        ([norm([("w", 0, 101)], [])], {}, r"op 0 .*moves 101 bytes of w, which has 100"),
        ([norm([("w", -1, 8)], [])], {}, r"op 0 .*version -1 and 8 bytes, expected at least 0"),
        ([norm([("w", 0, -8)], [])], {}, r"op 0 .*version 0 and -8 bytes, expected at least 0"),
        ([norm([], []), norm([], [])], {0: [1]}, r"op 0 .*runs after op 1, which is not an earlier op"),
        ([norm([], [])], {0: [7]}, r"op 0 .*runs after op 7, which is not an earlier op"),
        (
            [norm([("y", 1, 8)], [("y", 0, 8)]), norm([("y", 0, 8)], [("y", 1, 8)])], {},
            r"dependencies form a cycle: op 0 \(attn_norm\) waits for op 1 \(attn_norm\) waits for op 0",
        ),
        ([norm([("y", 0, 8)], [("y", 0, 8)])], {}, r"cycle: op 0 \(attn_norm\) waits for op 0"),
        ([norm([], []), norm([], [])], {0: [1], 1: [0]}, r"cycle: op 0 \(attn_norm\) waits for op 1"),
    ],
)  # fmt: skip
def test_impossible_order_is_named(ops, after, message):
    with pytest.raises(WorkloadError, match=message):
        verify(make_trace(ops, W, after))


def changed(**columns) -> Trace:
    """A possible trace of three ops with some columns replaced."""
    trace = make_trace(
        [norm([("w", 0, 8)], [("y", 0, 8)]), ("q_proj", [("y", 0, 8)], [("y", 1, 8)]), ("attention", [], [])], W
    )
    verify(trace)
    arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    return replace(trace, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kind": [1, 999, 1]}, f"op 1: kind code 999, expected 0 to {len(OP_KINDS) - 1}"),
        ({"phase": [0, 0, 4]}, "phase code 4, expected 0 to 3"),
        ({"dtype": [0, 0, -1]}, "dtype code -1, expected 0 to 7"),
        ({"flops": [0, -5, 0]}, r"op 1 \(q_proj\): flops is -5, expected at least 0"),
        ({"m": [1, 0, 1]}, "m is 0, expected at least 1"),
        ({"layer": [-2, 0, 0]}, "layer is -2, expected at least -1"),
        ({"k": [0, 0, 1]}, r"op 1 \(q_proj\): k is 0, expected at least 1"),
        ({"heads": [0, 0, 0]}, r"op 2 \(attention\): heads is 0"),
        ({"exp_ops": [1, 0, 0]}, "1 exp, rsqrt and div operations, more than the 0 vector operations"),
        ({"m": [1, 1]}, r"column m is int64 of shape \(2,\), expected \(3,\) int64"),
        ({"read_ptr": [0, 2, 1, 2]}, "read_ptr is not 4 rising offsets from 0"),
        ({"read_bytes": [8]}, "column read_bytes is int64 of shape"),
        ({"read_tensor": [0, 2]}, "operand names tensor 2, expected 0 to 1"),
    ],
)
def test_impossible_values_are_named(columns, message):
    with pytest.raises(WorkloadError, match=message):
        verify(changed(**columns))


def test_wrong_column_type():
    with pytest.raises(WorkloadError, match="column m is float64"):
        verify(replace(changed(), m=np.ones(3)))  # type: ignore[arg-type]


def test_impossible_tensors_are_named():
    trace = changed()
    twice = replace(trace, tensors=(trace.tensors[0], replace(trace.tensors[1], name="w")))
    with pytest.raises(WorkloadError, match="tensor w is declared twice"):
        verify(twice)
    negative = replace(trace, tensors=(replace(trace.tensors[0], nbytes=-1), trace.tensors[1]))
    with pytest.raises(WorkloadError, match="tensor w has -1 bytes"):
        verify(negative)


def test_several_problems_in_one_message():
    with pytest.raises(WorkloadError) as caught:
        verify(changed(flops=[-1, 0, -2], layer=[0, -9, 0]))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["op 0 (attn_norm)", "op 1 (q_proj)", "op 2 (attention)"]


def test_a_flood_of_problems_is_cut_short():
    ops = [norm([("y", i + 50, 8)], []) for i in range(100)]
    found = problems(make_trace(ops, W))
    assert 1 < len(found) < 10


# --- cost rules -------------------------------------------------------------------------------------------------------


def test_every_row_wise_kind_has_a_cost_rule():
    row_wise = {kind.name for kind in OP_KINDS if kind.op_class == OpClass.VECTOR}
    assert set(LANE_COST) == row_wise


@pytest.mark.parametrize(
    ("kind", "dims", "expected"),
    [
        ("q_proj", dict(batch=2, m=3, n=5, k=7), (2 * 2 * 3 * 5 * 7, 0, 0, 0, 0)),
        (
            "attention",
            dict(batch=2, m=3, n=9, k=16, heads=4, pairs=21),
            (4 * 4 * 16 * 21 * 2, 5 * 4 * 21 * 2, 168, 0, 0),
        ),
        ("attn_norm", dict(batch=1, m=3, n=5, k=0), (0, 4 * 15 + 3, 0, 3, 0)),
        ("silu_mul", dict(batch=1, m=3, n=5, k=0), (0, 75, 15, 0, 15)),
        ("target_conv", dict(batch=1, m=3, n=5, k=0), (150, 0, 0, 0, 0)),
        ("embedding", dict(batch=1, m=3, n=5, k=0), (0, 0, 0, 0, 0)),
        ("delta_write", dict(batch=1, m=3, n=5, k=7, extra_lanes=30), (210, 30, 0, 0, 0)),
    ],
)
def test_cost_rule(kind, dims, expected):
    assert tuple(op_cost(kind, **dims)) == expected
