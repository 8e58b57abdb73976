"""Built-in GPUs and accelerators against arithmetic on published figures that the files do not hold."""

import dataclasses
import re
from itertools import pairwise

import pytest

from tests.unit.test_docs import names, table
from ttt_sim.chip import Chip
from ttt_sim.config import chip_names, load_chip, read_chip_file

#: What the linter allows, too: peaks and bandwidths are published with two to four digits.
ROUNDED = 0.06

#: Device -> cores, multiply-adds per core and clock in 16 bit, clock in GHz, fp32 lanes of a core.
CORES = {
    "a100:A100-SXM4-80GB": (108, 1024, 1.41, 64),
    "h100:H100-SXM5-80GB": (132, 2048, 1.83, 128),
    "h100:H100-PCIe": (114, 2048, 1.62, 128),
    "h200:H200-SXM-141GB": (132, 2048, 1.83, 128),
    "b200:B200-SXM-180GB": (148, 4096, 1.856, 128),
    "mi300x:MI300X": (8 * 38, 1024, 2.1, 128),
    "mi210:MI210": (104, 512, 1.7, 64),
}

#: Device -> stacks of memory, Gbit/s of each of their 1024 pins, GB in a stack.
STACKS = {
    "a100:A100-SXM4-80GB": (5, 3.186, 16),
    "a100:A100-SXM4-40GB": (5, 2.43, 8),
    "a100:A100-PCIe-80GB": (5, 3.024, 16),
    "a100:A100-PCIe-40GB": (5, 2.43, 8),
    "a100:A100-80GB": (5, 3.186, 16),
    "h100:H100-SXM5-80GB": (5, 5.238, 16),
    "h100:H100-PCIe": (5, 3.186, 16),
    "h200:H200-SXM-141GB": (6, 6.25, 24),
    "b200:B200-SXM-180GB": (8, 7.8, 24),
    "mi300x:MI300X": (8, 5.2, 24),
    "mi210:MI210": (4, 3.2, 16),
}


def gpus() -> list[str]:
    """Every variant of every GPU, as ``chip:variant``."""
    chips = [name for name in chip_names() if load_chip(name).kind == "gpu"]
    return [f"{name}:{variant}" for name in chips for variant in read_chip_file(name).variants]


def numbers(chip: Chip) -> dict[str, str]:
    """Every number of a chip file as written, by dotted path."""
    return {path: place.text for path, place in chip.provenance.items()}


def changed(chip: str, variant: str) -> set[str]:
    """Paths whose numbers a variant changes."""
    usual, varied = numbers(load_chip(chip)), numbers(load_chip(chip, variant=variant))
    assert usual.keys() == varied.keys()
    return {path for path in usual if usual[path] != varied[path]}


def test_every_gpu_is_in_the_tables() -> None:
    assert set(STACKS) == set(gpus())
    assert {device.partition(":")[0] for device in CORES} == {device.partition(":")[0] for device in gpus()}


@pytest.mark.parametrize("device", CORES)
def test_rates_are_cores_times_width_times_clock(device: str) -> None:
    cores, multiply_adds, ghz, lanes = CORES[device]
    chip = load_chip(device)
    matrix, vector, special = (chip.unit(kind) for kind in ("matrix", "vector", "special"))
    assert chip.cores == cores
    for dtype in ("bf16", "fp16"):
        assert matrix.peak_per_s[dtype] == pytest.approx(2 * cores * multiply_adds * ghz * 1e9, rel=ROUNDED)
        assert matrix.count * matrix.ops_per_cycle[dtype] == multiply_adds
    assert vector.peak_per_s["fp32"] == pytest.approx(cores * lanes * ghz * 1e9, rel=0.01)
    assert special.peak_per_s["fp32"] == pytest.approx(cores * 16 * ghz * 1e9, rel=0.02)
    # a core of either vendor moves 128 bytes a clock from and to its scratchpad
    assert chip.core_memory is not None
    assert chip.core_memory.read_bytes_per_s == pytest.approx(cores * 128 * ghz * 1e9, rel=0.01)


