"""The physics of chip files. Each finding is provoked by one override whose arithmetic is in the comment."""

from datetime import date

import pytest

from ttt_sim.config import chip_names, load_chip
from ttt_sim.data_files import find
from ttt_sim.lint import Finding, lint_chip, lint_file


def provoked(chip: str, **overrides: str) -> list[Finding]:
    """Findings that the overrides add; keys have __ for dots."""
    dotted = {path.replace("__", "."): value for path, value in overrides.items()}
    known = {(finding.path, finding.message) for finding in lint_chip(load_chip(chip))}
    changed = lint_chip(load_chip(chip, overrides=dotted))
    return [finding for finding in changed if (finding.path, finding.message) not in known]


@pytest.mark.parametrize("name", chip_names())
def test_built_in_chips_hold_no_contradiction(name):
    assert [finding for finding in lint_file(name) if finding.severity == "error"] == []


@pytest.mark.parametrize(
    "name", ["tiny_gpu", "tiny_turnaround", "tiny_dataflow", "tiny_systolic", "tiny_spatial", "tiny_tiers"]
)
def test_example_chips_are_clean(name):
    assert lint_file(name) == []


def test_peak_is_units_times_rate_times_clock():
    # 4 cores x 1 unit x 128 multiply-adds x 2 x 1 GHz = 1.024 TFLOP/s; 1.08 is 5.2 % more than that, 1.1 is 6.9 %
    assert provoked("tiny_gpu", compute__tensor_core__peak__bf16="1.08 TFLOP/s") == []
    (finding,) = provoked("tiny_gpu", compute__tensor_core__peak__bf16="1.1 TFLOP/s")
    assert (finding.severity, finding.path) == ("error", "compute.tensor_core.peak.bf16")
    assert "1.1 TFLOP/s is stated, but 4 units x 128 per cycle x 2 FLOP x 1 GHz = 1.024 TFLOP/s (-7%" in finding.message


def test_vector_peaks_count_no_operation_twice():
    # 4 cores x 16 lanes x 1 x 1 GHz = 64 Gop/s
    (finding,) = provoked("tiny_gpu", compute__lanes__peak__fp32="128 Gop/s")
    assert "64 units x 1 per cycle x 1 GHz = 64 Gop/s (-50%" in finding.message


def test_weight_stationary_arrays_are_checked_by_their_geometry(tmp_path):
    text = find("hw_configs", "tiny_gpu", ".yaml").read_text()
    start, end = text.index("    ops_per_cycle:"), text.index("  - name: lanes")
    text = (text[:start] + text[end:]).replace("output_stationary", "weight_stationary")
    path = tmp_path / "tiny_gpu.yaml"
    # 4 x (16 x 16 x 1) x 2 x 1 GHz = 2.048 TFLOP/s, twice the bf16 peak; fp8 may run at any multiple
    path.write_text(text.replace("depth: 16", "depth: 1"))
    (finding,) = [finding for finding in lint_file(path) if finding.severity == "error"]
    assert finding.path == "compute.tensor_core.peak.bf16"
    assert "4 units x 256 per cycle x 2 FLOP x 1 GHz = 2.048 TFLOP/s (+100%" in finding.message
    path.write_text(text.replace("depth: 16", "depth: 1").replace("cols: 16", "cols: 8"))
    assert [finding for finding in lint_file(path) if finding.severity == "error"] == []


def test_an_array_must_say_how_it_is_loaded():
    found = provoked("tpu_v5e", compute__mxu__load="0 cycles")
    (finding,) = [finding for finding in found if finding.severity == "warning"]
    assert finding.path == "compute.mxu"
    assert "putting a stationary tile into the array counts as free" in finding.message
    assert provoked("tiny_systolic", compute__array__load="0 cycles") == []


def test_a_unit_of_the_whole_chip_is_counted_once():
    # count 0: one unit of 128 x 2 FLOP x 1 GHz = 256 GFLOP/s
    findings = provoked("tiny_gpu", compute__tensor_core__count="0")
    assert "1 units x 128 per cycle x 2 FLOP x 1 GHz = 256 GFLOP/s (-75%" in findings[0].message


def test_channels_times_rate_is_bandwidth():
    # 2 x 32 GB/s = 64 GB/s; 68 is 5.9 % from it, 69 is 7.2 %
    assert provoked("tiny_turnaround", memories__hbm__read_bandwidth="68 GB/s") == []
    (finding,) = provoked("tiny_turnaround", memories__hbm__read_bandwidth="69 GB/s")
    assert (finding.severity, finding.path) == ("error", "memories.hbm.channel_rate")
    assert "2 channels x 32 GB/s = 64 GB/s, but read_bandwidth is 69 GB/s" in finding.message


