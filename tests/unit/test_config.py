"""Chip files to chips: values, provenance, variants, overrides, defaults and the exported schema."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ttt_sim import data_files
from ttt_sim.chip import Chip
from ttt_sim.config import build_chip, chip_json_schema, chip_names, load_chip, read_chip_file, yaml_reader
from ttt_sim.config.chip_schema import CHIP
from ttt_sim.config.fields import Choice, Flag, Number, Text, TileList, WholeNumber
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConfigError

HBM = "memories.hbm.read_bandwidth"

MINIMAL = """\
name: minimal
title: Minimal
vendor: none
kind: example
execution: in_memory
clock: {value: 500 MHz, source: s, certainty: low}
cores: {value: 2, source: s, certainty: low}
compute:
  - name: array
    kind: matrix
    dataflow: in_array
    geometry: {rows: 256, cols: 128}
    peak:
      int8: {value: 10 Top/s, source: s, certainty: low}
memories:
  - name: pcm
    scope: chip
    capacity: {value: 100 B, source: s, certainty: low}
    read_bandwidth: {value: 8 GB/s, source: s, certainty: low}
    write_bandwidth: {value: 4 GB/s, source: s, certainty: low}
    write_energy: {value: 2 pJ/bit, source: s, certainty: low}
    write_pulses:
      value: 8
      source: s
      certainty: low
      calibration: {data: d.csv, rows: 3, error: 4 %, date: 2026-01-31}
    volatile: false
    endurance: {value: 1e9, source: s, certainty: low}
mapping: {fusion: none, serial_kernels: true}
power:
  limit: {value: 5 W, source: s, certainty: low}
  idle: {value: 0 W, source: s, certainty: low}
writability: {mode: program_verify}
sources: {s: a source}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def physics(chip: Chip) -> Chip:
    """The chip without its paperwork."""
    return dataclasses.replace(chip, overrides={}, provenance={}, file_sha256="")


def test_h100_figures():
    chip = load_chip("h100")
    assert (chip.clock_hz, chip.cores, chip.execution, chip.die_area_mm2) == (1.83e9, 132, "tile_wave", 814.0)
    tensor_core = chip.unit("matrix")
    assert tensor_core.peak_per_s["bf16"] == 989e12
    assert tensor_core.efficiency["fp8"] == 0.709
    assert (tensor_core.rows, tensor_core.cols, tensor_core.depth) == (64, 8, 16)
    assert chip.unit("vector").peak_per_s["fp32"] == pytest.approx(132 * 128 * 1.83e9, rel=1e-3)
    assert chip.unit("special").peak_per_s["fp32"] == pytest.approx(132 * 16 * 1.83e9, rel=1e-2)
    hbm, l2, shared = chip.memories
    assert (hbm.capacity_bytes, hbm.read_bytes_per_s, hbm.write_bytes_per_s) == (80_000_000_000, 3.35e12, 3.35e12)
    assert hbm.shared_bus
    assert hbm.read_energy_j_per_byte == pytest.approx(8 * 3.9e-12)  # 3.9 pJ per bit
    assert (hbm.read_to_write_s, hbm.write_to_read_s) == (15e-9, 19e-9)
    assert l2.capacity_bytes == 50 * 1024**2
    assert shared.capacity_bytes == 228 * 1024
    assert (chip.main_memory, chip.cache, chip.core_memory) == (hbm, l2, shared)
    assert (chip.power.limit_w, chip.price.per_hour_usd, chip.overheads.op_launch_s) == (700.0, 2.95, 1.2e-6)
    # FlashAttention-3 reaches some 650 TFLOP/s in attention, GEMM 794.5: a block of 128 x 128 x 128 takes its products
    # and the exposed exponentials.
    products = 4 * 128**3 / (989e12 * chip.mapping.attention_efficiency / 132)
    exponentials = chip.library.softmax_exposed * 128**2 / (3.9e12 / 132)
    assert 4 * 128**3 * 132 / (products + exponentials) == pytest.approx(650e12, rel=2e-2)
    assert chip.mapping.attention_efficiency < tensor_core.efficiency["bf16"]


def test_provenance_points_at_the_line_that_holds_the_number():
    for name in chip_names():
        chip = load_chip(name)
        lines = data_files.find("hw_configs", name, ".yaml").read_text().splitlines()
        assert len(chip.provenance) > 30
        for path, place in chip.provenance.items():
            line = lines[place.line - 1]
            assert f"{path.rpartition('.')[2]}: {{value: {place.text}," in line
            assert f"certainty: {place.certainty}" in line
            assert place.source in "\n".join(lines)


def test_file_hash():
    raw = data_files.find("hw_configs", "h100", ".yaml").read_bytes()
    assert load_chip("h100").file_sha256 == hashlib.sha256(raw).hexdigest()


