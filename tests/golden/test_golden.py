"""Cycle counts stay what they are until someone means to change them."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from tests.golden import record
from tests.golden.cases import cases
from tests.golden.record import (
    CYCLE_COLUMNS,
    KERNEL_COLUMNS,
    REMEDY,
    Measured,
    difference,
    layer_numbers,
    layer_ranges,
    measure,
    program_sha256,
    read_golden,
    trace_sha256,
    write_golden,
)
from ttt_sim import build_trace, load_chip, load_model, make_point
from ttt_sim.data_files import names
from ttt_sim.lower import MAPPERS, lower
from ttt_sim.model import Scenario
from ttt_sim.simulation import simulate_point

CASES = cases()
GOLDEN = read_golden()

#: Simulated again in SimPy: the small ones that exercise every method, phase and chip, and a real model once per phase.
IN_SIMPY = [
    name
    for name, point in CASES.items()
    if (point.model.name == "toy" and point.context_tokens == 150 and point.batch == 2)
    or name in ("h100 Qwen3-4B ttt_window prefill 4096 b1", "h100 Qwen3-4B ttt_window decode 4096 b1")
]


def test_golden_files_hold_the_cases_and_no_others() -> None:
    assert list(GOLDEN) == list(CASES), REMEDY


@pytest.mark.parametrize("name", CASES)
def test_cycles_are_the_golden_ones(name: str) -> None:
    if name not in GOLDEN:
        pytest.fail(f"{name}: is in no golden file. {REMEDY}")
    moved = difference(GOLDEN[name], measure(name, CASES[name]))
    if moved:
        pytest.fail(f"{name}: golden -> now\n{moved}\n{REMEDY}", pytrace=False)


@pytest.mark.parametrize("name", IN_SIMPY)
def test_simpy_gives_the_golden_cycles(name: str) -> None:
    outcome = simulate_point(replace(CASES[name], engine="simpy"))
    assert outcome.result is not None
    assert str(outcome.record["cycles"]) == GOLDEN[name].row["cycles"]
    assert str(outcome.result.cycles) == GOLDEN[name].row["simulated_cycles"]


def test_every_chip_that_can_be_simulated_has_cases() -> None:
    able = {chip for chip in names("hw_configs", ".yaml") if load_chip(chip).execution in MAPPERS}
    assert {point.chip.name for point in CASES.values() if point.model.name == "toy"} == able


# --- do the golden files notice what they are there for? --------------------------------------------------------------


@pytest.fixture(scope="module")
def one() -> tuple[str, Measured]:
    name = "tiny_gpu toy ttt_window prefill 150 b1"
    return name, measure(name, CASES[name])


def test_kernel_advances_add_up_to_the_simulated_cycles(one: tuple[str, Measured]) -> None:
    _, now = one
    advance = KERNEL_COLUMNS.index("advance")
    assert sum(values[advance] for values in now.kernels.values()) == int(now.row["simulated_cycles"])


def test_a_slower_memory_is_reported_by_kernel_layer_and_level() -> None:
    name = "tiny_gpu toy ttt_window prefill 150 b1"
    slow = load_chip("tiny_gpu", overrides={"memories.hbm.read_bandwidth": "32 GB/s"})
    text = difference(measure(name, CASES[name]), measure(name, replace(CASES[name], chip=slow)))
    lines = text.splitlines()
    assert lines[0].startswith("cycles: ")
    assert any(line.startswith("program_sha256: ") for line in lines)
    assert any(line.startswith("hbm busy: ") for line in lines)
    assert not any("trace_sha256" in line for line in lines)  # the workload is the same
    kernels = [line for line in lines if line.startswith("layer ")]
    assert "layer 0 2, attention: " in "\n".join(kernels)  # the TTT layers, whose kernels moved alike
    # Reads and writes share the bus of this memory; no other level got slower.
    moved = {part.split()[0] for line in kernels for part in line.partition(": ")[2].split(", ")}
    assert moved == {"advance", "read", "write"}


def test_a_longer_chunk_is_reported_as_a_change_of_the_trace() -> None:
    name = "tiny_gpu toy ttt_window prefill 320 b1"
    point = CASES[name]
    other = make_point(
        "tiny_gpu", "toy", "ttt_window", phase="prefill", context=320, window=64, ttt="toy", chunk=64, call_tokens=64
    )
    text = difference(measure(name, point), measure(name, other))
    assert "trace_sha256: " in text
    # toy updates layers 0 and 2, so the update kernels of both moved alike
    assert any(line.startswith("layer 0 2, ") and "delta" in line for line in text.splitlines())


def test_no_difference_from_itself(one: tuple[str, Measured]) -> None:
    assert difference(one[1], one[1]) == ""


def test_difference_names_new_and_gone_kernels_and_counts_what_it_leaves_out() -> None:
    row = dict.fromkeys(CYCLE_COLUMNS, "1") | {"busy_cycles": "hbm:5;l2:7"}
    zeros = (0,) * len(KERNEL_COLUMNS)
    before = Measured(row=row, kernels={("q_proj", layer): zeros for layer in range(4)})
    after = Measured(
        row=row | {"busy_cycles": "hbm:5;l2:8"},
        kernels={("q_proj", 1): zeros, ("o_proj", 1): zeros, **{(f"k{i}", 0): zeros for i in range(9)}},
    )
    lines = difference(before, after).splitlines()
    assert lines[0] == "l2 busy: 7 -> 8"
    assert lines[1] == "layer 0, k0: is new"
    assert lines[-1] == "and 3 more kernels"  # 9 new k's, q_proj gone, o_proj new: 11, of which 8 are listed
    assert len(lines) == 1 + 8 + 1


@pytest.mark.parametrize(
    ("layers", "text"),
    [([0, 2, 3, 4], "0 2-4"), ([-1], "-"), ([-1, 0, 1], "- 0-1"), ([5], "5"), ([3, 1, 2, 9, 10], "1-3 9-10")],
)
def test_layer_ranges_read_back(layers: list[int], text: str) -> None:
    assert layer_ranges(layers) == text
    assert layer_numbers(text) == sorted(layers)


def test_files_read_back(tmp_path, monkeypatch, one: tuple[str, Measured]) -> None:
    monkeypatch.setattr(record, "CYCLES_FILE", tmp_path / "cycles.csv")
    monkeypatch.setattr(record, "KERNELS_FILE", tmp_path / "kernels.csv")
    name, now = one
    write_golden({name: now})
    assert read_golden() == {name: now}


def test_hashes_depend_on_every_column() -> None:
    """Changing one number anywhere in a trace or a program changes its hash."""
    model, point = load_model("toy"), CASES["tiny_gpu toy ttt prefill 150 b1"]
    trace = build_trace(model, point.method, Scenario.prefill(40))
    program = lower(trace, point.chip).program
    sources: tuple[tuple[Any, Callable[[Any], str]], ...] = ((trace, trace_sha256), (program, program_sha256))
    for source, digest in sources:
        columns = [field.name for field in fields(source) if isinstance(getattr(source, field.name), np.ndarray)]
        assert len(columns) >= 14
        hashes = {digest(source)}
        for name in columns:
            changed = (
                np.append(getattr(source, name), 1) if not getattr(source, name).size else getattr(source, name) + 1
            )
            hashes.add(digest(replace(source, **{name: changed})))
        assert len(hashes) == 1 + len(columns)


def test_case_names_say_what_is_simulated() -> None:
    for name, point in CASES.items():
        chip, model, method, phase, context, batch = name.split()[:6]
        assert (chip, model, method, phase) == (point.chip.name, point.model.name, point.method.name, point.phase)
        assert (int(context), batch) == (point.context_tokens, f"b{point.batch}")
