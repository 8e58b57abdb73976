"""Documentation against code: every name, key, column, command and formula that the documents state."""

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest

import ttt_sim
from tests.unit.trace_tools import TOY, Totals, is_kind, kinds, one_call, totals
from ttt_sim.chip import Chip
from ttt_sim.cli import _parser, main
from ttt_sim.config.chip_schema import CHIP
from ttt_sim.config.fields import Choice, Field
from ttt_sim.config.groups import Group, Items
from ttt_sim.drift import COLUMNS as DRIFT_COLUMNS
from ttt_sim.drift import LARGEST, STORAGES
from ttt_sim.lint import lint_file
from ttt_sim.model import Carry, KVSettings, MethodSettings, TTTSettings, WeightWrite
from ttt_sim.model_config import PRESETS
from ttt_sim.ops import OP_KINDS, Role, Trace
from ttt_sim.report.data import COLUMNS as REPORT_COLUMNS
from ttt_sim.report.figures import FIGURES
from ttt_sim.simulation import PointResult
from ttt_sim.trace_io.table import COLUMNS, TENSOR_COLUMNS
from ttt_sim.units import DIMENSIONS, parse_quantity
from ttt_sim.workload import CONTEXT_METHODS, METHODS, build_trace, state_per_sequence

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE = re.compile(r"`([^`]+)`")


class Table(NamedTuple):
    heading: str
    columns: list[str]
    rows: list[list[str]]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tables(name: str) -> Iterator[Table]:
    """Every Markdown table of a document, with the heading that it stands under."""
    heading, block = "", list[list[str]]()
    for line in [*text_of(name).splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif block:
            yield Table(heading, block[0], block[2:])
            block = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def table(name: str, heading: str, first_column: str) -> Table:
    """The tables under headings that begin like this and with this first column, as one."""
    found = [t for t in tables(name) if t.heading.startswith(heading) and t.columns[0] == first_column]
    assert found, f"{name} has no table of {first_column} under {heading}"
    return Table(heading, found[0].columns, [row for t in found for row in t.rows])


def names(t: Table) -> list[str]:
    """What stands as code in the first column."""
    return [name for row in t.rows for name in CODE.findall(row[0])]


def block(name: str, language: str, *, after: str = "") -> str:
    """The first fenced block of a language after some text."""
    match = re.search(rf"```{language}\n(.*?)```", text_of(name).partition(after)[2] if after else text_of(name), re.S)
    assert match is not None
    return match.group(1)


# --- all documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_accepted(path: Path) -> None:
    """Commands in the text parse; what they name may be a placeholder."""
    text = path.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"```\n(.*?)```", text, re.S))
    for command in re.findall(r"^ttt_sim (.+)$", fenced, re.M) + re.findall(r"`ttt_sim ([^`]+)`", text):
        _parser().parse_args(shlex.split(command, comments=True))


