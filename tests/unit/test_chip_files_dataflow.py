"""Built-in chips with static dataflow against published figures, and the page that describes all chips."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttt_sim import simulate
from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.data_files import names as built_in
from ttt_sim.grid import make_point
from ttt_sim.simulation import simulate_point

ROOT = Path(__file__).parents[2]
#: Published figures are rounded.
ROUNDED = 0.06

CHIPS = (
    "ai100_ultra", "groq_lpu", "hexagon_8elite", "northpole", "npu_xdna2", "sn40l", "versal_vc1902", "versal_vhk158",
    "wse3",
)  # fmt: skip
#: Chip -> multiply-adds of the whole chip and cycle, clock in GHz, dtype and peak in TFLOP/s or Top/s.
PEAKS = {
    "ai100_ultra": (4 * 16 * 8192, 0.83, "int8", 870),
    "groq_lpu": (4 * 320 * 320, 0.9, "int8", 750),
    "hexagon_8elite": (16384, 1.53, "int8", 50),
    "northpole": (256 * 2048 / 2, 0.4, "int8", 200),
    "npu_xdna2": (4 * 8 * 512, 1.53, "int8", 50),
    "sn40l": (1040 * 32 * 6, 1.6, "bf16", 638),
    "versal_vc1902": (50 * 8 * 128, 1.25, "int8", 128),
    "versal_vhk158": (7168 * 3, 0.5, "int8", 21.5),
    "wse3": (900_000 * 8, 1.1, "fp16", 15_840),
}
#: Chip -> main memory in GB and GB/s.
MEMORIES = {
    "ai100_ultra": (4 * 32, 4 * 137),
    "groq_lpu": (0.23, 80_000),
    "hexagon_8elite": (12 * 1.074, 8 * 10.6),
    "northpole": (0.224, 3_700_000 / 288),
    "npu_xdna2": (32, 16 * 8.0),
    "sn40l": (64, 25_600 / 16),
    "versal_vc1902": (16, 4 * 8 * 3.2),
    "versal_vhk158": (32, 2 * 8 * 16 * 3.2),
    "wse3": (900_000 * 48 * 1024 / 1e9, 900_000 * 21 * 1.1),
}
#: Chip -> how weights are written: mode, least that is replaced, a new version beside the old one, reading transposed.
WRITING = {
    "ai100_ultra": ("reupload", "tile", False, False),
    "groq_lpu": ("static_schedule", "word", True, True),
    "hexagon_8elite": ("reupload", "tile", False, False),
    "northpole": ("reupload", "device", False, False),
    "npu_xdna2": ("free", "word", False, True),
    "sn40l": ("free", "word", True, True),
    "versal_vc1902": ("free", "word", True, True),
    "versal_vhk158": ("free", "word", True, True),
    "wse3": ("free", "word", True, False),
}
WITHOUT_BF16 = {"ai100_ultra", "groq_lpu", "hexagon_8elite", "northpole", "versal_vc1902"}


def test_every_chip_is_in_the_tables() -> None:
    chips = [load_chip(name) for name in built_in("hw_configs", ".yaml")]
    dataflow = {chip.name for chip in chips if chip.execution == "static_dataflow" and chip.kind != "example"}
    assert dataflow == set(CHIPS) == set(PEAKS) == set(MEMORIES) == set(WRITING)


@pytest.mark.parametrize("name", CHIPS)
def test_peak_is_multipliers_times_clock(name: str) -> None:
    multiply_adds, ghz, dtype, tera = PEAKS[name]
    chip = load_chip(name)
    peak = chip.unit("matrix").peak_per_s[dtype]
    assert peak == pytest.approx(tera * 1e12, rel=1e-3)
    assert peak == pytest.approx(2 * multiply_adds * ghz * 1e9, rel=ROUNDED)
    assert chip.clock_hz == pytest.approx(ghz * 1e9)


@pytest.mark.parametrize("name", CHIPS)
def test_main_memory(name: str) -> None:
    gb, gb_per_s = MEMORIES[name]
    memory = load_chip(name).main_memory
    assert memory.capacity_bytes == pytest.approx(gb * 1e9, rel=1e-2)
    assert memory.read_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=2e-2)


@pytest.mark.parametrize("name", CHIPS)
def test_writing_weights(name: str) -> None:
    rules = load_chip(name).writability
    assert (rules.mode, rules.granularity, rules.shadow_bank, rules.transposed_read) == WRITING[name]
    assert rules.overlap == (rules.mode != "reupload")  # nothing runs while the host writes


def test_formats_that_do_not_exist() -> None:
    for name in CHIPS:
        assert ("bf16" not in load_chip(name).unit("matrix").peak_per_s) == (name in WITHOUT_BF16), name
    assert {name: load_chip(name).default_dtype for name in WITHOUT_BF16} == {
        "ai100_ultra": "fp16", "groq_lpu": "fp16", "hexagon_8elite": "fp16", "northpole": "int8",
        "versal_vc1902": "fp32",
    }  # fmt: skip


def network(chip: Chip) -> float:
    """Bytes per second of the first network between cores."""
    return next(link.bytes_per_s for link in chip.links if link.scope == "core")


def test_networks_and_links() -> None:
    assert network(load_chip("wse3")) == pytest.approx(214e15 / 8, rel=1e-3)
    assert network(load_chip("ai100_ultra")) == 4 * 186e9
    groq = next(link for link in load_chip("groq_lpu").links if link.name == "c2c")
    assert (groq.bytes_per_s, groq.count) == (512e9 / 2, 16)
    assert groq.latency_s == pytest.approx(0.72e-6)


def test_tiers_behind_the_main_memory() -> None:
    """SN40L: 1600 GB/s and 24 TB of DDR over 16 sockets. WSE-3: 1.2 Tbit/s of system I/O."""
    backing = load_chip("sn40l").backing
    assert backing is not None
    assert (backing.capacity_bytes, backing.read_bytes_per_s) == (24e12 / 16, 1600e9 / 16)
    backing = load_chip("wse3").backing
    assert backing is not None
    assert (backing.capacity_bytes, backing.read_bytes_per_s) == (12 * 1128 * 2**30, 1.2e12 / 8)
    with_backing = {name for name in CHIPS if load_chip(name).backing is not None}
    assert with_backing == {"sn40l", "wse3"}


@pytest.mark.parametrize(
    ("name", "gigabytes", "tokens_per_s"),
    [("hexagon_8elite", 2.4, 23.47), ("npu_xdna2", 4.7, 12.8)],
)
def test_effective_bandwidth_reproduces_the_decode_rate_it_comes_from(
    name: str, gigabytes: float, tokens_per_s: float
) -> None:
    """Bytes of the weights times tokens per second; the share is a calibrated value and says so."""
    chip = load_chip(name)
    memory = chip.main_memory
    assert memory.read_bytes_per_s * memory.achievable_frac == pytest.approx(gigabytes * tokens_per_s * 1e9, rel=0.01)
    place = chip.provenance[f"memories.{memory.name}.achievable_fraction"]
    assert {"data", "rows", "error", "date"} <= set(place.calibration)


@pytest.mark.parametrize("name", CHIPS)
def test_a_recalled_or_assumed_number_is_never_of_high_certainty(name: str) -> None:
    for path, place in load_chip(name).provenance.items():
        if re.search(r"from memory|assumption of this project|assumed", f"{place.note} {place.source}"):
            assert place.certainty != "high", path


LABELS = ("Modelled", "Not modelled", "Writing weights", "How sure", "Published figure")


def test_page_has_a_section_for_every_chip() -> None:
    text = (ROOT / "docs" / "chips.md").read_text(encoding="utf-8")
    sections = {
        match[1]: match[2] for match in re.finditer(r"^## `(\w+)`: [^\n]+\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    }
    assert list(sections) == sorted(sections)
    chips = [load_chip(name) for name in built_in("hw_configs", ".yaml")]
    assert {chip.name for chip in chips if chip.kind != "example"} <= set(sections)
    for name, body in sections.items():
        assert [label for label in LABELS if f"*{label}*:" not in body] == [], name


LLAMA_70B = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
"intermediate_size": 28672, "vocab_size": 128256,
"tie_word_embeddings": false, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5,
"max_position_embeddings": 131072}"""


