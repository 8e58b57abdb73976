"""Published whole-model figures with their citations, for validation where no folder of measurements is at hand.

Each line is a row as in files (docs/validation.md) with the figure turned into a latency. Only figures with a stated
batch: throughput "at saturation" leaves the batch open.
"""

from __future__ import annotations

from typing import NamedTuple

from ttt_sim.predict.rows import Row

_TRTLLM = "github:NVIDIA/TensorRT-LLM@138f96d docs/source/performance.md (v0.5 and 0.6.1)"
_ROCM = "github:ROCm/vllm@040de12 docs/dev-docker/README.md (ROCm 6.4.1, vLLM 0.10)"


class Figure(NamedTuple):
    """One published figure: what was measured and where it stands."""

    op: str
    device: str
    dtype: str
    model: str
    batch: int
    context: int
    out_len: int
    tp: int
    latency_s: float
    source: str
    note: str = ""


FIGURES: tuple[Figure, ...] = (
    Figure("e2e_prefill", "H100-SXM5-80GB", "fp8", "Llama-2-7b", 1, 2048, 0, 1, 0.036, _TRTLLM, "time to first token"),
    Figure("e2e_prefill", "A100-SXM4-80GB", "fp16", "Llama-2-7b", 1, 2048, 0, 1, 0.133, _TRTLLM, "time to first token"),
    Figure("e2e_generate", "A100-SXM4-80GB", "fp16", "Llama-2-7b", 60, 128, 2048, 1, 60 * 2048 / 1928, _TRTLLM,
           "1928 tokens/s"),
    *(
        Figure("e2e_generate", "MI300X", "fp8", "Llama-3-70B", batch, prompt, 2048, 8, seconds, _ROCM)
        for batch, prompt, seconds in (
            (1, 128, 17.236), (4, 128, 18.45), (8, 128, 19.677), (16, 128, 22.072), (32, 128, 24.932),
            (32, 2048, 25.966), (128, 2048, 52.394),
        )
    ),
    Figure("e2e_generate", "MI300X", "fp8", "Llama-3.1-405B", 8, 128, 2048, 8, 54.226, _ROCM),
)  # fmt: skip


def published_rows() -> list[Row]:
    """The figures as rows; ``source`` is the citation."""
    return [
        Row(
            line=number, op=f.op, device=f.device, dtype=f.dtype, model=f.model, batch=f.batch, context=f.context,
            out_len=f.out_len, tp=f.tp, latency_us=f.latency_s * 1e6, source=f.source, note=f.note,
        )
        for number, f in enumerate(FIGURES, start=1)
    ]  # fmt: skip