@pytest.mark.parametrize("device", gpus())
def test_half_the_bits_give_twice_the_rate_but_for_old_matrix_cores(device: str) -> None:
    chip = load_chip(device)
    peak = chip.unit("matrix").peak_per_s
    ladder = [dtype for dtype in ("tf32", "bf16", "fp8", "fp4") if dtype in peak]
    for wide, narrow in pairwise(ladder):
        assert peak[narrow] == pytest.approx(2 * peak[wide], rel=0.01)
    assert peak["int8"] == pytest.approx((1 if chip.name == "mi210" else 2) * peak["bf16"], rel=0.01)
    assert ("fp8" in peak) == (chip.name not in ("a100", "mi210"))
    assert ("fp4" in peak) == (chip.name == "b200")
    assert ("fp32" in peak) == (chip.vendor == "AMD")  # tensor cores take fp32 operands as tf32 only


@pytest.mark.parametrize("device", STACKS)
def test_memory_is_stacks_times_pins(device: str) -> None:
    stacks, gbit_per_s, gb = STACKS[device]
    memory = load_chip(device).main_memory
    # the PCIe H100 is listed with 2 TB/s, two per cent below what its pins give
    assert memory.read_bytes_per_s == pytest.approx(stacks * 1024 / 8 * gbit_per_s * 1e9, rel=0.025)
    assert memory.channels * (memory.channel_bytes_per_s or 0) == pytest.approx(memory.read_bytes_per_s, rel=0.01)
    assert memory.channels % stacks == 0
    assert 0.93 * stacks * gb * 1e9 <= memory.capacity_bytes <= stacks * gb * 1e9  # some of a stack may be set aside


@pytest.mark.parametrize("name", sorted({device.partition(":")[0] for device in STACKS}))
def test_the_matrix_units_at_their_peak_draw_the_rest_of_the_power(name: str) -> None:
    chip = load_chip(name)
    unit = chip.unit("matrix")
    for dtype in unit.peak_per_s:
        drawn = chip.power.idle_w + unit.peak_per_s[dtype] * unit.energy_j_per_op[dtype]
        assert drawn == pytest.approx(chip.power.limit_w, rel=0.01)


@pytest.mark.parametrize("device", gpus())
def test_sustained_is_below_peak_and_attention_not_above_a_plain_product(device: str) -> None:
    chip = load_chip(device)
    unit = chip.unit("matrix")
    # 0.33 is measured: block-scaled fp8 products of the MI300X.
    assert all(0.3 < unit.efficiency[dtype] < 1 for dtype in unit.peak_per_s)
    assert chip.mapping.attention_efficiency <= unit.efficiency["bf16"]
    assert 0.75 <= chip.main_memory.achievable_frac <= 0.95


@pytest.mark.parametrize("device", gpus())
def test_levels_get_smaller_and_faster_inwards(device: str) -> None:
    chip = load_chip(device)
    outer, cache, inner = chip.memories
    assert (chip.main_memory, chip.cache, chip.core_memory) == (outer, cache, inner)
    assert outer.capacity_bytes > 100 * cache.capacity_bytes > 100 * inner.capacity_bytes
    sustained = [level.read_bytes_per_s * level.achievable_frac for level in chip.memories]
    assert sustained == sorted(sustained)
    assert outer.latency_s > cache.latency_s
    # 128 x 128 tiles in 16 bit, two steps of 64: 2 x 256 x 64 x 2 bytes = 64 KiB
    assert inner.capacity_bytes >= 64 * 1024
    assert (128, 128) in chip.unit("matrix").tiles


def test_the_last_cache_of_the_mi300x() -> None:
    cache = load_chip("mi300x").cache
    assert cache is not None
    assert cache.capacity_bytes == 128 * 2 * 1024**2  # 128 slices of 2 MiB
    assert cache.read_bytes_per_s == pytest.approx(128 * 64 * 2.1e9, rel=0.01)  # 64 bytes a clock from each