def decoded(chip: str, model: str | Path, dtype: str, **system: int) -> float:
    """Seconds of a token after 1024, in batch 1."""
    record = simulate(chip, model, "kv", phase="decode", context=1024, dtype=dtype, **system).record
    assert record["fits"], record
    return float(str(record["seconds_per_token"]))


def prompt(chip: Chip | str, tokens: int, dtype: str) -> float:
    """Seconds of a prompt of Llama-3.1-8B."""
    record = simulate(chip, "Llama-3.1-8B", "kv", phase="prefill", context=tokens, dtype=dtype).record
    assert record["fits"], record
    return float(str(record["seconds"]))


def test_published_decode_rates(tmp_path: Path) -> None:
    """The rows that a constant was fitted on, and those that it was not."""
    path = tmp_path / "Llama-3.1-70B.json"
    path.write_text(LLAMA_70B, encoding="utf-8")
    assert decoded("wse3", "Llama-3.1-8B", "fp16") == pytest.approx(1 / 1800, rel=0.02)  # fitted
    assert decoded("wse3", path, "fp16", pp=4) == pytest.approx(1 / 450, rel=0.08)
    assert decoded("sn40l", "Llama-3.1-8B", "bf16", tp=16) == pytest.approx(1 / 1042, rel=0.02)  # fitted
    assert decoded("groq_lpu", path, "int8", tp=8, pp=72) == pytest.approx(1 / 300, rel=0.2)  # nothing is fitted
    assert 10 * decoded("wse3:CS-3-hardware-hops", "Llama-3.1-8B", "fp16") == pytest.approx(1e-3, rel=0.1)


def test_published_prompts() -> None:
    """FastFlowLM on the XDNA2: the row behind the efficiency, and longer ones. Hexagon: 4.944 s, nothing is fitted."""
    for tokens, rate in ((4096, 495), (8192, 467), (16384, 381), (32768, 281)):
        assert tokens / prompt("npu_xdna2", tokens, "bf16") == pytest.approx(rate, rel=0.02 if tokens == 4096 else 0.15)
    roomy = load_chip("hexagon_8elite", overrides={"memories.lpddr.capacity": "24 GB"})  # its weights had 4 bits
    assert prompt(roomy, 4096, "fp16") == pytest.approx(4.944, rel=0.15)


@pytest.mark.parametrize("name", CHIPS)
def test_an_update_runs_in_the_format_of_the_chip(name: str) -> None:
    point = make_point(name, "toy", "ttt", phase="prefill", context=512, ttt="toy")
    assert point.method.ttt is not None
    assert point.dtype == point.method.ttt.fast_dtype == load_chip(name).default_dtype
    assert simulate_point(point).record["fits"]
