"""Names and colours of methods, kernels and traffic classes; one of each everywhere in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ttt_sim.report.data import ReportData, tokens_label


class MethodStyle(NamedTuple):
    title: str
    color: str
    marker: str
    dash: Literal["-", "--"]


#: Colours by Okabe and Ito, told apart with every kind of colour vision: caches cold, fast weights warm.
METHOD_STYLES: Mapping[str, MethodStyle] = {
    "kv": MethodStyle("KV cache", "#0072B2", "o", "-"),
    "kv_quant": MethodStyle("KV cache quantised", "#009E73", "D", "-"),
    "kv_window": MethodStyle("KV + window", "#56B4E9", "v", "--"),
    "ttt": MethodStyle("TTT + full attention", "#D55E00", "s", "-"),
    "ttt_window": MethodStyle("TTT + window", "#E69F00", "^", "--"),
}
_OTHER_STYLES: tuple[tuple[str, str], ...] = (
    ("#CC79A7", "P"), ("#000000", "X"), ("#999933", "h"), ("#882255", "*"), ("#44AA99", "p"), ("#332288", "<"),
    ("#AA4499", ">"), ("#117733", "d"), ("#88CCEE", "H"), ("#661100", "8"),
)  # fmt: skip

_OTHER_TITLES: Mapping[str, str] = {
    "fine_tuning": "fine-tuning", "lora": "LoRA", "lora_ttt": "LoRA at test time", "q_ttt": "query-only TTT",
    "ttt_outer": "outer training", "ttt_e2e": "TTT-E2E", "kv_paged": "KV paged", "kv_prefix": "KV shared prefix",
    "kv_offload": "KV offloaded", "kv_mla": "KV latent (MLA)", "gated_deltanet": "Gated DeltaNet", "mamba2": "Mamba2",
    "ttt_linear": "TTT-Linear", "ttt_mlp": "TTT-MLP", "lact": "LaCT", "titans": "Titans", "rag": "retrieval",
}  # fmt: skip

#: Groups of kernels: title, colour, the op kinds that put a kernel into it. The first group with a match wins.
KERNEL_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("weight write", "#B2182B", ("weight_write", "delta_write", "norm_write")),
    ("update: delta", "#F4A582", ("target_conv", "target_proj", "delta_gemm", "outer_gemm", "outer_proj", "delta_norm",
                                  "delta_scale", "delta_sum", "online_update", "weight_scan", "conv_grad",
                                  "fast_back", "muon_product")),
    ("fast-weight apply", "#E69F00", ("fast_apply", "fast_init", "adapter_down", "adapter_up", "own_proj",
                                      "fast_gate_up")),
    ("attention core", "#2166AC", ("attention", "latent_attention", "join_parts", "kv_fetch")),
    ("attention projections", "#92C5DE", ("q_proj", "k_proj", "v_proj", "o_proj", "latent_proj", "latent_up",
                                          "absorb_q", "absorb_out", "in_proj")),
    ("gate and up", "#1B7837", ("gate_proj", "up_proj")),
    ("down", "#A6DBA0", ("down_proj",)),
    ("LM head", "#9970AB", ("lm_head",)),
    ("carry", "#DDCC77", ("carry_append",)),
    ("between chips", "#B15928", ("allreduce", "allgather", "stage_send", "kv_ring", "delta_scan", "state_join",
                                  "state_read")),
    ("state of fixed size", "#44AA99", ("delta_rule", "delta_step", "ssm_scores", "ssm_mix", "ssm_states", "state_pass",
                                        "ssm_read", "ssm_step", "linear_update", "mlp_update", "memory_update")),
    ("retrieval", "#01665E", ("index_write", "index_scan", "pq_table", "pq_scan", "graph_search", "top_k", "embed_pool",
                              "embed_proj")),
    ("norms, RoPE, residuals", "#C4C9CE", ()),
)  # fmt: skip
WHOLE_LAYER = ("whole layer, fused", "#7F8C8D")

#: Reporting classes of memory traffic: title and colour.
CLASS_STYLES: Mapping[str, tuple[str, str]] = {
    "weights": ("weights", "#9AA3AA"),
    "kv": ("KV cache", "#2166AC"),
    "fast_weights": ("fast weights", "#E69F00"),
    "gradients": ("deltas", "#B2182B"),
    "activations": ("activations and carry", "#A6DBA0"),
    "optimiser": ("optimiser state", "#762A83"),
    "index": ("search index", "#01665E"),
}


def style_of_method(method: str, shown: Sequence[str], window_tokens: int | None) -> MethodStyle:
    """Look of one of the ``shown`` methods; its window is part of the title."""
    known = METHOD_STYLES.get(method)
    if known is None:
        others = [name for name in shown if name not in METHOD_STYLES]
        color, marker = _OTHER_STYLES[others.index(method) % len(_OTHER_STYLES)]
        known = MethodStyle(short_title(method), color, marker, "-")
    return with_window(known, window_tokens)


def short_title(method: str) -> str:
    """Name of a method where room is scarce; of one that is not known, the name itself."""
    if method in METHOD_STYLES:
        return METHOD_STYLES[method].title
    return _OTHER_TITLES.get(method, method.replace("_", " "))


def method_style(data: ReportData, method: str) -> MethodStyle:
    """Look of a method in a report of ``run``."""
    return style_of_method(method, data.methods, data.window_tokens(method))


def with_window(style: MethodStyle, window_tokens: int | None) -> MethodStyle:
    """The style with the window, if any, in its title."""
    return style if window_tokens is None else style._replace(title=f"{style.title} {tokens_label(window_tokens)}")


def method_title(data: ReportData, method: str) -> str:
    return method_style(data, method).title


def kernel_group(label: str) -> str:
    """Group that a kernel label such as ``q_proj+k_proj+v_proj`` belongs to."""
    parts = set(label.split("+"))
    if "gate_proj" in parts and parts & {"attention", "latent_attention"}:
        return WHOLE_LAYER[0]
    for title, _, kinds in KERNEL_GROUPS:
        if parts & set(kinds):
            return title
    return KERNEL_GROUPS[-1][0]


def group_order() -> list[tuple[str, str]]:
    """Groups in the order in which stacks are drawn: forward work first, the update last."""
    by_title = {group[0]: (group[0], group[1]) for group in KERNEL_GROUPS}
    order = (
        "attention core", "state of fixed size", "attention projections", "gate and up", "down", "fast-weight apply",
        "LM head", "retrieval", "norms, RoPE, residuals", "between chips", "carry", "update: delta", "weight write",
    )  # fmt: skip
    return [WHOLE_LAYER, *(by_title[title] for title in order)]


def short_kernel(label: str) -> str:
    """``q/k/v_proj`` for ``q_proj+k_proj+v_proj``; other names of several parts are joined with spaces."""
    parts = label.split("+")
    endings = {part.rpartition("_")[2] for part in parts}
    if len(parts) > 1 and len(endings) == 1 and all("_" in part for part in parts):
        return "/".join(part.rpartition("_")[0] for part in parts) + "_" + endings.pop()
    return " + ".join(parts)


def is_dark(color: str) -> bool:
    """White text reads better on this ``#rrggbb`` colour than dark text."""
    return sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) < 380


def three_digits(value: float) -> str:
    """A number with three significant digits and no exponent, for labels: ``0.0123``, ``4.57``, ``12,300``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def short_parameter(path: str) -> str:
    """Dotted path of a chip parameter without the list that it stands in: ``hbm.bandwidth``."""
    head, _, rest = path.partition(".")
    return rest if head in ("memories", "compute", "overheads", "links") else path
