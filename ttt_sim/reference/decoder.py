"""A whole decoder-only transformer with In-Place TTT in some of its layers, in prefill and decode.

``batch`` independent sequences advance together. The model is of the Llama or Qwen3 family: RMSNorm, grouped-query
attention with rotary embedding (Qwen3: norms of queries and keys), gated MLP. In the TTT layers the down projection is
a fast weight (:mod:`ttt_sim.reference.in_place_ttt`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ttt_sim.reference import elementary
from ttt_sim.reference.checks import FloatArray, InputError, as_count
from ttt_sim.reference.formats import BFLOAT16, Format, nearest, round_to
from ttt_sim.reference.in_place_ttt import TAPS, ChunkRule, FastWeight, MlpWeights, StreamingMlp, TTTOptions
from ttt_sim.reference.kv_formats import KVFormat
from ttt_sim.reference.layers import attention, rms_norm, rotate
from ttt_sim.reference.meter import Meter
from ttt_sim.reference.randomness import normal, whole_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a model. ``ttt_layers`` have a fast weight; ``window`` None: attention to everything."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    dtype: Format = BFLOAT16
    kv: KVFormat = field(default_factory=KVFormat)
    window: int | None = None
    ttt_layers: tuple[int, ...] = ()
    ttt: TTTOptions | None = None
    projection: bool = True
    rotary_base: float = 1e6
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads: is {self.n_heads}, expected a multiple of n_kv_heads, {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim: is {self.head_dim}, expected an even number: rotary embedding pairs elements")
        if self.window is not None:
            as_count("window", self.window)
        if self.ttt is not None and (self.ttt.update_rows or 1) > self.d_model:
            raise InputError(f"update_rows: is {self.ttt.update_rows}, expected at most d_model, {self.d_model}")
        if any(not 0 <= layer < self.n_layers for layer in self.ttt_layers):
            raise InputError(f"ttt_layers: {self.ttt_layers}, expected layers from 0 to {self.n_layers - 1}")


def parameter_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, in the layout that PyTorch keeps."""
    d, f, h = shape.d_model, shape.d_ff, shape.head_dim
    out: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, d), "final_norm.weight": (d,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = (shape.vocab_size, d)
    for layer in range(shape.n_layers):
        names = {
            "attn_norm": (d,), "q_proj": (shape.n_heads * h, d), "k_proj": (shape.n_kv_heads * h, d),
            "v_proj": (shape.n_kv_heads * h, d), "qk_norm": (2, h), "o_proj": (d, shape.n_heads * h), "mlp_norm": (d,),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f), "ttt_conv": (d, TAPS), "ttt_proj": (d, d),
        }  # fmt: skip
        if not shape.qk_norm:
            del names["qk_norm"]
        u = d if shape.ttt is None or shape.ttt.update_rows is None else shape.ttt.update_rows
        if layer not in shape.ttt_layers:
            del names["ttt_conv"], names["ttt_proj"]
        elif not shape.projection:
            del names["ttt_proj"]
            names["ttt_conv"] = (u, TAPS)
        else:
            names["ttt_proj"] = (d, u)
        out |= {f"layers.{layer}.{name}.weight": size for name, size in names.items()}
    return out


def random_parameters(shape: DecoderShape, seed: int) -> dict[str, FloatArray]:
    """Parameters for tests: norms near 1, matrices of variance 1/inputs, convolution taps small enough that a few
    updates with a rate of about 1 change the fast weight by its own size. Numbers of ``shape.dtype``."""
    out = {}
    for i, (name, size) in enumerate(parameter_shapes(shape).items()):
        x = normal(seed, i, size)
        if "norm" in name:
            x = 1 + x / 8
        elif name == "embedding.weight":
            pass
        elif "ttt_conv" in name:
            x = x / 64
        else:
            x = x / np.sqrt(float(size[-1]))
        out[name] = round_to(x, shape.dtype, name)
    return out


def random_tokens(shape: DecoderShape, seed: int, batch: int, n: int) -> npt.NDArray[np.int64]:
    """Token ids (batch, n), each sequence its own."""
    return whole_numbers(seed, 1 << 20, (batch, n), shape.vocab_size)


@dataclass(slots=True)
class LayerCache:
    """Keys and values (batch, rows, G, h) as a reader of the cache gets them."""

    keys: FloatArray
    values: FloatArray


@dataclass(slots=True)
class Recorded:
    """What one call left behind: ``outputs[layer]`` (batch, tokens, d), and the logits (batch, V) it was asked for."""

    outputs: list[FloatArray] = field(default_factory=list)
    embedded: FloatArray = field(default_factory=lambda: np.zeros(0))
    logits: FloatArray | None = None