def test_built_in_chips_are_named_like_their_files():
    assert {"h100", "tiny_gpu", "tiny_turnaround", "tiny_dataflow"} <= set(chip_names())
    for name in chip_names():
        assert load_chip(name).name == name


def test_names_paths_and_variants_lead_to_the_same_chip():
    path = data_files.find("hw_configs", "h100", ".yaml")
    by_name = load_chip("h100", variant="H100-PCIe")
    assert load_chip("h100:H100-PCIe") == by_name
    assert load_chip(path, variant="H100-PCIe") == by_name
    assert load_chip(f"{path}:H100-PCIe") == by_name
    assert by_name.variant == "H100-PCIe"
    assert by_name.cores == 114
    assert by_name.main_memory.read_bytes_per_s == 2e12
    assert by_name.main_memory.capacity_bytes == load_chip("h100").main_memory.capacity_bytes


def test_a_variant_without_changes_is_the_chip_itself():
    assert physics(load_chip("h100:H100-SXM5-80GB")) == dataclasses.replace(
        physics(load_chip("h100")), variant="H100-SXM5-80GB"
    )


def test_variant_mistakes():
    with pytest.raises(ConfigError, match="unknown variant 'H100-PCI', did you mean H100-PCIe"):
        load_chip("h100:H100-PCI")
    with pytest.raises(ConfigError, match="two variants given: 'H100-PCIe' in the chip's name and 'H100-SXM5-80GB'"):
        load_chip("h100:H100-PCIe", variant="H100-SXM5-80GB")
    with pytest.raises(ConfigError, match="unknown variant 'x'; it has no variants"):
        load_chip("tiny_gpu:x")


def test_overrides_take_quantities_base_units_and_choices():
    chip = load_chip(
        "h100",
        overrides={
            HBM: "4.8 TB/s",
            "memories.hbm.capacity": 141e9,
            "memories.l2.capacity": "100 MiB",
            "compute.tensor_core.efficiency.bf16": 0.9,
            "compute.tensor_core.peak.fp4": "4 PFLOP/s",
            "compute.tensor_core.tiles": "[[128, 64], [64, 8]]",
            "compute.tensor_core.geometry.depth": 32,
            "mapping.persistent": False,
            "mapping.fusion": "layer",
            "mapping.max_split_k": "4",
            "overheads.op_launch": "0 ns",
            "links.nvlink.bandwidth": 9e11,
            "title": "An H100 with more",
        },
    )
    assert chip.main_memory.read_bytes_per_s == chip.main_memory.write_bytes_per_s == 4.8e12
    assert chip.main_memory.capacity_bytes == 141_000_000_000
    assert chip.memories[1].capacity_bytes == 100 * 1024**2
    assert chip.unit("matrix").efficiency["bf16"] == 0.9
    assert chip.unit("matrix").peak_per_s["fp4"] == 4e15
    assert chip.unit("matrix").tiles == ((128, 64), (64, 8))
    assert chip.unit("matrix").depth == 32
    assert (chip.mapping.persistent, chip.mapping.fusion, chip.mapping.max_split_k) == (False, "layer", 4)
    assert chip.overheads.op_launch_s == 0
    assert chip.links[0].bytes_per_s == 9e11
    assert chip.title == "An H100 with more"
    assert chip.overrides[HBM] == "4.8 TB/s"
    place = chip.provenance[HBM]
    assert (place.text, place.source, place.line) == ("4.8 TB/s", "override", 0)