def test_readme_lists_commands_and_targets() -> None:
    commands = table("README.md", "Commands", "Command")
    (subparsers,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert [name.split()[1] for name in names(commands)] == list(subparsers)
    options = {option for action in subparsers["run"]._actions for option in action.option_strings}
    assert set(names(table("README.md", "Commands", "Option"))) <= options
    targets = re.search(r"^\.PHONY: (.+)$", text_of("Makefile"), re.M)
    assert targets is not None
    assert sorted(names(table("README.md", "Commands", "Make target"))) == sorted(
        f"make {target}" for target in targets.group(1).split()
    )


def test_readme_shows_what_the_sample_report_says() -> None:
    """The example of output is that of the committed report, line breaks apart."""
    example = next(b for b in re.findall(r"```\n(.*?)```", text_of("README.md"), re.S) if b.startswith("- "))
    bullets = [" ".join(bullet.split()) for bullet in re.split(r"^- ", example, flags=re.M)[1:]]
    report = text_of("reports/sample/README.md").splitlines()
    assert [f"- {bullet}" for bullet in bullets] == [line for line in report if line.startswith("- ")][: len(bullets)]
    assert f"has {len(FIGURES)} figures" in text_of("README.md")


def test_architecture_names_every_module() -> None:
    package = ROOT / "ttt_sim"
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    listed = names(table("ARCHITECTURE.md", "Modules", "Module"))
    assert sorted(listed) == sorted(name for name in modules if not name.endswith("__init__"))


# --- chip files -------------------------------------------------------------------------------------------------------


def section_fields(heading: str) -> dict[str, Field]:
    """What a table of the chip format must list, by the name that it uses."""
    if heading == "Top level":
        return dict(CHIP.fields)
    found: dict[str, Field] = {}
    for section in heading.split(", "):
        group = CHIP.fields[section]
        if isinstance(group, Items):
            group = group.item
        assert isinstance(group, Group)
        prefix = f"{section}." if ", " in heading else ""
        found |= {f"{prefix}{key}": field for key, field in group.fields.items()}
    return found


@pytest.mark.parametrize(
    "heading",
    ["Top level", "compute", "memories", "links", "mapping", "library", "overheads, power, price, writability"],
)
def test_chip_keys_are_documented(heading: str) -> None:
    fields = section_fields(heading)
    documented = table("docs/chip_files.md", heading, "Key")
    assert sorted(names(documented)) == sorted(fields)
    for row in documented.rows:
        for key in CODE.findall(row[0]):
            assert (row[1] == "yes") == fields[key].required, key
            if isinstance(field := fields[key], Choice):
                missing = [option for option in field.options if re.search(rf"\b{option}\b", row[2]) is None]
                assert not missing, key


def test_units_of_chip_files() -> None:
    for row in table("docs/chip_files.md", "Numbers", "Quantity").rows:
        for example in CODE.findall(row[2]):
            parse_quantity(example, *DIMENSIONS)


def test_chip_example_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "my_chip.yaml"
    path.write_text(block("docs/chip_files.md", "yaml", after="## A complete example"), encoding="utf-8")
    assert [finding for finding in lint_file(path) if finding.severity != "note"] == []
    assert ttt_sim.simulate(path, "toy", "ttt", ttt="toy", phase="prefill", context=160).record["fits"] is True


def expected_output(shown: list[str], printed: list[str]) -> bool:
    """Whether a command printed what a document shows; a line of dots stands for any number of lines."""
    at = 0
    anywhere = False
    for line in shown:
        if line == "...":
            anywhere = True
            continue
        place = next((i for i in range(at, len(printed)) if printed[i] == line), None) if anywhere else at
        if place is None or place >= len(printed) or printed[place] != line:
            return False
        at, anywhere = place + 1, False
    return anywhere or at == len(printed)


def test_adding_a_chip_shows_what_the_commands_print(tmp_path: Path, monkeypatch, capsys) -> None:
    document = "docs/adding_a_chip.md"
    final, mistakes = re.findall(r"```yaml\n(.*?)```", text_of(document), re.S)
    draft = final.splitlines()
    for line in mistakes.splitlines():
        key = line.partition("{")[0]
        draft[next(i for i, other in enumerate(draft) if other.startswith(key))] = line
    (tmp_path / "draft").mkdir()
    (tmp_path / "l40s.yaml").write_text(final, encoding="utf-8")
    (tmp_path / "draft" / "l40s.yaml").write_text("\n".join(draft) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n\$ ttt_sim ([^\n]+)\n(.*?)```", text_of(document), re.S)
    assert len(blocks) == 4
    for command, shown in blocks:
        status = main(shlex.split(command))
        printed = capsys.readouterr().out.splitlines()
        assert expected_output(shown.splitlines(), printed), "\n".join(printed)
        assert status == (1 if "draft" in command else 0)


# --- TTT settings -----------------------------------------------------------------------------------------------------


def test_ttt_settings_are_documented() -> None:
    settings = table("docs/ttt_settings.md", "TTT settings", "Setting")
    assert names(settings) == [field.name for field in dataclasses.fields(TTTSettings)]
    for row in settings.rows:
        name, value = CODE.findall(row[0])[0], getattr(TTTSettings(), CODE.findall(row[0])[0])
        shown = "nothing" if value is None else str(value).lower()
        assert row[1].strip("`").startswith(shown), name
    assert names(table("docs/ttt_settings.md", "Presets", "Preset")) == list(PRESETS)


def test_ttt_settings_example_loads(tmp_path: Path) -> None:
    path = tmp_path / "my_ttt.yaml"
    path.write_text(block("docs/ttt_settings.md", "yaml"), encoding="utf-8")
    assert ttt_sim.load_ttt(path) == TTTSettings(
        chunk_tokens=2048, target="input_embed", carry="keep_z", weight_write="fused", fast_dtype="fp32"
    )


# --- number formats ---------------------------------------------------------------------------------------------------


def test_number_formats_are_documented() -> None:
    document = "docs/number_formats.md"
    assert names(table(document, "What is computed", "Format")) == list(STORAGES)
    assert names(table(document, "Files", "Column")) == list(DRIFT_COLUMNS)
    (subparsers,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = {option: a for a in subparsers["drift"]._actions for option in a.option_strings if a.dest != "help"}
    options = table(document, "Files", "Option")
    assert names(options) == list(actions)
    for row in options.rows:
        defaults = ", ".join(str(actions[option].default) for option in CODE.findall(row[0]))
        assert row[1] == defaults
    assert [LARGEST[name] for name in ("width", "ff", "chunk")] == [256, 1024, 8192]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_trace_columns_are_documented() -> None:
    assert sorted(names(table("docs/trace_format.md", "Columns", "Column"))) == sorted(COLUMNS)
    tensors = table("docs/trace_format.md", "Tensors", "Column")
    assert names(tensors) == list(TENSOR_COLUMNS)
    roles = next(row[1] for row in tensors.rows if row[0] == "`role`")
    assert sorted(CODE.findall(roles)) == sorted(role.name.lower() for role in Role)


def test_trace_example_can_be_replayed(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "example.csv"
    path.write_text(block("docs/trace_format.md", "csv"), encoding="utf-8")
    trace = ttt_sim.load_trace(path)
    assert trace.flops.tolist() == [2 * 32 * 64 * 192] * 3
    ops = ttt_sim.simulate_trace(ttt_sim.load_chip("tiny_gpu"), trace, engine=engine).ops()
    start, finish = ops["start_cycles"].tolist(), ops["finish_cycles"].tolist()
    assert ops["stream"].tolist() == ["forward", "update", "forward"]
    assert start[1] >= finish[0]  # overwrites what the first apply reads
    assert start[2] >= finish[1]  # reads what the update writes
    assert ops["main_write_bytes"].tolist() == [32 * 64 * 2, 64 * 192 * 2, 32 * 64 * 2]


# --- workloads --------------------------------------------------------------------------------------------------------

WORKLOADS = "docs/workloads.md"
OTHER_METHODS = "docs/methods.md"


def test_op_kinds_are_documented() -> None:
    ids = [t for page in (WORKLOADS, OTHER_METHODS) for t in tables(page) if t.columns[0] == "Id"]
    documented = {(row[0], CODE.findall(row[1])[0]) for t in ids for row in t.rows}
    assert documented == {(kind.spec, kind.name) for kind in OP_KINDS}


def test_methods_and_policies_are_documented() -> None:
    assert names(table(WORKLOADS, "What attention keeps", "Method")) == list(CONTEXT_METHODS)
    others = [name for name in METHODS if name not in CONTEXT_METHODS]
    assert names(table(OTHER_METHODS, "Ways to adapt", "Method")) == others
    assert sorted(names(table(WORKLOADS, "How a delta", "Variant"))) == sorted(get_args(WeightWrite))
    assert names(table(WORKLOADS, "The open chunk", "Policy")) == list(get_args(Carry))


def value(formula: str, symbols: Mapping[str, int]) -> int:
    """A formula of the document in numbers."""
    python = formula.replace("·", "*").replace("−", "-")
    assert re.fullmatch(r"[A-Za-z_0-9 ()+*,-]+", python), formula
    return int(eval(python, {"__builtins__": {}, "min": min}, dict(symbols)))


def cell(row: list[str], columns: list[str], column: str, symbols: Mapping[str, int]) -> int:
    """Value of a cell that holds one formula or nothing."""
    found = CODE.findall(row[columns.index(column)]) if column in columns else []
    return value(found[0], symbols) if found else 0


def formula_rows(heading: str) -> dict[str, tuple[list[str], list[str]]]:
    """Rows with formulas under a heading by op kind, and by "kind (qualifier)" where kinds have several rows."""
    t = table(WORKLOADS, heading, "Id")
    labels = [row[1].replace("`", "") for row in t.rows]
    kinds_of = [label.split(" ")[0] for label in labels]
    return {
        label if kinds_of.count(kind) > 1 else kind: (row, t.columns)
        for label, kind, row in zip(labels, kinds_of, t.rows, strict=True)
    }


def assert_op_costs(trace: Trace, kind: str, row: list[str], columns: list[str], symbols: Mapping[str, int]) -> None:
    """The first op of a kind has the FLOPs, lane operations and bytes that a row of the document gives."""
    mask = np.zeros(trace.n_ops, dtype=np.bool_)
    mask[int(np.argmax(is_kind(trace, kind)))] = True
    assert is_kind(trace, kind).any(), kind
    assert totals(trace, mask) == Totals(
        flops=cell(row, columns, "FLOPs", symbols),
        vector_ops=cell(row, columns, "Lane operations", symbols),
        read_bytes=cell(row, columns, "Bytes read", symbols),
        write_bytes=cell(row, columns, "Bytes written", symbols),
    ), kind
    special = row[columns.index("of which special")] if "of which special" in columns else ""
    tagged = dict(re.findall(r"(\w+) `([^`]+)`", special))
    for name in ("exp", "rsqrt", "div"):
        expected = value(tagged[name], symbols) if name in tagged else 0
        assert int(getattr(trace, f"{name}_ops")[mask][0]) == expected, (kind, name)


#: The toy model and a batch of three, bf16; fast weights in fp32, so that no two sizes are equal by chance.
BATCH, CHUNK, BF16, FP32 = 3, 32, 2, 4
SHAPE = {
    "B": BATCH, "d": 64, "f": 192, "H": 4, "G": 2, "h": 16, "L": 4, "s": 2, "V": 256, "C": CHUNK, "e": BF16,
    "e_f": FP32, "e_g": FP32, "c": 2 * 2 * 16 * BF16,
}  # fmt: skip


def in_place(**changes: Any) -> MethodSettings:
    settings = dataclasses.replace(TTTSettings(layers=(0, 2), chunk_tokens=CHUNK, fast_dtype="fp32"), **changes)
    return MethodSettings(name="ttt", kv=KVSettings(), ttt=settings)


def test_forward_formulas_with_a_full_cache() -> None:
    # rows 41 to 47 see 41 to 47 keys: 308 pairs
    symbols = SHAPE | {"m": 7, "p": 40, "N": 41 + 42 + 43 + 44 + 45 + 46 + 47, "K": 47, "A": 7}
    trace = build_trace(TOY, METHODS["kv"].settings(None, None, None), one_call(40, 7, batch=BATCH, logits=True))
    rows = formula_rows("Forward pass")
    for kind in set(kinds(trace)) - {"attention"}:
        assert_op_costs(trace, kind, *rows[kind], symbols)
    assert_op_costs(trace, "attention", *rows["attention (full)"], symbols)
    fast = build_trace(TOY, in_place(chunk_tokens=64), one_call(40, 7, batch=BATCH))
    assert_op_costs(fast, "fast_apply", *rows["fast_apply"], symbols)
    assert set(rows) - set(kinds(trace)) == {"attention (full)", "attention (window)", "fast_apply"}


@pytest.mark.parametrize(
    ("position", "tokens", "pairs", "read", "appended"),
    # a window of 16: all 7 rows see 16 keys; 30 rows after 5 see 6 to 15 (105 pairs), then 20 times 16
    [(40, 7, 7 * 16, 15, 7), (5, 30, 105 + 20 * 16, 5, 16)],
)
def test_forward_formulas_with_a_window(position: int, tokens: int, pairs: int, read: int, appended: int) -> None:
    symbols = SHAPE | {"m": tokens, "p": position, "w": 16, "N": pairs, "K": read, "A": appended}
    trace = build_trace(
        TOY, METHODS["kv_window"].settings(16, None, None), one_call(position, tokens, batch=BATCH, logits=True)
    )
    rows = formula_rows("Forward pass")
    assert_op_costs(trace, "attention", *rows["attention (window)"], symbols)
    assert_op_costs(trace, "kv_append", *rows["kv_append"], symbols)
    for name, expected in (("K", read), ("A", appended)):
        row = next(r for r in table(WORKLOADS, "Symbols", "Symbol").rows if r[0] == f"`{name}`")
        assert value(CODE.findall(row[1])[-1], symbols) == expected


def test_quantised_cache_formulas() -> None:
    symbols = SHAPE | {"K": 47, "A": 7}
    call = one_call(40, 7, batch=BATCH)
    plain, quantised = (build_trace(TOY, METHODS["kv"].settings(None, dtype, None), call) for dtype in (None, "int8"))
    note = next(line for line in re.split(r"\n\* ", text_of(WORKLOADS)) if line.startswith("With a quantised cache"))
    for kind, formula in zip(("kv_append", "attention"), CODE.findall(note)[:2], strict=True):
        more = totals(quantised, is_kind(quantised, kind)).vector_ops - totals(plain, is_kind(plain, kind)).vector_ops
        assert more == TOY.n_layers * value(formula, symbols), kind


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("target_conv", "target_proj", "delta_gemm", "delta_scale", "weight_write")),
        ({"contraction": "outer_first"}, ("target_conv", "outer_gemm", "outer_proj", "delta_scale", "weight_write")),
        ({"clip": 1.0}, ("delta_norm",)),
        ({"weight_write": "fused"}, ("delta_write",)),
    ],
    ids=["project_first", "outer_first", "clip", "fused"],
)
def test_update_formulas(settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    trace = build_trace(TOY, in_place(**settings), one_call(0, CHUNK, batch=BATCH))
    rows = formula_rows("Update of a fast weight")
    for kind in (*expected, "fast_init"):
        assert_op_costs(trace, kind, *rows[kind], SHAPE)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("target_conv", "target_proj", "delta_gemm", "delta_scale", "weight_write", "down_proj", "fast_apply")),
        ({"contraction": "outer_first", "clip": 1.0}, ("outer_gemm", "outer_proj", "delta_norm", "fast_init")),
        ({"weight_write": "fused"}, ("delta_write",)),
        ({"carry": "online"}, ("online_update",)),
    ],
    ids=["project_first", "outer_first", "fused", "online"],
)
def test_formulas_of_part_of_a_matrix(settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    """16 of 64 rows. The first layer has TTT, so the first down_proj is one of a TTT layer."""
    # after 8 rows of a chunk and their convolution, an online step takes in one row
    position, tokens = (40, 1) if "carry" in settings else (0, CHUNK)
    trace = build_trace(TOY, in_place(update_rows=16, **settings), one_call(position, tokens, batch=BATCH))
    rows = formula_rows("Updates of part of a matrix")
    for kind in expected:
        assert_op_costs(trace, kind, *rows[kind], SHAPE | {"u": 16, "m": CHUNK, "n": 1})


@pytest.mark.parametrize("variant", get_args(WeightWrite))
def test_weight_write_formulas(variant: WeightWrite) -> None:
    fast, delta = ("bf16", FP32) if variant == "master" else ("fp32", FP32)
    symbols = SHAPE | {"e_f": BF16 if variant == "master" else FP32, "e_g": delta}
    trace = build_trace(TOY, in_place(weight_write=variant, fast_dtype=fast), one_call(0, CHUNK, batch=BATCH))
    after = totals(trace, is_kind(trace, "delta_scale", "weight_write", "delta_write"))
    written = after.write_bytes + totals(trace, is_kind(trace, "delta_gemm")).write_bytes
    # The fused GEMM reads its operands as well: C rows of d and of f.
    operands = 2 * BATCH * CHUNK * (64 + 192) * BF16 if is_kind(trace, "delta_write").any() else 0
    t = table(WORKLOADS, "How a delta", "Variant")
    row = next(row for row in t.rows if row[0] == f"`{variant}`")
    per_layer_and_sequence = 2 * BATCH
    assert after.read_bytes - operands == per_layer_and_sequence * cell(row, t.columns, "Bytes read", symbols)
    assert written == per_layer_and_sequence * cell(row, t.columns, "Bytes written", symbols)


@pytest.mark.parametrize("carry", ["official", "ring", "keep_z"])
def test_carry_formulas(carry: Carry) -> None:
    t = table(WORKLOADS, "The open chunk", "Policy")
    row = next(row for row in t.rows if row[0] == f"`{carry}`")
    kept = state_per_sequence(TOY, in_place(carry=carry), 100, "bf16").carry_bytes
    assert kept == 2 * value(CODE.findall(row[1])[0], SHAPE)  # two TTT layers


def test_carry_append_and_online_update_formulas() -> None:
    rows = {CODE.findall(row[1])[0]: CODE.findall(row[2]) for row in table(WORKLOADS, "The open chunk", "Id").rows}
    # tokens 40 to 46 join a chunk that has 8 rows; an online step takes in one row
    appended = build_trace(TOY, in_place(), one_call(40, 7, batch=BATCH))
    moved = totals(appended, is_kind(appended, "carry_append") & (appended.layer == 0))
    read, written = rows["carry_append"][-2:]
    symbols = SHAPE | {"r": 8, "m": 7, "n": 1}
    assert (moved.read_bytes, moved.write_bytes) == (value(read, symbols), value(written, symbols))
    online = build_trace(TOY, in_place(carry="online"), one_call(40, 1, batch=BATCH))
    folded = totals(online, is_kind(online, "online_update") & (online.layer == 0))
    flops, read, written = rows["online_update"][-3:]
    assert (folded.flops, folded.read_bytes, folded.write_bytes) == tuple(
        value(formula, symbols) for formula in (flops, read, written)
    )


def test_state_formulas() -> None:
    rows = {row[0]: CODE.findall(row[1]) for row in table(WORKLOADS, "State per sequence", "Part").rows}
    symbols = SHAPE | {"T": 100, "w": 16}
    full, windowed = rows["KV cache"]
    settings = in_place()
    assert state_per_sequence(TOY, settings, 100, "bf16").kv_bytes == value(full, symbols)
    ring = dataclasses.replace(settings, name="ttt_window", kv=KVSettings(window_tokens=16))
    assert state_per_sequence(TOY, ring, 100, "bf16").kv_bytes == value(windowed, symbols)
    plain, _, master = rows["fast weights"]
    assert state_per_sequence(TOY, settings, 100, "bf16").fast_weight_bytes == value(plain, symbols)
    shadowed = in_place(weight_write="master", fast_dtype="bf16")
    assert state_per_sequence(TOY, shadowed, 100, "bf16").fast_weight_bytes == value(master, symbols | {"e_f": BF16})


# --- results ----------------------------------------------------------------------------------------------------------

RESULTS = "docs/results.md"


def parts_of(chip: Chip) -> list[str]:
    return [*(level.name for level in chip.memories), *(unit.name for unit in chip.units)]


def expanded(documented: list[str], chip: Chip) -> list[str]:
    """Names with ``<unit>`` replaced by each unit of a chip."""
    return sorted(
        name.replace("<unit>", part)
        for name in documented
        for part in (parts_of(chip) if "<unit>" in name else [""])
    )  # fmt: skip


@pytest.fixture(scope="module")
def decoded() -> PointResult:
    return ttt_sim.simulate("tiny_gpu", "toy", "ttt_window", ttt="toy", window=64, phase="decode", context=100, batch=2)


def test_record_fields_are_documented(decoded: PointResult) -> None:
    documented = names(table(RESULTS, "The record of a point", "Field"))
    assert expanded(documented, decoded.point.chip) == sorted(decoded.record)


def test_fields_of_a_point_that_does_not_fit_are_documented() -> None:
    chip = ttt_sim.load_chip("tiny_gpu", overrides={"memories.hbm.capacity": "64 KiB"})
    record = ttt_sim.simulate(chip, "toy", "kv", context=100).record
    first = next(t for t in tables(RESULTS) if t.heading == "The record of a point")
    assert record["fits"] is False
    assert sorted(names(first)) == sorted(record)


@pytest.mark.parametrize("frame", ["ops", "units", "memory"])
def test_frame_columns_are_documented(decoded: PointResult, frame: str) -> None:
    documented = next(t for t in tables(RESULTS) if t.heading.startswith(f"`{frame}()`"))
    assert decoded.result is not None
    assert names(documented) == list(getattr(decoded.result, frame)().columns)


def test_summary_keys_are_documented(decoded: PointResult) -> None:
    assert decoded.result is not None
    documented = expanded(list(CODE.findall(text_of(RESULTS))), decoded.point.chip)
    assert set(decoded.result.summary()) <= set(documented)


def test_report_frames_are_documented() -> None:
    frames = table(RESULTS, "The report folder", "File")
    key = {"method", "phase", "context_tokens", "batch"}
    rows = {name: CODE.findall(row[2]) for row in frames.rows for name in CODE.findall(row[0]) if len(row) == 3}
    assert sorted(rows) == sorted(set(REPORT_COLUMNS) - {"points"})
    for name, columns in rows.items():
        assert set(REPORT_COLUMNS[name]) - key == set(columns), name


def test_summary_of_a_report_is_documented() -> None:
    sample = json.loads(text_of("reports/sample/summary.json"))
    assert sorted(names(table(RESULTS, "The report folder", "Key"))) == sorted(sample)
