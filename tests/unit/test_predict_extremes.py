"""Rows at the edges: chips with overlapping kernels, sizes that overrun 64 bits, rows that only some chips can run."""

from __future__ import annotations

import pytest

from ttt_sim.config import load_chip
from ttt_sim.predict.predictions import Devices, predict_rows
from ttt_sim.predict.rows import parse_rows

HEADER = "device,dtype,op,m,n,k,batch,seq_q,n_heads,n_kv_heads,head_dim\n"


def predict(chip: str, *lines: str) -> tuple[list[float | None], list[str]]:
    text = HEADER + "".join(f"{chip},{line}\n" for line in lines)
    found = parse_rows(text, "rows.csv")
    assert not found.problems
    predictions, problems = predict_rows(found.rows, Devices(load_chip(chip)))
    return [None if p is None else p.predicted_us for p in predictions], problems


@pytest.mark.parametrize("chip", ["tpu_v5e", "trainium2", "gaudi3", "inferentia2"])
def test_overlapping_kernels_take_no_less_than_their_weights(chip: str) -> None:
    """The traffic before a row may end after much of the row: the row's own time counts."""
    main = load_chip(chip).main_memory
    times, problems = predict(chip, *(f"bf16,gemm,16,8192,{k},,,,," for k in (16384, 32768, 65536)))
    assert not problems
    for k, time in zip((16384, 32768, 65536), times, strict=True):
        beyond_cache = 2 * 8192 * k - sum(m.capacity_bytes for m in load_chip(chip).memories[1:])
        assert time is not None
        assert time * 1e-6 >= beyond_cache / main.read_bytes_per_s


@pytest.mark.parametrize("chip", ["h100", "trainium2", "tiny_systolic", "tiny_spatial"])
def test_kernels_of_very_many_steps_lose_nothing(chip: str) -> None:
    times, problems = predict(chip, "bf16,softmax,67108864,67108864,,,,,,", "bf16,gemm,1,1099511627776,1,,,,,")
    assert not problems
    assert all(time is not None and time > 1e3 for time in times)


def test_a_row_that_a_chip_has_no_rule_for_is_named_and_the_others_predicted() -> None:
    gemm = "bf16,gemm,64,64,64,,,,,"
    times, problems = predict("tpu_v5e", gemm, "fp8,gemm,64,64,64,,,,,", gemm)
    assert times[1] is None
    assert times[0] == times[2] is not None
    assert problems == ["line 3: tpu_v5e: unit mxu has no peak for dtype fp8; the chip file lists bf16, int8"]


@pytest.mark.parametrize("cell", ["1_0", "\u0663", "0x10", "-0", "1e400"])
def test_numbers_are_written_in_plain_digits(cell: str) -> None:
    found = parse_rows(f"{HEADER}h100,bf16,gemm,{cell},1,1,,,,,\n", "rows.csv")
    assert not found.rows
    assert f"rows.csv:2: m: {cell!r} is not a whole number from 1 to" in found.problems[0]
