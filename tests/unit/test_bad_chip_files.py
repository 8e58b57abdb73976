"""What can be wrong with a chip file: each fault gives its file, line, key path and a hint; all faults come at once.

Each case damages a sound file in one place. The expected line is that of ``marker`` in the damaged text.
"""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_sim.config import load_chip
from ttt_sim.data_files import find
from ttt_sim.errors import ConfigError

HBM_BANDWIDTH = "read_bandwidth: {value: 3.35 TB/s, source: ml_engineering, certainty: high}"
CLOCK = "clock: {value: 1.83 GHz"
CAPACITY = 'capacity: {value: 80 GB, source: ml_engineering, certainty: high, note: "HBM3, 5 stacks"}'
CORE_REST = (
    "capacity: {value: 64 KiB, source: assumption, certainty: low}",
    "read_bandwidth: {value: 40 TB/s, source: assumption, certainty: low}",
)
ROW_SIZE = (
    "    row_size: {value: 1 KiB, source: jedec_hbm3, certainty: medium, "
    'note: "page of a pseudo-channel; from memory"}\n'
)
HBM = "memories.hbm.read_bandwidth"


def good() -> str:
    return (Path(__file__).parent / "data" / "sound_chip.yaml").read_text(encoding="utf-8")


def hbm(value: str) -> str:
    return HBM_BANDWIDTH.replace("3.35 TB/s", value)


