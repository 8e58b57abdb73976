"""``trace`` writes a workload, ``run --trace`` replays it: the same simulation as without the file in between."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command import contents, succeed, ttt_sim
from ttt_sim import build_trace, find_method, load_chip, load_model, load_trace, load_ttt, simulate_trace
from ttt_sim.model import Scenario
from ttt_sim.ops import Trace

#: 150 tokens in calls of 64 with chunks of 32: two chunks a call, an open chunk at the end.
PREFILL = (
    "trace", "--model", "toy", "--ttt", "toy", "--method", "ttt_window", "--window", "64", "--context", "150",
    "--call", "64",
)  # fmt: skip
#: 40 steps after 150 tokens; the step at position 159 completes a chunk.
DECODE = (
    "trace", "--model", "toy", "--ttt", "toy", "--method", "ttt", "--phase", "decode", "--context", "150",
    "--steps", "40", "--batch", "2",
)  # fmt: skip


def prefill_trace() -> Trace:
    method = find_method("ttt_window").settings(64, None, load_ttt("toy"))
    return build_trace(load_model("toy"), method, Scenario.prefill(150, call_tokens=64))


def decode_trace() -> Trace:
    method = find_method("ttt").settings(None, None, load_ttt("toy"))
    return build_trace(load_model("toy"), method, Scenario.decode(range(150, 190), batch=2))


def summary(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_replayed_trace_takes_the_cycles_of_the_trace_in_memory(ending: str, tmp_path: Path) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    for arguments, trace in ((PREFILL, prefill_trace()), (DECODE, decode_trace())):
        said = succeed(*arguments, "-o", f"t.{ending}", cwd=tmp_path)
        assert said == f"t.{ending}: {trace.n_ops} ops, {len(trace.tensors)} tensors\n"
        succeed("run", "tiny_gpu", "--trace", f"t.{ending}", "--out", "replay", cwd=tmp_path)
        expected = simulate_trace(load_chip("tiny_gpu"), trace)
        found = summary(tmp_path / "replay")
        assert found["cycles"] == expected.cycles
        assert found["flops"] == int(trace.flops.sum())
        assert found["peak_memory_bytes"] == expected.peak_memory_bytes()


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with ``t.csv`` and its replay in ``replay``, and what the replay printed."""
    folder = tmp_path_factory.mktemp("replayed")
    succeed(*PREFILL, "-o", "t.csv", cwd=folder)
    return folder, succeed("run", "tiny_gpu", "--trace", "t.csv", "--out", "replay", cwd=folder)


def test_replay_writes_its_frames(replayed: tuple[Path, str]) -> None:
    folder = replayed[0] / "replay"
    assert sorted(contents(folder)) == ["memory.csv", "ops.csv", "summary.json", "units.csv"]
    found = summary(folder)
    assert found["files"] == ["memory.csv", "ops.csv", "summary.json", "units.csv"]
    trace = prefill_trace()
    with (folder / "ops.csv").open(encoding="utf-8", newline="") as file:
        ops = list(csv.DictReader(file))
    assert len(ops) == found["n_ops"] == trace.n_ops
    assert sum(int(row["flops"]) for row in ops) == int(trace.flops.sum())
    assert max(int(row["finish_cycles"]) for row in ops) == found["cycles"]
    assert sum(int(row["advance_cycles"]) for row in ops) == found["cycles"]
    with (folder / "units.csv").open(encoding="utf-8", newline="") as file:
        units = {row["unit"]: int(row["busy_cycles"]) for row in csv.DictReader(file)}
    assert found["busiest_unit"] == max(units, key=lambda unit: units[unit])
    with (folder / "memory.csv").open(encoding="utf-8", newline="") as file:
        held: dict[str, int] = {}
        for row in csv.DictReader(file):
            held[row["cycle"]] = held.get(row["cycle"], 0) + int(row["allocated_bytes"])
    assert max(held.values()) == found["peak_memory_bytes"]


def test_replay_keeps_its_provenance(replayed: tuple[Path, str]) -> None:
    provenance = summary(replayed[0] / "replay")["provenance"]
    assert isinstance(provenance, dict)
    assert provenance["command"] == "python -m ttt_sim run tiny_gpu --trace t.csv --out replay"
    assert provenance["chip_file_sha256"] == load_chip("tiny_gpu").file_sha256
    assert provenance["trace"]["method"] == "ttt_window"