def test_scratchpad_holds_the_operands_of_a_tile_twice():
    # bf16, depth 16: the 16 x 16 tile needs 2 x (16 + 16) x 16 x 2 B = 2 KiB, 32 x 32 4 KiB, 64 x 64 8 KiB
    assert provoked("tiny_gpu", memories__scratchpad__capacity="8 KiB") == []
    (finding,) = provoked("tiny_gpu", memories__scratchpad__capacity="4 KiB")
    assert (finding.severity, finding.path) == ("warning", "memories.scratchpad.capacity")
    assert "4 KiB cannot hold the operands of a 64 x 64 tile of 'tensor_core' twice (8 KiB" in finding.message
    findings = provoked("tiny_gpu", memories__scratchpad__capacity="1 KiB")
    assert [finding.severity for finding in findings] == ["error"] * 3


def test_power_at_full_rate():
    # idle 10 W + 1.024 TFLOP/s x 1 pJ = 1.024 W + 64 GB/s x 32 pJ = 2.048 W + 256 GB/s x 2 pJ = 0.512 W
    # + 512 GB/s x 1 pJ = 0.512 W: 14.096 W; fp8 is 2.048 TFLOP/s x 0.5 pJ, the same
    assert provoked("tiny_gpu", power__limit="14.1 W") == []
    findings = provoked("tiny_gpu", power__limit="14 W")
    assert [(finding.severity, finding.path) for finding in findings] == [("note", "power.limit")] * 2
    assert "= 14.1 W, more than the limit of 14 W" in findings[0].message


def test_sram_fits_the_die():
    # (1 MiB + 4 x 64 KiB) x 8 bits x 0.021 um2 = 1310720 x 8 x 0.021e-6 mm2 = 0.2202 mm2; HBM is not on the die
    assert provoked("tiny_gpu", die_area="0.32 mm2") == []
    (finding,) = provoked("tiny_gpu", die_area="0.3 mm2")  # 0.2202 / 0.3 = 73 %
    assert (finding.severity, finding.path) == ("warning", "die_area")
    (finding,) = provoked("tiny_gpu", die_area="0.2 mm2")
    assert finding.severity == "error"
    assert "1.25 MiB of SRAM (l2, scratchpad) need at least 0.2202 mm2" in finding.message


def test_hierarchy():
    # 4 x 512 KiB = 2 MiB of scratchpads inside an L2 of 1 MiB
    (finding,) = provoked("tiny_gpu", memories__scratchpad__capacity="512 KiB")
    assert (finding.severity, finding.path) == ("warning", "memories.scratchpad.capacity")
    assert "2 MiB in all, more than 'l2' outside it (1 MiB)" in finding.message
    (finding,) = provoked("tiny_gpu", memories__l2__read_bandwidth="60 GB/s")
    assert finding.path == "memories.l2.read_bandwidth"


def test_what_is_left_out(tmp_path):
    text = find("hw_configs", "tiny_gpu", ".yaml").read_text()
    for old in (
        "      fp8: {value: 0.5 pJ/FLOP, source: example, certainty: high}\n",
        "    efficiency:\n      bf16: {value: 1, source: example, certainty: high}\n"
        "      fp8: {value: 1, source: example, certainty: high}\n",
        "  per_hour: {value: 1 USD/h, source: example, certainty: high}\n",
        "    read_energy: {value: 32 pJ/byte, source: example, certainty: high}\n",
    ):
        assert old in text
        text = text.replace(old, "", 1)
    text = text.replace("kind: example", "kind: gpu").replace("sources:\n", "sources:\n  spare: never used\n")
    text = text.replace(
        "cores: {value: 4, source: example, certainty: high}", "cores: {value: 4, source: example, certainty: low}"
    )
    path = tmp_path / "other.yaml"
    path.write_text(text)
    findings = {(finding.severity, finding.path, finding.message.split(":")[0]) for finding in lint_file(path)}
    assert findings == {
        ("warning", "compute.tensor_core.peak.fp8", "no energy.fp8"),
        ("warning", "compute.tensor_core.peak.bf16", "no efficiency.bf16"),
        ("warning", "compute.tensor_core.peak.fp8", "no efficiency.fp8"),
        ("note", "price", "no per_hour"),
        ("warning", "memories.hbm", "no read_energy"),
        ("warning", "memories.hbm", "achievable_fraction 1"),
        ("warning", "memories.hbm", "shared_bus without turn-around times"),
        ("warning", "name", "'tiny_gpu' differs from the file name 'other.yaml'"),
        ("warning", "sources.spare", "no number refers to this source"),
        ("note", "die_area", "not given"),
        ("note", "sources", f"1 of {text.count('certainty:')} numbers are of low certainty"),
    }


