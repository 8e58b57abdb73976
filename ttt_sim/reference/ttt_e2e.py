"""TTT-E2E in float64: forward, loss, backward through the suffix, one clipped step of gradient descent per mini-batch.

The model of :mod:`ttt_sim.reference.decoder` with windowed attention, norms of queries and keys and norms after each
branch. The last layers (the suffix) have a prime MLP before the static one, whose matrices P = (gate, up, down) belong
to a sequence. Over mini-batch i of b tokens, with mean next-token cross-entropy L_i:

    g = dL_i / dP at P_(i-1),   P_i = P_(i-1) - rate * min(1, clip / |g|) * g

The norm is over all prime matrices of a sequence. Keys and values from before the mini-batch are constants. Rows of an
open mini-batch run with the matrices that its loss will be taken with, so any split of tokens into calls gives the same
matrices. Keys are kept before rotation, and rotated by their place among the keys that a call sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray, InputError, as_count
from ttt_sim.reference.exact import row_dot, row_sum
from ttt_sim.reference.formats import FLOAT64
from ttt_sim.reference.layers import attention, rms_norm, rotate
from ttt_sim.reference.meter import Meter, OpCount
from ttt_sim.reference.randomness import normal, whole_numbers

Ids = npt.NDArray[np.int64]
#: What the forward pass of a layer leaves for the backward pass, by name.
Kept = dict[str, FloatArray]
#: Prime matrices, or their gradients: (layer, name) -> (batch, outputs, inputs).
Prime = dict[tuple[int, str], FloatArray]

PRIME = ("prime_gate_proj", "prime_up_proj", "prime_down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class E2EShape:
    """Sizes of a model whose last ``n_suffix`` layers learn. ``dense``: count all pairs of a mini-batch's queries and
    keys in the suffix as computed, those that the mask hides too. ``clip`` None: none."""

    n_layers: int
    n_suffix: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    window: int
    mini_batch: int
    dense: bool = True
    rate: float = 1.0
    clip: float | None = 1.0
    rotary_base: float = 1e6
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_suffix", "window", "mini_batch"):
            as_count(name, getattr(self, name))
        if self.n_suffix > self.n_layers:
            raise InputError(f"n_suffix: is {self.n_suffix}, expected at most n_layers, {self.n_layers}")
        if self.window < self.mini_batch:
            raise InputError(f"window: is {self.window}, expected at least mini_batch, {self.mini_batch}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads: is {self.n_heads}, expected a multiple of n_kv_heads, {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim: is {self.head_dim}, expected an even number: rotary embedding pairs elements")

    @property
    def suffix(self) -> range:
        return range(self.n_layers - self.n_suffix, self.n_layers)


def parameter_shapes(shape: E2EShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters; of prime matrices what every sequence starts from."""
    d, f, h = shape.d_model, shape.d_ff, shape.head_dim
    out: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, d), "final_norm.weight": (d,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = (shape.vocab_size, d)
    for layer in range(shape.n_layers):
        names: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "q_proj": (shape.n_heads * h, d), "k_proj": (shape.n_kv_heads * h, d),
            "v_proj": (shape.n_kv_heads * h, d), "qk_norm": (2, h), "o_proj": (d, shape.n_heads * h),
            "attn_post_norm": (d,), "mlp_norm": (d,), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
            "mlp_post_norm": (d,),
        }  # fmt: skip
        if layer in shape.suffix:
            names |= {"prime_norm": (d,), "prime_post_norm": (d,)}
            names |= dict(zip(PRIME, ((f, d), (f, d), (d, f)), strict=True))
        out |= {f"layers.{layer}.{name}.weight": size for name, size in names.items()}
    return out


def random_parameters(shape: E2EShape, seed: int) -> dict[str, FloatArray]:
    """Parameters for tests: norms near 1, matrices of variance 1/inputs."""
    out = {}
    for i, (name, size) in enumerate(parameter_shapes(shape).items()):
        x = normal(seed, i, size)
        if "norm" in name:
            x = 1 + x / 8
        elif name != "embedding.weight":
            x = x / np.sqrt(float(size[-1]))
        out[name] = x
    return out


