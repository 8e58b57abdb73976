"""Layers with a state of fixed size: forms agree, gradients are right, FLOPs are those of the traces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ttt_sim.ops import op_cost
from ttt_sim.reference import states
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.meter import OpCount
from ttt_sim.workload import closed_forms as forms

#: 23 tokens in chunks of 5 end in a chunk of three.
T, CHUNK = 23, 5
RNG = np.random.default_rng(7)


def draw(*shape: int) -> FloatArray:
    return RNG.normal(size=shape)


def share(*shape: int) -> FloatArray:
    """Decays and rates, in (0.2, 1)."""
    return RNG.uniform(0.2, 1.0, size=shape)


def close(a: FloatArray, b: FloatArray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def scan_flops(kind: str, *, m: int, n: int, k: int, chunk: int) -> int:
    return int(op_cost(kind, batch=1, m=m, n=n, k=k, heads=1, pairs=chunk).flops)


# --- forms ------------------------------------------------------------------------------------------------------------


def test_gated_delta_rule() -> None:
    n, k = 6, 4
    q, keys, v = draw(T, k), draw(T, k), draw(T, n)
    keys /= np.sqrt((keys**2).sum(axis=1, keepdims=True))
    a, b, state = share(T), share(T), draw(k, n)
    alone, chunks = OpCount(), OpCount()
    out, last = states.delta_recurrent(q, keys, v, a, b, state, alone)
    other, end = states.delta_chunked(q, keys, v, a, b, state, chunks, chunk=CHUNK)
    close(out, other)
    close(last, end)
    assert alone.flops == scan_flops("delta_step", m=T, n=n, k=k, chunk=0)
    assert alone.flops + alone.lanes == T * forms.delta_net_step_ops(k, n)
    assert chunks.flops == scan_flops("delta_rule", m=T, n=n, k=k, chunk=CHUNK)
    # by the definition, one token: S = a (I - b k k^T) S + b k v^T
    first = a[0] * (np.eye(k) - b[0] * np.outer(keys[0], keys[0])) @ state + b[0] * np.outer(keys[0], v[0])
    close(states.delta_recurrent(q[:1], keys[:1], v[:1], a, b, state, OpCount())[1], first)


def test_mamba2() -> None:
    heads, p, n = 2, 3, 4
    x, a, dt, b, read, state = (
        draw(T, heads, p), share(T, heads), share(T, heads), draw(T, n), draw(T, n), draw(heads, p, n)
    )  # fmt: skip
    alone, chunks = OpCount(), OpCount()
    out, last = states.mamba2_recurrent(x, a, dt, b, read, state, alone)
    other, end = states.mamba2_chunked(x, a, dt, b, read, state, chunks, chunk=CHUNK)
    close(out, other)
    close(last, end)
    step = op_cost("ssm_step", batch=1, m=1, n=p, k=n, heads=heads)
    assert (alone.flops, alone.lanes) == (T * int(step.flops), T * int(step.vector_ops))
    assert chunks.flops == sum(forms.mamba2_chunk_flops(c, heads, p, n) for c in (5, 5, 5, 5, 3))


def ttt_weights(mlp: bool, h: int) -> states.Weights:
    n = 4 * h
    return (draw(h, n), draw(n), draw(n, h) / 4, draw(h)) if mlp else (draw(h, h), draw(h))


@pytest.mark.parametrize("mlp", [False, True])
def test_ttt_layers(mlp: bool) -> None:
    h = 4
    q, k, v, rates, gain, bias = draw(T, h), draw(T, h), draw(T, h), 0.1 * share(T), share(h), draw(h)
    weights = ttt_weights(mlp, h)
    primal, dual = OpCount(), OpCount()
    out, last = states.ttt_primal(q, k, v, rates, weights, gain, bias, primal, mini_batch=CHUNK)
    other, end = states.ttt_dual(q, k, v, rates, weights, gain, bias, dual, mini_batch=CHUNK)
    close(out, other)
    for one, two in zip(last, end, strict=True):
        close(one, two)
    kind, n = ("mlp_update", 4 * h) if mlp else ("linear_update", h)
    assert primal.flops == scan_flops(kind, m=T, n=n, k=h, chunk=0)
    assert dual.flops == scan_flops(kind, m=T, n=n, k=h, chunk=CHUNK)
    form = forms.ttt_mlp_flops if mlp else forms.ttt_linear_flops
    assert dual.flops == sum(form(b, h) for b in (5, 5, 5, 5, 3))


def test_titans() -> None:
    h = 4
    q, k, v = draw(T, h), draw(T, h), draw(T, h)
    gates = np.stack([0.1 * share(T), share(T), 0.3 * share(T)], axis=1)
    memory, momentum = (draw(h, 4 * h), draw(4 * h, h) / 4), (0.1 * draw(h, 4 * h), 0.1 * draw(4 * h, h))
    alone, chunks = OpCount(), OpCount()
    results = [
        states.titans_recurrent(q, k, v, gates, memory, momentum, alone, chunk=CHUNK),
        states.titans_chunked(q, k, v, gates, memory, momentum, chunks, chunk=CHUNK),
    ]
    close(results[0][0], results[1][0])
    for i in (1, 2):
        for one, two in zip(results[0][i], results[1][i], strict=True):
            close(one, two)
    assert alone.flops == scan_flops("memory_update", m=T, n=4 * h, k=h, chunk=0) == T * 56 * h * h
    assert chunks.flops == scan_flops("memory_update", m=T, n=4 * h, k=h, chunk=CHUNK)
    assert chunks.flops == sum(forms.titans_flops(c, h) for c in (5, 5, 5, 5, 3))


def lact_case(h: int, hidden: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, states.Weights]:
    weights = (draw(hidden, h), draw(hidden, h), draw(h, hidden))
    return draw(T, h), draw(T, h), draw(T, h), 0.1 * share(T, 3), weights


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize(("h", "hidden"), [(4, 4), (3, 6)])
def test_lact(muon: bool, h: int, hidden: int) -> None:
    q, k, v, rates, weights = lact_case(h, hidden)
    c = OpCount()
    out, last = states.lact(q, k, v, rates, weights, c, chunk=CHUNK, muon=muon)
    full, expand = T // CHUNK, hidden // h
    size = 3 * h * hidden
    expected = 2 * size * T + full * 4 * size * CHUNK + (full * 3 * forms.muon_flops(h, expand) if muon else 0)
    assert c.flops == expected
    for before, after in zip(weights, last, strict=True):
        close(np.square(before).sum(axis=1), np.square(after).sum(axis=1))
    # the first chunk sees the weights as they were; calls that end at chunks go on where the one before ended
    close(out[:CHUNK], states.swiglu(q[:CHUNK], weights, OpCount()))
    cut = 2 * CHUNK
    lengths = [np.sqrt(np.square(w).sum(axis=1, keepdims=True)) for w in weights]
    first, between = states.lact(q[:cut], k[:cut], v[:cut], rates[:cut], weights, OpCount(), chunk=CHUNK, muon=muon)
    second, end = states.lact(
        q[cut:], k[cut:], v[cut:], rates[cut:], between, OpCount(), chunk=CHUNK, muon=muon, lengths=lengths
    )
    close(np.concatenate([first, second]), out)
    for one, two in zip(last, end, strict=True):
        close(one, two)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for shape in ((5, 5), (4, 9), (9, 4)):
        values = np.linalg.svd(states.newton_schulz(draw(*shape), OpCount()), compute_uv=False)
        assert (values > 0.3).all()
        assert (values < 1.4).all()


# --- gradients --------------------------------------------------------------------------------------------------------


def slopes(loss: Callable[[states.Weights], float], weights: states.Weights) -> list[FloatArray]:
    """Central differences of ``loss`` for every element of every array."""
    step, found = 1e-6, []
    for i, w in enumerate(weights):
        grad = np.empty_like(w)
        for at in np.ndindex(w.shape):
            ends = []
            for sign in (1, -1):
                moved = w.copy()
                moved[at] += sign * step
                ends.append(loss((*weights[:i], moved, *weights[i + 1 :])))
            grad[at] = (ends[0] - ends[1]) / (2 * step)
        found.append(grad)
    return found


def assert_slopes(found: list[FloatArray], expected: list[FloatArray]) -> None:
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mlp", [False, True])
def test_gradient_of_ttt_layers(mlp: bool) -> None:
    h = 4
    k, v, gain, bias, weights = draw(6, h), draw(6, h), share(h), draw(h), ttt_weights(mlp, h)
    inputs, grads = states.ttt_gradients(k, v, weights, gain, bias, OpCount())
    found = [part for x, g in zip(inputs, grads, strict=True) for part in (x.T @ g, g.sum(axis=0))]
    assert_slopes(found, slopes(lambda w: states.ttt_loss(k, v, w, gain, bias), weights))


def test_gradient_of_titans() -> None:
    k, v, memory = draw(6, 3), draw(6, 3), (draw(3, 12), draw(12, 3) / 4)
    inputs, grads = states.memory_gradients(k, v, memory, OpCount())
    found = [x.T @ g for x, g in zip(inputs, grads, strict=True)]
    assert_slopes(found, slopes(lambda w: states.memory_loss(k, v, w), memory))


def test_gradient_of_lact() -> None:
    _, k, v, rates, weights = lact_case(3, 6)
    same = np.repeat(rates[:, :1], 3, axis=1)
    found = [-grad for grad in states.swiglu_gradients(k, v, same, weights, OpCount())]
    assert_slopes(found, slopes(lambda w: states.swiglu_loss(k, v, rates[:, 0], w), weights))
