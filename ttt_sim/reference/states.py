"""Layers with a state of fixed size, one head (Mamba2: all), in float64: token by token and in chunks.

Row-vector convention, T tokens. Both forms of each layer return outputs and the state after the last token, and are
equal but for rounding, which sums over rows may do differently from one machine to another. ``c`` counts FLOPs:
products, multiply-adds of outer products, and the substitution of a solve.

Gated delta rule   S <- a (I - b k k^T) S + b k v^T,  o = q S;  S (k, n)
Mamba2             h <- a h + dt x B^T,  y = h C;  h (heads, p, n), B and C shared by heads
TTT                f(x) = x + LN(g(x)), g(x) = x W + b or gelu(x W1 + b1) W2 + b2; loss |f(k) - v|^2 / 2 per token, all
                   gradients of a mini-batch at the weights of its start, rates per token
Titans             g(x) = gelu(x W1) W2, loss |g(k) - v|^2 / 2;  S <- e S - t grad,  M <- (1 - a) M + S
LaCT               f(x) = W2 (silu(W1 x) * (W3 x)), loss -sum of rates times <f(k), v>
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.formats import FLOAT64
from ttt_sim.reference.meter import OpCount

#: Constants of the tanh form of GELU, of LayerNorm, and of the Newton-Schulz iteration of Muon.
_GELU, _CUBIC = 0.7978845608028654, 0.044715
EPSILON = 1e-6
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Weights = tuple[FloatArray, ...]


def _product(a: FloatArray, b: FloatArray, c: OpCount) -> FloatArray:
    return c.product(a, b, FLOAT64)


def _outer(a: FloatArray, b: FloatArray, c: OpCount) -> FloatArray:
    """Outer product that is added to something."""
    c.flops += 2 * a.size * b.size
    return np.asarray(np.multiply.outer(a, b), dtype=np.float64)


def _decays(a: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(T,) products of decays up to each token, and (T, T) from one token to a later one, 0 to an earlier one."""
    total: FloatArray = np.cumprod(a, dtype=np.float64)
    return total, np.tril(total[:, None] / total[None, :])


# --- gated delta rule -------------------------------------------------------------------------------------------------


def delta_recurrent(
    q: FloatArray, k: FloatArray, v: FloatArray, a: FloatArray, b: FloatArray, state: FloatArray, c: OpCount
) -> tuple[FloatArray, FloatArray]:
    """``q, k`` (T, k), ``v`` (T, n), ``a, b`` (T,), ``state`` (k, n)."""
    out = np.empty_like(v)
    for t in range(v.shape[0]):
        state = a[t] * state
        c.lanes += state.size
        error = v[t] - _product(k[None, t], state, c)[0]
        state = state + _outer(k[t], b[t] * error, c)
        out[t] = _product(q[None, t], state, c)[0]
    return out, state


