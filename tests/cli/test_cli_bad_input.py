"""Wrong input ends with status 2 and one message that names what was wrong, prints no traceback and writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import ROOT, contents, environment, ttt_sim
from ttt_sim.data_files import names
from ttt_sim.ops import OP_KINDS
from ttt_sim.workload import METHODS

#: Too large to simulate by mistake: a case that is not refused shows at once.
RUN = ("run", "tiny_gpu", "--model", "toy", "--context", "64", "--batch", "1", "--workers", "1", "--out", "report")
REPLAY = ("run", "tiny_gpu", "--trace")
DRIFT = ("drift", "--tokens", "64", "--chunk", "32", "--width", "4", "--ff", "8", "--out", "drift")

MODEL = (ROOT / "model_configs" / "toy.json").read_text(encoding="utf-8")
CHIP = (ROOT / "hw_configs" / "tiny_gpu.yaml").read_text(encoding="utf-8")
FILES = {
    "negative.yaml": CHIP.replace("value: 1 GHz", "value: -1 GHz"),
    "text.yaml": CHIP.replace("value: 1 GHz", "value: fast"),
    "misspelt.yaml": CHIP.replace("clock:", "clok:"),
    "twice.yaml": CHIP + "\nvendor: again\n",
    "broken.yaml": "name: [1, 2\n",
    "other_family.json": '{"model_type": "gpt2"}',
    "no_layers.json": MODEL.replace("num_hidden_layers", "layers"),
    "not.json": "{",
    "settings.yaml": "chunk_tokens: 0\n",
    "misspelt_settings.yaml": "chunk_token: 32\n",
    "notes.txt": "mine\n",
    "foreign/notes.txt": "mine\n",
    "other_tool/summary.json": '{"generator": "another tool", "files": ["summary.json"]}',
    "mixed/summary.json": '{"generator": "ttt_sim report", "files": ["summary.json"]}',
    "mixed/notes.txt": "mine\n",
    "empty.csv": "",
    "unknown_op.csv": "kind,m,n,k\nq_prj,4,4,4\n",
    "negative.csv": "kind,m,n,k\nq_proj,-4,4,4\n",
    "words.csv": "kind,m,n,k\nq_proj,four,4,4\n",
    "no_column.csv": "kind,m\nq_proj,4\n",
    "unknown_column.csv": "kind,m,n,kk\nq_proj,4,4,4\n",
    "cycle.csv": "kind,m,n,k,after\nq_proj,4,4,4,1\nk_proj,4,4,4,0\n",
    "early_read.csv": (
        "kind,phase,m,n,k,reads,writes\n"
        "fast_apply,forward,4,4,4,fast_weight.0@2:32,y@0:32\n"
        "weight_write,weight_write,4,4,0,fast_weight.0@1:32,fast_weight.0@2:32\n"
    ),
    "operand.csv": "kind,m,n,k,reads\nq_proj,4,4,4,x:32\n",
    "unknown_key.json": '{"op": []}',
    "words.parquet": "no parquet\n",
}

#: (arguments, words that the message must hold)
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # commands and options
    "no command": ((), ("COMMAND",)),
    "unknown command": (("rnu", "h100"), ("'rnu'", "did you mean run")),
    "no chip": (("run",), ("CHIP",)),
    "superfluous argument": (("chips", "all"), ("'all'",)),
    "unknown option": ((*RUN, "--contxt", "4k"), ("--contxt", "did you mean --context")),
    "abbreviated option": ((*RUN, "--mod", "toy"), ("--mod", "did you mean --model")),
    "unknown option with a value": ((*RUN, "--bach=4"), ("--bach", "did you mean --batch")),
    "option of another command": (("chips", "--batch", "4"), ("--batch",)),
    "option without value": (("run", "h100", "--batch"), ("--batch",)),
    "option that a replay ignores": (("run", "h100", "--trace", "t.csv", "--batch", "4"), ("--batch", "saved trace")),
    # chips
    "unknown chip": (("run", "h10"), ("'h10'", "did you mean h100", "tiny_gpu")),
    "unknown chip, show": (("show", "tiny_gpo"), ("'tiny_gpo'", "did you mean tiny_gpu")),
    "unknown chip, lint": (("lint", "a100x"), ("'a100x'",)),
    "missing chip file": (("run", "mine.yaml"), ("mine.yaml", "no such file")),
    "unknown variant": (("show", "h100", "--variant", "H100-PCI"), ("'H100-PCI'", "did you mean H100-PCIe")),
    "negative chip value": (("run", "negative.yaml"), ("negative.yaml:7", "clock", "-1 GHz", "greater than 0")),
    "text for a chip value": (("show", "text.yaml"), ("text.yaml:7", "clock", "'fast'", "1.83 GHz")),
    "misspelt chip key": (("lint", "misspelt.yaml"), ("misspelt.yaml:7", "clok", "did you mean clock")),
    "chip key twice": (("run", "twice.yaml"), ("twice.yaml", "vendor")),
    "chip file that is no YAML": (("run", "broken.yaml"), ("broken.yaml:",)),
    "unknown override": (
        ("run", "h100", "--set", "memories.hbm.read_bandwith=1 TB/s"), ("did you mean memories.hbm.read_bandwidth",)
    ),
    "override of the wrong unit": (("show", "h100", "--set", "clock=1 TB/s"), ("clock", "1 TB/s", "frequency")),
    "override without value": (("show", "h100", "--set", "clock"), ("--set", "'clock'", "PATH=VALUE")),
    "override given twice": (("show", "h100", "--set", "clock=1 GHz", "--set", "clock=2 GHz"), ("clock", "twice")),
    "infinite override": (("show", "h100", "--set", "clock=inf"), ("clock", "inf", "finite")),
    "zero override": (("show", "h100", "--set", "memories.hbm.capacity=0 GiB"), ("hbm.capacity", "greater than 0")),
    # models, methods, engines, dtypes
    "unknown model": ((*RUN, "--model", "Qwen3-4b"), ("'Qwen3-4b'", "did you mean Qwen3-4B")),
    "missing model file": ((*RUN, "--model", "mine.json"), ("mine.json",)),
    "model of another family": ((*RUN, "--model", "other_family.json"), ("other_family.json:1", "gpt2", "qwen3")),
    "model without layers": ((*RUN, "--model", "no_layers.json"), ("no_layers.json", "num_hidden_layers")),
    "model file that is no JSON": ((*RUN, "--model", "not.json"), ("not.json:1",)),
    "unknown method": ((*RUN, "--method", "kv,ttt_windw"), ("'ttt_windw'", "did you mean ttt_window")),
    "empty method": ((*RUN, "--method", "kv,"), ("--method", "'kv,'")),
    "unknown engine": ((*RUN, "--engine", "simpi"), ("'simpi'", "did you mean simpy")),
    "unknown engine of a replay": (("run", "h100", "--trace", "t.csv", "--engine", "simpi"), ("did you mean simpy",)),
    "unknown dtype": ((*RUN, "--dtype", "bf61"), ("--dtype", "'bf61'", "did you mean bf16")),
    "dtype that the chip lacks": ((*RUN, "--dtype", "fp4"), ("tiny_gpu", "fp4", "bf16")),
    "unknown KV dtype": ((*RUN, "--kv-dtype", "int44"), ("'int44'", "did you mean int4")),
    "unknown TTT preset": ((*RUN, "--ttt", "papr"), ("'papr'", "did you mean paper")),
    "TTT file with a zero chunk": ((*RUN, "--ttt", "settings.yaml"), ("settings.yaml:1", "chunk_tokens", "'0'")),
    "TTT file with a misspelt key": ((*RUN, "--ttt", "misspelt_settings.yaml"), ("did you mean chunk_tokens",)),
    "unknown carry": ((*RUN, "--carry", "rign"), ("'rign'", "did you mean ring")),
    "unknown weight write": ((*RUN, "--weight-write", "fuse"), ("'fuse'", "did you mean fused")),
    "unknown phase": (("trace", "--phase", "decod", "-o", "t.csv"), ("--phase", "'decod'", "did you mean decode")),
    "execution style of another matrix unit": ((*RUN, "--set", "execution=event_driven"), ("tiny_gpu", "event_driven")),
    # numbers
    "zero context": ((*RUN, "--context", "0"), ("--context", "'0'", "128k")),
    "negative context": ((*RUN, "--context=-1"), ("--context", "'-1'")),
    "text for a context": ((*RUN, "--context", "1k,long"), ("--context", "'long'")),
    "fraction of a k": ((*RUN, "--context", "1.5k"), ("--context", "'1.5k'")),
    "empty context": ((*RUN, "--context", "1k,,2k"), ("--context", "'1k,,2k'")),
    "huge context": ((*RUN, "--context", "9" * 20), ("--context",)),
    "zero batch": ((*RUN, "--batch", "0"), ("--batch", "0", "at least 1")),
    "negative batch": ((*RUN, "--batch=-1"), ("--batch", "'-1'")),
    "fractional batch": ((*RUN, "--batch", "1.5"), ("--batch", "'1.5'")),
    "huge batch": ((*RUN, "--batch", "1" + "0" * 20), ("1" + "0" * 20, "2^63")),
    "zero chunk": ((*RUN, "--chunk", "0"), ("--chunk", "'0'")),
    "zero window": ((*RUN, "--window", "0"), ("--window", "'0'")),
    "zero call": ((*RUN, "--call", "0"), ("--call", "'0'")),
    "zero workers": ((*RUN, "--workers", "0"), ("--workers", "0", "at least 1")),
    "text for workers": ((*RUN, "--workers", "all"), ("--workers", "'all'")),
    "too little detail": ((*RUN, "--detail", "3"), ("--detail", "3", "16")),
    "zero steps": (("trace", "--phase", "decode", "--steps", "0", "-o", "t.csv"), ("--steps", "0", "at least 1")),
    # number formats of a fast weight
    "unknown format": ((*DRIFT, "--formats", "bf16,fp8_e4m4"), ("--formats", "'fp8_e4m4'", "did you mean fp8_e4m3")),
    "empty format": ((*DRIFT, "--formats", "bf16,"), ("--formats", "''", "fp32_master")),
    "format twice": ((*DRIFT, "--formats", "bf16,bf16"), ("--formats", "'bf16'", "twice")),
    "misspelt clip": ((*DRIFT, "--clip", "none,publshed"), ("--clip", "'publshed'", "did you mean published")),
    "zero clip": ((*DRIFT, "--clip", "0"), ("--clip", "0 is not between 1e-30 and 1e+30")),
    "clip that is no number": ((*DRIFT, "--clip", "nan"), ("--clip", "nan is not between")),
    "clip twice": ((*DRIFT, "--clip", "1e-5,0.00001"), ("--clip", "1e-05", "twice")),
    "negative rate": ((*DRIFT, "--rate=-1"), ("--rate", "-1 is not between 1e-12 and 1e+12")),
    "infinite rate": ((*DRIFT, "--rate", "inf"), ("--rate", "inf is not between")),
    "text for a rate": ((*DRIFT, "--rate", "fast"), ("--rate", "'fast'")),
    "zero tokens of a stream": ((*DRIFT, "--tokens", "0"), ("--tokens", "'0'", "128k")),
    "stream too long": ((*DRIFT, "--tokens", "17M"), ("--tokens", "17825792", "16777216")),
    "stream shorter than a chunk": ((*DRIFT, "--tokens", "31"), ("--tokens", "31", "at least one chunk of 32")),
    "chunk too long": ((*DRIFT, "--tokens", "1M", "--chunk", "9000"), ("--chunk", "9000 is not between 1 and 8192")),
    "zero width": ((*DRIFT, "--width", "0"), ("--width", "0 is not between 1 and 256")),
    "negative width": ((*DRIFT, "--width=-4"), ("--width", "-4 is not between 1 and 256")),
    "width too large": ((*DRIFT, "--ff", "1025"), ("--ff", "1025 is not between 1 and 1024")),
    "text for a width": ((*DRIFT, "--width", "wide"), ("--width", "'wide'")),
    "negative seed": ((*DRIFT, "--seed=-1"), ("--seed", "-1 is not between 0 and")),
    "misspelt option of drift": ((*DRIFT, "--format", "bf16"), ("--format", "did you mean --formats")),
    "drift over another's folder": ((*DRIFT, "--out", "foreign"), ("foreign", "notes.txt")),
    # traces
    "missing trace": ((*REPLAY, "none.csv"), ("none.csv", "No such file")),
    "trace of an unknown ending": ((*REPLAY, "notes.txt"), ("notes.txt", ".csv, .json, .parquet")),
    "empty trace": ((*REPLAY, "empty.csv"), ("empty.csv", "header")),
    "trace with an unknown op": ((*REPLAY, "unknown_op.csv"), ("unknown_op.csv:2", "'q_prj'", "did you mean q_proj")),
    "trace with a negative size": ((*REPLAY, "negative.csv"), ("negative.csv:2", "m", "-4", "at least 1")),
    "trace with text for a size": ((*REPLAY, "words.csv"), ("words.csv:2", "m", "'four'")),
    "trace without a column": ((*REPLAY, "no_column.csv"), ("no_column.csv:1", "missing column n")),
    "trace with an unknown column": ((*REPLAY, "unknown_column.csv"), ("unknown_column.csv:1", "'kk'", "did you mean")),
    "trace with a cycle": ((*REPLAY, "cycle.csv"), ("cycle.csv:2", "cycle", "op 0", "op 1")),
    "trace that reads ahead": ((*REPLAY, "early_read.csv"), ("early_read.csv:2", "fast_weight.0", "2")),
    "trace with a bad operand": ((*REPLAY, "operand.csv"), ("operand.csv:2", "'x:32'", "tensor@version:bytes")),
    "trace with an unknown key": ((*REPLAY, "unknown_key.json"), ("unknown_key.json", "'ops'")),
    "Parquet that is none": ((*REPLAY, "words.parquet"), ("words.parquet", "Parquet")),
    # outputs
    "report to a file": ((*RUN, "--out", "notes.txt"), ("notes.txt", "is a file")),
    "report below a file": ((*RUN, "--out", "notes.txt/report"), ("notes.txt", "is a file")),
    "report over another's folder": ((*RUN, "--out", "foreign"), ("foreign", "notes.txt")),
    "report over another tool's": ((*RUN, "--out", "other_tool"), ("other_tool", "summary.json")),
    "report over one with notes": ((*RUN, "--out", "mixed"), ("mixed", "notes.txt")),
    "report to the current folder": ((*RUN, "--out", "."), ("current folder",)),
    "report to a name too long": ((*RUN, "--out", "x" * 300), ("cannot be written", "too long")),
    "trace of an unknown format": (("trace", "--model", "toy", "-o", "t.xls"), ("t.xls", ".csv, .json, .parquet")),
    "trace to a missing folder": (("trace", "--model", "toy", "-o", "none/t.csv"), ("none/t.csv", "cannot be written")),
    "trace to a folder": (("trace", "--model", "toy", "-o", "folder.csv"), ("folder.csv", "cannot be written")),
    "replay to a file": (("run", "h100", "--trace", "good.csv", "--out", "notes.txt"), ("notes.txt", "is a file")),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {**FILES, "good.csv": "kind,m,n,k\nq_proj,4,4,4\n"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    return tmp_path


def check_refusal(done: subprocess.CompletedProcess[str], words: tuple[str, ...]) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("ttt_sim: error: ")
    assert done.stderr.count("ttt_sim: error:") == 1
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused(case: str, folder: Path) -> None:
    arguments, words = CASES[case]
    before = contents(folder)
    check_refusal(ttt_sim(*arguments, cwd=folder), words)
    assert contents(folder) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes no files")
def test_folder_that_cannot_be_made_is_refused_before_the_simulation(tmp_path: Path) -> None:
    check_refusal(ttt_sim(*RUN, "--out", "/proc/report", cwd=tmp_path), ("/proc/report", "cannot be written"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        check_refusal(ttt_sim(*RUN, cwd=tmp_path), ("report", "Permission denied"))
    finally:
        tmp_path.chmod(0o700)


def test_messages_list_what_there_is(tmp_path: Path) -> None:
    """The lists in the messages are those of the registries and folders, whole."""
    chips = ttt_sim("show", "none", cwd=tmp_path).stderr
    assert f"available: {', '.join(names('hw_configs', '.yaml'))};" in chips
    models = ttt_sim(*RUN, "--model", "none", cwd=tmp_path).stderr
    assert f"available: {', '.join(names('model_configs', '.json'))};" in models
    assert f"methods: {', '.join(METHODS)}" in ttt_sim(*RUN, "--method", "none", cwd=tmp_path).stderr
    (tmp_path / "t.csv").write_text("kind,m,n\nnone,1,1\n", encoding="utf-8")
    ops = ttt_sim(*REPLAY, "t.csv", cwd=tmp_path).stderr
    assert f"allowed: {', '.join(kind.name for kind in OP_KINDS)}" in ops


#: Packages that take long to import; none is needed to print help or to refuse input.
HEAVY = ("pandas", "matplotlib", "numba", "simpy", "joblib", "pyarrow", "rich", "scipy")
QUICK = {
    "help": ("--help",),
    "help of a command": ("run", "--help"),
    "version": ("--version",),
    "unknown command": ("rnu",),
    "unknown chip": ("run", "h10"),
    "bad override": ("run", "h100", "--set", "clock=fast"),
    "unknown model": ("run", "h100", "--model", "none"),
    "unknown method": ("run", "h100", "--method", "none"),
    "unknown engine": ("run", "h100", "--engine", "none"),
    "unknown dtype": ("run", "h100", "--dtype", "none"),
    "unknown KV dtype": ("run", "h100", "--kv-dtype", "none"),
    "unknown TTT settings": ("run", "h100", "--ttt", "none"),
    "bad context": ("run", "h100", "--context", "none"),
    "bad batch": ("run", "h100", "--batch", "none"),
    "bad folder": ("run", "h100", "--out", "."),
    "bad number format": ("drift", "--formats", "none"),
    "bad trace": ("run", "h100", "--trace", "none.csv"),
}


@pytest.mark.parametrize("case", QUICK)
def test_help_and_refusals_import_nothing_slow(case: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ttt_sim.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *QUICK[case]], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "loaded:"