def test_the_h200_is_an_h100_with_another_memory() -> None:
    h100, h200 = load_chip("h100"), load_chip("h200")
    for unit, other in zip(h100.units, h200.units, strict=True):
        same = {"efficiency": unit.efficiency, "energy_j_per_op": unit.energy_j_per_op}
        assert dataclasses.replace(other, **same) == unit  # type: ignore[arg-type]
    assert h200.memories[1:] == h100.memories[1:]
    assert (h200.cores, h200.clock_hz, h200.mapping) == (h100.cores, h100.clock_hz, h100.mapping)
    assert h200.power.limit_w == h100.power.limit_w
    assert h200.main_memory.read_bytes_per_s == pytest.approx(4.8 / 3.35 * h100.main_memory.read_bytes_per_s)


def test_a100_variants_differ_where_the_products_do() -> None:
    rate = {"memories.hbm.read_bandwidth", "memories.hbm.channel_rate"}
    efficiency = {f"compute.tensor_core.efficiency.{dtype}" for dtype in ("tf32", "bf16", "fp16", "int8")}
    power = {"power.limit", "power.idle"}
    assert changed("a100", "A100-SXM4-80GB") == set()
    assert changed("a100", "A100-SXM4-40GB") == {*rate, "memories.hbm.capacity"}
    assert changed("a100", "A100-PCIe-80GB") == rate | efficiency | power
    assert changed("a100", "A100-PCIe-40GB") == {*rate, *efficiency, *power, "memories.hbm.capacity"}
    assert changed("a100", "A100-80GB") == set()  # the SXM part, held less certain
    for path in ("memories.hbm.read_bandwidth", "power.limit"):
        assert load_chip("a100").provenance[path].certainty == "high"
        assert load_chip("a100:A100-80GB").provenance[path].certainty == "medium"
    limits = [load_chip("a100", variant=variant).power.limit_w for variant in read_chip_file("a100").variants]
    assert limits == [400, 400, 300, 250, 400]


def test_a_number_from_memory_is_never_of_high_certainty() -> None:
    for device in gpus():
        for path, place in load_chip(device).provenance.items():
            if re.search(r"from memory|assumption of this project", f"{place.note} {place.source}"):
                assert place.certainty != "high", (device, path)


def test_documentation_lists_every_chip_and_variant() -> None:
    listed = table("docs/chip_files.md", "Built-in chips", "Chip")
    assert names(listed) == chip_names()
    for cells in listed.rows:
        variants = re.findall(r"`([^`]+)`", cells[2])
        for name in re.findall(r"`([^`]+)`", cells[0]):
            assert list(read_chip_file(name).variants) == variants


#: Chip -> arrays of the whole chip, cells along each side, clock in GHz, GiB and GB/s of main memory, factor of 8 bits.
ARRAYS = {
    "tpu_v5e": (4, 128, 1.5, 16, 819, ("int8", 2)),
    "tpu_v5p": (8, 128, 1.75, 95, 2765, ("int8", 2)),
    "tpu_v6e": (4, 256, 1.75, 32, 1640, ("int8", 2)),
    "tpu_v7": (8, 256, 2.2, 192, 7380, ("fp8", 2)),
    "trainium2": (8, 128, 2.4, 96, 2900, ("fp8", 2)),
    "inferentia2": (2, 128, 2.8, 32, 820, ("fp8", 1)),
}


def systolic() -> list[str]:
    chips = [load_chip(name) for name in chip_names()]
    return [chip.name for chip in chips if chip.execution == "systolic" and chip.kind != "example"]


