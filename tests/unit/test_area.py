"""Silicon area from the parts, by hand, on the tiny GPU: 4 cores, 16 lanes and 4 special units in each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.lower_tools import chip
from ttt_sim.area import area_estimate
from ttt_sim.chip import Chip
from ttt_sim.lint import RETICLE_MM2, Finding, lint_chip
from ttt_sim.show import describe

#: 4 x 10 + 64 x 0.5 + 16 x 1 = 88 mm2 of units; 1 MiB and 4 x 64 KiB at 64 KiB per mm2: 16 and 4 mm2. In all 108 mm2 of
#: 0.75 of the die: 144 mm2. The DRAM is another die.
PARTS = {"tensor_core": 40.0, "lanes": 32.0, "sfu": 16.0, "l2": 16.0, "scratchpad": 4.0}


def sized(*, die: float | None = None, scale: float = 1.0, kind: str = "hypothetical", **areas: float | None) -> Chip:
    tiny = chip()
    area = {"tensor_core": 10.0 * scale, "lanes": 0.5 * scale, "sfu": 1.0 * scale, **areas}
    units = tuple(replace(unit, area_mm2=area[unit.name]) for unit in tiny.units)
    dense = {"l2": 65536.0 / scale, "scratchpad": 65536.0 / scale}
    memories = tuple(
        replace(level, density_bytes_per_mm2=dense.get(level.name) if areas.get(level.name, 1) else None)
        for level in tiny.memories
    )
    return replace(tiny, kind=kind, units=units, memories=memories, area_overhead=0.25, die_area_mm2=die)


def about_area(found: Chip) -> list[Finding]:
    return [f for f in lint_chip(found) if "mm2" in f.message or "area" in f.message]


def test_parts_add_up_over_what_is_left_of_the_die():
    estimate = area_estimate(sized())
    assert estimate.parts == PARTS
    assert estimate.missing == ()
    assert estimate.total_mm2 == pytest.approx(144)


def test_a_unit_of_the_whole_chip_is_there_once():
    one = sized()
    units = (replace(one.units[0], count=0), *one.units[1:])
    assert area_estimate(replace(one, units=units)).parts["tensor_core"] == 10


def test_dram_with_a_density_is_on_the_die():
    one = sized()
    dram = replace(one.memories[0], density_bytes_per_mm2=2.0**20)
    found = area_estimate(replace(one, memories=(dram, *one.memories[1:])))
    assert found.parts["hbm"] == 1024
    assert found.total_mm2 == pytest.approx((108 + 1024) / 0.75)


def test_no_estimate_without_every_part():
    estimate = area_estimate(sized(lanes=None, l2=0.0))
    assert estimate.missing == ("compute.lanes.area", "memories.l2.density")
    assert estimate.total_mm2 is None
    assert set(estimate.parts) == {"tensor_core", "sfu", "scratchpad"}


def test_show_prints_the_split():
    lines = [line.split() for line in describe(sized()).splitlines()]
    for name, area in PARTS.items():
        assert [name, f"{area:g}"] in lines
    assert ["other", "(25%)", "36"] in lines
    assert ["total", "144"] in lines
    assert "no total, missing: compute.lanes.area" in describe(sized(lanes=None))
    assert "Area estimate" not in describe(chip())


def test_the_estimate_fits_the_die():
    # 144 mm2 is 5.9 % more than 136, 6.7 % more than 135
    assert about_area(sized(die=136.0)) == []
    (finding,) = about_area(sized(die=135.0))
    assert (finding.severity, finding.path) == ("error", "die_area")
    assert (
        "tensor_core 40 + lanes 32 + sfu 16 + l2 16 + scratchpad 4, over 0.75 of the die, is 144 mm2" in finding.message
    )
    assert "more than the 135 mm2 that are stated" in finding.message


def test_more_than_a_reticle_is_not_one_die():
    assert RETICLE_MM2 == 858
    # six times 144 are 864 mm2
    (finding,) = about_area(sized(scale=6.0))
    assert finding.severity == "warning"
    assert "864 mm2, more than a reticle of 26 x 33 mm (858 mm2)" in finding.message
    assert [f for f in about_area(sized(scale=6.0, kind="wafer_scale")) if "reticle" in f.message] == []
    assert about_area(sized(scale=5.9)) == []


def test_a_design_without_areas_is_told_so():
    (finding,) = [f for f in about_area(sized(sfu=None)) if f.path == "compute"]
    assert (finding.severity, finding.path) == ("note", "compute")
    assert "missing: compute.sfu.area" in finding.message
    assert [f for f in about_area(sized(sfu=None, kind="gpu")) if f.path == "compute"] == []
