"""Results of the reference stay what they are, to the bit, until someone means to change them."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from tests.golden import digests
from tests.golden.digests import REMEDY, Result, cases, read_digests, sha256, write_digests
from ttt_sim.reference import FORMATS

CASES = cases()
GOLDEN = read_digests()


def test_golden_file_holds_the_cases_and_no_others() -> None:
    assert list(GOLDEN) == list(CASES), REMEDY


def test_no_two_cases_are_the_same() -> None:
    assert len(set(GOLDEN.values())) == len(GOLDEN)


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_golden_ones(name: str) -> None:
    if name not in GOLDEN:
        pytest.fail(f"{name}: is in no golden file. {REMEDY}")
    now = sha256(CASES[name]())
    if now != GOLDEN[name]:
        pytest.fail(f"{name}: bits of its results moved, {GOLDEN[name][:16]} -> {now[:16]}. {REMEDY}", pytrace=False)


def test_cases_update_the_weight_and_end_in_an_open_chunk() -> None:
    """A case whose weight never moved would hold nothing fixed."""
    for name in ("streaming bfloat16", "parallel bfloat16", "decoder bfloat16"):
        versions = [r.values for r in CASES[name]() if "W_" in r.name]
        assert len(versions) >= 5
        assert all(np.mean(a != b) > 0.5 for a, b in pairwise(versions) if a.shape == b.shape)


def test_digest_depends_on_values_shapes_names_and_formats() -> None:
    x = np.arange(6.0).reshape(2, 3)
    bf16, f32 = FORMATS["bfloat16"], FORMATS["float32"]
    changed = x.copy()
    changed[1, 2] += 1
    results = [
        [Result("y", x, bf16)],
        [Result("y", changed, bf16)],
        [Result("y", x.reshape(3, 2), bf16)],
        [Result("z", x, bf16)],
        [Result("y", x, f32)],
        [Result("y", x, bf16), Result("y", x, bf16)],
        [],
    ]
    assert len({sha256(result) for result in results}) == len(results)
    # Known once and for all: little-endian bfloat16 of 1 and -2.
    known = hashlib.sha256(b"y bfloat16 (2,)" + bytes.fromhex("803f00c0")).hexdigest()
    assert sha256([Result("y", np.array([1.0, -2.0]), bf16)]) == known


def test_file_reads_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(digests, "DIGESTS_FILE", tmp_path / "digests.csv")
    assert read_digests() == {}
    write_digests({"a, b": "0f", "c": "1e"})
    assert read_digests() == {"a, b": "0f", "c": "1e"}