# (id, text to replace, replacement, marker on the expected line, key path, parts of the message)
CASES = [
    # numbers out of range
    ("negative", HBM_BANDWIDTH, hbm("-3 TB/s"), "-3 TB/s", HBM, ["-3 TB/s: must be greater than 0"]),
    ("zero", HBM_BANDWIDTH, hbm("0 TB/s"), "{value: 0 TB/s", HBM, ["must be greater than 0"]),
    ("nan", HBM_BANDWIDTH, hbm(".nan"), ".nan", HBM, ["must be a finite number", "3.35 TB/s"]),
    ("infinite", HBM_BANDWIDTH, hbm(".inf"), ".inf", HBM, [".inf: must be a finite number"]),
    ("overflow", HBM_BANDWIDTH, hbm("1e999 TB/s"), "1e999", HBM, ["1e999: must be between 1e-60 and 1e60"]),
    ("fraction_above_one", "bf16: {value: 0.803", "bf16: {value: 1.2", "bf16: {value: 1.2",
     "compute.tensor_core.efficiency.bf16", ["1.2: must be in (0, 1]"]),
    ("fraction_zero", "{value: 0.9, source: streaming", "{value: 0, source: streaming", "source: streaming",
     "memories.hbm.achievable_fraction", ["0: must be in (0, 1]"]),
    ("fraction_in_percent", "{value: 0.9, source: streaming", "{value: 90 %, source: streaming", "90 %",
     "memories.hbm.achievable_fraction", ["write the fraction 0.9 instead of a percentage"]),
    ("negative_energy", "read_energy: {value: 3.9 pJ", "read_energy: {value: -3.9 pJ", "-3.9",
     "memories.hbm.read_energy", ["must be at least 0"]),
    ("negative_latency", "{value: 262 ns", "{value: -262 ns", "-262", "memories.hbm.latency", ["must be at least 0"]),
    ("broken_count", "cores: {value: 132", "cores: {value: 132.5", "132.5", "cores", ["132.5: must be a whole number"]),
    ("half_a_byte", "{value: 32 B, source: jedec_hbm3", "{value: 0.5 B, source: jedec_hbm3", "0.5 B",
     "memories.hbm.write_granularity", ["0.5 B: must be a whole number of B"]),
    ("split_k_zero", "max_split_k: 16", "max_split_k: 0", "max_split_k: 0", "mapping.max_split_k",
     ["0: must be a whole number of at least 1"]),
    # not a number, not the right unit
    ("text", HBM_BANDWIDTH, hbm("fast"), "fast,", HBM, ["'fast' is not a bandwidth", "3.35 TB/s"]),
    ("boolean", HBM_BANDWIDTH, hbm("true"), "{value: true", HBM, ["'true' is not a bandwidth"]),
    ("empty_value", HBM_BANDWIDTH, hbm(""), "{value: ,", f"{HBM}.value", ["must be 3.35 TB/s", "found nothing"]),
    ("no_unit", HBM_BANDWIDTH, hbm("3.35e12"), "3.35e12", HBM, ["has no unit", "a bandwidth such as 3.35 TB/s"]),
    ("unit_misspelt", HBM_BANDWIDTH, hbm("3.35 TB/sec"), "TB/sec", HBM, ["unknown unit 'TB/sec'", "did you mean TB/s"]),
    ("unit_in_small_letters", HBM_BANDWIDTH, hbm("3.35 tb/s"), "tb/s", HBM, ["'tb/s'", "did you mean TB/s"]),
    ("bits_or_bytes", HBM_BANDWIDTH, hbm("26800 Gb/s"), "Gb/s", HBM, ["'Gb/s'", "Gbit/s", "GB/s"]),
    ("unit_unknown", HBM_BANDWIDTH, hbm("3 furlongs"), "furlongs", HBM,
     ["unknown unit 'furlongs', expected a bandwidth in B/s"]),
    ("wrong_dimension", CAPACITY, CAPACITY.replace("80 GB", "80 GB/s"), "80 GB/s", "memories.hbm.capacity",
     ["GB/s is the unit of a bandwidth, expected a capacity such as 50 MiB"]),
    ("clock_misspelt", CLOCK, "clock: {value: 1.83 Ghz", "Ghz", "clock", ["'Ghz'", "did you mean GHz"]),
    ("unit_on_a_count", "cores: {value: 132", "cores: {value: 132 SM", "132 SM", "cores",
     ["expected a count without a unit"]),
    ("vector_peak_in_flops", "fp32: {value: 30.9 Top/s", "fp32: {value: 67 TFLOP/s", "67 TFLOP/s,",
     "compute.fp32_lanes.peak.fp32", ["must be in op/s", "multiply-add counts once"]),
    # the sourced form
    ("bare_number", HBM_BANDWIDTH, "read_bandwidth: 3.35 TB/s", "read_bandwidth: 3.35 TB/s", HBM,
     ["every number needs its source, write {value: 3.35 TB/s, source: REF, certainty: high | medium | low}"]),
    ("bare_text", HBM_BANDWIDTH, "read_bandwidth: quick", "read_bandwidth: quick", HBM,
     ["quick: every number needs its source", "{value: 3.35 TB/s"]),
    ("list_for_a_number", HBM_BANDWIDTH, "read_bandwidth: [3.35 TB/s]", "[3.35 TB/s]", HBM,
     ["must be {value", "found a list of 1"]),
    ("no_source", HBM_BANDWIDTH, "read_bandwidth: {value: 3.35 TB/s, certainty: high}", "3.35 TB/s, certainty", HBM,
     ["the key 'source' is missing"]),
    ("no_certainty", HBM_BANDWIDTH, "read_bandwidth: {value: 3.35 TB/s, source: ml_engineering}", "3.35 TB/s, source",
     HBM,
     ["the key 'certainty' is missing", "high or medium or low"]),
    ("no_value", HBM_BANDWIDTH, "read_bandwidth: {source: ml_engineering, certainty: high}",
     "read_bandwidth: {source: ml_eng", HBM, ["the key 'value' is missing"]),
    ("unknown_source", HBM_BANDWIDTH, HBM_BANDWIDTH.replace("ml_engineering", "ml_enginering"), "ml_enginering",
     f"{HBM}.source", ["'ml_enginering' is not defined under sources, did you mean ml_engineering"]),
    ("bad_certainty", HBM_BANDWIDTH, HBM_BANDWIDTH.replace("high", "hihg"), "hihg", f"{HBM}.certainty",
     ["'hihg' is unknown, did you mean high"]),
    ("extra_key", HBM_BANDWIDTH, HBM_BANDWIDTH.replace("certainty", "comment: x, certainty"), "comment: x",
     f"{HBM}.comment", ["unknown key", "expected one of value, source, certainty, note, calibration"]),
    ("calibration_incomplete", HBM_BANDWIDTH,
     HBM_BANDWIDTH.replace("high}", "high, calibration: {data: a.csv, rows: 1, error: 3 %}}"),
     "a.csv", f"{HBM}.calibration", ["the key 'date' is missing"]),
    # keys and structure
    ("key_misspelt", "    latency: {value: 262 ns", "    latancy: {value: 262 ns", "latancy", "memories.hbm.latancy",
     ["unknown key, did you mean latency"]),
    ("top_key_misspelt", "process: TSMC 4N", "proces: TSMC 4N", "proces: TSMC", "proces",
     ["unknown key, did you mean process"]),
    ("duplicate_key", "vendor: NVIDIA\n", "vendor: NVIDIA\nvendor: AMD\n", "vendor: AMD", "vendor",
     ["duplicate key, first given on line 4"]),
    ("duplicate_deep_key", "    shared_bus: true\n", "    shared_bus: true\n    shared_bus: false\n",
     "shared_bus: false",
     "memories[0].shared_bus", ["duplicate key"]),
    ("missing_key", "    " + CAPACITY + "\n", "", "- name: hbm", "memories.hbm.capacity",
     ["is missing, expected {value: 50 MiB"]),
    ("list_for_a_mapping", "{rows: 64, cols: 8, depth: 16}", "[64, 8, 16]", "[64, 8, 16]",
     "compute.tensor_core.geometry",
     ["must be a mapping with rows, cols, found a list of 3"]),
    ("scalar_for_a_mapping", "{rows: 64, cols: 8, depth: 16}", "64x8x16", "64x8x16", "compute.tensor_core.geometry",
     ["must be a mapping with rows, cols, found the text '64x8x16'"]),
    ("mapping_for_a_list", "links:\n  - name: nvlink", "links:\n    name: nvlink", "name: nvlink", "links",
     ["must be a list of items", "found a mapping"]),
    ("name_with_a_dot", "- name: l2", "- name: l2.5", "l2.5", "memories[1].name", ["'l2.5'", "small letters, digits"]),
    ("same_name_twice", "- name: l2", "- name: hbm  # again", "# again", "memories[1].name",
     ["'hbm' is the name of an earlier item"]),
    ("name_of_a_unit", "- name: l2", "- name: sfu  # again", "# again", "memories.sfu.name",
     ["already the name of a compute unit"]),
    ("link_named_as_a_memory", "- name: nvlink", "- name: hbm  # again", "# again", "links.hbm.name",
     ["already the name of a memory"]),
    ("link_named_as_a_unit", "- name: nvlink", "- name: sfu  # again", "# again", "links.sfu.name",
     ["already the name of a compute unit"]),
    ("flag_in_words", "persistent: true", "persistent: yes", "persistent: yes", "mapping.persistent",
     ["yes: must be true or false"]),
    ("unknown_choice", "fusion: vector", "fusion: vectors", "fusion: vectors", "mapping.fusion",
     ["'vectors': must be one of none, vector, epilogue, layer", "did you mean vector"]),
    ("unknown_execution", "execution: tile_wave", "execution: gpu", "execution: gpu", "execution",
     ["'gpu'", "tile_wave", "systolic"]),
    ("unknown_dtype", "      fp8: {value: 1979", "      fp9: {value: 1 TFLOP/s}\n      fp8: {value: 1979", "fp9:",
     "compute.tensor_core.peak.fp9", ["unknown key, did you mean fp8"]),
    ("date", "as_of: 2026-05", "as_of: May 2026", "May 2026", "price.as_of", ["YYYY-MM"]),
    ("tile_not_a_pair", "[256, 128], ", "[256], ", "[256], ", "compute.tensor_core.tiles[0]",
     ["must be a pair [rows, columns]"]),
    ("reserved_source", 'sources:\n', 'sources:\n  override: "mine"\n', 'override: "mine"', "sources.override",
     ["reserved"]),
    # contradictions
    ("tile_off_the_geometry", "[256, 128], ", "[250, 128], ", "[250, 128], ", "compute.tensor_core.tiles",
     ["[250, 128]: must be multiples of the geometry's 64 x 8"]),
    ("second_vector_unit", "kind: special", "kind: vector  # second", "# second", "compute.sfu.kind",
     ["a second vector unit beside 'fp32_lanes'"]),
    ("geometry_of_a_vector_unit", "    kind: special", "    kind: special\n    geometry: {rows: 2, cols: 2}",
     "cols: 2}",
     "compute.sfu.geometry", ["belongs to matrix units, 'sfu' is a special unit"]),
    ("matrix_without_dataflow", "    dataflow: output_stationary\n", "", "- name: tensor_core",
     "compute.tensor_core.dataflow",
     ["a matrix unit needs its dataflow"]),
    ("load_of_an_output_stationary_unit", "    dataflow: output_stationary\n",
     "    dataflow: output_stationary\n    load: {value: 128 cycles, source: assumption, certainty: low}\n",
     "128 cycles", "compute.tensor_core.load",
     ["belongs to weight_stationary arrays", "'tensor_core' is output_stationary"]),
    ("efficiency_without_peak", "    efficiency:\n",
     "    efficiency:\n      fp4: {value: 0.5, source: ml_engineering, certainty: low}\n", "fp4:",
     "compute.tensor_core.efficiency.fp4", ["peak.fp4 is not given"]),
    ("turnaround_without_bus", "- name: l2\n",
     "- name: l2\n    read_to_write: {value: 1 ns, source: assumption, certainty: low}\n", "{value: 1 ns",
     "memories.l2.read_to_write",
     ["needs shared_bus: true"]),
    ("row_larger_than_memory", "{value: 1 KiB, source", "{value: 81 GB, source", "{value: 81 GB",
     "memories.hbm.row_size",
     ["must not exceed the capacity of 80000000000 B"]),
    ("endurance_of_volatile_memory", "- name: l2\n",
     "- name: l2\n    endurance: {value: 1e9, source: assumption, certainty: low}\n",
     "1e9", "memories.l2.endurance", ["say volatile: false"]),
    ("pulses_without_verify", "- name: l2\n",
     "- name: l2\n    write_pulses: {value: 8.5, source: assumption, certainty: low}\n",
     "8.5", "memories.l2.write_pulses", ["belongs to mode program_verify, the mode is free"]),
    ("bus_with_faster_writes", "    shared_bus: true",
     "    write_bandwidth: {value: 4 TB/s, source: ml_engineering, certainty: high}\n    shared_bus: true",
     "{value: 4 TB/s",
     "memories.hbm.write_bandwidth", ["must not exceed read_bandwidth"]),
    ("uneven_groups", "channel_groups: 2", "channel_groups: 3", "channel_groups: 3", "memories.hbm.channel_groups",
     ["3: must divide the 160 channels evenly"]),
    ("idle_above_limit", "idle: {value: 70 W", "idle: {value: 701 W", "701 W", "power.idle",
     ["must be below the limit of 700 W"]),
    ("price_without_date", "  as_of: 2026-05\n", "", "per_hour:", "price.as_of", ["a price needs its date"]),
    ("reupload_unpriced", "mode: free", "mode: reupload", "mode: reupload", "writability.mode",
     ["needs reupload_time or reupload_bandwidth"]),
    ("never_written_yet_overlapping", "mode: free", "mode: none", "overlap: true", "writability.overlap",
     ["contradicts mode none"]),
    ("row_miss_without_rows", ROW_SIZE, "", "row_miss:", "memories.hbm.row_miss", ["needs row_size"]),
    ("chip_inside_core", "scope: core\n",
     "scope: core\n" + "".join(f"    {line}\n" for line in CORE_REST) + "  - name: inner\n    scope: chip  # inside\n",
     "# inside",
     "memories.inner.scope", ["cannot lie inside 'shared_memory' of one core"]),
    ("core_level_outermost", "- name: hbm\n    scope: chip", "- name: hbm\n    scope: core", "scope: core",
     "memories.hbm.scope",
     ["the outermost level must have scope chip"]),
    # variants
    ("variant_path", "    memories.hbm.channels: {value: 80", "    memories.hbm.chanels: {value: 80", "chanels",
     "variants.H100-PCIe.memories.hbm.chanels", ["unknown path, did you mean memories.hbm.channels"]),
    ("variant_value", "cores: {value: 114", "cores: {value: -114", "-114", "cores", ["-114: must be greater than 0"]),
    ("variant_contradiction", "power.limit: {value: 350 W", "power.limit: {value: 35 W", "idle: {value: 70 W",
     "power.idle",
     ["70 W: must be below the limit of 35 W"]),
    ("variant_shape", "H100-SXM5-80GB: {}", "H100-SXM5-80GB: 80 GB", "H100-SXM5-80GB: 80 GB", "variants.H100-SXM5-80GB",
     ["must map dotted paths to values"]),
    # the file as YAML
    ("tab", "  - name: hbm", "\t- name: hbm", "\t- name: hbm", None,
     ["is not valid YAML", "indent with spaces, not tabs"]),
    ("open_brace", CLOCK, "clock: {{value: 1.83 GHz", "cores:", None, ["is not valid YAML"]),
    ("alias", "vendor: NVIDIA\nkind: gpu", "vendor: &v NVIDIA\nkind: *v", "kind: *v", None, ["uses a YAML alias (*v)"]),
    ("merge", "overheads:\n", "overheads:\n  <<: {}\n", "<<: {}", "overheads", ["uses a YAML merge key"]),
    ("tag", "cores: {value: 132", "cores: {value: !!float 132", "!!float", None, ["uses the YAML tag"]),
    ("second_document", "vendor: NVIDIA\n", "vendor: NVIDIA\n---\n", "---", None,
     ["is not valid YAML", "single document"]),
    ("control_character", "vendor: NVIDIA", "vendor: NVI\x07DIA", "NVI\x07", None, ["is not valid YAML"]),
]  # fmt: skip


