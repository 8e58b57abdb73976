"""TTT-E2E in NumPy: gradients against differences, streaming against prefill, counts against the trace."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trace_tools import TOY
from ttt_sim.model import Call, Model, Scenario
from ttt_sim.ops import OP_KINDS, Trace
from ttt_sim.reference.checks import InputError
from ttt_sim.reference.meter import Meter
from ttt_sim.reference.ttt_e2e import (
    PRIME,
    E2EDecoder,
    E2EShape,
    attention_grad,
    norm_grad,
    random_parameters,
    random_tokens,
    silu_mul_grad,
)
from ttt_sim.workload import METHODS, build_trace
from ttt_sim.workload.method import set_options
from ttt_sim.workload.ttt_e2e import e2e_model, suffix_layers

#: Three layers of which two learn, window of two and a half mini-batches.
SMALL = E2EShape(
    n_layers=3, n_suffix=2, d_model=8, d_ff=12, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=11,
    tied_embeddings=True, window=10, mini_batch=4,
)  # fmt: skip


def decoder(shape: E2EShape = SMALL, batch: int = 1, meter: Meter | None = None) -> E2EDecoder:
    return E2EDecoder(shape, random_parameters(shape, 3), batch, meter)


def run(model: E2EDecoder, ids: np.ndarray, lengths: list[int]) -> list[np.ndarray | None]:
    """Calls of ``lengths`` tokens of ``ids`` (batch, n + 1)."""
    out, at = [], 0
    for n in lengths:
        out.append(model(ids[:, at : at + n], ids[:, at + n]))
        at += n
    return out


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, tied_embeddings=False, n_kv_heads=2, n_suffix=3)])
@pytest.mark.parametrize("before", [0, 12])
def test_gradients_are_those_of_differences(shape: E2EShape, before: int) -> None:
    model = decoder(shape, batch=2)
    ids = random_tokens(shape, 5, 2, before + 5)
    if before:
        model(ids[:, :before], ids[:, before], logits=False)
    rows, targets = ids[:, before : before + 4], ids[:, before + 1 : before + 5]
    losses, grads = model.gradients(rows, targets)
    assert np.allclose(losses, model.loss(rows, targets), rtol=1e-14)
    random = np.random.default_rng(1)
    step = 1e-5
    assert set(grads) == {(layer, name) for layer in shape.suffix for name in PRIME}
    for key, grad in grads.items():
        largest = np.abs(grad).max()
        for _ in range(3):
            at = tuple(int(random.integers(0, n)) for n in grad.shape)
            kept = model.prime[key]
            sides = []
            for sign in (1, -1):
                moved = kept.copy()
                moved[at] += sign * step
                model.prime[key] = moved
                sides.append(model.loss(rows, targets)[at[0]])
            model.prime[key] = kept
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(grad[at], rel=1e-6, abs=1e-8 * largest)


def test_gradients_of_pieces_are_those_of_differences() -> None:
    random = np.random.default_rng(2)
    x, gain, out = random.normal(size=(3, 6)), random.normal(size=6), random.normal(size=(3, 6))

    def normed(x: np.ndarray) -> float:
        return float((x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain * out).sum())

    def gated(x: np.ndarray) -> float:
        return float((x / (1 + np.exp(-x)) * 0.7 * out).sum())

    for function, grad in (
        (normed, norm_grad(x, gain, 1e-6, out)),
        (gated, silu_mul_grad(x, np.full_like(x, 0.7), out)[0]),
    ):
        for at in ((0, 0), (2, 5), (1, 3)):
            moved = np.zeros_like(x)
            moved[at] = 1e-6
            assert (function(x + moved) - function(x - moved)) / 2e-6 == pytest.approx(grad[at], rel=1e-6)


def test_no_gradient_goes_through_hidden_pairs() -> None:
    random = np.random.default_rng(3)
    q, k, v, out = (random.normal(size=(1, 4, 2, 4)) for _ in range(4))
    visible = np.eye(4, dtype=np.bool_)
    dq, dk, dv = attention_grad(q, k, v, visible, out, Meter().op("attention_grad"))
    assert np.abs(dq).max() < 1e-15
    assert np.abs(dk).max() < 1e-15
    assert np.allclose(dv, out)  # a row that sees only itself returns its value


@pytest.mark.parametrize("lengths", [[27], [4, 4, 4, 4, 4, 4, 3], [1] * 27, [3, 9, 2, 13], [5, 5, 5, 5, 5, 2]])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_split_gives_the_same_weights(lengths: list[int], batch: int) -> None:
    ids = random_tokens(SMALL, 7, batch, 28)
    whole, split = decoder(batch=batch), decoder(batch=batch)
    first, other = run(whole, ids, [27]), run(split, ids, lengths)
    assert len(whole.losses) == 27 // 4
    for key, weight in whole.prime.items():
        assert np.array_equal(split.prime[key], weight)
        start = whole.parameters[f"layers.{key[0]}.{key[1]}.weight"]
        assert all(not np.array_equal(own, start) for own in weight)
    assert first[-1] is not None
    assert other[-1] is not None
    assert np.allclose(first[-1], other[-1], rtol=1e-11, atol=1e-11)


def test_steps_lower_the_loss_of_what_is_repeated() -> None:
    shape = replace(SMALL, vocab_size=23, d_model=16, d_ff=24, rate=0.3)
    ids = np.tile(random_tokens(shape, 9, 1, 4), (1, 12))
    learns, frozen = decoder(shape), decoder(replace(shape, rate=1e-12))
    for model in (learns, frozen):
        model(ids[:, :-1], ids[:, -1], logits=False)
    assert learns.losses[-1][0] < 0.5 * frozen.losses[-1][0]


def test_the_clip_is_by_the_norm_over_all_matrices_of_a_sequence() -> None:
    ids = random_tokens(SMALL, 11, 2, 5)
    free = decoder(replace(SMALL, clip=None), batch=2)
    _, grads = free.gradients(ids[:, :4], ids[:, 1:])
    norms = np.sqrt(sum((grad**2).sum(axis=(1, 2)) for grad in grads.values()))
    limit = float(norms.mean())  # between the two
    assert norms.min() < limit < norms.max()
    clipped = decoder(replace(SMALL, clip=limit), batch=2)
    start = dict(clipped.prime)
    for model in (free, clipped):
        model(ids[:, :4], ids[:, 4])
    for key, grad in grads.items():
        scale = np.minimum(1, limit / norms)[:, None, None]
        assert np.allclose(clipped.prime[key], start[key] - scale * grad, rtol=1e-13, atol=1e-15)
        assert np.allclose(free.prime[key], start[key] - grad, rtol=1e-13, atol=1e-15)


def test_sequences_learn_on_their_own() -> None:
    ids = random_tokens(SMALL, 13, 2, 13)
    both = decoder(batch=2)
    run(both, ids, [12])
    for i in range(2):
        alone = decoder()
        run(alone, ids[i : i + 1], [12])
        for key, weight in alone.prime.items():
            assert np.allclose(both.prime[key][i], weight[0], rtol=1e-12, atol=1e-14)


def last_logits(shape: E2EShape, ids: np.ndarray) -> np.ndarray:
    logits = decoder(shape)(ids[:, :-1], ids[:, -1])
    assert logits is not None
    return logits


def test_a_window_ends_what_is_seen() -> None:
    """Of a model that does not learn: the last row of one layer sees w tokens, that of three layers 3 (w - 1) + 1."""
    shape = replace(SMALL, rate=1e-300, window=5)
    ids = random_tokens(shape, 17, 1, 31)
    reach = 3 * (shape.window - 1) + 1
    plain = last_logits(shape, ids)
    for changed, same in ((reach - 1, False), (reach, True)):
        other = ids.copy()
        other[0, 29 - changed] = (other[0, 29 - changed] + 1) % shape.vocab_size
        assert np.array_equal(plain, last_logits(shape, other)) == same


# --- counts -----------------------------------------------------------------------------------------------------------


def flops_of(trace: Trace) -> dict[tuple[str, int, int], list[int]]:
    out = defaultdict(list)
    for kind, step, layer, flops in zip(
        trace.kind.tolist(), trace.step.tolist(), trace.layer.tolist(), trace.flops.tolist(), strict=True
    ):
        if flops:
            out[OP_KINDS[kind].name, step, layer].append(flops)
    return {key: sorted(values) for key, values in out.items()}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "model", [replace(TOY, n_layers=5, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=32),
              replace(TOY, n_layers=8, d_model=16, d_ff=24, n_heads=2, n_kv_heads=2, head_dim=8, vocab_size=32,
                      tied_embeddings=False)],
)  # fmt: skip
@pytest.mark.parametrize("lengths", [[26, 1, 1], [3, 9, 2, 13], [1] * 17])
def test_observed_flops_are_those_of_the_trace(model: Model, dense: bool, batch: int, lengths: list[int]) -> None:
    size, window = 8, 12
    settings = set_options(
        METHODS["ttt_e2e"].settings(window, None, None),
        {"mini_batch": str(size), "dense_attention": str(dense).lower()},
    )
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    calls = tuple(Call(position=p, tokens=m, logits=True) for p, m in zip(starts, lengths, strict=True))
    trace = build_trace(model, settings, Scenario(batch=batch, dtype="bf16", calls=calls))
    narrow = e2e_model(model)
    shape = E2EShape(
        n_layers=narrow.n_layers, n_suffix=len(suffix_layers(model)), d_model=narrow.d_model, d_ff=narrow.d_ff,
        n_heads=narrow.n_heads, n_kv_heads=narrow.n_kv_heads, head_dim=narrow.head_dim, vocab_size=narrow.vocab_size,
        tied_embeddings=narrow.tied_embeddings, window=window, mini_batch=size, dense=dense,
    )  # fmt: skip
    meter = Meter()
    seen = E2EDecoder(shape, random_parameters(shape, 0), batch, meter)
    run(seen, random_tokens(shape, 0, batch, sum(lengths) + 1), lengths)
    observed = defaultdict(list)
    for count in meter.counts:
        if count.flops:
            observed[count.kind, count.step, count.layer].append(count.flops)
    assert {key: sorted(values) for key, values in observed.items()} == flops_of(trace)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, "window: is 3, expected at least mini_batch, 4"),
        ({"n_suffix": 4}, "n_suffix: is 4, expected at most n_layers, 3"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_heads: is 3, expected a multiple of n_kv_heads, 2"),
        ({"head_dim": 3}, "head_dim: is 3, expected an even number"),
        ({"mini_batch": 0}, "mini_batch: is 0"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_wrong_tokens_are_refused() -> None:
    model, ids = decoder(), random_tokens(SMALL, 0, 1, 5)
    with pytest.raises(InputError, match=r"tokens: shape is \(1, 0\)"):
        model(ids[:, :0], ids[:, 0])
    with pytest.raises(InputError, match=r"following: shape is \(1, 1\), expected \(1,\)"):
        model(ids[:, :4], ids[:, 4:])
    with pytest.raises(InputError, match="expected 0 to 10"):
        model(ids[:, :4], ids[:, 4] * 0 + 11)
    parameters = random_parameters(SMALL, 0)
    del parameters["layers.2.prime_up_proj.weight"]
    with pytest.raises(InputError, match=r"'layers.2.prime_up_proj.weight'.*got nothing"):
        E2EDecoder(SMALL, parameters)