def delta_chunked(
    q: FloatArray, k: FloatArray, v: FloatArray, a: FloatArray, b: FloatArray, state: FloatArray, c: OpCount, *,
    chunk: int,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """The same in chunks: corrections of all tokens of a chunk by a triangular solve."""
    out = np.empty_like(v)
    for start in range(0, v.shape[0], chunk):
        rows = slice(start, start + chunk)
        total, between = _decays(a[rows])
        keys, n = k[rows], v.shape[1]
        lower = np.tril(b[rows, None] * between * _product(keys, keys.T, c), -1)
        right = b[rows, None] * np.concatenate([v[rows], total[:, None] * keys], axis=1)
        solved = np.empty_like(right)
        for i in range(right.shape[0]):  # forward substitution
            solved[i] = right[i]
            if i:
                solved[i] -= _product(lower[i, None, :i], solved[:i], c)[0]
            c.flops += right.shape[1]  # the subtraction
        corrected = solved[:, :n] - _product(solved[:, n:], state, c)
        scores = between * _product(q[rows], keys.T, c)
        out[rows] = total[:, None] * _product(q[rows], state, c) + _product(scores, corrected, c)
        state = total[-1] * state + _product((between[-1][:, None] * keys).T, corrected, c)
    return out, state


# --- Mamba2 -----------------------------------------------------------------------------------------------------------


def mamba2_recurrent(
    x: FloatArray, a: FloatArray, dt: FloatArray, b: FloatArray, read: FloatArray, state: FloatArray, c: OpCount
) -> tuple[FloatArray, FloatArray]:
    """``x`` (T, heads, p), ``a, dt`` (T, heads), ``b, read`` (T, n), ``state`` (heads, p, n)."""
    out = np.empty_like(x)
    for t in range(x.shape[0]):
        state = a[t][:, None, None] * state
        c.lanes += 2 * state.size  # decay, and the step size per element
        for head in range(x.shape[1]):
            state[head] += _outer(x[t, head], dt[t, head] * b[t], c)
            out[t, head] = _product(state[head], read[t][:, None], c)[:, 0]
    return out, state


def mamba2_chunked(
    x: FloatArray, a: FloatArray, dt: FloatArray, b: FloatArray, read: FloatArray, state: FloatArray, c: OpCount, *,
    chunk: int,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """The same in chunks."""
    out, state = np.empty_like(x), state.copy()
    for start in range(0, x.shape[0], chunk):
        rows = slice(start, start + chunk)
        scores = _product(read[rows], b[rows].T, c)
        for head in range(x.shape[1]):
            total, between = _decays(a[rows, head])
            values = dt[rows, head][:, None] * x[rows, head]
            inside = _product(between * scores, values, c)
            out[rows, head] = inside + total[:, None] * _product(read[rows], state[head].T, c)
            added = _product((between[-1][:, None] * values).T, b[rows], c)
            state[head] = total[-1] * state[head] + added
    return out, state


# --- pieces of inner models -------------------------------------------------------------------------------------------


def _tanh(x: FloatArray) -> FloatArray:
    return 1 - 2 / (1 + elementary.exp(2 * x))


def gelu(x: FloatArray) -> FloatArray:
    """The tanh form."""
    return 0.5 * x * (1 + _tanh(_GELU * (x + _CUBIC * x**3)))


def gelu_slope(x: FloatArray) -> FloatArray:
    """Derivative of :func:`gelu`."""
    t = _tanh(_GELU * (x + _CUBIC * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _GELU * (1 + 3 * _CUBIC * x**2)


def layer_norm(z: FloatArray, gain: FloatArray, bias: FloatArray) -> FloatArray:
    centred = z - z.mean(axis=-1, keepdims=True)
    return np.asarray(gain * centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON) + bias)


def layer_norm_loss_gradient(z: FloatArray, target: FloatArray, gain: FloatArray, bias: FloatArray) -> FloatArray:
    """Gradient of |LN(z) - target|^2 / 2 with respect to ``z``, row by row."""
    centred = z - z.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    unit = centred / scale
    g = gain * (gain * unit + bias - target)
    slope = g - g.mean(axis=-1, keepdims=True) - unit * (g * unit).mean(axis=-1, keepdims=True)
    return np.asarray(slope / scale)


def ttt_loss(x: FloatArray, target: FloatArray, weights: Weights, gain: FloatArray, bias: FloatArray) -> float:
    """Sum over tokens of |f(x) - target|^2 / 2; ``weights`` (W, b) or (W1, b1, W2, b2)."""
    z = x @ weights[0] + weights[1]
    if len(weights) == 4:
        z = gelu(z) @ weights[2] + weights[3]
    error = x + layer_norm(z, gain, bias) - target
    return float((error * error).sum() / 2)


def ttt_gradients(
    k: FloatArray, v: FloatArray, weights: Weights, gain: FloatArray, bias: FloatArray, c: OpCount
) -> tuple[list[FloatArray], list[FloatArray]]:
    """(inputs, gradients of outputs) of each matrix, rows of tokens: an outer product of both is a token's gradient."""
    z = _product(k, weights[0], c) + weights[1]
    if len(weights) == 2:
        return [k], [layer_norm_loss_gradient(z, v - k, gain, bias)]
    hidden = gelu(z)
    last = _product(hidden, weights[2], c) + weights[3]
    back = layer_norm_loss_gradient(last, v - k, gain, bias)
    return [k, hidden], [_product(back, weights[2].T, c) * gelu_slope(z), back]


# --- TTT-Linear and TTT-MLP -------------------------------------------------------------------------------------------


def ttt_primal(
    q: FloatArray, k: FloatArray, v: FloatArray, rates: FloatArray, weights: Weights, gain: FloatArray,
    bias: FloatArray, c: OpCount, *, mini_batch: int,
) -> tuple[FloatArray, Weights]:  # fmt: skip
    """``q, k, v`` (T, h), ``rates`` (T,): every token's own weights, one after the other."""
    out, now, start = np.empty_like(v), weights, weights
    for t in range(v.shape[0]):
        if t % mini_batch == 0:
            start = now
        inputs, grads = ttt_gradients(k[None, t], v[None, t], start, gain, bias, c)
        stepped: list[FloatArray] = []
        for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
            stepped += [now[2 * i] - _outer(rates[t] * x[0], g[0], c), now[2 * i + 1] - rates[t] * g[0]]
        now = tuple(stepped)
        z = _product(q[None, t], now[0], c) + now[1]
        if len(now) == 4:
            z = _product(gelu(z), now[2], c) + now[3]
        out[t] = q[t] + layer_norm(z, gain, bias)[0]
    return out, now


def ttt_dual(
    q: FloatArray, k: FloatArray, v: FloatArray, rates: FloatArray, weights: Weights, gain: FloatArray,
    bias: FloatArray, c: OpCount, *, mini_batch: int,
) -> tuple[FloatArray, Weights]:  # fmt: skip
    """The same with products over mini-batches. A bias is one more input that is always one."""
    out = np.empty_like(v)
    for start in range(0, v.shape[0], mini_batch):
        rows = slice(start, start + mini_batch)
        inputs, grads = ttt_gradients(k[rows], v[rows], weights, gain, bias, c)
        z, stepped = q[rows], list[FloatArray]()
        for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
            y = gelu(z) if i else z
            seen = np.tril(_product(y, x.T, c) + 1) * rates[rows]
            z = _product(y, weights[2 * i], c) + weights[2 * i + 1] - _product(seen, g, c)
            weighted = rates[rows, None] * g
            stepped += [weights[2 * i] - _product(x.T, weighted, c), weights[2 * i + 1] - weighted.sum(axis=0)]
        out[rows] = q[rows] + layer_norm(z, gain, bias)
        weights = tuple(stepped)
    return out, weights


# --- Titans -----------------------------------------------------------------------------------------------------------


def memory_loss(x: FloatArray, target: FloatArray, memory: Weights) -> float:
    """Sum over tokens of |g(x) - target|^2 / 2."""
    error = gelu(x @ memory[0]) @ memory[1] - target
    return float((error * error).sum() / 2)


def memory_gradients(
    k: FloatArray, v: FloatArray, memory: Weights, c: OpCount
) -> tuple[list[FloatArray], list[FloatArray]]:
    """As :func:`ttt_gradients`."""
    z = _product(k, memory[0], c)
    hidden = gelu(z)
    back = _product(hidden, memory[1], c) - v
    return [k, hidden], [_product(back, memory[1].T, c) * gelu_slope(z), back]


def titans_recurrent(
    q: FloatArray, k: FloatArray, v: FloatArray, gates: FloatArray, memory: Weights, momentum: Weights, c: OpCount, *,
    chunk: int,
) -> tuple[FloatArray, Weights, Weights]:  # fmt: skip
    """``q, k, v`` (T, h), ``gates`` (T, 3): rate, momentum and forgetting of each token."""
    out, start = np.empty_like(v), memory
    for t, (rate, keep, forget) in enumerate(gates):
        if t % chunk == 0:
            start = memory
        inputs, grads = memory_gradients(k[None, t], v[None, t], start, c)
        steps = [_outer(rate * x[0], g[0], c) for x, g in zip(inputs, grads, strict=True)]
        momentum = tuple(keep * s - step for s, step in zip(momentum, steps, strict=True))
        memory = tuple((1 - forget) * w + s for w, s in zip(memory, momentum, strict=True))
        out[t] = _product(gelu(_product(q[None, t], memory[0], c)), memory[1], c)[0]
    return out, memory, momentum


def _titans_shares(gates: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """How memory and momentum after each token of a chunk follow from those before it and from its gradients.

    M_t = old_t M + push_t S - sum of taken_ts grad_s, and S_t = kept_t S - sum of held_ts grad_s.
    """
    n = gates.shape[0]
    old, push, kept = np.ones(n), np.zeros(n), np.ones(n)
    taken, held = np.zeros((n, n)), np.zeros((n, n))
    before = (1.0, 0.0, 1.0, np.zeros(n), np.zeros(n))
    for t, (rate, keep, forget) in enumerate(gates):
        kept[t], held[t] = keep * before[2], keep * before[4]
        held[t, t] += rate
        old[t], push[t] = (1 - forget) * before[0], (1 - forget) * before[1] + kept[t]
        taken[t] = (1 - forget) * before[3] + held[t]
        before = (old[t], push[t], kept[t], taken[t], held[t])
    return old, push, kept, taken, held


def titans_chunked(
    q: FloatArray, k: FloatArray, v: FloatArray, gates: FloatArray, memory: Weights, momentum: Weights, c: OpCount, *,
    chunk: int,
) -> tuple[FloatArray, Weights, Weights]:  # fmt: skip
    """The same with products over chunks."""
    out = np.empty_like(v)
    for start in range(0, v.shape[0], chunk):
        rows = slice(start, start + chunk)
        inputs, grads = memory_gradients(k[rows], v[rows], memory, c)
        old, push, kept, taken, held = _titans_shares(gates[rows])
        z, memories, momenta = q[rows], list[FloatArray](), list[FloatArray]()
        for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
            y = gelu(z) if i else z
            z = old[:, None] * _product(y, memory[i], c) + push[:, None] * _product(y, momentum[i], c)
            z = z - _product(taken * _product(y, x.T, c), g, c)
            memories.append(old[-1] * memory[i] + push[-1] * momentum[i] - _product(x.T, taken[-1][:, None] * g, c))
            momenta.append(kept[-1] * momentum[i] - _product(x.T, held[-1][:, None] * g, c))
        out[rows], memory, momentum = z, tuple(memories), tuple(momenta)
    return out, memory, momentum


# --- LaCT -------------------------------------------------------------------------------------------------------------


def swiglu(x: FloatArray, weights: Weights, c: OpCount) -> FloatArray:
    """f(x) of rows; ``weights`` W1, W3 (hidden, h) and W2 (h, hidden)."""
    gate_up = _product(x, np.concatenate(weights[:2]).T, c)
    hidden = weights[0].shape[0]
    return _product(elementary.silu(gate_up[:, :hidden]) * gate_up[:, hidden:], weights[2].T, c)


def swiglu_loss(x: FloatArray, target: FloatArray, rates: FloatArray, weights: Weights) -> float:
    """-sum of rates times <f(x), target>, ``rates`` (T,)."""
    return -float((rates[:, None] * swiglu(x, weights, OpCount()) * target).sum())


def swiglu_gradients(x: FloatArray, target: FloatArray, rates: FloatArray, weights: Weights, c: OpCount) -> Weights:
    """Minus the gradient of :func:`swiglu_loss` for each matrix, ``rates`` (T, 3) of W1, W3 and W2 each."""
    hidden = weights[0].shape[0]
    gate_up = _product(x, np.concatenate(weights[:2]).T, c)
    gate, up = gate_up[:, :hidden], gate_up[:, hidden:]
    share = 1 / (1 + elementary.exp(-gate))
    back = _product(target, weights[2], c)
    to_gate = back * up * share * (1 + gate * (1 - share))
    rows = np.concatenate([rates[:, :1] * to_gate, rates[:, 1:2] * back * gate * share], axis=1)
    both = _product(rows.T, x, c)
    return both[:hidden], both[hidden:], _product((rates[:, 2:] * target).T, gate * share * up, c)


def newton_schulz(x: FloatArray, c: OpCount) -> FloatArray:
    """``x`` with all its singular values near one: five steps, as Muon has them."""
    turned = x.shape[0] > x.shape[1]
    y = x.T if turned else x
    y = y / (np.sqrt((y * y).sum()) + EPSILON)
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        gram = _product(y, y.T, c)
        y = first * y + _product(second * gram + third * _product(gram, gram, c), y, c)
    return np.asarray(y.T if turned else y)


def lact(
    q: FloatArray, k: FloatArray, v: FloatArray, rates: FloatArray, weights: Weights, c: OpCount, *, chunk: int,
    muon: bool = False, lengths: Sequence[FloatArray] | None = None,
) -> tuple[FloatArray, Weights]:  # fmt: skip
    """``q, k, v`` (T, h), ``rates`` (T, 3): each chunk is applied to, then learned from, if it is whole.

    ``lengths`` (rows, 1) that the rows of each matrix are brought back to; those of ``weights`` if not said.
    """
    out = np.empty_like(v)
    lengths = [np.sqrt((w * w).sum(axis=1, keepdims=True)) for w in weights] if lengths is None else lengths
    for start in range(0, v.shape[0], chunk):
        rows = slice(start, start + chunk)
        out[rows] = swiglu(q[rows], weights, c)
        if start + chunk > v.shape[0]:
            break
        steps = swiglu_gradients(k[rows], v[rows], rates[rows], weights, c)
        moved = [w + (newton_schulz(step, c) if muon else step) for w, step in zip(weights, steps, strict=True)]
        weights = tuple(
            length * w / np.sqrt((w * w).sum(axis=1, keepdims=True)) for w, length in zip(moved, lengths, strict=True)
        )
    return out, weights
