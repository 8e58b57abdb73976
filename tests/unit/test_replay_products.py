"""Tiles, parts of reductions and orders of accumulation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.lower_tools import chip, gemm_trace
from ttt_sim.lower import lower
from ttt_sim.model import Scenario
from ttt_sim.model_config import load_model
from ttt_sim.ops import KIND
from ttt_sim.reference.exact import dot
from ttt_sim.reference.formats import BFLOAT16, FLOAT16, FLOAT32, nearest
from ttt_sim.reference.randomness import normal
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.products import Cover, attention, product
from ttt_sim.replay.tiling import Tiling, spans, tiling_of
from ttt_sim.workload import METHODS, build_trace


def tiling(m: int, n: int, k: int, rows: int, cols: int, part: int, depth: int) -> Tiling:
    return Tiling(
        tiles=tuple((*r, *c) for r in spans(m, rows) for c in spans(n, cols)), parts=spans(k, part), depth=depth
    )


def operands(m: int, n: int, k: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    a, b = normal(seed, 0, (2, m, k)), normal(seed, 1, (2, k, n))
    return nearest(a, BFLOAT16), nearest(b, BFLOAT16)


@given(length=st.integers(1, 200), size=st.integers(1, 70), offset=st.integers(0, 150))
def test_spans_cut_at_the_multiples_of_the_longer_range(length: int, size: int, offset: int) -> None:
    found = spans(length, size, offset=offset)
    assert [i for begin, end in found for i in range(begin, end)] == list(range(length))
    assert all(begin < end for begin, end in found)
    cuts = {begin + offset for begin, _ in found[1:]}
    assert cuts == {x for x in range(offset + 1, offset + length) if x % size == 0}


@given(
    m=st.integers(1, 9), n=st.integers(1, 9), k=st.integers(1, 40), rows=st.integers(1, 5), cols=st.integers(1, 5),
    part=st.integers(1, 40), depth=st.integers(1, 8), seed=st.integers(0, 99),
)  # fmt: skip
def test_exact_products_do_not_see_tiles_or_parts(
    m: int, n: int, k: int, rows: int, cols: int, part: int, depth: int, seed: int
) -> None:
    a, b = operands(m, n, k, seed=seed)
    for fmt in (BFLOAT16, FLOAT32):
        cut = product(a, b, tiling(m, n, k, rows, cols, part, depth), fmt, "exact", "test")
        assert np.array_equal(cut, dot(a, b, fmt))


def test_parts_stay_unrounded_until_the_last() -> None:
    """2**12 + 1 - 2**12 in two parts: rounded parts would give 0, since 4097 is no bfloat16 number."""
    a, b = np.array([[[4096.0, 1.0, -4096.0]]]), np.ones((1, 3, 1))
    split = Tiling(tiles=((0, 1, 0, 1),), parts=((0, 2), (2, 3)), depth=1)
    assert product(a, b, split, BFLOAT16, "exact", "test").item() == 1.0


def test_hardware_order_is_the_written_one() -> None:
    """By hand in float32: steps of one element, 2**24 + 1 + 1 keeps 2**24, 1 + 1 + 2**24 does not."""
    ones = np.ones((1, 3, 1))
    one_part = Tiling(tiles=((0, 1, 0, 1),), parts=((0, 3),), depth=1)
    falling, rising = np.array([[[2.0**24, 1.0, 1.0]]]), np.array([[[1.0, 1.0, 2.0**24]]])
    assert product(falling, ones, one_part, FLOAT32, "hardware", "test").item() == 2.0**24
    assert product(rising, ones, one_part, FLOAT32, "hardware", "test").item() == 2.0**24 + 2
    # In one step, or in two parts that are added in the end, the ones are summed first.
    assert product(falling, ones, replace(one_part, depth=3), FLOAT32, "hardware", "test").item() == 2.0**24 + 2
    two_parts = replace(one_part, parts=((0, 1), (1, 3)))
    assert product(falling, ones, two_parts, FLOAT32, "hardware", "test").item() == 2.0**24 + 2


def test_hardware_order_of_a_product_by_a_loop_in_numpy_float32() -> None:
    a, b = operands(5, 7, 50)
    cut = product(a, b, tiling(5, 7, 50, 2, 3, 32, 8), BFLOAT16, "hardware", "test")
    expected = np.zeros((2, 5, 7), dtype=np.float32)
    for begin, end in ((0, 32), (32, 50)):
        part = np.zeros_like(expected)
        for k in range(begin, end, 8):
            stop = min(k + 8, end)
            # bfloat16 products have 16 bits, and eight of them of similar size sum exactly in float64
            part += (a[..., k:stop] @ b[:, k:stop]).astype(np.float32)
        expected += part
    assert np.array_equal(cut, nearest(expected.astype(np.float64), BFLOAT16))


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One head at a time in plain float64."""
    out = np.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            kv = head * k.shape[2] // q.shape[2]
            scores = q[b, :, head] @ k[b, :, kv].T / np.sqrt(q.shape[-1])
            weights = np.where(visible, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
            out[b, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, kv]
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("rows", "block", "part"), [(100, 100, 100), (3, 4, 12), (5, 2, 6)])
def test_attention_in_both_modes_against_plain_softmax(window: int | None, rows: int, block: int, part: int) -> None:
    m, n, width = 9, 21, 8
    q = nearest(normal(3, 0, (2, m, 4, width)), BFLOAT16)
    k, v = (nearest(normal(3, i, (2, n, 2, width)), BFLOAT16) for i in (1, 2))
    distance = np.arange(n - m, n)[:, None] - np.arange(n)[None, :]
    visible = (distance >= 0) & (distance < (window or n))
    cut = Tiling(tiles=tuple((*r, 0, width) for r in spans(2 * m, rows)), parts=spans(n, part), depth=block)
    whole = Tiling(tiles=((0, 2 * m, 0, width),), parts=((0, n),), depth=n)
    exact = attention(q, k, v, visible, cut, BFLOAT16, "exact")
    assert np.array_equal(exact, attention(q, k, v, visible, whole, BFLOAT16, "exact"))
    plain = softmax_attention(q, k, v, visible)
    for got in (exact, attention(q, k, v, visible, cut, BFLOAT16, "hardware")):
        assert np.abs(got - plain).max() <= 2.0**-8 * np.abs(plain).max()
    fine = attention(q, k, v, visible, cut, FLOAT32, "hardware")
    assert np.abs(fine - plain).max() <= 1e-6