def test_replay_prints_totals_kernels_units_energy_and_memory(replayed: tuple[Path, str]) -> None:
    folder, text = replayed
    found = summary(folder / "replay")
    lines = text.splitlines()
    assert lines[0] == "Trace of toy, ttt_window on Tiny GPU (example)"
    assert f"{found['cycles']:,} cycles at 1 GHz" in text
    assert f"{found['n_ops']:,} ops" in text
    assert "at the peak, of 1 GiB in hbm" in text
    assert "does not fit" not in text
    for title in ("Time by kernel", "Units", "Energy"):
        assert sum(line.startswith(title) for line in lines) == 1
    kernels = lines[next(i for i, line in enumerate(lines) if line.startswith("Time by kernel")) + 3 :]
    shown = [re.search(r"([\d,]+) +[\d.]+%", line) for line in kernels[: kernels.index("")]]
    assert sum(int(match.group(1).replace(",", "")) for match in shown if match) == found["cycles"]
    assert all(len(line) <= 100 for line in lines)


def test_replay_on_other_engine_and_without_overlap(replayed: tuple[Path, str]) -> None:
    folder, _ = replayed
    usual = summary(folder / "replay")["cycles"]
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--engine", "simpy", "--out", "simpy", cwd=folder)
    assert summary(folder / "simpy")["cycles"] == usual
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--no-overlap", "--out", "serial", cwd=folder)
    assert (
        summary(folder / "serial")["cycles"]
        == simulate_trace(load_chip("tiny_gpu"), prefill_trace(), overlap=False).cycles
    )


def test_replay_follows_overrides(replayed: tuple[Path, str]) -> None:
    """At half the clock the memory moves twice the bytes per cycle; seconds are cycles over the new clock."""
    folder, _ = replayed
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--set", "clock=500 MHz", "--out", "slow", cwd=folder)
    found = summary(folder / "slow")
    cycles, seconds = found["cycles"], found["seconds"]
    assert isinstance(cycles, int)
    assert isinstance(seconds, float)
    assert seconds == pytest.approx(cycles / 500e6, rel=1e-12)
    assert found["provenance"]["chip_overrides"] == {"clock": "500 MHz"}  # type: ignore[index]


def test_trace_that_does_not_fit_says_so(replayed: tuple[Path, str]) -> None:
    """A capacity just under the peak: two chips are needed, and the replay is still a result."""
    folder, _ = replayed
    peak = summary(folder / "replay")["peak_memory_bytes"]
    assert isinstance(peak, int)
    small = f"memories.hbm.capacity={peak - 1} B"
    text = succeed("run", "tiny_gpu", "--trace", "t.csv", "--set", small, "--out", "full", cwd=folder)
    found = summary(folder / "full")
    assert (found["fits"], found["bytes_needed"], found["chips_needed"]) == (False, peak, 2)
    assert "does not fit, 2 chips needed" in text


def test_later_replay_replaces_the_folder_whole(tmp_path: Path) -> None:
    succeed(*PREFILL, "-o", "t.csv", cwd=tmp_path)
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--out", "replay", cwd=tmp_path)
    first = contents(tmp_path)
    succeed("run", "tiny_gpu", "--trace", "t.csv", "--out", "replay", cwd=tmp_path)
    assert contents(tmp_path) == first  # same command, same bytes, nothing left over
    (tmp_path / "replay" / "notes.txt").write_text("mine", encoding="utf-8")
    done = ttt_sim("run", "tiny_gpu", "--trace", "t.csv", "--out", "replay", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "notes.txt" in done.stderr
    assert (tmp_path / "replay" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_hand_written_trace_replays(tmp_path: Path) -> None:
    """One GEMM of 64 x 64 x 64: 2 x 64^3 = 524,288 FLOPs; three matrices of 8,192 bytes."""
    (tmp_path / "t.csv").write_text(
        "kind,m,n,k,reads,writes\nq_proj,64,64,64,x@0:8192;weight.q@0:8192,y@0:8192\n", encoding="utf-8"
    )
    text = succeed("run", "tiny_gpu", "--trace", "t.csv", "--out", "replay", cwd=tmp_path)
    found = summary(tmp_path / "replay")
    assert text.startswith("Trace on Tiny GPU (example)\n")
    assert (found["flops"], found["n_ops"], found["peak_memory_bytes"]) == (524288, 1, 3 * 8192)


def test_1k_and_1024_are_the_same_context(tmp_path: Path) -> None:
    for text, name in (("1k", "a.csv"), ("1024", "b.csv")):
        succeed("trace", "--model", "toy", "--method", "kv", "--context", text, "-o", name, cwd=tmp_path)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_written_trace_reads_back_column_for_column(tmp_path: Path) -> None:
    succeed(*DECODE, "-o", "t.csv", cwd=tmp_path)
    found, expected = load_trace(tmp_path / "t.csv"), decode_trace()
    assert found.tensors == expected.tensors
    for column in ("kind", "layer", "step", "flops", "read_tensor", "read_version", "write_bytes", "after_idx"):
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column))
