"""How a latency was measured: what is inside it besides the op, and which operands the caches still held.

A harness is chosen by the ``source`` of a row; rows of an unknown source are taken to be a replayed graph with weights
in rotation. Fixed times are fitted per harness and class of op, not per chip or shape (docs/validation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Weights = Literal["cold", "rotated", "warm"]
#: Classes of rows by which a harness and the errors differ.
OpGroup = Literal["product", "attention", "recurrent", "norm", "softmax", "element", "collective", "model"]
GROUPS: tuple[str, ...] = get_args(OpGroup)
GROUP_OF_OP: Mapping[str, OpGroup] = {
    "gemm": "product", "bmm": "product", "attention_prefill": "attention", "attention_decode": "attention",
    "gdn_chunk_prefill": "recurrent", "gdn_recurrent_decode": "recurrent", "layernorm": "norm", "rmsnorm": "norm",
    "softmax": "softmax", "gelu": "element", "silu_mul": "element", "elementwise_add": "element",
    "allreduce": "collective", "e2e_prefill": "model", "e2e_generate": "model", "e2e_decode_step": "model",
    "e2e_train_step": "model",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """``extra_us``    time of the host or the profiler in each measurement by group of op, beyond what the chip file
                    says of kernels; negative where a profiler does not see the gap before a kernel
    ``weights``     cold: every use from main memory; rotated: up to five copies used in turn, as many as overrun the
                    cache; warm: the same operands in every round
    ``quantise``    a product in 8 or 4 bits holds the kernels that quantise its activations
    ``kv_write``    attention holds the kernel that stores new keys and values
    """

    title: str
    extra_us: Mapping[str, float] = field(default_factory=dict)
    weights: Weights = "cold"
    quantise: bool = False
    kv_write: bool = False


DEFAULT_HARNESS = "graph_replay"
HARNESSES: Mapping[str, Harness] = {
    "graph_replay": Harness(
        title="replayed graph, weights in rotation", weights="rotated", quantise=True, kv_write=True
    ),
    # Fitted on vidur: kernel durations lack the gap before a kernel, products touch their weights for the first time.
    "profiler": Harness(
        title="kernel durations of one pass over a model",
        extra_us={"product": 2.4, "norm": 3.2, "softmax": -0.5, "element": -0.5},
    ),
    # Fitted on LLMCompass.
    "host_timed": Harness(
        title="call and synchronise, timed on the host",
        extra_us={"product": 24.0, "norm": 43.3, "softmax": 12.3, "element": 43.3},
        weights="warm",
    ),
    # Fitted on NeuSight.
    "event_timed": Harness(
        title="eager calls between two events",
        extra_us={"product": 24.0, "norm": 19.0, "softmax": 19.0, "element": 19.0},
        weights="warm",
    ),
    "warm_loop": Harness(title="one kernel in a loop, the same operands", weights="warm"),
    "tuned_kernel": Harness(title="device time of tuned kernels, operands in rotation"),
    "bare_kernel": Harness(title="kernel durations of a profiler, caches warm", weights="warm"),
}
#: Harness by the ``source`` of published rows.
SOURCES: Mapping[str, str] = {
    "aiconfigurator": "graph_replay",
    "vidur": "profiler",
    "LLMCompass": "host_timed",
    "NeuSight": "event_timed",
    "Azure-AI-benchmarking-guide": "warm_loop",
    "ml-engineering": "warm_loop",
    "ROCm/aiter": "tuned_kernel",
    "aiter": "tuned_kernel",
    "LLMServingSim": "bare_kernel",
}


def harness_of(source: str) -> str:
    """Name of the harness behind a source."""
    return SOURCES.get(source, DEFAULT_HARNESS)