def test_an_output_must_be_stored_exactly_once() -> None:
    cover = Cover(2, 4, 4)
    cover.store((0, 4), (0, 3), np.zeros((2, 4, 3)))
    with pytest.raises(ExecutionError, match=r"element \(0, 3\) 0 times"):
        cover.complete()
    cover.store((0, 4), (2, 4), np.zeros((2, 4, 2)))
    with pytest.raises(ExecutionError, match=r"element \(0, 2\) 2 times"):
        cover.complete()


def test_parts_must_follow_one_another() -> None:
    a, b = operands(2, 2, 8)
    for parts in (((0, 4),), ((0, 4), (5, 8)), ((0, 5), (4, 8)), ((4, 8), (0, 4)), ((0, 9),)):
        with pytest.raises(ExecutionError, match="expected ranges that follow one another from 0 to 8"):
            product(a, b, Tiling(tiles=((0, 2, 0, 2),), parts=parts, depth=4), FLOAT16, "exact", "test")


# --- what lowering chose ----------------------------------------------------------------------------------------------


def test_a_product_runs_on_the_tile_of_its_kernel() -> None:
    trace = gemm_trace(200, 300, 520)
    work = lower(trace, chip()).work
    found = tiling_of(trace, work.op_tiles, 0)
    rows, cols = int(work.tile_rows[0]), int(work.tile_cols[0])
    assert len(found.tiles) * int(work.split[0]) == int(work.items[0])
    assert found.tiles[0] == (0, min(rows, 200), 0, min(cols, 300))
    assert found.tiles[-1][1::2] == (200, 300)
    assert sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in found.tiles) == 200 * 300


def test_sibling_products_share_the_grid_of_the_merged_product() -> None:
    """q, k and v side by side are one product of 64 + 32 + 32 columns: its tile grid begins at the columns of q."""
    model = load_model("toy")
    trace = build_trace(model, METHODS["kv"].settings(None, None, None), Scenario.prefill(40))
    tiles = lower(trace, chip("h100")).work.op_tiles
    q, k, v, gate, up = (
        int(np.flatnonzero(trace.kind == KIND[name])[0])
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    )
    assert tiles.offset[[q, k, v, gate, up]].tolist() == [0, 64, 96, 0, 192]
    assert tiles.cols[q] == tiles.cols[k] == tiles.cols[v] > 0
    cols = int(tiles.cols[gate])
    starts = {c0 + 192 for _, _, c0, _ in tiling_of(trace, tiles, up).tiles}
    assert starts == {192} | {x for x in range(193, 384) if x % cols == 0}
    not_tiled = np.flatnonzero(trace.kind == KIND["silu_mul"])[0]
    assert tiles.rows[not_tiled] == tiles.depth[not_tiled] == 0
