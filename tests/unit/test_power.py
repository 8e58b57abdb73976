"""Where energy goes, and what a power limit does to time: worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lower_tools import HandTrace, chip
from ttt_sim.bounds import check
from ttt_sim.chip import Chip, Link
from ttt_sim.errors import ConfigError, ConservationError
from ttt_sim.experiment import _sensitivity, _steps_around_boundary
from ttt_sim.grid import make_point
from ttt_sim.lower.work import LINK
from ttt_sim.ops import Phase, Role, Trace
from ttt_sim.power import throttled_seconds
from ttt_sim.simulation import PointResult, simulate_point, simulate_trace

#: 10 GB/s and 10 pJ per byte; the host's link, listed first, carries no sums.
LINKS = (
    Link(name="pcie", topology="host", bytes_per_s=64e9, latency_s=0.0, energy_j_per_byte=1.0),
    Link(name="ring", topology="ring", bytes_per_s=10e9, latency_s=0.0, energy_j_per_byte=10e-12),
)


def linked() -> Chip:
    return replace(chip(), links=LINKS)


def sum_trace(nbytes: int, ranks: int) -> Trace:
    t = HandTrace()
    t.weight("x", nbytes)
    t.tensor("y", nbytes)
    t.op("allreduce", m=nbytes // 2, n=1, heads=ranks, reads=[("x", 0, nbytes)], writes=[("y", 0, nbytes)])
    return t.build()


# 2 (n - 1) parts of 1 / n of the operand, rounded up
@pytest.mark.parametrize(("nbytes", "ranks", "sent"), [(1 << 20, 4, 1572864), (100, 3, 134), (4096, 2, 4096)])
def test_links_carry_bytes_and_take_energy(nbytes, ranks, sent, engine):
    result = simulate_trace(linked(), sum_trace(nbytes, ranks), engine=engine)
    assert result.lowered.work.link_bytes.tolist() == [[0, sent]]
    assert result.dynamic_energy_j()["ring"].tolist() == pytest.approx([sent * 10e-12])
    units = result.units().set_index("unit")
    assert units["moved_bytes"]["link"] == sent
    # bytes and lanes beside it: main memory reads and writes the operand once, cache and scratchpads both
    rest = 2 * nbytes * (32 + 2 + 1) * 1e-12
    assert result.ops()["energy_j"].sum() == pytest.approx(sent * 10e-12 + rest)
    assert sum(float(v.sum()) for v in result.dynamic_energy_j().values()) == pytest.approx(sent * 10e-12 + rest)


def test_a_byte_lost_on_a_link_is_noticed(engine):
    result = simulate_trace(linked(), sum_trace(4096, 2), engine=engine)
    program = result.lowered.program
    nbytes = program.nbytes.copy()
    nbytes[np.flatnonzero(program.unit == program.unit_names.index("link"))[0]] -= 1
    broken = replace(result.lowered, program=replace(program, nbytes=nbytes))
    with pytest.raises(ConservationError, match=r"bytes sent over links: 4095 in the program, 4096 in the trace"):
        check(result.trace, result.chip, broken, result.timeline)
    assert result.lowered.work.cycles[0, LINK] > 0


@pytest.mark.parametrize(("granularity", "uploaded"), [("word", 65536), ("device", 2 * 65536)])
def test_a_reupload_crosses_the_link_to_the_host(granularity, uploaded, engine):
    # A fast weight of 64 KiB, and with it all weights on the device: the delta counts as one here.
    t = HandTrace()
    t.weight("delta", 65536)
    t.tensor("w", 65536, Role.FAST_WEIGHT, exists=True)
    t.op(
        "weight_write", m=64, n=512, phase=Phase.WEIGHT_WRITE, reads=[("delta", 0, 65536), ("w", 0, 65536)],
        writes=[("w", 1, 65536)],
    )  # fmt: skip
    rules = replace(chip().writability, mode="reupload", granularity=granularity, reupload_bytes_per_s=32e9)
    result = simulate_trace(replace(linked(), writability=rules), t.build(), engine=engine)
    assert result.lowered.work.link_bytes.tolist() == [[uploaded, 0]]
    assert result.dynamic_energy_j()["pcie"].tolist() == [uploaded * 1.0]  # 1 J per byte
    assert result.lowered.work.cycles[0, LINK] == uploaded / 32


def test_chips_without_links_have_no_energy_for_them():
    assert set(simulate_trace(chip(), sum_free()).dynamic_energy_j()) == {
        "hbm", "l2", "scratchpad", "tensor_core", "lanes", "sfu",
    }  # fmt: skip


def sum_free() -> Trace:
    t = HandTrace()
    t.weight("a", 8192)
    t.weight("b", 8192)
    t.tensor("c", 8192)
    t.op("down_proj", m=64, n=64, k=64, reads=[("a", 0, 8192), ("b", 0, 8192)], writes=[("c", 0, 8192)])
    return t.build()


def test_throttled_time_by_hand():
    hundred = chip(power__limit="100 W", power__idle="10 W")
    assert throttled_seconds(hundred, 1.0, 90.0) == 1.0  # 90 W + 10 W
    assert throttled_seconds(hundred, 1.0, 180.0) == 2.0  # 180 J at the 90 W that idling leaves
    assert throttled_seconds(hundred, 1.0, 0.0) == 1.0


def test_idle_power_leaves_room_to_work():
    with pytest.raises(ConfigError, match="100 W: must be below the limit of 100 W"):
        chip(power__idle="100 W")


def simulated(phase: str, **overrides: str) -> PointResult:
    return simulate_point(
        make_point(chip(**overrides), "toy", "ttt", phase=phase, context=96, batch=2, chunk=32)  # type: ignore[arg-type]
    )


def number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_point_at_the_limit_takes_longer(phase):
    free = simulated(phase).record
    dynamic = number(free["energy_j"]) - number(free["idle_energy_j"])
    watts = dynamic / number(free["seconds"])
    # Idle 10 W, and half of what the work would draw: it takes twice the time.
    record = simulated(phase, power__limit=f"{10 + watts / 2} W").record
    assert free["throttled"] is False
    assert free["unthrottled_seconds"] == free["seconds"]
    assert record["throttled"] is True
    assert record["power_limit_w"] == pytest.approx(10 + watts / 2)
    assert record["average_power_w"] == pytest.approx(10 + watts / 2)
    for name in ("cycles", "flops", "main_read_bytes", "update_energy_j", "update_read_bytes", "unthrottled_seconds"):
        assert record[name] == free[name], name
    longer = ["seconds", "seconds_per_token", "idle_energy_j", "cost_usd_per_million_tokens", "update_seconds"]
    longer += ["update_added_seconds"]
    if phase == "decode":
        longer += ["boundary_step_seconds", "ordinary_step_seconds"]
    for name in longer:
        assert record[name] == pytest.approx(2 * number(free[name])), name
    for name in ("tokens_per_s", "updates_per_s", "cell_writes_per_s"):
        assert record[name] == pytest.approx(number(free[name]) / 2), name
    # the interval depends on the size class of the time, so only its place around the time is sure
    assert number(record["seconds_low"]) <= number(record["seconds"]) <= number(record["seconds_high"])
    assert number(record["energy_j"]) == pytest.approx(dynamic + 10 * number(record["seconds"]))


def test_sensitivities_and_steps_are_those_of_a_throttled_chip():
    free = simulated("decode")
    watts = number(free.record["average_power_w"]) - 10
    held = simulated("decode", power__limit=f"{10 + watts / 2} W")
    assert held.result is not None
    assert held.mean_seconds(held.result) == pytest.approx(number(held.record["seconds"]))
    for row in _sensitivity(held):  # only a larger cache saves energy; nothing else makes the chip faster
        gain = number(row["gain_frac"])
        assert (gain > 0.05) if "capacity" in str(row["parameter"]) else (gain == pytest.approx(0, abs=1e-9)), row
    for slow, fast in zip(_steps_around_boundary(held), _steps_around_boundary(free), strict=True):
        assert slow["seconds"] == pytest.approx(2 * number(fast["seconds"]))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_energy_is_split_into_all_its_parts(phase):
    record = simulated(phase).record
    parts = ["hbm", "l2", "scratchpad", "tensor_core", "lanes", "sfu"]
    names = [*(f"energy_{part}_j" for part in parts), "idle_energy_j"]
    assert number(record["energy_j"]) == pytest.approx(sum(number(record[name]) for name in names))
    for name in (*names, "energy_j"):
        assert number(record[f"{name}_per_token"]) == pytest.approx(number(record[name]) / number(record["tokens"]))


def test_purchase_price_stands_beside_a_cost_that_is_not_known(tmp_path):
    record = simulated("decode").record
    assert (record["purchase_usd"], record["cost_usd_per_million_tokens"] is None) == (None, False)
    bought = replace(chip(), price=replace(chip().price, per_hour_usd=None, purchase_usd=30000.0))
    record = simulate_point(make_point(bought, "toy", "kv", context=96)).record
    assert (record["purchase_usd"], record["cost_usd_per_million_tokens"]) == (30000, None)
