"""Traces as files: round trips, hand-written files, and what is said about broken ones."""

from __future__ import annotations

import builtins
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.unit.trace_tools import TOY
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.model import Scenario, TTTSettings
from ttt_sim.ops import KIND, Phase, Role, Trace
from ttt_sim.trace_io import FORMATS, load, save
from ttt_sim.workload import METHODS, build_trace

TTT = TTTSettings(layers=(0, 2), chunk_tokens=32, weight_write="resident", clip=1e-5)


def example(method: str = "ttt_window") -> Trace:
    scenario = Scenario.prefill(70, batch=2, call_tokens=40)
    return build_trace(TOY, METHODS[method].settings(48, None, TTT), scenario)


def assert_equal(a: Trace, b: Trace) -> None:
    for field in fields(Trace):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert np.array_equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("method", list(METHODS))
def test_round_trip(tmp_path: Path, method, ending):
    trace = example(method)
    path = tmp_path / f"trace{ending}"
    save(trace, path)
    assert_equal(trace, load(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_files_are_the_same_every_time(tmp_path: Path, ending):
    first, second = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    save(example(), first)
    save(load(first), second)
    assert first.read_bytes() == second.read_bytes()


def write(tmp_path: Path, text: str, name: str = "hand.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


HAND_WRITTEN = """\
# one update and the apply that follows it
kind,phase,m,n,k,reads,writes,after
delta_gemm,backward,64,192,32,x@0:4096;z@0:12288,gradient.0@0:24576,
weight_write,weight_write,64,192,,gradient.0@0:24576;fast_weight.0@5:24576,fast_weight.0@6:24576,

fast_apply,,32,64,192,z@0:12288;fast_weight.0@6:24576,y@0:4096,0; 1
"""


def test_hand_written_file(tmp_path: Path):
    trace = load(write(tmp_path, HAND_WRITTEN))
    assert trace.kind.tolist() == [KIND["delta_gemm"], KIND["weight_write"], KIND["fast_apply"]]
    assert trace.phase.tolist() == [Phase.BACKWARD, Phase.WEIGHT_WRITE, Phase.FORWARD]
    assert trace.flops.tolist() == [2 * 64 * 192 * 32, 0, 2 * 32 * 64 * 192]
    assert trace.vector_ops.tolist() == [0, 64 * 192, 0]
    assert trace.batch.tolist() == [1, 1, 1]
    assert trace.layer.tolist() == [-1, -1, -1]
    assert trace.after_idx.tolist() == [0, 1]
    found = {t.name: (t.role, t.nbytes, t.initial_version, t.in_place) for t in trace.tensors}
    assert found == {
        "x": (Role.WEIGHT, 4096, 0, False),  # nobody writes it
        "z": (Role.WEIGHT, 12288, 0, False),
        "gradient.0": (Role.GRADIENT, 24576, -1, False),
        "fast_weight.0": (Role.FAST_WEIGHT, 24576, 5, True),
        "y": (Role.ACTIVATION, 4096, -1, False),
    }


def test_spreadsheet_export_is_read(tmp_path: Path):
    """Byte-order mark, Windows line ends, trailing empty cells."""
    text = HAND_WRITTEN.replace("\n", ",,\r\n")
    path = tmp_path / "hand.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(path).n_ops == 3


def test_stated_costs_win_over_the_rule(tmp_path: Path):
    trace = load(write(tmp_path, "kind,m,n,k,flops\nq_proj,2,3,4,7\nq_proj,2,3,4,\n"))
    assert trace.flops.tolist() == [7, 48]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("kind,m,n\nq_porj,1,1\n", [":2: kind: unknown kind 'q_porj', did you mean q_proj", "allowed: embedding"]),
        ("kind,m,n,phase\nrope,1,1,fwd\n", [":2: phase: unknown phase 'fwd'", "allowed: forward, recompute, backward"]),
        ("kind,m,n,dtype\nrope,1,1,bf61\n", ["dtype: unknown dtype 'bf61', did you mean bf16"]),
        ("kind,m,n\nrope,1.5,1\n", [":2: m: is '1.5', expected a whole number"]),
        ("kind,m,n\nrope,,1\n", [":2: m: is missing"]),
        ("kind,m,n\nrope,-3,1\n", [":2: m: is -3, expected at least 1"]),
        ("kind,m,n\nrope,1e3,1\n", ["is '1e3', expected a whole number"]),
        ("kind,m,n\nrope,99999999999999999999,1\n", ["expected a whole number"]),
        ("kind,m\nrope,1\n", [":1: missing column n"]),
        ("kind,m,n,read\nrope,1,1,\n", [":1: unknown column 'read', did you mean reads"]),
        ("kind,m,n,m\nrope,1,1,1\n", [":1: column 'm' is there twice"]),
        ("kind,m,n\nrope,1,1,1\n", [":2: has 4 cells, but the header names 3 columns"]),
        ("op,kind,m,n\n0,rope,1,1\n2,rope,1,1\n", [":3: op: is 2, expected 1: ops are numbered from 0 in order"]),
        ("kind,m,n,reads\nrope,1,1,x\n", [":2: reads: 'x' is not an operand, write tensor@version:bytes"]),
        ("kind,m,n,reads\nrope,1,1,x@-1:4\n", ["'x@-1:4' is not an operand"]),
        ("kind,m,n,after\nrope,1,1,first\n", [":2: after: 'first' is not an op number"]),
        ("kind,m,n,after\nrope,1,1,0\n", [":2: reads: dependencies form a cycle: op 0 (rope) waits for op 0 (rope)"]),
        (
            "kind,m,n,reads,writes\nrope,1,1,b@0:4,a@0:4\n\nrope,1,1,a@0:4,b@0:4\n",
            [":2: reads: dependencies form a cycle: op 0 (rope) waits for op 1 (rope) waits for op 0 (rope)"],
        ),
        (
            "kind,m,n,reads,writes\nrope,1,1,b@0:4,\nrope,1,1,,b@0:4\n",
            [":2: reads: reads b version 0 before op 1 (rope) writes it"],
        ),
        (
            "kind,m,n,reads,writes\nrope,1,1,,b@0:4\nrope,1,1,b@1:4,\n",
            [":3: reads: reads b version 1, which no op writes"],
        ),
        ("kind,m,n\n", ["has no ops"]),
        ("", ["has no header line"]),
        ("#meta,{\nkind,m,n\nrope,1,1\n", [":1: meta is not valid JSON"]),
        ("#meta,[1]\nkind,m,n\nrope,1,1\n", [":1: meta is not a JSON object"]),
        ("#tensor,x,4\nkind,m,n\nrope,1,1\n", [":1: #tensor has 2 cells, expected name,shape,dtype"]),
        (
            "#tensor,x,1x,bf16,weight,4,0,false\nkind,m,n\nrope,1,1\n",
            [":1: shape is '1x', expected lengths such as 1x64x192"],
        ),
        (
            "#tensor,x,2,bf16,wieght,4,0,false\nkind,m,n\nrope,1,1\n",
            [":1: role 'wieght' is unknown, did you mean weight", "allowed: weight, fast_weight, kv"],
        ),
        (
            "#tensor,hidden,2,bf16,weight,4,0,false\nkind,m,n,reads\nrope,1,1,hiden@0:4\n",
            [":3: reads: unknown tensor 'hiden', did you mean hidden"],
        ),
        (
            "#tensor,x,2,bf16,weight,4,0,false\nkind,m,n,reads\nrope,1,1,x@0:5\n",
            [":3: reads: moves 5 bytes of x, which has 4"],
        ),
    ],
)  # fmt: skip
def test_broken_csv(tmp_path: Path, text, messages):
    path = write(tmp_path, text)
    with pytest.raises(WorkloadError) as caught:
        load(path)
    for message in messages:
        assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_several_problems_are_listed_in_line_order(tmp_path: Path):
    text = "kind,m,n,reads\nropee,1,1,\nrope,x,1,\nrope,1,1,y\n"
    with pytest.raises(WorkloadError) as caught:
        load(write(tmp_path, text))
    assert [line.split(":")[1:3] for line in str(caught.value).splitlines()] == [
        ["2", " kind"], ["3", " m"], ["4", " reads"],
    ]  # fmt: skip


def test_many_problems_are_cut_short(tmp_path: Path):
    text = "kind,m,n\n" + "ropee,1,1\n" * 100
    with pytest.raises(WorkloadError) as caught:
        load(write(tmp_path, text))
    assert str(caught.value).splitlines()[-1] == "and 88 more"


def test_line_numbers_count_quoted_line_ends(tmp_path: Path):
    text = 'kind,m,n,reads\nrope,1,1,"a@0:4;\nb@0:4"\nrope,0,1,\n'
    with pytest.raises(WorkloadError, match=r"hand\.csv:4: m: is 0"):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r":1: is not valid JSON"),
        ("[]", "must be a JSON object with a list of ops"),
        ('{"ops": [1]}', r"ops\[0\] is not an object"),
        ('{"ops": [{"kind": "rope", "m": 1}]}', r"ops\[0\]: missing column n"),
        ('{"ops": [{"kind": "rope", "m": 1, "n": true}]}', r"ops\[0\]: n: is True, expected a whole number"),
        ('{"ops": [{"kind": "rope", "m": 1, "n": 1, "reads": 5}]}', r"ops\[0\]: reads: is 5, expected text"),
        ('{"ops": [], "tensor": []}', "unknown key 'tensor', did you mean tensors"),
        ('{"ops": [], "tensors": [{}]}', "tensors must be a list of objects with the keys name, shape"),
        ('{"ops": [], "meta": 3}', "meta is not a JSON object"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_broken_json(tmp_path: Path, content, message):
    with pytest.raises(WorkloadError, match=message):
        load(write(tmp_path, content, "hand.json"))


def test_short_json(tmp_path: Path):
    ops = [{"kind": "q_proj", "m": 2, "n": 3, "k": 4}, {"kind": "rope", "m": 2, "n": 3, "after": 0}]
    trace = load(write(tmp_path, json.dumps({"ops": ops}), "hand.json"))
    assert trace.flops.tolist() == [48, 0]
    assert trace.after_idx.tolist() == [0]


def test_file_that_is_not_parquet(tmp_path: Path):
    with pytest.raises(WorkloadError, match="is not a Parquet file"):
        load(write(tmp_path, "kind,m,n\n", "hand.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ConfigError, match=r"pip install 'ttt-sim\[parquet\]', or use \.csv or \.json"):
        save(example(), tmp_path / "trace.parquet")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read_or_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"a trace file ends in \.csv, \.json, \.parquet, not in '\.txt'"):
        load(tmp_path / "trace.txt")
    with pytest.raises(ConfigError, match="not in 'nothing'"):
        save(example(), tmp_path / "trace")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "missing.csv")
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        save(example(), tmp_path / "missing" / "trace.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        save(example(), tmp_path / "folder.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.csv"]
    (tmp_path / "latin.csv").write_bytes(b"kind,m,n\nr\xf6pe,1,1\n")
    with pytest.raises(WorkloadError, match=r"latin\.csv:2: is not UTF-8"):
        load(tmp_path / "latin.csv")
