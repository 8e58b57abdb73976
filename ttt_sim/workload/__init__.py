"""From a model, a method and a scenario to a trace. Pure functions that know no chip."""

from __future__ import annotations

from collections.abc import Mapping

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError
from ttt_sim.model import MethodSettings, Model, Scenario, shard
from ttt_sim.ops import Trace
from ttt_sim.workload.attention import check_kv
from ttt_sim.workload.fine_tuning import FINE_TUNING
from ttt_sim.workload.gated_deltanet import GATED_DELTANET
from ttt_sim.workload.in_place_ttt import TTT, TTT_WINDOW
from ttt_sim.workload.kv_cache import KV, KV_QUANT, KV_WINDOW
from ttt_sim.workload.kv_forms import KV_OFFLOAD, KV_PAGED, KV_PREFIX
from ttt_sim.workload.lact import LACT
from ttt_sim.workload.latent_attention import KV_MLA
from ttt_sim.workload.lora import LORA, LORA_TTT
from ttt_sim.workload.mamba2 import MAMBA2
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.q_ttt import Q_TTT
from ttt_sim.workload.retrieval import RAG
from ttt_sim.workload.titans import TITANS
from ttt_sim.workload.ttt_e2e import TTT_E2E
from ttt_sim.workload.ttt_layers import TTT_LINEAR, TTT_MLP
from ttt_sim.workload.ttt_outer import TTT_OUTER

__all__ = [
    "CONTEXT_METHODS",
    "METHODS",
    "Method",
    "State",
    "build_trace",
    "find_method",
    "state_of_context",
    "state_per_sequence",
]

#: Every method by name.
METHODS: Mapping[str, Method] = {
    "kv": KV,
    "kv_window": KV_WINDOW,
    "kv_quant": KV_QUANT,
    "kv_paged": KV_PAGED,
    "kv_prefix": KV_PREFIX,
    "kv_offload": KV_OFFLOAD,
    "kv_mla": KV_MLA,
    "ttt": TTT,
    "ttt_window": TTT_WINDOW,
    "ttt_e2e": TTT_E2E,
    "gated_deltanet": GATED_DELTANET,
    "mamba2": MAMBA2,
    "ttt_linear": TTT_LINEAR,
    "ttt_mlp": TTT_MLP,
    "lact": LACT,
    "titans": TITANS,
    "lora": LORA,
    "lora_ttt": LORA_TTT,
    "q_ttt": Q_TTT,
    "fine_tuning": FINE_TUNING,
    "ttt_outer": TTT_OUTER,
    "rag": RAG,
}
#: Those that ``run``, ``compare`` and ``sweep`` know: a KV cache and In-Place TTT, in their forms.
CONTEXT_METHODS: tuple[str, ...] = ("kv", "kv_window", "kv_quant", "ttt", "ttt_window")


def find_method(name: str) -> Method:
    """The method of this name; raises :class:`ConfigError` with the nearest spelling."""
    if name not in METHODS:
        known = tuple(METHODS)
        raise ConfigError(f"unknown method {name!r}{did_you_mean(name, known)}; methods: {', '.join(known)}")
    return METHODS[name]


def build_trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """The trace of ``scenario`` on ``model`` with the method that ``settings`` name.

    Raises:
        ConfigError: unknown method, or settings that cannot be.
        WorkloadError: the chips of ``scenario.parallel`` cannot share the model.
    """
    return find_method(settings.name).trace(shard(model, scenario.parallel.tp), settings, scenario)


def state_per_sequence(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """What one sequence keeps after ``tokens`` tokens, with activations of ``dtype``.

    Raises:
        ConfigError: unknown method, or settings that cannot be.
    """
    check_kv(settings.kv)
    return find_method(settings.name).state(model, settings, tokens, dtype)


def state_of_context(model: Model, settings: MethodSettings, context_tokens: int, dtype: str) -> State:
    """What one sequence keeps once a context was taken in: of the tokens that are still held before a question, or, of
    an index, of all of them.

    Raises:
        ConfigError: unknown method, or settings that cannot be.
    """
    method = find_method(settings.name)
    tokens = context_tokens if method.adapts == "index" else method.held_tokens(settings, context_tokens)
    return state_per_sequence(model, settings, tokens, dtype)