def test_every_systolic_chip_is_in_the_table() -> None:
    assert set(ARRAYS) == set(systolic())


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_cells_times_clock(name: str) -> None:
    count, side, ghz, gib, gb_per_s, (narrow, factor) = ARRAYS[name]
    chip = load_chip(name)
    unit, memory = chip.unit("matrix"), chip.main_memory
    assert (chip.cores * unit.count, unit.rows, unit.cols, unit.dataflow) == (count, side, side, "weight_stationary")
    assert unit.peak_per_s["bf16"] == pytest.approx(2 * count * side * side * ghz * 1e9, rel=ROUNDED)
    assert unit.peak_per_s[narrow] == pytest.approx(factor * unit.peak_per_s["bf16"], rel=0.01)
    # filled and drained by one wave, loaded no slower than a row of cells a cycle, hidden behind the pass before
    assert unit.startup_cycles == 2 * side
    assert unit.issue_cycles < side
    assert unit.load_cycles <= side
    assert unit.double_buffer
    assert memory.capacity_bytes == gib * 2**30
    assert memory.read_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.01)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_scratchpad_feeds_its_arrays(name: str) -> None:
    # Each array takes a row of 16-bit elements a cycle and stores one of its columns: the scratchpad must give more.
    count, side, ghz, *_ = ARRAYS[name]
    chip = load_chip(name)
    main, scratchpad = chip.memories
    assert chip.cache == scratchpad
    assert chip.core_memory is None
    assert scratchpad.read_bytes_per_s > count * side * 2 * 2 * ghz * 1e9
    assert scratchpad.read_bytes_per_s > 5 * main.read_bytes_per_s
    assert 40 * 2**20 < scratchpad.capacity_bytes < 256 * 2**20


@pytest.mark.parametrize("name", ARRAYS)
def test_the_arrays_at_their_peak_draw_the_rest_of_the_power(name: str) -> None:
    chip = load_chip(name)
    unit = chip.unit("matrix")
    for dtype in unit.peak_per_s:
        drawn = chip.power.idle_w + unit.peak_per_s[dtype] * unit.energy_j_per_op[dtype]
        assert drawn == pytest.approx(chip.power.limit_w, rel=0.01)
    for path in ("power.limit", "power.idle"):  # not published for any of them
        assert chip.provenance[path].certainty == "low"


def test_engines_of_neuron_cores() -> None:
    # elements per cycle and GHz of the vector and the scalar engine of each core
    for name, (cores, vector, scalar) in {
        "trainium2": (8, (256, 0.96), (128, 1.2)),
        "inferentia2": (2, (128, 1.12), (128, 1.4)),
    }.items():
        chip = load_chip(name)
        for kind, (width, ghz) in (("vector", vector), ("special", scalar)):
            assert chip.unit(kind).peak_per_s["fp32"] == pytest.approx(cores * width * ghz * 1e9, rel=0.01)  # type: ignore[arg-type]
        assert chip.main_memory.transfer_engines == 16
        assert chip.cycles(chip.main_memory.transfer_start_s) == round(1.3e3 * chip.clock_hz / 1e9)
        assert not chip.writability.transposed_read


def test_matrix_engines_of_gaudi3_hold_their_results() -> None:
    chip = load_chip("gaudi3")
    unit = chip.unit("matrix")
    assert (chip.execution, unit.dataflow, chip.cores * unit.count) == ("tile_wave", "output_stationary", 8)
    assert unit.peak_per_s["bf16"] == pytest.approx(2 * 8 * 256 * 256 * 1.6e9, rel=0.001)
    assert unit.peak_per_s["bf16"] * unit.efficiency["bf16"] == pytest.approx(1243e12, rel=0.001)
    assert chip.unit("vector").peak_per_s["fp32"] == pytest.approx(64 * 64 * 1.6e9, rel=0.001)
    assert chip.main_memory.capacity_bytes == 128e9


def test_numbers_from_memory_are_never_of_high_certainty_on_accelerators() -> None:
    for name in [*ARRAYS, "gaudi3"]:
        for path, place in load_chip(name).provenance.items():
            if re.search(r"from memory|assumption of this project", f"{place.note} {place.source}"):
                assert place.certainty != "high", (name, path)