class Decoder:
    """The model with its state: call it with the next tokens of every sequence."""

    def __init__(
        self, shape: DecoderShape, parameters: Mapping[str, FloatArray], batch: int = 1, meter: Meter | None = None
    ) -> None:
        for name, size in parameter_shapes(shape).items():
            if name not in parameters or parameters[name].shape != size:
                got = "nothing" if name not in parameters else f"shape {parameters[name].shape}"
                raise InputError(f"parameters[{name!r}]: got {got}, expected shape {size}")
        if shape.ttt_layers and shape.ttt is None:
            raise InputError("shape: has TTT layers, expected TTT options")
        self.shape, self.parameters, self.batch = shape, parameters, batch
        self.meter = meter or Meter()
        self.position = 0
        self.reset()

    def reset(self) -> None:
        """Start new documents in all sequences: empty caches, trained weights."""
        s = self.shape
        empty = np.zeros((self.batch, 0, s.n_kv_heads, s.head_dim))
        self.position = 0
        self.caches = [LayerCache(empty, empty) for _ in range(s.n_layers)]
        self.fast: dict[int, StreamingMlp] = {}
        for layer in s.ttt_layers:
            assert s.ttt is not None
            self.fast[layer] = StreamingMlp(self._mlp(layer), s.ttt, self.batch, self.meter, layer)

    def _mlp(self, layer: int) -> MlpWeights:
        def of(name: str) -> FloatArray:
            return self.parameters[f"layers.{layer}.{name}.weight"]

        fast = layer in self.shape.ttt_layers
        return MlpWeights(
            gate=of("gate_proj"),
            up=of("up_proj"),
            down=of("down_proj"),
            conv=of("ttt_conv") if fast else np.zeros((self.shape.d_model, TAPS)),
            projection=of("ttt_proj") if fast and self.shape.projection else None,
        )

    @np.errstate(over="ignore")  # an infinity is an error where it is rounded
    def __call__(self, tokens: npt.NDArray[np.int64], *, logits: bool = True) -> Recorded:
        """The next ``tokens`` (batch, m) of every sequence.

        Raises:
            InputError: wrong shape, or ids outside the vocabulary.
        """
        s, q = self.shape, self.shape.dtype
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise InputError(f"tokens: shape is {tokens.shape}, expected ({self.batch}, at least 1)")
        if tokens.min() < 0 or tokens.max() >= s.vocab_size:
            raise InputError(f"tokens: ids from {tokens.min()} to {tokens.max()}, expected 0 to {s.vocab_size - 1}")
        out = Recorded()
        c = self.meter.op("embedding")
        x = out.embedded = c.write(c.read(self.parameters["embedding.weight"][tokens], q), q)
        for layer in range(s.n_layers):
            x = self._layer(layer, x, out.embedded)
            out.outputs.append(x)
        if logits:
            out.logits = self._head(x[:, -1])
        self._keep_shared_targets(tokens.shape[1])
        self.position += tokens.shape[1]
        self.meter.step += 1
        return out

    def _layer(self, layer: int, x: FloatArray, embedded: FloatArray) -> FloatArray:
        s, q = self.shape, self.shape.dtype
        attended = self._add("attn_residual", layer, x, self._attention(layer, self._norm("attn_norm", layer, x)))
        normed = self._norm("mlp_norm", layer, attended)
        if layer in self.fast:
            assert s.ttt is not None
            y = self.fast[layer](normed, normed if s.ttt.own_targets else embedded)
        else:
            options = TTTOptions(chunk=1, rate=0.0, dtype=q, fast_dtype=q)
            rule = ChunkRule(weights=self._mlp(layer), options=options, meter=self.meter, layer=layer)
            y = self._linear("down_proj", layer, rule.hidden(normed))
        return self._add("mlp_residual", layer, attended, y)

    def _norm(self, name: str, layer: int, x: FloatArray) -> FloatArray:
        q, c = self.shape.dtype, self.meter.op(name, layer=layer)
        gain = self.parameters[f"layers.{layer}.{name}.weight" if layer >= 0 else f"{name}.weight"]
        return c.write(rms_norm(c.read(x, q), c.read(gain, q), self.shape.norm_epsilon, q, c), q)

    def _linear(self, name: str, layer: int, x: FloatArray, weight: str = "") -> FloatArray:
        q, c = self.shape.dtype, self.meter.op(name, layer=layer)
        w = c.read(self.parameters[weight or f"layers.{layer}.{name}.weight"], q)
        y = c.product(c.read(x, q).reshape(-1, x.shape[-1]), w.T, q)
        return c.write(y, q).reshape(*x.shape[:-1], -1)

    def _add(self, name: str, layer: int, x: FloatArray, y: FloatArray) -> FloatArray:
        q, c = self.shape.dtype, self.meter.op(name, layer=layer)
        c.lanes += x.size
        return c.write(c.read(x, q) + c.read(y, q), q)

    def _attention(self, layer: int, x: FloatArray) -> FloatArray:
        """F2 to F8: projections, norms, rotation, cache, core, output projection."""
        s, q = self.shape, self.shape.dtype
        m, p = x.shape[1], self.position

        def heads(y: FloatArray) -> FloatArray:
            return y.reshape(self.batch, m, -1, s.head_dim)

        queries, keys, values = (heads(self._linear(f"{n}_proj", layer, x)) for n in "qkv")
        if s.qk_norm:
            c, gains = self.meter.op("qk_norm", layer=layer), self.parameters[f"layers.{layer}.qk_norm.weight"]
            queries = c.write(rms_norm(c.read(queries, q), gains[0], s.norm_epsilon, q, c), q)
            keys = c.write(rms_norm(c.read(keys, q), gains[1], s.norm_epsilon, q, c), q)
        c = self.meter.op("rope", layer=layer)
        tables = elementary.rotary_tables(np.arange(p, p + m, dtype=np.float64), s.head_dim, s.rotary_base)
        cos, sin = (nearest(table, q) for table in tables)
        c.read(np.repeat(cos, 2, axis=1), q)  # tables hold a number for each of the h elements
        c.read(np.repeat(sin, 2, axis=1), q)
        queries, keys = (c.write(rotate(c.read(y, q), cos, sin, q, c), q) for y in (queries, keys))
        core = self._attend(layer, queries, keys, values)
        return self._linear("o_proj", layer, core.reshape(self.batch, m, -1))

    def _attend(self, layer: int, queries: FloatArray, keys: FloatArray, values: FloatArray) -> FloatArray:
        """F6 and F7. A full cache, and a single new row, is stored first and attended to as it is stored; the rows of a
        longer call attend to each other as they are, and only the window's last are stored afterwards."""
        s, q, m = self.shape, self.shape.dtype, queries.shape[1]
        cache = self.caches[layer]
        stored_first = s.window is None or m == 1
        if stored_first:
            self._store(layer, keys, values)
        c = self.meter.op("attention", layer=layer)
        kept_k, kept_v = cache.keys, cache.values
        if not stored_first:
            assert s.window is not None
            kept = max(kept_k.shape[1] - (s.window - 1), 0)  # the oldest row is out of sight of every new one
            kept_k, kept_v = kept_k[:, kept:], kept_v[:, kept:]
        c.bytes_read += 2 * self.batch * kept_k.shape[1] * s.kv.row_bytes(s.n_kv_heads, s.head_dim)
        if s.kv.quantised:
            c.lanes += 2 * (kept_k.size + kept_v.size)  # scale, zero point
        if not stored_first:
            kept_k = np.concatenate([kept_k, c.read(keys, q)], axis=1)
            kept_v = np.concatenate([kept_v, c.read(values, q)], axis=1)
        end = self.position + m
        query_at = np.arange(self.position, end)[:, None]
        key_at = np.arange(end - kept_k.shape[1], end)[None, :]
        visible = key_at <= query_at
        if s.window is not None:
            visible &= key_at > query_at - s.window
        y = c.write(attention(c.read(queries, q), kept_k, kept_v, visible, q, c), q)
        if not stored_first:
            self._store(layer, keys, values)
        return y

    def _store(self, layer: int, keys: FloatArray, values: FloatArray) -> None:
        s, q, cache = self.shape, self.shape.dtype, self.caches[layer]
        c = self.meter.op("kv_append", layer=layer)
        room = keys.shape[1] if s.window is None else min(keys.shape[1], s.window)
        keys, values = c.read(keys[:, -room:], q), c.read(values[:, -room:], q)
        if s.kv.quantised:
            c.lanes += 2 * (keys.size + values.size)
        c.bytes_written += 2 * self.batch * room * s.kv.row_bytes(s.n_kv_heads, s.head_dim)
        rows = slice(None) if s.window is None else slice(-s.window, None)
        cache.keys = np.concatenate([cache.keys, s.kv.stored(keys, q)], axis=1)[:, rows]
        cache.values = np.concatenate([cache.values, s.kv.stored(values, q)], axis=1)[:, rows]

    def _head(self, x: FloatArray) -> FloatArray:
        head = "embedding.weight" if self.shape.tied_embeddings else "lm_head.weight"
        return self._linear("lm_head", -1, self._norm("final_norm", -1, x), head)

    def _keep_shared_targets(self, m: int) -> None:
        """Embeddings as targets are kept once for all layers, except by the official carry; count the store."""
        s = self.shape
        if s.ttt is None or s.ttt.own_targets or s.ttt.carry == "official" or not self.fast:
            return
        r = self.position % s.ttt.chunk
        rows = m if r + m < s.ttt.chunk else (r + m) % s.ttt.chunk
        if s.ttt.carry == "online":
            rows = min(rows, TAPS - 1)
        if rows:
            c = self.meter.op("carry_append")
            width = next(iter(self.fast.values())).rule.target_columns
            c.write(np.zeros((self.batch, rows, width)), s.dtype)

    def weights_of(self, layer: int) -> list[FastWeight]:
        """Every version of a layer's fast weight so far, W_0 first."""
        return self.fast[layer].versions
