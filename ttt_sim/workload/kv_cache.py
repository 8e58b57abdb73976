"""The baseline: frozen weights and a KV cache, full, windowed or quantised."""

from __future__ import annotations

from dataclasses import asdict

from ttt_sim.model import KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Trace
from ttt_sim.workload.attention import kv_bytes
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.transformer import Decoder, decoder_trace

DEFAULT_WINDOW_TOKENS = 1024
DEFAULT_KV_DTYPE = "bf16"
DEFAULT_QUANTISED_DTYPE = "int4"


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops F0 to F16 with every weight frozen."""
    decoder = Decoder.of(model, settings.kv, scenario)
    meta: dict[str, object] = {
        "model": model.name,
        "method": settings.name,
        "kv": asdict(settings.kv),
        "ttt": None,
        "pinned": [],
    }
    return decoder_trace(decoder, scenario, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Keys and values only; ``dtype`` of the activations does not matter."""
    return State(kv_bytes=kv_bytes(model, settings.kv, tokens))


def _full(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="kv", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE))


def _windowed(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    window = DEFAULT_WINDOW_TOKENS if window_tokens is None else window_tokens
    return MethodSettings(name="kv_window", kv=KVSettings(window_tokens=window, dtype=kv_dtype or DEFAULT_KV_DTYPE))


def _quantised(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="kv_quant", kv=KVSettings(dtype=kv_dtype or DEFAULT_QUANTISED_DTYPE))


KV = Method(
    name="kv", title="full attention, KV cache", settings=_full, trace=trace, state=state,
    caveat="The reference for quality: every token sees all tokens before it.",
)  # fmt: skip
KV_WINDOW = Method(
    name="kv_window", title="windowed attention, KV cache", settings=_windowed, trace=trace, state=state,
    caveat="Forgets what left the window: RULER-16k of a windowed 4B model 5.07 (arXiv 2604.06169).",
)  # fmt: skip
KV_QUANT = Method(
    name="kv_quant", title="full attention, quantised KV cache", settings=_quantised, trace=trace, state=state,
    caveat="Rounds keys and values; what that costs in quality depends on model and scheme, and is not simulated.",
)  # fmt: skip
