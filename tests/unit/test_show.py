"""The text of ``ttt_sim show``: figures recomputed here by hand from the round numbers of the example chips."""

import re
from dataclasses import replace

import pytest

from ttt_sim.config import chip_names, load_chip, read_chip_file
from ttt_sim.data_files import find
from ttt_sim.model import TTTSettings
from ttt_sim.model_config import load_model
from ttt_sim.show import WIDTH, describe
from ttt_sim.simulation import simulate_trace
from ttt_sim.writing import describe_writing, update_trace


def row(text: str, *starts: str) -> list[str]:
    """Columns of the table row whose first cells are ``starts``."""
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if tuple(cells[: len(starts)]) == starts:
            return cells[len(starts) :]
    raise AssertionError(f"no row {starts}")


def test_compute_per_cycle():
    text = describe(load_chip("tiny_gpu"))
    # 1.024 TFLOP/s at 1 GHz are 1024 FLOP per cycle, 256 on each of 4 cores
    assert row(text, "tensor_core", "matrix", "bf16") == ["1.024 TFLOP/s", "1,024 FLOP", "1", "256"]
    assert row(text, "lanes", "vector", "fp32") == ["64 Gop/s", "64 op", "1", "16"]
    assert row(text, "sfu", "special", "fp32") == ["16 Gop/s", "16 op", "1", "4"]


def test_ridge_points():
    # 1.024 TFLOP/s over 64 GB/s = 16 FLOP per byte; fp8 twice that
    text = describe(load_chip("tiny_gpu"))
    assert row(text, "tensor_core", "bf16") == ["16", "16"]
    assert row(text, "tensor_core", "fp8") == ["32", "32"]
    # half of the peak against 0.8 of the bandwidth: 16 x 0.5 / 0.8 = 10
    overrides = {"compute.tensor_core.efficiency.bf16": 0.5, "memories.hbm.achievable_fraction": 0.8}
    assert row(describe(load_chip("tiny_gpu", overrides=overrides)), "tensor_core", "bf16") == ["16", "10"]


def test_memories():
    text = describe(load_chip("tiny_gpu"))
    # 1 GiB at 64 GB/s: 2^30 / 64e9 = 16.777 ms; 64 B per cycle on one bus
    assert row(text, "hbm") == ["1 GiB", "1 GiB", "64", "64 (1 bus)", "16.78 ms", "32 pJ", "32 pJ"]
    # 4 x 64 KiB at 512 GB/s: 262144 / 512e9 = 512 ns
    assert row(text, "scratchpad") == ["64 KiB/core", "256 KiB", "512", "512", "512 ns", "1 pJ", "1 pJ"]


def test_delays_in_cycles():
    text = describe(load_chip("tiny_turnaround", overrides={"memories.hbm.latency": "1.5 ns"}))
    assert row(text, "hbm", "2") == ["5", "10", "20"]  # 1.5 ns at 1 GHz rounded up
    assert row(text, "kernel launch") == ["100"]


@pytest.mark.parametrize("name", chip_names())
def test_every_number_stands_with_its_source_and_certainty(name):
    for variant in (None, *read_chip_file(name).variants):
        chip = load_chip(name, variant=variant)
        text = describe(chip)
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert chip.title in text
        sources = re.sub(r"\s+", "", text[text.index("\nSources\n") :])  # long addresses are broken anywhere
        for path, place in chip.provenance.items():
            (line,) = re.findall(rf"^  {re.escape(path)} .*$", text, flags=re.M)
            assert line.split()[1:-2] == place.text.split()
            assert line.split()[-2] == place.certainty
            assert line.split()[-1] + re.sub(r"\s+", "", place.source) in sources


def test_variant_and_overrides_are_named():
    text = describe(load_chip("h100:H100-PCIe", overrides={"memories.hbm.read_bandwidth": "3 TB/s"}))
    assert "NVIDIA H100 PCIe 80 GB  (h100, variant H100-PCIe)" in text
    assert "overridden: memories.hbm.read_bandwidth = 3 TB/s" in text
    assert re.search(r"\] +override$", text, flags=re.M)


