"""Rows to predictions: reading, harnesses, whole models, intervals, calibration."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt_sim
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.intervals import MEASURED_CHIPS, RESIDUALS, TRANSFER, interval
from ttt_sim.model import Scenario
from ttt_sim.predict.calibrate import CALIBRATABLE, calibrate, updated_file, value_of, with_values
from ttt_sim.predict.harness import GROUP_OF_OP, GROUPS, HARNESSES, SOURCES
from ttt_sim.predict.models import MODELS, parts_of
from ttt_sim.predict.nearest import MEASURED_ROWS, TTT_OPS, nearest
from ttt_sim.predict.predictions import Devices, predict_rows, to_csv
from ttt_sim.predict.predictor import simulate_steps
from ttt_sim.predict.rows import OPERATORS, OPS, SCHEMA, WHOLE_COLUMNS, Row, parse_rows
from ttt_sim.predict.validation import fold_of, rank_correlation, two_numbers
from ttt_sim.predict.workloads import product_step, step_of
from ttt_sim.simulation import simulate_trace
from ttt_sim.workload import METHODS, build_trace

HEADER = "device,dtype,op,m,n,k,batch,seq_q,seq_kv,n_heads,n_kv_heads,head_dim,causal,tp,latency_us,mine\n"
ROWS = {
    "gemm": "H100-SXM5-80GB,bf16,gemm,64,4096,4096,,,,,,,,,15.0,a",
    "fp8": "H100-SXM5-80GB,fp8,gemm,64,4096,4096,,,,,,,,,,b",
    "bmm": "A100-PCIe-40GB,fp32,bmm,128,64,64,8,,,,,,,,,c",
    "prefill": "A100-SXM4-80GB,bf16,attention_prefill,,,,2,512,1024,32,8,128,1,,,d",
    "decode": "H100-SXM5-80GB,bf16,attention_decode,,,,8,1,4096,32,8,128,0,,,e",
    "chunk": "H100-SXM5-80GB,bf16,gdn_chunk_prefill,,,,2,256,256,16,8,128,1,,,f",
    "step": "H100-SXM5-80GB,bf16,gdn_recurrent_decode,,,,64,1,1,16,8,128,0,,,g",
    "norm": "A100-80GB,fp16,rmsnorm,512,4096,,,,,,,,,,,h",
    "gelu": "MI210,fp16,gelu,1048576,1,,,,,,,,,,,i",
    "sum": "H200-SXM-141GB,bf16,allreduce,1048576,,,,,,,,,,8,,j",
}


def rows(*names: str) -> tuple[Row, ...]:
    found = parse_rows(HEADER + "\n".join(ROWS[name] for name in names or ROWS) + "\n", "rows.csv")
    assert not found.problems
    return found.rows


def predict(*names: str) -> list[float]:
    found, problems = predict_rows(rows(*names), Devices())
    assert not problems
    return [p.predicted_us for p in found if p is not None]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("h100,bf16,gem,1,1,1,,,,,,,,,,", "rows.csv:2: op: 'gem' is unknown, did you mean gemm?"),
        ("h100,bf17,gemm,1,1,1,,,,,,,,,,", "dtype: 'bf17' is unknown, did you mean bf16"),
        (",bf16,gemm,1,1,1,,,,,,,,,,", "device: is empty"),
        ("h100,bf16,gemm,-1,1,1,,,,,,,,,,", "m: '-1' is not a whole number from 1 to"),
        ("h100,bf16,gemm,x,1,1,,,,,,,,,,", "m: 'x' is not a whole number"),
        ("h100,bf16,gemm,1.5,1,1,,,,,,,,,,", "m: '1.5' is not a whole number"),
        ("h100,bf16,gemm,inf,1,1,,,,,,,,,,", "m: 'inf' is not a whole number"),
        ("h100,bf16,gemm,1,1,,,,,,,,,,,", "k: is empty, a row of gemm needs it"),
        ("h100,bf16,gemm,1,1,1,,,,,,,,,0,", "latency_us: '0' is not a number greater than 0"),
        ("h100,bf16,gemm,1,1,1,,,,,,,,,nan,", "latency_us: 'nan' is not"),
        ("h100,bf16,gemm,1,1", "has 5 cells, the header has 16"),
        ("h100,bf16,gemm,1000000000000,1000000000000,1,,,,,,,,,,", "operations or elements, more than"),
        ("h100,bf16,attention_prefill,,,,1,8,4,8,8,64,1,,,", "seq_kv: 4 is less than seq_q 8"),
        ("h100,bf16,attention_decode,,,,1,2,4,8,8,64,0,,,", "seq_q: 2, a decode step has one query"),
        ("h100,bf16,attention_decode,,,,1,1,4,8,3,64,0,,,", "n_heads: 8 is not a multiple of n_kv_heads 3"),
        ("h100,bf16,attention_prefill,,,,1,8,8,8,8,64,2,,,", "causal: '2' is not a whole number from 0 to 1"),
        ("h100,bf16,allreduce,64,,,,,,,,,,1,,", "tp: 1, an allreduce needs at least 2 chips"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(line: str, message: str) -> None:
    found = parse_rows(HEADER + line + "\n", "rows.csv")
    assert not found.rows
    assert message in "\n".join(found.problems)
    assert all(problem.startswith("rows.csv:2: ") for problem in found.problems)


def test_all_bad_rows_are_listed_and_good_ones_kept() -> None:
    text = (
        HEADER
        + ROWS["gemm"]
        + "\nh100,bf16,gem,1,1,1,,,,,,,,,,\n"
        + ROWS["norm"]
        + "\nh100,bf16,gemm,0,0,1,,,,,,,,,,\n"
    )
    found = parse_rows(text, "rows.csv")
    assert [row.line for row in found.rows] == [2, 4]
    assert [problem.split(": ")[0] for problem in found.problems] == ["rows.csv:3", "rows.csv:5", "rows.csv:5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("device,dtype\n", "the column 'op' is missing"),
        ("device,dtype,op,op\n", "'op' is given twice"),
        ('device,dtype,op\n"a', "rows.csv"),
    ],
)
def test_files_without_rows(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rows(text, "rows.csv")


def test_tables_agree() -> None:
    assert set(GROUP_OF_OP) == set(OPS)
    assert set(GROUP_OF_OP.values()) == set(GROUPS)
    assert set(SOURCES.values()) <= set(HARNESSES)
    assert all(set(harness.extra_us) <= set(GROUPS) for harness in HARNESSES.values())
    assert {column for needed in OPS.values() for column in needed} <= set(SCHEMA)
    assert {op for constant in CALIBRATABLE.values() for op in constant.ops} <= set(OPERATORS)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_neighbours() -> None:
    together = predict()
    assert together == [predict(name)[0] for name in ROWS]
    assert together[::-1] == predict(*reversed(ROWS))


def test_engines_agree_on_every_row() -> None:
    compiled, _ = predict_rows(rows(), Devices())
    simpy, _ = predict_rows(rows(), Devices(), engine="simpy")
    assert [p and p.predicted_us for p in compiled] == [p and p.predicted_us for p in simpy]


def test_chip_without_serial_kernels_gets_a_trace_for_each_row() -> None:
    chip = ttt_sim.load_chip("tiny_gpu", overrides={"mapping.serial_kernels": "false"})
    steps = [product_step(m, 64, 64, 1, "bf16", HARNESSES["warm_loop"], 0) for m in (16, 256)]
    both = simulate_steps(chip, steps)
    assert both == [simulate_steps(chip, [step])[0] for step in steps]
    assert both[0].cycles < both[1].cycles


def test_devices_choose_file_and_variant() -> None:
    devices = Devices()
    assert devices.chip("A100-PCIe-40GB").variant == "A100-PCIe-40GB"
    assert devices.chip("a100-pcie-40gb").main_memory.read_bytes_per_s == 1.555e12
    assert devices.chip("h100").name == "h100"
    with pytest.raises(ConfigError, match="'H100-SXM', did you mean H100-SXM5-80GB"):
        devices.chip("H100-SXM")


def test_rows_that_a_chip_cannot_run_are_named() -> None:
    text = HEADER + "A100-SXM4-80GB,fp8,gemm,1,1,1,,,,,,,,,,\nnowhere,bf16,gemm,1,1,1,,,,,,,,,,\n" + ROWS["gemm"] + "\n"
    found, problems = predict_rows(parse_rows(text, "x").rows, Devices())
    assert [p is None for p in found] == [True, True, False]
    assert problems[0].startswith("line 2: a100: unit tensor_core has no peak for dtype fp8")
    assert problems[1].startswith("line 3: device: no built-in chip has the variant 'nowhere'")


def test_output_keeps_columns_and_adds_predictions() -> None:
    found = parse_rows(HEADER + ROWS["gemm"] + "\n", "x")
    predictions, _ = predict_rows(found.rows, Devices())
    lines = to_csv(found.header, [p for p in predictions if p is not None]).splitlines()
    assert lines[0] == HEADER.strip() + ",chip,predicted_us,low_us,high_us,bound_by,included"
    assert lines[1].startswith(ROWS["gemm"] + ",h100:H100-SXM5-80GB,")
    again = parse_rows("\n".join(lines) + "\n", "x")  # an output is an input; old predictions are replaced
    predictions, _ = predict_rows(again.rows, Devices())
    assert to_csv(again.header, [p for p in predictions if p is not None]).splitlines() == lines


def test_harness_decides_what_is_in() -> None:
    chip = ttt_sim.load_chip("h100")
    (fp8,), (prefill,) = rows("fp8"), rows("prefill")
    replay, bare = HARNESSES["graph_replay"], HARNESSES["bare_kernel"]
    assert [op.kind for op in step_of(fp8, replay, 1)] == ["quantise"] * 4 + ["product"]
    assert [op.kind for op in step_of(fp8, bare, 1)] == ["product"]
    assert [op.kind for op in step_of(prefill, replay, 1)] == ["kv_append", "attention"]
    assert [op.kind for op in step_of(prefill, bare, 1)] == ["attention"]
    (gemm,) = rows("gemm")
    cold, rotated, warm = (
        simulate_steps(chip, [step_of(gemm, replace(replay, weights=weights), 50 << 20)])[0].cycles
        for weights in ("cold", "rotated", "warm")
    )
    assert warm < rotated <= cold


@settings(max_examples=80)
@given(
    op=st.sampled_from(sorted(OPS)),
    dtype=st.sampled_from(["bf16", "fp8", "fp32", "int8"]),
    device=st.sampled_from(["H100-SXM5-80GB", "A100-80GB", "MI300X", "tiny_gpu"]),
    source=st.sampled_from(["", "vidur", "NeuSight", "LLMCompass"]),
    numbers=st.lists(st.sampled_from([1, 2, 3, 7, 64, 1000, 1 << 13, 1 << 20, 1 << 40]), min_size=13, max_size=13),
)
def test_any_row_is_predicted_or_named(op: str, dtype: str, device: str, source: str, numbers: list[int]) -> None:
    header = ("device", "dtype", "op", "source", "model", *WHOLE_COLUMNS)
    cells = [device, dtype, op, source, "Llama-3-8B", *map(str, numbers)]
    cells[header.index("causal")] = str(numbers[0] % 2)
    found = parse_rows(",".join(header) + "\n" + ",".join(cells) + "\n", "x", models=tuple(MODELS))
    assert bool(found.rows) != bool(found.problems)
    predictions, problems = predict_rows(found.rows, Devices())
    for p in predictions:
        assert (p is None) == bool(problems)
        if p is not None:
            assert 0 < p.low_us <= p.predicted_us <= p.high_us < float("inf")


def test_more_work_takes_longer() -> None:
    chip = ttt_sim.load_chip("h100")
    sizes = [2**i for i in range(4, 15)]
    steps = [product_step(m, 8192, 8192, 1, "bf16", HARNESSES["graph_replay"], 50 << 20) for m in sizes]
    times = [time.cycles for time in simulate_steps(chip, steps)]
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(times))
    flops = 2 * sizes[-1] * 8192 * 8192 / (times[-1] / chip.clock_hz)
    assert 0.7 * 989e12 < flops < 0.803 * 989e12


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "tokens", "before"), [("e2e_decode_step", 1, 2047), ("e2e_prefill", 1024, 0)])
def test_a_model_row_is_what_run_simulates(phase: str, tokens: int, before: int) -> None:
    """Layers, norms, head: the same kernels as the generated trace of the same model, but for the embedding."""
    chip = ttt_sim.load_chip("h100")
    model = ttt_sim.load_model("Llama-3.1-8B")
    method = METHODS["kv"].settings(1024, None, None)
    scenario = Scenario.decode((before,)) if tokens == 1 else Scenario.prefill(tokens)
    whole = simulate_trace(chip, build_trace(model, method, scenario)).seconds * 1e6
    row = Row(line=1, op=phase, device="h100", dtype="bf16", model="Llama-3-8B", batch=1, tp=1, context=before + tokens)
    found, _ = predict_rows([row], Devices())
    assert found[0] is not None
    assert found[0].predicted_us == pytest.approx(whole, rel=0.02)


def test_tensor_parallel_chips_share_work_and_pay_for_sums() -> None:
    def row(tp: int) -> Row:
        return Row(
            line=1, op="e2e_decode_step", device="h100", dtype="bf16", model="Llama-3-70B", batch=1, tp=tp, context=128
        )

    one, eight = (found.predicted_us for found in predict_rows([row(1), row(8)], Devices())[0] if found is not None)
    assert one / 8 < eight < one / 2
    with pytest.raises(WorkloadError, match="tp: 7 chips cannot share"):
        parts_of(row(7))


def test_loaded_serving_holds_prefills() -> None:
    row = Row(
        line=1, op="e2e_decode_step", device="h100", dtype="fp8", model="Qwen3-32B", batch=32, tp=1, context=1152,
        out_len=256,
    )  # fmt: skip
    plain, _ = parts_of(row)
    loaded, _ = parts_of(replace(row, note="closed-loop load"))
    assert len(loaded) == len(plain) + 2
    assert loaded[-2].count == pytest.approx(MODELS["Qwen3-32B"].n_layers * 32 / 256)


# --- intervals and validation -----------------------------------------------------------------------------------------


def test_unmeasured_chips_have_wider_intervals() -> None:
    h100, b200, mi300x = (ttt_sim.load_chip(name) for name in ("h100", "b200", "mi300x"))
    assert set(MEASURED_CHIPS) == {"a100", "h100"}
    for op in RESIDUALS:
        for us in (1.0, 50.0, 1e4):
            own, kin, other = (interval(op, us, chip) for chip in (h100, b200, mi300x))
            assert other.low <= kin.low <= own.low <= 1 <= own.high <= kin.high <= other.high
    assert set(TRANSFER) == set(RESIDUALS)


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == 1.0
    assert rank_correlation(a, -a) == -1.0
    assert rank_correlation(a, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.894, abs=1e-3)


def test_two_numbers_find_floor_and_slope() -> None:
    made = [Row(line=i, op="gemm", device="h100", dtype="bf16", m=2**i, n=1, k=1, latency_us=0.0) for i in range(12)]
    roof = np.array([float(2**i) for i in range(12)])
    made = [replace(row, latency_us=10 + 2 * x) for row, x in zip(made, roof, strict=True)]
    assert len({fold_of(row) for row in made}) > 1
    assert two_numbers(made, roof) == pytest.approx(10 + 2 * roof, rel=0.02)


def test_measured_rows_of_the_project_are_near() -> None:
    """The quick check without a folder of measurements: every kind of op, short and long."""
    found, problems = predict_rows(MEASURED_ROWS, Devices())
    assert not problems
    errors = [abs((p.ratio or 0) - 1) for p in found if p is not None]
    assert len(errors) == len(MEASURED_ROWS) >= 50
    assert max(errors) < 0.3
    assert np.mean(errors) < 0.08
    assert {row.op for row in MEASURED_ROWS} >= {op for ttt in TTT_OPS.values() for op in ttt.alike}


def test_nearest_measured_shapes_of_ttt_ops() -> None:
    row = Row(line=1, op="gemm", device="h100", dtype="bf16", m=4096, n=8192, k=1024)
    first = nearest("delta_gemm", row)[0]
    assert (first.row.m, first.row.n, first.row.k, first.factor) == (4096, 8192, 1024, 1.0)
    assert [near.row.op for near in nearest("weight_write", row)] == ["elementwise_add"] * 3


# --- calibration ------------------------------------------------------------------------------------------------------


def made_up(truth: dict[str, float], n: int = 40) -> list[Row]:
    """Rows of an H100 whose constants are ``truth``, with the latencies that such a chip would show."""
    rng = np.random.default_rng(1)
    sizes = 2 ** rng.integers(4, 13, size=(n, 3))
    blank = [
        Row(line=i, op="gemm", device="mine", dtype="bf16", m=int(m), n=int(n_), k=int(k))
        for i, (m, n_, k) in enumerate(sizes)
    ]
    chip = with_values(ttt_sim.load_chip("h100"), truth)
    found, _ = predict_rows(blank, Devices(chip))
    return [replace(row, latency_us=p.predicted_us) for row, p in zip(blank, found, strict=True) if p is not None]


def test_calibration_finds_the_constants_behind_rows(tmp_path: Path) -> None:
    truth = {"library.kernel": 4000.0, "library.stream_fraction.product": 0.6}
    chip = ttt_sim.load_chip("h100")
    fit = calibrate({"mine": chip}, made_up(truth))
    assert fit.before > 10
    assert fit.after < 2
    assert fit.held_out < 5
    for path, value in truth.items():
        assert fit.values[path] == pytest.approx(value, rel=0.05)

    source = Path(ttt_sim.__file__).parents[1] / "hw_configs" / "h100.yaml"
    new = tmp_path / "mine.yaml"
    text = updated_file(source.read_text(), chip, fit, data="made up 123", date="2026-01-02")
    new.write_text(text.replace("name: h100\n", "name: mine\n"))
    written = ttt_sim.load_chip(new)
    assert value_of(written, "library.kernel") == pytest.approx(4000, rel=0.05)
    record = written.provenance["library.kernel"].calibration
    assert (record["data"], record["rows"], record["date"]) == ("made up 123", "40", "2026-01-02")
    assert written.units == chip.units  # nothing else changed


def test_constants_are_inserted_where_a_file_lacks_them(tmp_path: Path) -> None:
    chip = ttt_sim.load_chip("tiny_gpu")
    made = with_values(chip, {"library.kernel": 900.0, "library.stream_fraction.gelu": 0.5})
    blank = [
        Row(line=i, op=op, device="d", dtype="bf16", m=2**i, n=64, k=64 * (op == "gemm"))
        for i in range(4, 14)
        for op in ("gemm", "gelu")
    ]
    found, _ = predict_rows(blank, Devices(made))
    fit = calibrate(
        {"d": chip}, [replace(row, latency_us=p.predicted_us) for row, p in zip(blank, found, strict=True) if p]
    )
    text = updated_file(
        (Path(ttt_sim.__file__).parents[1] / "hw_configs" / "tiny_gpu.yaml").read_text(),
        chip,
        fit,
        data="d",
        date="2026-01-02",
    )
    path = tmp_path / "tiny_gpu.yaml"
    path.write_text(text)
    assert ttt_sim.load_chip(path).library.stream_frac["gelu"] == pytest.approx(0.5, rel=0.1)
    assert ttt_sim.load_chip(path).library.kernel_cycles == pytest.approx(900, rel=0.1)


def test_calibration_refuses_what_rows_do_not_determine() -> None:
    rows_ = made_up({"library.kernel": 3000.0}, n=12)
    fit = calibrate({"mine": ttt_sim.load_chip("h100")}, rows_)
    assert len(fit.values) <= 3
    assert any("too few" in reason or "cannot tell" in reason or "no row" in reason for reason in fit.refused.values())
    assert "library.scan_chunk" not in fit.values
    with pytest.raises(ConfigError, match="determine none"):
        calibrate({"mine": ttt_sim.load_chip("h100")}, [replace(row, op="allreduce", tp=2) for row in rows_])