def load(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    load_chip(path)


def problems(tmp_path: Path, text: str | bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("old", "new", "marker", "key", "parts"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_one_fault(tmp_path: Path, old: str, new: str, marker: str, key: str | None, parts: list[str]) -> None:
    text = good()
    assert old in text
    damaged = text.replace(old, new, 1)
    (message,) = problems(tmp_path, damaged)
    line = damaged[: damaged.index(marker)].count("\n") + 1
    start = f"{tmp_path / 'x.yaml'}:{line}: " + (f"{key}: " if key else "")
    assert message.startswith(start)
    for part in parts:
        assert part in message


def test_all_faults_come_at_once_in_line_order(tmp_path: Path) -> None:
    text = (
        good()
        .replace("as_of: 2026-05", "as_of: May")  # late in the file
        .replace("cores: {value: 132", "cores: {value: -1")  # early
        .replace("idle: {value: 70 W", "idle: {value: 900 W")
        .replace("    shared_bus: true", "    shared_buss: true")
        .replace("vendor: NVIDIA\n", "")  # missing: reported at the start of the mapping
    )
    found = problems(tmp_path, text)
    lines = [int(re.match(r".*?x\.yaml:(\d+): ", problem).group(1)) for problem in found]  # type: ignore[union-attr]
    assert lines == sorted(lines)
    keys = [problem.split(": ")[1] for problem in found]
    # without its shared bus the memory may not have turn-around times either
    assert keys == [
        "vendor", "cores", "memories.hbm.shared_buss", "memories.hbm.read_to_write", "memories.hbm.write_to_read",
        "power.idle", "price.as_of",
    ]  # fmt: skip


def test_missing_sections(tmp_path: Path) -> None:
    found = problems(tmp_path, "name: x\ntitle: X\nvendor: none\nkind: example\nexecution: tile_wave\n")
    missing = {problem.split(": ")[1] for problem in found}
    assert missing == {"clock", "cores", "compute", "memories", "mapping", "power", "writability", "sources"}
    assert all("is missing, expected" in problem for problem in found)


def test_lists_may_not_be_empty(tmp_path: Path) -> None:
    text = re.sub(r"\ncompute:\n.*?\n\nmemories", "\ncompute: []\n\nmemories", good(), flags=re.S)
    (problem,) = problems(tmp_path, text)
    assert "compute: must be a list of items" in problem
    assert "found an empty list" in problem


def test_only_special_functions_compute_nothing(tmp_path: Path) -> None:
    text = re.sub(r"\n  - name: tensor_core\n.*?\n(?=  - name: sfu)", "\n", good(), flags=re.S)
    text = re.sub(r"\nvariants:\n.*?\n\n", "\n\n", text, flags=re.S)
    (problem,) = problems(tmp_path, text)
    assert problem.endswith("compute: needs a matrix or a vector unit")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "x.yaml: is empty"),
        (b"# a comment only\n", "x.yaml: is empty"),
        (b"- 1\n- 2\n", "x.yaml:1: must be a mapping of keys to values, found a list of 2"),
        (b"name\n", "x.yaml:1: must be a mapping of keys to values, found the text 'name'"),
        (b"name: x\ntitle: caf\xe9\n", "x.yaml:2: is not UTF-8 text (byte 0xe9)"),
        (b"a: " + b"[" * 100_000, "x.yaml:1: is nested more than 50 levels deep"),
        (b"? [a, b]\n: 1\n", "x.yaml:1: a key must be plain text"),
    ],
)
def test_files_that_are_no_chip(tmp_path: Path, content: bytes, part: str) -> None:
    (problem,) = problems(tmp_path, content)
    assert part in problem


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: no such file"):
        load_chip(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="no such file; h100 is a built-in chip, use that name"):
        load_chip(tmp_path / "h100.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_chip(tmp_path)


def test_unknown_chip_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load_chip("h1000")
    assert "unknown chip 'h1000', did you mean h100 or " in str(caught.value)
    assert "; available: a100, " in str(caught.value)
    assert "tiny_gpu" in str(caught.value)


def test_messages_name_files_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = problems(tmp_path, good().replace(HBM_BANDWIDTH, hbm("-3 TB/s")))
    assert problem.startswith("x.yaml:")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_refused_but_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    text = find("hw_configs", "tiny_turnaround", ".yaml").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        end = start + data.draw(st.integers(0, 40))
        junk = data.draw(
            st.text(max_size=4) | st.sampled_from(["- ", ": ", "{}", "[]", "null", "name: x", "\n  ", ".nan", "1e9"])
        )
        text = text[:start] + junk + text[end:]
    with contextlib.suppress(ConfigError):
        load(tmp_path, text.encode("utf-8", "surrogatepass"))


def test_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    load(tmp_path, b"\xef\xbb\xbf" + good().replace("\n", "\r\n").encode())


SECRET = "a line of words that is nobody's business but its own"


@pytest.mark.parametrize(
    "content",
    [
        SECRET,  # plain text is one long YAML scalar
        f"- {SECRET}\n- {SECRET}",
        f"{SECRET}: 1\nname: {SECRET}",
        f"clock: {SECRET}\n{SECRET}: {SECRET}\nkind: {SECRET}\ncores: {{value: {SECRET}, source: {SECRET}}}",
        f"clock: {{value: 7 {SECRET.replace(' ', '_')}, source: x, certainty: {SECRET}}}",
        f"cores: *{SECRET.replace(' ', '_')}",
        f"cores: !{SECRET.replace(' ', '_')} 1",
        f"{SECRET}: 1\n{SECRET}: 2",
    ],
)
def test_messages_hold_little_of_a_file_that_is_none_of_ours(tmp_path, content):
    path = tmp_path / "foreign.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_chip(path)
    assert str(path) in str(caught.value)
    told = str(caught.value).replace("_", " ")
    assert not any(SECRET[i : i + 28] in told for i in range(len(SECRET) - 28))


def test_a_file_of_another_kind_is_said_to_be_one(tmp_path):
    path = tmp_path / "compose.yaml"
    path.write_text("# services\nname: web\nservices: {one: {image: x}}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_chip(path)
    assert str(caught.value) == (
        f"{path}:2: is not a chip file, it has none of the keys execution, clock, cores, compute, memories"
    )
