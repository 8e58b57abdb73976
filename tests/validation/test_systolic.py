"""Single chips of the systolic kind against published serving figures; nothing in their files is fitted to these.

tpu-recipes (github:AI-Hypercomputer/tpu-recipes@6374419, inference/ironwood/vLLM/Qwen3-32B) prints output tokens per
second of one TPU v7 with fp8 weights, activations and cache, at most 135 sequences and 4096 tokens a call, under a load
that keeps all of them busy; lengths are uniform between 0.8 and 1.0 of the nominal ones, 0.9 in the mean.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ttt_sim.grid import make_point
from ttt_sim.model import Model
from ttt_sim.simulation import simulate_point
from ttt_sim.workload.method import PhaseName

SEQUENCES = 135
#: Qwen3-32B, config.json of huggingface.co/Qwen/Qwen3-32B.
QWEN3_32B = Model(
    name="Qwen3-32B", family="qwen3", n_layers=64, d_model=5120, d_ff=25600, n_heads=64, n_kv_heads=8, head_dim=128,
    vocab_size=151936, tied_embeddings=False, qk_norm=True, max_context_tokens=40960,
)  # fmt: skip


def seconds(phase: PhaseName, context: int, batch: int) -> float:
    """A prefill of ``context`` tokens, or a decode step with so many held."""
    point = make_point(
        "tpu_v7", QWEN3_32B, "kv", phase=phase, context=context, batch=batch, dtype="fp8", kv_dtype="fp8",
        call_tokens=4096,
    )  # fmt: skip
    record = simulate_point(replace(point, chunk_tokens=16)).record
    assert record["fits"], record["reason"]
    return float(str(record["seconds"]))


@pytest.mark.parametrize(
    ("tokens_in", "tokens_out", "published", "ratio"), [(1024, 8192, 3959.56, 1.01), (8192, 1024, 1382.18, 1.28)]
)
def test_tpu_v7_serves_qwen3_32b(tokens_in, tokens_out, published, ratio):
    """Predicted over published. Long prompts are too fast: calls that mix prefill and decode, and what a server does
    between calls, are not simulated."""
    inputs, outputs = 9 * tokens_in // 10, 9 * tokens_out // 10
    prefill, step = seconds("prefill", inputs, 1), seconds("decode", inputs + outputs // 2, SEQUENCES)
    # each of the sequences is prefilled once and decoded with all others
    predicted = SEQUENCES * outputs / (SEQUENCES * prefill + outputs * step)
    assert predicted / published == pytest.approx(ratio, abs=0.01)
