"""What ``ttt_sim validate`` demands: the largest mean absolute percentage error of each set of rows.

The limits are targets, not results with a margin: a set that meets its target by far is not allowed to drift up to it
unseen, because the table prints the error itself. Sets without a target of the project are held to what the model
reaches, rounded up. Change a limit only with a reason in the changelog.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ttt_sim.predict.rows import Row
from ttt_sim.predict.validation import apart

_ROW_WISE = ("softmax", "layernorm", "rmsnorm", "gelu", "silu_mul", "elementwise_add")
_MEASURED = ("A100", "H100")


class Tolerance(NamedTuple):
    """``rows`` picks the set; ``limit`` is its largest mean absolute percentage error."""

    title: str
    limit: float
    rows: Callable[[Row], bool]


def _counts(row: Row, *ops: str) -> bool:
    return row.op in ops and row.device.startswith(_MEASURED) and apart(row) in ("", "loaded serving")


MEASURED: tuple[Tolerance, ...] = (
    Tolerance(
        "16-bit gemm, graph replay", 8.0,
        lambda row: _counts(row, "gemm") and row.source == "aiconfigurator" and row.dtype in ("bf16", "fp16"),
    ),
    Tolerance("fp8 gemm, graph replay", 8.0,
              lambda row: _counts(row, "gemm") and row.source == "aiconfigurator" and row.dtype == "fp8"),
    Tolerance("16-bit gemm, profiler and host", 12.0,
              lambda row: _counts(row, "gemm") and row.source in ("vidur", "LLMCompass")),
    Tolerance("fp32 gemm and bmm", 14.0, lambda row: _counts(row, "gemm", "bmm") and row.dtype == "fp32"),
    Tolerance("attention prefill", 8.0, lambda row: _counts(row, "attention_prefill")),
    Tolerance("attention decode", 8.0, lambda row: _counts(row, "attention_decode")),
    Tolerance("gated delta rule", 6.0, lambda row: _counts(row, "gdn_chunk_prefill", "gdn_recurrent_decode")),
    Tolerance("row-wise ops", 15.0, lambda row: _counts(row, *_ROW_WISE)),
    Tolerance("allreduce", 20.0, lambda row: _counts(row, "allreduce")),
    Tolerance("whole models: prefill", 12.0, lambda row: _counts(row, "e2e_prefill")),
    Tolerance("whole models: prompt and answer", 12.0, lambda row: _counts(row, "e2e_generate")),
    Tolerance("whole models: decode steps of loaded serving", 10.0,
              lambda row: _counts(row, "e2e_decode_step") and apart(row) == "loaded serving"),
    Tolerance("MI300X fp8 gemm", 12.0, lambda row: row.op == "gemm" and row.device == "MI300X"),
)  # fmt: skip


class FigureLimit(NamedTuple):
    """``limit`` is the largest mean error in per cent of the counted published figures of ``chips``."""

    title: str
    limit: float
    chips: tuple[str, ...]


#: Targets of the project for the median error of published figures in per cent; ``validate`` says whether they are met.
TARGETS: Mapping[str, float] = {"all": 25.0, "gpu": 15.0}
#: Without measurements at hand: published figures of chips. Constants of kernels of chips that were never measured come
#: from a data sheet and a relative, which the limits show.
FIGURE_LIMITS: tuple[FigureLimit, ...] = (
    FigureLimit("A100 and H100", 15.0, ("a100", "h100")),
    FigureLimit("H200 and B200", 20.0, ("h200", "b200")),
    FigureLimit("MI300X", 22.0, ("mi300x",)),
    FigureLimit("TPU v7", 20.0, ("tpu_v7",)),
    FigureLimit("Inferentia2 and Trainium2", 35.0, ("inferentia2", "trainium2")),
    FigureLimit("Groq LPU and WSE-3", 20.0, ("groq_lpu", "wse3")),
    FigureLimit("Hexagon and XDNA2", 25.0, ("hexagon_8elite", "npu_xdna2")),
    FigureLimit("VHK158", 30.0, ("versal_vhk158",)),
)