def random_tokens(shape: E2EShape, seed: int, batch: int, n: int) -> Ids:
    """Token ids (batch, n), each sequence its own."""
    return whole_numbers(seed, 1 << 20, (batch, n), shape.vocab_size)


@dataclass(slots=True)
class _Cache:
    """Keys before rotation and values (batch, rows, G, h): of whole mini-batches, and of the open one."""

    keys: FloatArray
    values: FloatArray
    open_keys: FloatArray
    open_values: FloatArray


class E2EDecoder:
    """The model with its state: call it with the next tokens of every sequence."""

    def __init__(
        self, shape: E2EShape, parameters: Mapping[str, FloatArray], batch: int = 1, meter: Meter | None = None
    ) -> None:
        for name, size in parameter_shapes(shape).items():
            if name not in parameters or parameters[name].shape != size:
                got = "nothing" if name not in parameters else f"shape {parameters[name].shape}"
                raise InputError(f"parameters[{name!r}]: got {got}, expected shape {size}")
        self.shape, self.parameters, self.batch = shape, parameters, batch
        self.meter = meter or Meter()
        self.position = 0
        empty = np.zeros((batch, 0, shape.n_kv_heads, shape.head_dim))
        self._caches = [_Cache(empty, empty, empty, empty) for _ in range(shape.n_layers)]
        self._open_ids: Ids = np.zeros((batch, 0), dtype=np.int64)
        self.prime: Prime = {
            (layer, name): np.repeat(parameters[f"layers.{layer}.{name}.weight"][None], batch, axis=0)
            for layer in shape.suffix
            for name in PRIME
        }
        self.losses: list[FloatArray] = []  # (batch,) of each mini-batch

    def __call__(self, tokens: Ids, following: Ids, *, logits: bool = True) -> FloatArray | None:
        """The next ``tokens`` (batch, m) of every sequence. ``following`` (batch,): the token after them, which the
        last row of a mini-batch is to predict; in decode the one that was drawn from the logits.

        Returns the logits (batch, V) of the last row, if asked for.

        Raises:
            InputError: wrong shape, or ids outside the vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise InputError(f"tokens: shape is {tokens.shape}, expected ({self.batch}, at least 1)")
        if following.shape != (self.batch,):
            raise InputError(f"following: shape is {following.shape}, expected ({self.batch},)")
        row = np.concatenate([tokens, following[:, None]], axis=1)
        if row.min() < 0 or row.max() >= self.shape.vocab_size:
            raise InputError(f"tokens: ids from {row.min()} to {row.max()}, expected 0 to {self.shape.vocab_size - 1}")
        out: FloatArray | None = None
        begin, n = 0, tokens.shape[1]
        while begin < n:
            stop = min(begin + self.shape.mini_batch - self._open_ids.shape[1], n)
            out = self._piece(tokens[:, begin:stop], row[:, begin + 1 : stop + 1], logits=logits and stop == n)
            begin = stop
            self.meter.step += 1
        return out

    def _piece(self, ids: Ids, following: Ids, *, logits: bool) -> FloatArray | None:
        """Tokens that end no later than their mini-batch."""
        opened = self._open_ids.shape[1]
        if opened + ids.shape[1] < self.shape.mini_batch:
            x, kept = self._forward(ids, whole=False)
            for cache, rows in zip(self._caches, kept, strict=True):
                cache.open_keys = np.concatenate([cache.open_keys, rows["k_normed"]], axis=1)
                cache.open_values = np.concatenate([cache.open_values, rows["v"]], axis=1)
            self._open_ids = np.concatenate([self._open_ids, ids], axis=1)
            self.position += ids.shape[1]
            return self._head(x[:, -1]) if logits else None
        ids = np.concatenate([self._open_ids, ids], axis=1)
        targets = np.concatenate([ids[:, 1:], following[:, -1:]], axis=1)
        losses, last, grads, kept = self._learn(ids, targets)
        self.losses.append(losses)
        self._step(grads)
        for cache, rows in zip(self._caches, kept, strict=True):
            cache.keys = np.concatenate([cache.keys, rows["k_normed"]], axis=1)[:, -self.shape.window :]
            cache.values = np.concatenate([cache.values, rows["v"]], axis=1)[:, -self.shape.window :]
            cache.open_keys, cache.open_values = cache.open_keys[:, :0], cache.open_values[:, :0]
        self._open_ids = ids[:, :0]
        self.position += ids.shape[1] - opened
        return last if logits else None

    def gradients(self, ids: Ids, targets: Ids) -> tuple[FloatArray, Prime]:
        """Mean loss (batch,) of a whole mini-batch that begins now, and its gradients. Changes nothing."""
        losses, _, grads, _ = self._learn(ids, targets)
        return losses, grads

    def loss(self, ids: Ids, targets: Ids) -> FloatArray:
        """Mean loss (batch,) of a whole mini-batch that begins now. Changes nothing."""
        x, _ = self._forward(ids, whole=True)
        _, logits = self._all_logits(x)
        return self._losses(logits, targets)[0]

    def _learn(self, ids: Ids, targets: Ids) -> tuple[FloatArray, FloatArray, Prime, list[Kept]]:
        x, kept = self._forward(ids, whole=True)
        normed, logits = self._all_logits(x)
        losses, logits_grad = self._losses(logits, targets)
        grads = self._backward(self._head_grad(x, logits_grad), kept)
        assert normed.shape == x.shape
        return losses, logits[:, -1], grads, kept

    def _step(self, grads: Prime) -> None:
        s = self.shape
        scale = np.ones(self.batch)
        if s.clip is not None:
            parts = []
            for grad in grads.values():
                self.meter.op("delta_norm")
                flat = grad.reshape(self.batch, -1)
                parts.append(row_dot(flat, flat, FLOAT64))
            norm = np.sqrt(row_sum(np.stack(parts, axis=-1), FLOAT64))
            scale = np.minimum(1.0, s.clip / np.maximum(norm, np.finfo(np.float64).tiny))
        for key, grad in grads.items():
            self.meter.op("weight_write", layer=key[0])
            self.prime[key] = self.prime[key] - s.rate * scale[:, None, None] * grad

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _weight(self, name: str, layer: int) -> FloatArray:
        return self.parameters[f"layers.{layer}.{name}.weight" if layer >= 0 else f"{name}.weight"]

    def _norm(self, kind: str, name: str, layer: int, x: FloatArray) -> FloatArray:
        c = self.meter.op(kind, layer=layer)
        return rms_norm(x, self._weight(name, layer), self.shape.norm_epsilon, FLOAT64, c)

    def _linear(self, kind: str, layer: int, x: FloatArray, weight: FloatArray) -> FloatArray:
        """Rows (..., k) times a weight (n, k) that sequences share."""
        y = self.meter.op(kind, layer=layer).product(x.reshape(-1, x.shape[-1]), weight.T, FLOAT64)
        return y.reshape(*x.shape[:-1], -1)

    def _own(self, kind: str, layer: int, x: FloatArray, name: str) -> FloatArray:
        """Rows (batch, m, k) times the prime matrix of each sequence."""
        weight = np.swapaxes(self.prime[layer, name], -1, -2)
        return self.meter.op(kind, layer=layer).product(x, weight, FLOAT64)

    def _head(self, x: FloatArray) -> FloatArray:
        return self._linear("lm_head", -1, self._norm("final_norm", "final_norm", -1, x), self._table)

    @property
    def _table(self) -> FloatArray:
        return self._weight("embedding" if self.shape.tied_embeddings else "lm_head", -1)

    def _all_logits(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        normed = self._norm("final_norm", "final_norm", -1, x)
        return normed, self._linear("lm_head", -1, normed, self._table)

    def _losses(self, logits: FloatArray, targets: Ids) -> tuple[FloatArray, FloatArray]:
        """Mean cross-entropy (batch,) and its gradient."""
        self.meter.op("loss")
        b = targets.shape[1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        powers = elementary.exp(shifted)
        total = row_sum(powers, FLOAT64)
        wanted = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
        losses = row_sum(elementary.log(total) - wanted, FLOAT64) / b
        self.meter.op("loss_grad")
        grad = powers / total[..., None]
        np.put_along_axis(grad, targets[..., None], np.take_along_axis(grad, targets[..., None], axis=-1) - 1, axis=-1)
        return losses, grad / b

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward(self, ids: Ids, *, whole: bool) -> tuple[FloatArray, list[Kept]]:
        """Rows after the last layer, and what each layer keeps. ``whole``: a mini-batch, not rows of an open one."""
        self.meter.op("embedding")
        x, kept = self.parameters["embedding.weight"][ids], []
        for layer in range(self.shape.n_layers):
            rows: Kept = {"x": x}
            x = self._attended(layer, rows, whole=whole)
            if layer in self.shape.suffix:
                rows["attn_stream"] = x
                normed = rows["prime_normed"] = self._norm("mlp_norm", "prime_norm", layer, x)
                gate = rows["prime_gate"] = self._own("gate_proj", layer, normed, PRIME[0])
                up = rows["prime_up"] = self._own("up_proj", layer, normed, PRIME[1])
                hidden = rows["prime_hidden"] = elementary.silu(gate) * up
                out = rows["prime_out"] = self._own("fast_apply", layer, hidden, PRIME[2])
                x = x + self._norm("post_norm", "prime_post_norm", layer, out)
            rows["attended"] = x
            normed = self._norm("mlp_norm", "mlp_norm", layer, x)
            gate = rows["gate"] = self._linear("gate_proj", layer, normed, self._weight("gate_proj", layer))
            up = rows["up"] = self._linear("up_proj", layer, normed, self._weight("up_proj", layer))
            hidden = elementary.silu(gate) * up
            out = rows["mlp_out"] = self._linear("down_proj", layer, hidden, self._weight("down_proj", layer))
            x = x + self._norm("post_norm", "mlp_post_norm", layer, out)
            kept.append(rows)
        return x, kept

    def _attended(self, layer: int, rows: Kept, *, whole: bool) -> FloatArray:
        s, x = self.shape, rows["x"]
        m = x.shape[1]
        normed = self._norm("attn_norm", "attn_norm", layer, x)
        for name in "qkv":
            y = self._linear(f"{name}_proj", layer, normed, self._weight(f"{name}_proj", layer))
            rows[name] = y.reshape(self.batch, m, -1, s.head_dim)
        c, gains = self.meter.op("qk_norm", layer=layer), self._weight("qk_norm", layer)
        queries, keys = (
            rms_norm(rows[name], gain, s.norm_epsilon, FLOAT64, c) for name, gain in zip("qk", gains, strict=True)
        )
        rows["k_normed"] = keys
        before, values, dense = self._before(layer, whole=whole)
        n = before.shape[1]
        cos, sin = elementary.rotary_tables(np.arange(n + m, dtype=np.float64), s.head_dim, s.rotary_base)
        c = self.meter.op("rope", layer=layer)
        rows["cos"], rows["sin"] = cos[n:], sin[n:]
        rows["q_rotated"] = rotate(queries, cos[n:], sin[n:], FLOAT64, c)
        rows["keys"] = rotate(np.concatenate([before, keys], axis=1), cos, sin, FLOAT64, c)
        rows["values"] = np.concatenate([values, rows["v"]], axis=1)
        c = self.meter.op("attention", layer=layer)
        visible = self._visible(m, n)
        rows["core"] = attention(rows["q_rotated"], rows["keys"], rows["values"], visible, FLOAT64, c)
        c.flops += 4 * self._hidden(visible, dense)
        core = rows["core"].reshape(self.batch, m, -1)
        out = rows["attn_out"] = self._linear("o_proj", layer, core, self._weight("o_proj", layer))
        return x + self._norm("post_norm", "attn_post_norm", layer, out)

    def _before(self, layer: int, *, whole: bool) -> tuple[FloatArray, FloatArray, bool]:
        """Keys and values that a call sees from before it, and whether hidden pairs are computed too."""
        cache, s = self._caches[layer], self.shape
        dense = whole and s.dense and layer in s.suffix
        keys, values = cache.keys, cache.values
        if not whole:
            keys = np.concatenate([keys, cache.open_keys], axis=1)
            values = np.concatenate([values, cache.open_values], axis=1)
        drop = max(keys.shape[1] - (s.window if dense else s.window - 1), 0)
        return keys[:, drop:], values[:, drop:], dense

    def _visible(self, m: int, n: int) -> npt.NDArray[np.bool_]:
        """(m, n + m): the keys that each query sees, itself and those before it in the window."""
        query, key = np.arange(n, n + m)[:, None], np.arange(n + m)[None, :]
        return (key <= query) & (key > query - self.shape.window)

    def _hidden(self, visible: npt.NDArray[np.bool_], dense: bool) -> int:
        """Multiply-adds of the pairs that a dense core computes in vain, in each of its products."""
        s = self.shape
        return self.batch * s.n_heads * s.head_dim * int(visible.size - visible.sum()) if dense else 0

    # --- backward -----------------------------------------------------------------------------------------------------

    def _back(self, layer: int, grad: FloatArray, weight: FloatArray) -> FloatArray:
        """Gradient of the rows that a shared weight (n, k) was multiplied with."""
        y = self.meter.op("input_grad", layer=layer).product(grad.reshape(-1, grad.shape[-1]), weight, FLOAT64)
        return y.reshape(*grad.shape[:-1], -1)

    def _norm_grad(self, name: str, layer: int, x: FloatArray, grad: FloatArray) -> FloatArray:
        self.meter.op("norm_grad", layer=layer)
        return norm_grad(x, self._weight(name, layer), self.shape.norm_epsilon, grad)

    def _head_grad(self, x: FloatArray, grad: FloatArray) -> FloatArray:
        return self._norm_grad("final_norm", -1, x, self._back(-1, grad, self._table))

    def _backward(self, grad: FloatArray, kept: Sequence[Kept]) -> Prime:
        """Gradients of the prime matrices from that of the rows after the last layer."""
        s = self.shape
        grads: Prime = {}
        for layer in reversed(s.suffix):
            rows = kept[layer]
            out = self._norm_grad("mlp_post_norm", layer, rows["mlp_out"], grad)
            hidden = self._back(layer, out, self._weight("down_proj", layer))
            gate, up = silu_mul_grad(rows["gate"], rows["up"], hidden)
            normed = self._back(layer, gate, self._weight("gate_proj", layer))
            normed = normed + self._back(layer, up, self._weight("up_proj", layer))
            grad = grad + self._norm_grad("mlp_norm", layer, rows["attended"], normed)
            out = self._norm_grad("prime_post_norm", layer, rows["prime_out"], grad)
            hidden = self._own_grad(layer, PRIME[2], out, rows["prime_hidden"], grads, to_input=True)
            gate, up = silu_mul_grad(rows["prime_gate"], rows["prime_up"], hidden)
            above = layer != s.suffix[0]
            normed = self._own_grad(layer, PRIME[0], gate, rows["prime_normed"], grads, to_input=above)
            normed = normed + self._own_grad(layer, PRIME[1], up, rows["prime_normed"], grads, to_input=above)
            if above:
                grad = grad + self._norm_grad("prime_norm", layer, rows["attn_stream"], normed)
                out = self._norm_grad("attn_post_norm", layer, rows["attn_out"], grad)
                grad = grad + self._norm_grad("attn_norm", layer, rows["x"], self._attention_grad(layer, rows, out))
        return grads

    def _own_grad(
        self, layer: int, name: str, out: FloatArray, source: FloatArray, grads: Prime, *, to_input: bool
    ) -> FloatArray:
        """Backward of :meth:`_own`; the gradient of ``source``, or nothing (zeros) where that is not wanted."""
        back = np.zeros_like(source)
        if to_input:
            back = self.meter.op("input_grad", layer=layer).product(out, self.prime[layer, name], FLOAT64)
        c = self.meter.op("weight_grad", layer=layer)
        grads[layer, name] = c.product(np.swapaxes(out, -1, -2), source, FLOAT64)
        return back

    def _attention_grad(self, layer: int, rows: Kept, grad: FloatArray) -> FloatArray:
        """From the gradient of what attention adds to that of its normed input."""
        s, m = self.shape, grad.shape[1]
        core = self._back(layer, grad, self._weight("o_proj", layer)).reshape(self.batch, m, -1, s.head_dim)
        n = rows["keys"].shape[1] - m
        visible = self._visible(m, n)
        c = self.meter.op("attention_grad", layer=layer)
        q, k, v = attention_grad(rows["q_rotated"], rows["keys"], rows["values"], visible, core, c)
        c.flops += 10 * self._hidden(visible, s.dense)
        turn = self.meter.op("rope_grad", layer=layer)
        q = rotate(q, rows["cos"], -rows["sin"], FLOAT64, turn)
        k = rotate(k[:, n:], rows["cos"], -rows["sin"], FLOAT64, turn)
        gains = self._weight("qk_norm", layer)
        q, k = (
            norm_grad(rows[name], gain, s.norm_epsilon, g) for name, gain, g in zip("qk", gains, (q, k), strict=True)
        )
        flat = [y.reshape(self.batch, m, -1) for y in (q, k, v[:, n:])]
        parts = [self._back(layer, y, self._weight(f"{name}_proj", layer)) for name, y in zip("qkv", flat, strict=True)]
        return parts[0] + parts[1] + parts[2]


def norm_grad(x: FloatArray, gain: FloatArray, epsilon: float, grad: FloatArray) -> FloatArray:
    """Gradient of the input of an RMSNorm: r g - x r**3 (g x) / d with g = grad * gain, r = 1 / sqrt(mean(x**2))."""
    d = x.shape[-1]
    scale = 1 / np.sqrt(row_dot(x, x, FLOAT64) / d + epsilon)
    inner = grad * gain
    along: FloatArray = row_dot(inner, x, FLOAT64) * scale * scale * scale / d
    back: FloatArray = inner * scale[..., None] - x * along[..., None]
    return back


def silu_mul_grad(gate: FloatArray, up: FloatArray, grad: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gradients of both factors of silu(gate) * up."""
    share = 1 / (1 + elementary.exp(-gate))
    return grad * up * share * (1 + gate * (1 - share)), grad * gate * share


