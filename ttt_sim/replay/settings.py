"""From models, settings and traces to the reference's own types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt_sim.errors import ConfigError
from ttt_sim.model import KVSettings, MethodSettings, Model, TTTSettings, WeightWrite
from ttt_sim.ops import Trace
from ttt_sim.reference.decoder import DecoderShape
from ttt_sim.reference.formats import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32, Format
from ttt_sim.reference.in_place_ttt import TTTOptions
from ttt_sim.reference.kv_formats import KVFormat

#: Formats of a trace in which its ops can be executed.
FORMAT_OF: Mapping[str, Format] = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16, "fp8": FLOAT8_E4M3}

#: Constants of the model classes. No cost depends on them, so models do not carry them.
ROTARY_BASE, NORM_EPSILON = 1e6, 1e-6

#: How the reference calls the ways in which a delta reaches the weight; some differ only in where data lies.
_WRITE: Mapping[WeightWrite, Any] = {
    "official": "official",
    "fused": "fused",
    "tile_wise": "fused",
    "resident": "fused",
    "master": "master",
}


def format_of(dtype: str) -> Format:
    """The reference's format; raises :class:`ConfigError` for one in which nothing can be computed."""
    if dtype not in FORMAT_OF:
        raise ConfigError(f"dtype {dtype!r} can be simulated but not executed; executable: {', '.join(FORMAT_OF)}")
    return FORMAT_OF[dtype]


def decoder_shape(model: Model, settings: MethodSettings, dtype: str) -> DecoderShape:
    """The reference's description of a model with a method; raises :class:`ConfigError` as :func:`format_of`."""
    ttt, q = settings.ttt, format_of(dtype)
    options = None
    if ttt is not None:
        options = TTTOptions(
            chunk=ttt.chunk_tokens,
            rate=ttt.rate,
            contraction=ttt.contraction,
            convolution=ttt.convolution,
            clip=ttt.clip,
            carry=ttt.carry,
            write=_WRITE[ttt.weight_write],
            own_targets=ttt.target == "hidden_states",
            dtype=q,
            fast_dtype=format_of(ttt.fast_dtype),
            update_rows=ttt.update_rows,
        )
    return DecoderShape(
        n_layers=model.n_layers,
        d_model=model.d_model,
        d_ff=model.d_ff,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        tied_embeddings=model.tied_embeddings,
        qk_norm=model.qk_norm,
        dtype=q,
        kv=KVFormat(name=settings.kv.dtype, group=settings.kv.group, per_token_scale=settings.kv.per_token_scale),
        window=settings.kv.window_tokens,
        ttt_layers=ttt.layers_of(model) if ttt is not None else (),
        ttt=options,
        projection=ttt.projection if ttt is not None else True,
        rotary_base=ROTARY_BASE,
        norm_epsilon=NORM_EPSILON,
    )


def settings_of(trace: Trace) -> tuple[KVSettings, TTTSettings | None]:
    """What a trace says of its method."""
    kv, ttt = trace.meta["kv"], trace.meta["ttt"]
    assert isinstance(kv, Mapping)
    assert ttt is None or isinstance(ttt, Mapping)
    return KVSettings(**kv), None if ttt is None else TTTSettings(**{**ttt, "layers": tuple(ttt["layers"])})
