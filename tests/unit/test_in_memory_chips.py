"""Chip files of in-memory, PIM and neuromorphic chips and of the hypothetical one, against published totals by hand."""

from __future__ import annotations

import pytest

import ttt_sim
from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.lower.in_memory import product
from ttt_sim.model_config import load_ttt

IN_MEMORY = ("gddr6_aim", "hbm_pim", "hermes_pcm", "loihi2", "reram_cim", "sram_cim")
RETICLE_MM2 = 26 * 33


def seconds(chip: Chip, *, m: int, n: int, k: int) -> float:
    """Of the arrays alone."""
    return product(chip, m=m, n=n, k=k, batch=1, dtype=chip.default_dtype).matrix_cycles / chip.clock_hz


def area_mm2(chip: Chip) -> float:
    """Sum over units and on-chip memories; the rest of the die is ``area_overhead`` of it."""
    units = sum((unit.area_mm2 or 0.0) * unit.count * chip.cores for unit in chip.units)
    memories = sum(
        level.capacity_bytes * (chip.cores if level.scope == "core" else 1) / level.density_bytes_per_mm2
        for level in chip.memories
        if level.density_bytes_per_mm2
    )
    return (units + memories) / (1 - chip.area_overhead)


@pytest.mark.parametrize(("name", "inside_bytes_per_s"), [("hbm_pim", 4.92e12), ("gddr6_aim", 16.4e12)])
def test_units_at_banks_read_weights_at_the_bandwidth_inside(name: str, inside_bytes_per_s: float) -> None:
    chip = load_chip(name)
    unit = chip.unit("matrix")
    sustained = inside_bytes_per_s * unit.efficiency[chip.default_dtype]
    weights = 4096 * 4096 * 2
    assert seconds(chip, m=1, n=4096, k=4096) == pytest.approx(weights / sustained, rel=2e-3)
    assert seconds(chip, m=8, n=4096, k=4096) == pytest.approx(8 * weights / sustained, rel=2e-3)  # no reuse
    assert inside_bytes_per_s > 3.9 * chip.main_memory.read_bytes_per_s  # what the bus outside gives


def test_rows_and_refresh_cost_what_dram_timings_say() -> None:
    # HBM2: 32 bursts of 1/300 MHz, tRP 14 + tRCD 14, tRFC 350 of every 3900; GDDR6 in cycles of 0.57 ns
    bursts = 32 / 0.3
    hbm = bursts / (bursts + 28) * (1 - 350 / 3900)
    gddr6 = 64 / (64 + 52 * 0.57) * (1 - 210 / 3333)
    assert load_chip("hbm_pim").unit("matrix").efficiency["fp16"] == pytest.approx(hbm, abs=0.015)
    assert load_chip("gddr6_aim").unit("matrix").efficiency["bf16"] == pytest.approx(gddr6, abs=0.005)


@pytest.mark.parametrize(("variant", "top_per_s", "top_per_s_w"), [(None, 63.1, 9.76), ("HERMES-4-phase", 16.1, 2.48)])
def test_hermes_reaches_its_published_rate_and_efficiency(
    variant: str | None, top_per_s: float, top_per_s_w: float
) -> None:
    chip = load_chip("hermes_pcm", variant=variant)
    full = seconds(chip, m=1000, n=64 * 256, k=256)  # a matrix that fills all 64 arrays
    assert 1000 * 2 * 64 * 256 * 256 / full == pytest.approx(top_per_s * 1e12, rel=2e-3)
    power_w = chip.power.idle_w + chip.unit("matrix").peak_per_s["int8"] * chip.unit("matrix").energy_j_per_op["int8"]
    assert top_per_s / power_w == pytest.approx(top_per_s_w, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "cells_at_once", "bytes_per_cell", "pulse_ns", "pulses"),
    [
        ("hermes_pcm", 64, 1 / 4, 100 + 133, 20),
        ("hermes_pcm:HERMES-parallel-writes", 64 * 256, 1 / 4, 100 + 133, 20),
        ("reram_cim", 128 * 32, 1 / 8, 50 + 14.4, 8.52),
    ],
)
def test_programming_a_whole_chip(
    name: str, cells_at_once: int, bytes_per_cell: float, pulse_ns: float, pulses: float
) -> None:
    memory = load_chip(name).main_memory
    expected_s = memory.capacity_bytes / (cells_at_once * bytes_per_cell) * pulses * pulse_ns * 1e-9
    assert memory.capacity_bytes / memory.write_bytes_per_s == pytest.approx(expected_s, rel=5e-3)
    assert not memory.volatile


