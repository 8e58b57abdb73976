"""Can verification fail? Traces and schedules are broken one way at a time, and every break must be noticed.

A dropped dependency must be caught twice: by the static check, and by executing in a legal order of what is left, with
versions unchecked, so that only poisoned buffers and wrong values can tell.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from ttt_sim.model import Call, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import KIND, Trace
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.decoder import random_parameters, random_tokens
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.execute import run_ops, whole
from ttt_sim.replay.memory import Memory
from ttt_sim.replay.order import (
    adversarial_order,
    ancestors,
    data_dependencies,
    missing_dependencies,
    transitive_reduction,
)
from ttt_sim.replay.settings import decoder_shape
from ttt_sim.replay.tiling import Tiling, TilingOf
from ttt_sim.replay.verify import Comparison, Expected, reference_run
from ttt_sim.trace_check import problems
from ttt_sim.workload import METHODS, build_trace

MODEL = Model(
    name="tiny", family="qwen3", n_layers=2, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=32,
    tied_embeddings=True, qk_norm=True, max_context_tokens=64,
)  # fmt: skip
#: Two calls of several tokens and decoding; chunks of four tokens end inside a call, at its end and while decoding.
CALLS = (
    Call(position=0, tokens=6, logits=False),
    Call(position=6, tokens=3, logits=True),
    *(Call(position=p, tokens=1, logits=True) for p in range(9, 13)),
)
TTT = TTTSettings(layers=(0,), chunk_tokens=4, rate=3.0)
CASES: dict[str, MethodSettings] = {
    "kv": METHODS["kv"].settings(None, None, None),
    "kv_window": METHODS["kv_window"].settings(5, None, None),
    "ttt": METHODS["ttt"].settings(None, None, TTT),
    "ttt_window": METHODS["ttt_window"].settings(5, None, TTT),
    "ring fused embed": METHODS["ttt_window"].settings(
        5, None, replace(TTT, carry="ring", weight_write="fused", target="input_embed")
    ),
    "keep_z master clip": METHODS["ttt_window"].settings(
        5, None, replace(TTT, carry="keep_z", weight_write="master", clip=0.5)
    ),
    "online outer": METHODS["ttt"].settings(None, None, replace(TTT, carry="online", contraction="outer_first")),
}


@dataclass(frozen=True)
class Case:
    trace: Trace
    expected: Expected
    parameters: dict[str, FloatArray]
    tokens: np.ndarray

    def failure(
        self, order: list[int], *, trace: Trace | None = None, tiling: TilingOf | None = None, versions: bool = True
    ) -> str | None:
        """What executing in ``order`` brings to light."""
        run = self.trace if trace is None else trace
        comparison = Comparison(run, self.expected)
        try:
            memory: Memory = run_ops(
                run, order, parameters=self.parameters, tokens=self.tokens, tiling=tiling or whole(run),
                check_versions=versions, observers=(comparison.see,),
            )  # fmt: skip
            comparison.finish(memory)
        except ExecutionError as error:
            return str(error)
        return comparison.failure(allow_differences=False)


@cache
def case(name: str) -> Case:
    settings, scenario = CASES[name], Scenario(batch=2, dtype="bf16", calls=CALLS)
    shape = decoder_shape(MODEL, settings, "bf16")
    parameters = random_parameters(shape, 1)
    tokens = random_tokens(shape, 1, 2, scenario.context_tokens)
    expected = reference_run(shape, scenario, parameters, tokens)
    return Case(build_trace(MODEL, settings, scenario), expected, parameters, tokens)


@pytest.mark.parametrize("name", CASES)
def test_any_legal_order_computes_the_same(name: str) -> None:
    c = case(name)
    needs = data_dependencies(c.trace)
    assert not missing_dependencies(c.trace, needs)
    for order in (list(range(c.trace.n_ops)), adversarial_order(c.trace, needs)):
        assert sorted(order) == list(range(c.trace.n_ops))
        assert c.failure(order) is None
        assert c.failure(order, versions=False) is None


@pytest.mark.parametrize("name", CASES)
def test_every_dropped_dependency_is_caught(name: str) -> None:
    c = case(name)
    reduced = transitive_reduction(data_dependencies(c.trace))
    assert not missing_dependencies(c.trace, reduced)
    unnoticed = []
    for op, own in enumerate(reduced):
        for earlier in own:
            needs = list(reduced)
            needs[op] = [other for other in own if other != earlier]
            assert (op, earlier) in missing_dependencies(c.trace, needs)
            order = adversarial_order(c.trace, needs, delay=earlier)
            assert order.index(op) < order.index(earlier)
            if c.failure(order, versions=False) is None:
                unnoticed.append((op, earlier))
    assert not unnoticed


def ops_of(trace: Trace, kind: str) -> list[int]:
    return np.flatnonzero(trace.kind == KIND[kind]).tolist()


def swapped(trace: Trace, first: int, second: int) -> Trace:
    """The trace with the versions of two read entries exchanged."""
    versions = trace.read_version.copy()
    versions[[first, second]] = versions[[second, first]]
    return replace(trace, read_version=versions)


def entry(trace: Trace, op: int, name: str) -> int:
    """The read entry of ``op`` that names a tensor of this family."""
    begin, end = trace.read_ptr[op : op + 2].tolist()
    return next(i for i in range(begin, end) if trace.tensors[trace.read_tensor[i]].name.endswith(f".{name}"))


def test_swapped_weight_versions_are_caught() -> None:
    c = case("ttt_window")
    first, second, *_ = ops_of(c.trace, "fast_apply")
    broken = swapped(c.trace, entry(c.trace, first, "fast_weight"), entry(c.trace, second, "fast_weight"))
    assert any("fast_weight" in problem.text for problem in problems(broken))
    failure = c.failure(list(range(broken.n_ops)), trace=broken)
    assert failure is not None
    assert f"op {first} fast_apply" in failure
    assert "version 1, but version 0 is there" in failure


def test_swapped_activation_versions_change_values() -> None:
    """The outputs of two chunks of one call, exchanged: nothing but values can tell."""
    c = case("ttt")
    op = ops_of(c.trace, "mlp_residual")[0]
    begin, end = c.trace.read_ptr[op : op + 2].tolist()
    pieces = [i for i in range(begin, end) if c.trace.tensors[c.trace.read_tensor[i]].name.endswith("fast_out")]
    assert len(pieces) == 2  # six tokens: a chunk of four and half a chunk, padded
    failure = c.failure(list(range(c.trace.n_ops)), trace=swapped(c.trace, *pieces), versions=False)
    assert failure is not None
    assert "residual.1 version 0" in failure


@pytest.mark.parametrize(
    ("name", "kind"), [("ttt", "weight_write"), ("ring fused embed", "delta_write"), ("online outer", "weight_write")]
)
@pytest.mark.parametrize("versions", [True, False])
def test_a_skipped_weight_write_is_caught(name: str, kind: str, versions: bool) -> None:
    c = case(name)
    skipped = ops_of(c.trace, kind)[1]
    order = [op for op in range(c.trace.n_ops) if op != skipped]
    assert c.failure(order, versions=versions) is not None


def narrower(tiling: Tiling) -> Tiling:
    (r0, r1, c0, c1), *rest = tiling.tiles
    return replace(tiling, tiles=((r0, r1, c0, c1 - 1), *rest))


def twice(tiling: Tiling) -> Tiling:
    return replace(tiling, tiles=(*tiling.tiles, tiling.tiles[0]))


def shorter(tiling: Tiling) -> Tiling:
    """The last element of the reduction is left out."""
    begin, end = tiling.parts[-1]
    return replace(tiling, parts=(*tiling.parts[:-1], (begin, end - 1)))


def overlapping(tiling: Tiling) -> Tiling:
    """One element of the reduction is summed by two parts."""
    ((begin, end),) = tiling.parts
    middle = (begin + end) // 2
    return replace(tiling, parts=((begin, middle), (middle - 1, end)))


@pytest.mark.parametrize("kind", ["q_proj", "fast_apply", "delta_gemm", "target_proj", "lm_head", "attention"])
@pytest.mark.parametrize("change", [narrower, twice, shorter, overlapping])
def test_a_changed_tile_bound_is_caught(kind: str, change: Callable[[Tiling], Tiling]) -> None:
    c = case("ttt_window")
    broken_op = ops_of(c.trace, kind)[-1]
    right = whole(c.trace)
    order = list(range(c.trace.n_ops))
    failure = c.failure(order, tiling=lambda op: change(right(op)) if op == broken_op else right(op))
    assert failure is not None
    assert f"op {broken_op} {kind}" in failure


def test_reduction_by_hand() -> None:
    """0 <- 1 <- 2 <- 3 with the shortcuts 0 <- 2, 0 <- 3 and 1 <- 3; 4 stands apart."""
    needs = [[], [0], [0, 1], [0, 1, 2], []]
    assert transitive_reduction(needs) == [[], [0], [1], [2], []]
    assert ancestors(needs) == [0b0, 0b1, 0b11, 0b111, 0b0]
