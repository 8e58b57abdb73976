"""The rest of a transformer layer: norms, rotary embedding, attention. Activations have shape (batch, tokens, width).

Each op computes in float64 from correctly rounded sums, and rounds its result once to the format q of the activations,
R(). Norms round before the gain as well, as the Hugging Face classes of Llama and Qwen3 do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray
from ttt_sim.reference.exact import dot, row_dot, row_sum
from ttt_sim.reference.formats import Format, round_to, wide_format
from ttt_sim.reference.meter import OpCount


def rms_norm(x: FloatArray, gain: FloatArray, epsilon: float, q: Format, c: OpCount) -> FloatArray:
    """R(R(x / sqrt(mean(x**2) + epsilon)) * gain) over the last axis."""
    squares = row_dot(x, x, wide_format(q), c.kind)
    c.lanes += 2 * x.size  # multiply, add
    scale = 1 / np.sqrt(squares / x.shape[-1] + epsilon)
    c.roots += scale.size
    c.lanes += scale.size
    y = round_to(x * scale[..., None], q, c.kind) * gain
    c.lanes += 2 * x.size
    return round_to(y, q, c.kind)


def rotate(x: FloatArray, cos: FloatArray, sin: FloatArray, q: Format, c: OpCount) -> FloatArray:
    """Rotary embedding of ``x`` (batch, tokens, heads, h): element i < h/2 is paired with element i + h/2.

    ``cos, sin`` (tokens, h/2). R(x cos - partner sin) in the first half, R(x cos + partner sin) in the second.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    y = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    c.lanes += 3 * x.size  # two multiplies, one add
    return round_to(y, q, c.kind)


def attention(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    visible: npt.NDArray[np.bool_],
    q: Format,
    c: OpCount,
) -> FloatArray:
    """softmax(q k^T / sqrt(h)) v for each head and query row by itself.

    ``queries`` (batch, m, H, h), ``keys, values`` (batch, n, G, h), query head i uses KV head i // (H/G); ``visible``
    (m, n). Scores s = R'(R'(q k) / sqrt(h)) with R' to the wide format (float32; float64 for float64), their exact
    maximum, p = R'(exp(s - max)), R(R'(sum p v) / R'(sum p)). Returns (batch, m, H, h). Hidden pairs are not counted.
    """
    wide, (batch, _, heads, width) = wide_format(q), queries.shape
    group = heads // keys.shape[2]
    pairs = batch * int(visible.sum())
    scale = 1 / np.sqrt(float(width))
    out = np.empty_like(queries)
    for head in range(heads):
        k, v = keys[:, :, head // group], values[:, :, head // group]
        scores = round_to(dot(queries[:, :, head], np.swapaxes(k, -1, -2), wide, c.kind) * scale, wide)
        largest = np.where(visible, scores, -np.inf).max(axis=-1, keepdims=True)
        p = np.where(visible, round_to(elementary.exp(np.where(visible, scores - largest, 0.0)), wide), 0.0)
        out[:, :, head] = dot(p, v, wide, c.kind) / row_sum(p, wide, c.kind)[..., None]
        c.flops += 2 * 2 * width * pairs  # q k and p v
        c.lanes += 5 * pairs  # scale, maximum, subtract, exp, sum
        c.exps += pairs
    return round_to(out, q, c.kind)