def attention_grad(
    queries: FloatArray,
    keys: FloatArray,
    values: FloatArray,
    visible: npt.NDArray[np.bool_],
    grad: FloatArray,
    c: OpCount,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Gradients of queries, keys and values from that of the core's output; shapes as of
    :func:`ttt_sim.reference.layers.attention`. Five products: the scores again, and those of weights, values, queries
    and keys. Hidden pairs are not counted."""
    batch, _, heads, width = queries.shape
    group = heads // keys.shape[2]
    scale = 1 / np.sqrt(float(width))
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    uncounted = OpCount(kind=c.kind)

    def product(a: FloatArray, b: FloatArray) -> FloatArray:
        return uncounted.product(a, b, FLOAT64)

    for head in range(heads):
        q, k, v = queries[:, :, head], keys[:, :, head // group], values[:, :, head // group]
        scores = np.where(visible, product(q, np.swapaxes(k, -1, -2)) * scale, -np.inf)
        powers = np.where(visible, elementary.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        p = powers / row_sum(powers, FLOAT64)[..., None]
        dp = product(grad[:, :, head], np.swapaxes(v, -1, -2))
        ds = p * (dp - row_dot(dp, p, FLOAT64)[..., None]) * scale
        dv[:, :, head // group] += product(np.swapaxes(p, -1, -2), grad[:, :, head])
        dq[:, :, head] = product(ds, k)
        dk[:, :, head // group] += product(np.swapaxes(ds, -1, -2), q)
        c.flops += 5 * 2 * width * batch * int(visible.sum())
    return dq, dk, dv