def test_capacity_is_the_cells_of_all_arrays() -> None:
    for name in ("hermes_pcm", "reram_cim", "sram_cim"):
        chip = load_chip(name)
        unit = chip.unit("matrix")
        element = 2 if chip.default_dtype == "bf16" else 1
        assert chip.main_memory.capacity_bytes == chip.cores * unit.count * unit.rows * unit.cols * element


def test_macros_are_as_dense_as_published() -> None:
    reram, sram = load_chip("reram_cim"), load_chip("sram_cim")
    reram_mm2 = reram.main_memory.capacity_bytes * 8 / 4.84e6
    assert reram.unit("matrix").peak_per_s["int8"] == pytest.approx(reram_mm2 * 126.7e12 / 64, rel=0.01)
    sram_mm2 = sram.main_memory.capacity_bytes * 8 / 617e3
    assert sram.unit("matrix").peak_per_s["bf16"] == pytest.approx(sram_mm2 * 0.754e12, rel=0.01)
    for chip, mm2 in ((reram, reram_mm2), (sram, sram_mm2)):
        assert chip.die_area_mm2 is not None
        assert mm2 < 0.6 * chip.die_area_mm2


def test_loihi_is_a_stated_factor_faster_than_its_predecessor() -> None:
    chip = load_chip("loihi2")
    # 128 cores, 3.8 ns for a synaptic operation of Loihi 1, 3.8 times as fast
    assert seconds(chip, m=1, n=1024, k=1024) == pytest.approx(1024 * 1024 / 128 * 1e-9, rel=1e-3)
    upper = load_chip("loihi2", variant="Loihi2-10x")
    assert seconds(upper, m=1, n=1024, k=1024) >= 1024 * 1024 / 128 * 3.8e-10 * 0.98
    # 120 million 8-bit synapses of six transistors would exceed the 2.3 billion transistors of the chip
    assert 120e6 * 8 * 6 > 2.3e9 > chip.main_memory.capacity_bytes * 8 * 6


def test_the_hypothetical_chip_fits_a_reticle_and_its_power() -> None:
    chip = load_chip("ideal_ttt")
    h100 = load_chip("h100")
    assert chip.die_area_mm2 is not None
    assert h100.die_area_mm2 is not None
    assert area_mm2(chip) == pytest.approx(chip.die_area_mm2, rel=0.01)
    assert chip.die_area_mm2 < RETICLE_MM2
    per_mm2 = chip.unit("matrix").peak_per_s["bf16"] / chip.die_area_mm2
    assert per_mm2 < h100.unit("matrix").peak_per_s["bf16"] / h100.die_area_mm2
    rules = chip.writability
    assert rules.overlap
    assert rules.shadow_bank
    assert rules.transposed_read
    assert rules.accumulate


def test_the_hypothetical_chip_holds_the_fast_weights_of_two_users() -> None:
    resident = load_ttt("default", weight_write="resident")
    fits = [
        ttt_sim.simulate("ideal_ttt", "Qwen3-4B", "ttt_window", context="8k", batch=batch, ttt=resident).record["fits"]
        for batch in (1, 2, 3)
    ]
    assert fits == [True, True, False]  # 285 MiB each, 0.9 of 768 MiB


@pytest.mark.parametrize("name", [*IN_MEMORY, "ideal_ttt"])
@pytest.mark.parametrize("method", ["kv", "kv_window", "ttt", "ttt_window"])
def test_every_method_runs_on_every_chip(name: str, method: str) -> None:
    for phase in ("prefill", "decode"):
        record = ttt_sim.simulate(name, "toy", method, phase=phase, context=160, window=64, ttt="toy").record
        assert (record["fits"], record["missing"]) == (True, "")


@pytest.mark.parametrize("name", ["hermes_pcm", "loihi2", "sram_cim"])
def test_a_model_that_does_not_fit_says_how_many_chips_it_needs(name: str) -> None:
    record = ttt_sim.simulate(name, "Qwen3-4B", "kv", phase="decode", context="8k").record
    weights = 4.02e9 * (2 if load_chip(name).default_dtype == "bf16" else 1)
    assert record["fits"] is False
    assert record["seconds"] is None
    needed = record["chips_needed"]
    assert isinstance(needed, int)
    assert weights < needed * load_chip(name).main_memory.capacity_bytes < 1.3 * weights
