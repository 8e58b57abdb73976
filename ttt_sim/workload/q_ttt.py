"""Query-only test-time training (qTTT, arXiv 2512.13898): only query projections learn, on spans of a long context.

The context is taken in once, as into any KV cache, which then stays as it is. A step is a forward and a backward pass
of a span of the context whose queries see the cache: rows are few, but each step reads all keys and values twice. Keys
and values of the cache are constants, those of the span's own rows are not. Afterwards every user has a cache and
queries of their own: an adapter on every query projection (released code), or a copy of it.

A span stands behind the whole context, the most that it can see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Trace
from ttt_sim.workload.attention import kv_bytes
from ttt_sim.workload.fine_tuning import StepOptions, check_training, training_of
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.lora import LowRank, adapter_parameters
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.transformer import Decoder, decoder_trace

_TARGETS = ("q_proj",)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryOptions(StepOptions):
    """``steps`` on spans of ``span_tokens`` tokens. ``form``: what learns, adapters of ``rank`` on query projections
    (lora) or copies of them (full)."""

    recompute: bool = False
    steps: int = 32
    span_tokens: int = 128
    form: Literal["lora", "full"] = "lora"
    rank: int = 16


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """A prompt into the cache, a step of training on a span, or calls of sequences with queries of their own.

    Raises:
        UnsupportedError: training on stages or context-parallel chips.
    """
    options = _options(settings)
    trains = scenario.task == "train"
    adapters, own = None, frozenset[str]()
    if trains or not scenario.from_empty:  # a prompt is read by the model as it is
        if options.form == "full":
            own = frozenset(_TARGETS)
        else:
            adapters = LowRank(
                model=model, targets=_TARGETS, rank=options.rank, batch=scenario.batch, sequences=scenario.batch,
                dtype=scenario.dtype, parallel=scenario.parallel,
            )  # fmt: skip
    decoder = Decoder.of(
        model, settings.kv, scenario, adapters=adapters, own=own, trained=own if trains else frozenset()
    )
    learner = None
    if trains:
        check_training(scenario)
        learner = training_of(decoder, options)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [], "updates": "together",
    }  # fmt: skip
    return decoder_trace(decoder, scenario, learner=learner, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The whole cache, and what queries learned."""
    options = _options(settings)
    parameters = adapter_parameters(model, _TARGETS, options.rank)
    if options.form == "full":
        parameters = model.n_layers * model.d_model * model.n_heads * model.head_dim
    return State(kv_bytes=kv_bytes(model, settings.kv, tokens), fast_weight_bytes=tensor_bytes(parameters, dtype))


def _options(settings: MethodSettings) -> QueryOptions:
    if not isinstance(settings.options, QueryOptions):
        raise ConfigError(f"method {settings.name} needs QueryOptions and has {settings.options!r}")
    return settings.options


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    return MethodSettings(name="q_ttt", kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=QueryOptions())


def _span(settings: MethodSettings, tokens: int) -> Call:
    return Call(position=tokens, tokens=_options(settings).span_tokens, logits=False)


def _steps(settings: MethodSettings, tokens: int) -> int:
    return _options(settings).steps


Q_TTT = Method(
    name="q_ttt", title="query-only TTT over a frozen cache", settings=_settings, trace=trace, state=state,
    family="training", phases=("prefill", "ask", "decode", "train"), step_call=_span, steps=_steps,
    options=QueryOptions,
    needs=("a KV cache of the whole context", "a backward pass", "optimiser state in memory", "queries writable"),
    caveat="Better than the same work spent on thinking tokens where a long context is read: Qwen3-4B gains 12.6 "
    "points on LongBench-v2 and 14.1 on ZeroScrolls, as the paper itself reports (arXiv 2512.13898).",
)  # fmt: skip
