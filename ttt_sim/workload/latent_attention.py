"""Multi-head latent attention: a latent of each token, and one rotated key for all heads, in place of keys and values.

A layer keeps ``latent + rope`` elements of a token. Keys and values of every head are products of the latent, so there
are two forms with the same result. *Expanded*: they are computed, for all tokens that the call sees, and attention is
that of as many KV heads as query heads. *Absorbed*: queries are multiplied with the weight that makes keys, latents
stand for keys and values of one head that all queries share, and their weighted sums are multiplied with the weight
that makes values. Expanded costs less for many rows, absorbed for one.

Shapes of DeepSeek-V2 (arXiv 2405.04434): latent 512, rotated key 64, heads of 128 (config.json: kv_lora_rank,
qk_rope_head_dim, qk_nope_head_dim, v_head_dim); queries from a latent of 1536, in DeepSeek-V2-Lite directly. Heads have
the number and width of the model that it is applied to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import IntArray, Num, Role, Trace
from ttt_sim.workload.attention import (
    dequantise_lanes,
    emit_joined_parts,
    emit_step_to_next,
    held_by_chip,
    packed_bytes,
    visible_pairs,
)
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State, options_of
from ttt_sim.workload.transformer import Decoder, decoder_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentOptions:
    """``latent`` and ``rope`` elements of a token; ``query_latent``: width of the latent that queries come from, None
    for the residual stream; ``form``: that of fewer FLOPs (auto), or always one."""

    latent: int = 512
    rope: int = 64
    query_latent: int | None = None
    form: Literal["auto", "absorbed", "expanded"] = "auto"

    def __post_init__(self) -> None:
        for name in ("latent", "query_latent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"option {name} is {value}, expected at least 1")
        if self.rope < 2 or self.rope % 2:
            raise ConfigError(f"option rope is {self.rope}, expected an even number of at least 2")

    def absorbs(self, head_dim: int, tokens: int, from_empty: bool) -> bool:
        """Whether a call of ``tokens`` rows is made in the absorbed form.

        Of each of many tokens before it, absorbing costs 2 H (2 u + r) m FLOPs, expanding 4 H h u + 2 H (2 h + r) m.
        """
        if self.form != "auto":
            return self.form == "absorbed"
        few = tokens * (self.latent - head_dim) < head_dim * self.latent
        return tokens == 1 or (few and not from_empty)

    @property
    def width(self) -> int:
        """Elements that a layer keeps of a token."""
        return self.latent + self.rope


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """The layers' attention; ``decoder`` is the one that it is put into, with plain attention."""

    decoder: Decoder
    scenario: Scenario
    options: LatentOptions

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return ()

    def declare(self, builder: TraceBuilder) -> None:
        """Declare weights, the table of cosines and sines, and the cache."""
        o, decoder = self.options, self.decoder
        model = decoder.model
        d, heads, h, source = model.d_model, model.n_heads, model.head_dim, o.query_latent or model.d_model
        weights: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "q_proj": (heads * (h + o.rope), source), "kv_down": (o.width, d),
            "kv_norm": (o.latent,), "kv_up": (2 * heads * h, o.latent), "o_proj": (d, heads * h),
        }  # fmt: skip
        if o.query_latent is not None:
            weights |= {"q_down": (o.query_latent, d), "q_norm": (o.query_latent,)}
        for name, shape in weights.items():
            decoder.declare_weight(builder, name, shape, layers=range(model.n_layers))
        tokens = self.scenario.context_tokens
        builder.declare("rope_table", (2, tokens, o.rope), decoder.dtype, Role.WEIGHT, layers=None, initial_version=0)
        held = held_by_chip(self.scenario, decoder.kv)
        builder.declare(
            "kv", (decoder.batch, held, o.width), decoder.kv.dtype, Role.KV, layers=range(model.n_layers),
            size=decoder.batch * held * latent_token_bytes(decoder.kv, o), initial_version=0,
        )  # fmt: skip

    def emit_layer(self, s: Segment) -> None:
        """F1 to F9 with K3 to K7."""
        o, decoder = self.options, self.decoder
        model, dtype, batch, m, size = decoder.model, decoder.dtype, decoder.batch, s.run.tokens, decoder.size
        rows, d, heads, h = batch * m, model.d_model, model.n_heads, model.head_dim
        stream: Read = ("layer_input", size(rows, d))
        normed = s.buffer("attn_normed", (batch, m, d), dtype)
        s.op("attn_norm", reads=[stream, ("attn_norm.weight", size(d))], writes=[normed], dtype=dtype, m=rows, n=d)
        source, width = normed, d
        if o.query_latent is not None:
            source, width = self._latent(s, "q", normed, o.query_latent, o.query_latent), o.query_latent
        q = s.buffer("q", (batch, m, heads * (h + o.rope)), dtype)
        decoder.project(s, "q_proj", [source], q, n=heads * (h + o.rope), k=width)
        latent = self._latent(s, "kv", normed, o.width, o.latent)
        rotated_q = s.buffer("q_rotated", (batch, m, heads * o.rope), dtype)
        rotated_k = s.buffer("k_rotated", (batch, m, o.rope), dtype)
        s.op(
            "rope",
            reads=[(q[0], size(rows, heads * o.rope)), ("kv_latent", size(rows, o.rope)),
                   ("rope_table", size(2 * m, o.rope))],
            writes=[rotated_q, rotated_k], dtype=dtype, m=rows, n=(heads + 1) * o.rope,
        )  # fmt: skip
        s.op(
            "kv_append", reads=[latent, rotated_k, ("kv", 0)],
            writes=[("kv", rows * latent_token_bytes(decoder.kv, o))], dtype=dtype, m=rows, n=o.width,
            extra_lanes=dequantise_lanes(decoder.kv, rows * o.width),
        )  # fmt: skip
        queries: Read = (q[0], size(rows, heads * h))
        if o.absorbs(h, m, s.run.from_empty):
            self._absorbed(s, queries, rotated_q)
        else:
            self._expanded(s, queries, rotated_q)
        if decoder.parallel.cp > 1 and not decoder.shares_prompt:
            emit_joined_parts(s, rows * heads * h, dtype, decoder.parallel)
        projected = s.buffer("attn_projected", (batch, m, d), dtype)
        decoder.project(s, "o_proj", [("attn_core", size(rows, heads * h))], projected, n=d, k=heads * h)
        if decoder.parallel.tp > 1:
            summed = s.buffer("attn_summed", (batch, m, d), dtype)
            decoder.emit_sum(s, [projected], summed)
            projected = summed
        attended = s.buffer("attended", (batch, m, d), dtype)
        s.op("attn_residual", reads=[stream, projected], writes=[attended], dtype=dtype, m=rows, n=d)

    def _latent(self, s: Segment, name: str, normed: Read, width: int, latent: int) -> Write:
        """K3 and K4: rows of ``width``, of which the first ``latent`` are normed."""
        decoder, m = self.decoder, s.run.tokens
        rows, d, dtype = decoder.batch * m, decoder.model.d_model, decoder.dtype
        out = s.buffer(f"{name}_latent", (decoder.batch, m, width), dtype)
        weight: Read = (f"{name}_down.weight", decoder.size(width, d))
        s.op("latent_proj", reads=[normed, weight], writes=[out], dtype=dtype, m=rows, n=width, k=d)
        out_normed = s.buffer(f"{name}_latent_normed", (decoder.batch, m, latent), dtype)
        s.op(
            "latent_norm", reads=[(out[0], decoder.size(rows, latent)), (f"{name}_norm.weight", decoder.size(latent))],
            writes=[out_normed], dtype=dtype, m=rows, n=latent,
        )  # fmt: skip
        return out_normed

    def _absorbed(self, s: Segment, queries: Read, rotated_q: Read) -> None:
        """K6, F7 with one KV head of latents, K7."""
        o, decoder, m = self.options, self.decoder, s.run.tokens
        model, batch, dtype = decoder.model, decoder.batch, decoder.dtype
        rows, heads, h = batch * m, model.n_heads, model.head_dim
        half: Read = ("kv_up.weight", decoder.size(heads * h, o.latent))
        absorbed = s.buffer("q_absorbed", (batch, m, heads * o.latent), dtype)
        s.op("absorb_q", reads=[queries, half], writes=[absorbed], dtype=dtype, batch=heads, m=rows, n=o.latent, k=h)
        sums = s.buffer("attn_latent", (batch, m, heads * o.latent), dtype)
        for name, keys, pairs, before in self._parts(s, sums):
            s.op(
                "latent_attention",
                reads=[absorbed, rotated_q, (name, batch * latent_token_bytes(decoder.kv, o) * keys), *before],
                writes=[sums], dtype=dtype, batch=batch, m=m, n=keys, k=o.latent + o.rope // 2, heads=heads, kv_heads=1,
                pairs=pairs, extra_lanes=dequantise_lanes(decoder.kv, batch * o.width * keys),
            )  # fmt: skip
        core = s.buffer("attn_core", (batch, m, heads * h), dtype)
        s.op("absorb_out", reads=[sums, half], writes=[core], dtype=dtype, batch=heads, m=rows, n=h, k=o.latent)

    def _expanded(self, s: Segment, queries: Read, rotated_q: Read) -> None:
        """K5 over all tokens that the call sees, F7 with as many KV heads as query heads."""
        o, decoder, m = self.options, self.decoder, s.run.tokens
        model, batch, dtype = decoder.model, decoder.batch, decoder.dtype
        heads, h = model.n_heads, model.head_dim
        token_bytes = latent_token_bytes(decoder.kv, o)
        rope_bytes = int(n_bytes(o.rope, decoder.kv.dtype))
        for source, keys, pairs, before in self._parts(s, ("attn_core", decoder.size(batch * m, heads * h))):
            name, _ = s.buffer("kv_expanded", (batch, int(keys.max()), 2, heads, h), dtype)
            expanded: Write = (name, n_bytes(2 * heads * h * batch * keys, dtype))
            s.op(
                "latent_up",
                reads=[(source, batch * (token_bytes - rope_bytes) * keys),
                       ("kv_up.weight", decoder.size(2 * heads * h, o.latent))],
                writes=[expanded], dtype=dtype, m=batch * keys, n=2 * heads * h, k=o.latent,
                extra_lanes=dequantise_lanes(decoder.kv, batch * o.latent * keys),
            )  # fmt: skip
            s.op(
                "latent_attention",
                reads=[queries, rotated_q, expanded, (source, batch * rope_bytes * keys), *before],
                writes=[s.buffer("attn_core", (batch, m, heads * h), dtype)], dtype=dtype, batch=batch, m=m, n=keys,
                k=h + o.rope // 2, heads=heads, kv_heads=heads,
                pairs=pairs, extra_lanes=dequantise_lanes(decoder.kv, batch * o.rope * keys),
            )  # fmt: skip

    def _parts(self, s: Segment, sums: Read) -> Iterator[tuple[str, IntArray, Num, list[Read]]]:
        """(latents, keys, pairs, sums so far) of the cores that a call takes: all keys at once, or of a chip of a
        context-parallel group its part of them; where the group shares a prompt its own rows, then the latents of each
        chip before, which go around the ring (P4) as they are kept."""
        decoder, m = self.decoder, s.run.tokens
        cp, positions = decoder.parallel.cp, s.run.positions
        if not decoder.shares_prompt:
            keys = positions + m
            if cp == 1:
                yield "kv", keys, visible_pairs(decoder.kv, positions, m), []
            else:
                keys = -(-keys // cp)
                yield "kv", keys, m * keys, []
            return
        keys = np.full_like(positions, m)
        yield "kv", keys, keys * (m + 1) // 2, []
        size = decoder.batch * m * latent_token_bytes(decoder.kv, self.options)
        source: Read = ("kv", size)
        for _ in range(cp - 1):
            received = s.buffer("kv_received", (decoder.batch, m, self.options.width), decoder.kv.dtype, size=size)
            emit_step_to_next(s, source, received, decoder.batch * m, decoder.dtype, decoder.parallel)
            source = received
            yield received[0], keys, keys * m, [sums]


def latent_token_bytes(kv: KVSettings, options: LatentOptions) -> int:
    """Bytes that one layer keeps of one token of one sequence."""
    return packed_bytes(kv, options.width, heads=1)


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Raises :class:`UnsupportedError` for training, and where a context-parallel chip would hold no latent."""
    if scenario.task == "train":
        raise UnsupportedError("latent attention is not modelled in training")
    options = options_of(settings, LatentOptions)
    plain = Decoder.of(model, settings.kv, scenario)
    decoder = replace(plain, mixer=LatentAttention(decoder=plain, scenario=scenario, options=options))
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [],
    }  # fmt: skip
    return decoder_trace(decoder, scenario, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Latents and rotated keys."""
    return State(
        kv_bytes=model.n_layers * tokens * latent_token_bytes(settings.kv, options_of(settings, LatentOptions))
    )


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="kv_mla", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=LatentOptions())


KV_MLA = Method(
    name="kv_mla", title="latent attention, cache of latents", settings=_settings, trace=trace, state=state,
    options=LatentOptions,
    caveat="The model must be trained with it; reported to match attention with all heads (arXiv 2405.04434).",
)  # fmt: skip