def test_findings_point_at_lines_and_come_errors_first(tmp_path):
    text = find("hw_configs", "tiny_gpu", ".yaml").read_text().replace("1.024 TFLOP/s", "9 TFLOP/s")
    path = tmp_path / "x.yaml"
    path.write_text(text)
    first, last = lint_file(path)
    assert (first.severity, first.path) == ("error", "compute.tensor_core.peak.bf16")
    assert "9 TFLOP/s" in text.splitlines()[first.line - 1]
    assert (last.severity, last.path, last.line) == ("warning", "name", 2)


def test_variants_are_linted_too(tmp_path):
    text = find("hw_configs", "h100", ".yaml").read_text()
    path = tmp_path / "h100.yaml"
    path.write_text(text.replace("cores: {value: 114", "cores: {value: 132"))
    errors = [finding for finding in lint_file(path) if finding.severity == "error"]
    assert errors
    assert all(finding.message.startswith("variant H100-PCIe: ") for finding in errors)
    assert {finding.path for finding in errors} >= {"compute.tensor_core.peak.bf16", "compute.sfu.peak.fp32"}


def test_non_volatile_memory_written_at_run_time_wears(tmp_path):
    text = find("hw_configs", "tiny_dataflow", ".yaml").read_text()
    path = tmp_path / "tiny_dataflow.yaml"
    path.write_text(text.replace("  - name: sram\n", "  - name: sram\n    volatile: false\n"))
    (finding,) = lint_file(path)
    assert (finding.severity, finding.path) == ("warning", "memories.sram")
    assert "no endurance is given" in finding.message


# --- contradictions between numbers that a data sheet states apart ----------------------------------------------------


def edited(tmp_path, chip: str, *changes: tuple[str, str], today: date | None = None) -> list[Finding]:
    """Findings on a copy of a chip file with these texts replaced."""
    text = find("hw_configs", chip, ".yaml").read_text()
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    path = tmp_path / f"{chip}.yaml"
    path.write_text(text)
    return lint_file(path, today)


LINKS = "mapping:\n"


def link(name: str, topology: str, more: str = "") -> str:
    return (
        f"links:\n  - name: {name}\n    topology: {topology}\n"
        f"    bandwidth: {{value: 64 GB/s, source: example, certainty: high}}\n{more}{LINKS}"
    )


def test_the_least_certain_number_is_named(tmp_path):
    change = (
        "read_bandwidth: {value: 64 GB/s, source: example, certainty: high",
        "read_bandwidth: {value: 80 GB/s, source: example, certainty: medium",
    )
    (finding,) = edited(tmp_path, "tiny_turnaround", change)
    assert "2 channels x 32 GB/s = 64 GB/s, but read_bandwidth is 80 GB/s" in finding.message
    assert finding.message.endswith("; least certain (medium): memories.hbm.read_bandwidth")
    (finding,) = edited(tmp_path, "tiny_turnaround", (change[0], change[1].replace("medium", "high")))
    assert "; all of high certainty: memories.hbm.read_bandwidth, " in finding.message


BACKING = """memories:  # outermost first
  - name: ddr
    scope: backing
    capacity: {{value: 4 GiB, source: example, certainty: high}}
    read_bandwidth: {{value: {rate} GB/s, source: example, certainty: low}}
    read_energy: {{value: 50 pJ/byte, source: example, certainty: high}}
"""


def test_a_backing_memory_is_slower_than_the_main_memory(tmp_path):
    memories = "memories:  # outermost first\n"
    assert [f.severity for f in edited(tmp_path, "tiny_gpu", (memories, BACKING.format(rate=32)))] == ["note"]
    first, note = edited(tmp_path, "tiny_gpu", (memories, BACKING.format(rate=65)))
    assert (first.severity, first.path, note.path) == ("warning", "memories.ddr.read_bandwidth", "sources")
    assert "65 GB/s is more than that of 'hbm', which it backs (64 GB/s)" in first.message
    assert "least certain (low): memories.ddr.read_bandwidth" in first.message


def test_neighbours_need_links_of_their_own(tmp_path):
    peers = "    peers: {value: 7, source: example, certainty: high}\n"
    count = "    count: {value: 7, source: example, certainty: high}\n"
    (finding,) = edited(tmp_path, "tiny_gpu", (LINKS, link("fabric", "point_to_point", peers)))
    assert (finding.severity, finding.path) == ("warning", "links.fabric.peers")
    assert "7 chips on a point_to_point without a count of links: one link of 64 GB/s is taken" in finding.message
    assert edited(tmp_path, "tiny_gpu", (LINKS, link("fabric", "point_to_point", peers + count))) == []
    assert edited(tmp_path, "tiny_gpu", (LINKS, link("fabric", "switch", peers))) == []  # one port reaches all