def test_overrides_come_after_the_variant():
    overrides = {HBM: "1 TB/s"}
    assert load_chip("h100:H100-PCIe", overrides=overrides).main_memory.read_bytes_per_s == 1e12
    assert load_chip("h100:H100-PCIe", overrides=overrides).cores == 114


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("memories.hbm.read_bandwith", "3 TB/s", f"unknown path, did you mean {HBM}"),
        ("memories.hbn.capacity", "3 GB", "unknown path, did you mean memories.hbm.capacity"),
        ("memories.hbm", "3 TB/s", "unknown path, it holds memories.hbm.scope"),
        ("name", "x", "name: unknown path"),
        ("memories.hbm.name", "x", "unknown path"),
        ("sources.assumption", "x", "unknown path"),
        ("", "x", "unknown path"),
        (HBM, "-3 TB/s", "-3 TB/s: must be greater than 0"),
        (HBM, 0, "0 B/s: must be greater than 0"),
        (HBM, "3.35e12", "3.35e12: has no unit, expected a bandwidth such as 3.35 TB/s"),
        ("clock", "3", "3: has no unit, expected a frequency such as 1.83 GHz"),
        ("overheads.op_launch", "2", "2: has no unit, expected a time such as 15 ns"),
        (HBM, float("nan"), "nan: must be a finite number"),
        (HBM, float("inf"), "inf: must be a finite number"),
        (HBM, "3 TB", "TB is the unit of a capacity, expected a bandwidth"),
        (HBM, True, "'true' is not a bandwidth"),
        (HBM, "", "must be 3.35 TB/s, found nothing"),
        ("power.idle", 701, "701 W: must be below the limit of 700 W"),
        ("cores", 1.5, "1.5: must be a whole number"),
        ("mapping.persistent", "maybe", "maybe: must be true or false"),
        ("mapping.attention_efficiency", 1.01, "1.01: must be in (0, 1]"),
        ("mapping.attention_efficiency", 0, "0: must be in (0, 1]"),
        ("mapping.fusion", "all", "must be one of none, vector, epilogue, layer"),
        ("compute.tensor_core.tiles", "[[128,", "is not valid YAML"),
        ("compute.tensor_core.tiles", "128", "must be a list of [rows, columns] pairs"),
        ("compute.tensor_core.tiles", "[[100, 100]]", "must be multiples of the geometry's 64 x 8"),
    ],
)
def test_bad_overrides(path, value, part):
    with pytest.raises(ConfigError) as caught:
        load_chip("h100", overrides={path: value})
    assert str(caught.value).startswith("override: ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def _alternatives(field):
    """Values, at least one of which is legal and differs from what any file says."""
    if isinstance(field, Number):
        return [field.maximum * 0.37] if field.maximum else [7.0, 320.0, 7e9]
    if isinstance(field, Choice):
        return list(field.options)
    if isinstance(field, Flag):
        return ["true", "false"]
    if isinstance(field, WholeNumber):
        return [2, 16, 1, 80]
    if isinstance(field, TileList):
        return ["[[64, 64]]"]
    assert isinstance(field, Text)
    return ["other words", "1999"]


# what these paths say is not part of a chip that differs from H100 in this one way only
NEEDS_COMPANY = {
    "writability.reupload_time",  # with mode reupload
    "writability.reupload_bandwidth",
    "memories.*.write_pulses",  # with mode program_verify
    "compute.*.dataflow",
    "compute.*.tiles",
    "compute.*.geometry.*",  # on the vector unit
    "compute.*.efficiency.*",  # with a peak
    "compute.*.energy.*",
    "compute.*.ops_per_cycle.*",
    "memories.*.read_to_write",  # with a shared bus
    "memories.*.write_to_read",
    "memories.*.endurance",  # with volatile: false
    "memories.*.channel_groups",  # with more channels
    "memories.*.row_miss",  # with rows
    "memories.hbm.scope",
    "memories.hbm.shared_bus",  # its turn-around needs it
    "compute.*.kind",
    "compute.*.issue",  # with dataflow weight_stationary
    "compute.*.load",
    "compute.*.double_buffer",
}


OTHER_DTYPES = tuple(f".{dtype}" for dtype in DTYPES if dtype not in ("bf16", "fp32"))


def test_every_key_of_the_schema_reaches_the_chip():
    file = read_chip_file("h100")
    original = physics(build_chip(file))
    ignored = []
    for path, field in CHIP.leaves(file.tree, ""):
        if path == "name" or path.endswith(OTHER_DTYPES):
            continue
        for value in _alternatives(field):
            try:
                chip = build_chip(file, overrides={path: value})
            except ConfigError:
                continue
            if physics(chip) != original:
                break
        else:
            ignored.append(path)
    unexplained = [path for path in ignored if not any(Path(path).match(pattern) for pattern in NEEDS_COMPANY)]
    assert unexplained == []
    assert not any(path.startswith("memories.hbm.r") for path in ignored)


def test_defaults_of_a_minimal_chip(minimal):
    chip = load_chip(minimal)
    array = chip.unit("matrix")
    assert (array.count, array.depth, array.tiles, array.startup_cycles) == (1, 1, ((256, 128),), 0)
    assert array.efficiency == {"int8": 1.0}
    assert array.energy_j_per_op == {"int8": 0.0}
    pcm = chip.main_memory
    assert (pcm.channels, pcm.channel_groups, pcm.banks_per_channel, pcm.shared_bus) == (1, 1, 1, False)
    assert (pcm.latency_s, pcm.row_miss_s, pcm.achievable_frac, pcm.write_granularity_bytes) == (0.0, 0.0, 1.0, 1)
    assert pcm.interleave_bytes == 100  # 256 B by default, cut to the capacity
    assert pcm.row_bytes == 100  # one row
    assert chip.links == ()
    assert (chip.mapping.persistent, chip.mapping.max_split_k, chip.mapping.cache_frac) == (False, 1, 1.0)
    assert (chip.mapping.multicast, chip.mapping.attention_efficiency) == (1, 1.0)
    assert (chip.overheads.op_launch_s, chip.overheads.call_s) == (0.0, 0.0)
    assert (chip.price.per_hour_usd, chip.price.purchase_usd, chip.price.as_of) == (None, None, "")
    assert (chip.process, chip.die_area_mm2, chip.variant) == ("", None, "")
    assert chip.cache is None
    assert chip.core_memory is None


def test_program_and_verify_pulses_are_in_the_cost_of_a_write(minimal):
    pcm = load_chip(minimal).main_memory
    assert pcm.read_bytes_per_s == 8e9
    assert pcm.write_bytes_per_s == 0.5e9  # 4 GB/s per pulse over 8 pulses
    assert pcm.write_energy_j_per_byte == pytest.approx(128e-12)  # 2 pJ/bit x 8 bits x 8 pulses
    assert pcm.read_energy_j_per_byte == 0.0
    assert (pcm.write_pulses, pcm.endurance_writes) == (8.0, 1e9)


def test_calibration_record(minimal):
    place = load_chip(minimal).provenance["memories.pcm.write_pulses"]
    assert place.calibration == {"data": "d.csv", "rows": "3", "error": "4 %", "date": "2026-01-31"}


def test_whole_nanoseconds_at_one_gigahertz_are_as_many_cycles():
    chip = load_chip("tiny_gpu")
    assert [chip.cycles(float(f"{n}e-9")) for n in range(3000)] == list(range(3000))
    assert chip.cycles(61.0001e-9) == 62
    assert chip.cycles(1e-13) == 1


def test_the_python_yaml_reader_gives_the_same_chip(monkeypatch):
    fast = load_chip("h100:H100-PCIe")
    monkeypatch.setattr(yaml_reader, "_LOADER", yaml.SafeLoader)
    assert load_chip("h100:H100-PCIe") == fast


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb:\n\tc: 2\n", 3), ("a: \x01", 1), ("a: 1\na: 2\n", 2), ("a: *b\n", 1), ("a: !!int 3\n", 1)],
)
def test_the_python_yaml_reader_finds_the_same_faults(monkeypatch, text, line):
    for loader in (yaml_reader._LOADER, yaml.SafeLoader):
        monkeypatch.setattr(yaml_reader, "_LOADER", loader)
        with pytest.raises(ConfigError, match=f"f.yaml:{line}: "):
            yaml_reader.parse_yaml(text, "f.yaml")


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(json.dumps(chip_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_json_schema_accepts_the_built_in_files(validator):
    for name in chip_names():
        path = data_files.find("hw_configs", name, ".yaml")
        assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value: 3.35 TB/s", "value: 3.35 TB"),
        ("value: 3.35 TB/s", "value: 3.35e12"),
        ("cores: {value: 132", "cores: {value: 132.5"),
        ("cores: {value: 132", "cores: {value: 0"),
        ("certainty: high", "certainty: sure"),
        ("    latency: {", "    latancy: {"),
        ("fusion: vector", "fusion: vectors"),
        ("persistent: true", "persistent: 1"),
        ("[256, 128]", "[256]"),
        ("depth: 16", "depth: 0"),
        ("mode: free", "modus: free"),
    ],
)
def test_json_schema_refuses_what_the_reader_refuses(tmp_path, validator, old, new):
    text = data_files.find("hw_configs", "h100", ".yaml").read_text()
    path = tmp_path / "h100.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError):
        load_chip(path)
    assert not validator.is_valid(yaml.safe_load(path.read_text()))


def test_every_field_of_the_schema_is_described():
    def undescribed(schema, path):
        for key, below in schema.get("properties", {}).items():
            if path.endswith(".calibration"):
                continue
            if not below.get("description") and key != "value":
                yield f"{path}.{key}"
            yield from undescribed(below, f"{path}.{key}")
            yield from undescribed(below.get("items", {}), f"{path}.{key}[]")

    assert list(undescribed(chip_json_schema(), "")) == []


def test_the_copy_in_an_installed_package_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "site" / "ttt_sim"
    (package / "_data" / "hw_configs").mkdir(parents=True)
    (package / "_data" / "hw_configs" / "minimal.yaml").write_text(MINIMAL)
    monkeypatch.setattr(data_files, "_PACKAGE", package)
    assert chip_names() == ["minimal"]
    assert load_chip("minimal").name == "minimal"
    with pytest.raises(ConfigError, match="the folder model_configs is missing from this installation"):
        data_files.names("model_configs", ".json")


def test_reading_a_chip_imports_nothing_heavy():
    code = (
        "import sys, ttt_sim.config as c; c.load_chip('h100'); "
        "print(sorted({'pandas', 'matplotlib', 'numba', 'scipy', 'pyarrow', 'simpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