def test_calibrated_values_show_their_record(tmp_path):
    text = find("hw_configs", "tiny_gpu", ".yaml").read_text()
    path = tmp_path / "tiny_gpu.yaml"
    record = "calibration: {data: runs.csv, rows: 12, error: 3 %, date: 2026-02-01}"
    path.write_text(
        text.replace(
            "{value: 0 ns, source: example, certainty: high}",
            f"{{value: 0 ns, source: example, certainty: high, {record}}}",
        )
    )
    assert "calibrated: data runs.csv, rows 12, error 3 %, date 2026-02-01" in describe(load_chip(path))


# --- writing weights --------------------------------------------------------------------------------------------------


def writing(chip) -> str:
    return " ".join(" ".join(describe_writing(chip)).split())


def test_how_weights_are_written_is_said():
    assert writing(load_chip("tiny_gpu")).startswith(
        "mode free: ordinary stores; a write replaces at least one word beside reads of other weights; reads of the old"
    )
    rules = load_chip("tiny_gpu").writability
    shadow = replace(rules, overlap=False, shadow_bank=True, accumulate=True, granularity="tile")
    text = writing(replace(load_chip("tiny_gpu"), writability=shadow))
    assert "at least one tile while nothing else runs (drain); a new version is written beside reads of the old" in text
    assert "the memory adds a delta to what it holds" in text
    upload = replace(rules, mode="reupload", reupload_s=0.005, reupload_bytes_per_s=64e9)
    assert "drain and re-upload: 5 ms + bytes at 64 GB/s" in writing(replace(load_chip("tiny_gpu"), writability=upload))
    never = replace(rules, mode="none", overlap=False)
    text = writing(replace(load_chip("tiny_gpu"), writability=never))
    assert "mode none: weights are never written" in text
    assert text.endswith("chunk of 1,024 tokens): impossible")


def test_one_update_is_simulated():
    # tiny_gpu: the products of 2 x 1024 x 2560 x (9728 + 2560) FLOP at 1024 per cycle are nearly all of the time.
    # Read, in MiB: targets 5, taps 0.02, convolved targets 5, projection 12.5, projected targets 5, hidden rows 19,
    # delta 47.5 and weight 47.5; written: convolved and projected targets, delta, weight. The scaled delta stays in
    # its kernel.
    chip = load_chip("tiny_gpu")
    result = simulate_trace(chip, update_trace(load_model("Qwen3-4B"), TTTSettings(), "bf16"))
    products = 2 * 1024 * 2560 * (9728 + 2560) / 1024
    assert products < result.cycles < 1.06 * products
    text = writing(chip)
    assert f"{result.cycles * 1e-6:.2f} ms; " in text
    assert "hbm: 141.5 MiB read, 105 MiB written" in text
    assert "each cell of 47.5 MiB in hbm is written once; it does not wear out" in text


def test_wear_of_one_update():
    # A million updates of the time above, one after another.
    overrides = {"memories.hbm.volatile": "false", "memories.hbm.endurance": "1e6"}
    text = writing(load_chip("tiny_gpu", overrides=overrides))
    assert "hbm: keeps its contents, 1e+06 writes per cell" in text
    assert "written once; worn out after 1e+06 updates, 18.27 h of them back to back" in text


def test_an_update_that_cannot_be_simulated_says_why():
    small = load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "64 MiB"})
    assert "does not fit, it needs " in writing(small)
    bare = replace(load_chip("tiny_gpu"), units=load_chip("tiny_gpu").units[:1])
    assert "not simulated: tiny_gpu: the workload needs a vector unit" in writing(bare)


@pytest.mark.parametrize("name", chip_names())
def test_lines_about_writing_fit(name):
    assert max(len(line) for line in describe_writing(load_chip(name))) <= WIDTH