@pytest.mark.parametrize(("rate", "errors"), [(67, 0), (69, 1)])  # 64 GB/s: 4.7 % and 7.8 % more
def test_a_reupload_passes_the_link_to_the_host(tmp_path, rate, errors):
    upload = f"reupload\n  reupload_bandwidth: {{value: {rate} GB/s, source: example, certainty: low}}"
    found = edited(tmp_path, "tiny_gpu", (LINKS, link("pcie", "host")), ("mode: free", f"mode: {upload}"))
    about = [finding for finding in found if finding.path == "writability.reupload_bandwidth"]
    assert [finding.severity for finding in about] == ["error"] * errors
    for finding in about:
        assert "69 GB/s, but the fastest link to the host, 'pcie', carries 64 GB/s" in finding.message
        assert "least certain (low): writability.reupload_bandwidth" in finding.message


def test_volatile_memory_of_free_stores_does_not_wear(tmp_path):
    worn = "  - name: l2\n    volatile: {}\n    endurance: {{value: 1e6, source: example, certainty: high}}\n"
    (finding,) = edited(tmp_path, "tiny_gpu", ("  - name: l2\n", worn.format("true")))
    assert (finding.severity, finding.path) == ("warning", "memories.l2.endurance")
    assert "1e+06 writes, but the memory is volatile and its mode is free" in finding.message
    assert edited(tmp_path, "tiny_gpu", ("  - name: l2\n", worn.format("false"))) == []


def test_an_array_holds_what_its_cells_do(tmp_path):
    # 4 arrays of 1024 x 256 cells hold 1 MiB of 8 bits or 2 MiB of 16: the L2 of 1 MiB is that of fp8
    def with_rows(rows: int) -> list[Finding]:
        old = "dataflow: output_stationary\n    geometry: {rows: 16, cols: 16, depth: 16}"
        new = f"dataflow: in_array\n    geometry: {{rows: {rows}, cols: 256}}"
        tiles = ("    tiles: [[64, 64], [32, 32], [16, 16]]\n", "")
        found = edited(tmp_path, "tiny_gpu", (old, new), tiles, ("kind: example", "kind: digital_imc"))
        return [finding for finding in found if finding.path.startswith("compute.")]

    assert with_rows(1024) == with_rows(512) == []  # half as many cells hold 1 MiB of bf16
    (finding,) = with_rows(300)
    assert (finding.severity, finding.path) == ("note", "compute.tensor_core.geometry")
    assert "4 arrays x 300 x 256 cells hold 600 KiB of bf16, 300 KiB of fp8; no memory has" in finding.message
    assert "hbm 1 GiB, l2 1 MiB, scratchpad 256 KiB" in finding.message


def test_a_row_is_whole_writes(tmp_path):
    rows = (
        "    row_size: {{value: 1 KiB, source: example, certainty: high}}\n"
        "    write_granularity: {{value: {} B, source: example, certainty: medium}}\n"
    )
    assert edited(tmp_path, "tiny_gpu", ("    shared_bus: true\n", "    shared_bus: true\n" + rows.format(64))) == []
    (finding,) = edited(tmp_path, "tiny_gpu", ("    shared_bus: true\n", "    shared_bus: true\n" + rows.format(48)))
    assert (finding.severity, finding.path) == ("warning", "memories.hbm.write_granularity")
    assert "48 B does not divide row_size, 1 KiB" in finding.message
    assert "least certain (medium): memories.hbm.write_granularity" in finding.message


@pytest.mark.parametrize(
    ("as_of", "today", "old"),
    [
        ("2024-05-03", date(2026, 5, 3), False), ("2024-05-03", date(2026, 5, 4), True),
        ("2024-05", date(2026, 5, 31), False), ("2024-05", date(2026, 6, 1), True),
        ("'2024'", date(2026, 12, 31), False), ("'2024'", date(2027, 1, 1), True),
    ],
)  # fmt: skip
def test_prices_age(tmp_path, as_of, today, old):
    changes = (("as_of: 2026-01", f"as_of: {as_of}"), ("kind: example", "kind: gpu"))
    found = [f for f in edited(tmp_path, "tiny_gpu", *changes, today=today) if f.path == "price.per_hour"]
    assert [f.severity for f in found] == ["note"] * old
    for finding in found:
        assert f"as of {as_of.strip(chr(39))}, more than 2 years ago" in finding.message
