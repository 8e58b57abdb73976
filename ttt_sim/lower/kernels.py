"""Which ops run together as one kernel, in which stream, and what each kernel must wait for.

A *kernel* is what the chip runs between two synchronisations of a stream: on a GPU a kernel launch, on a dataflow
machine a configuration. What may merge is a property of the chip (``mapping.fusion``); the tables below say which
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip, Fusion
from ttt_sim.lower.writes import writes_fast_weight
from ttt_sim.ops import (
    BESIDE,
    KIND,
    OP_KINDS,
    Dependencies,
    Hazard,
    IntArray,
    OpClass,
    Trace,
    is_update,
    op_classes,
    owners,
)

FORWARD_STREAM, UPDATE_STREAM, TRANSFER_STREAM = 0, 1, 2
STREAMS: tuple[str, ...] = ("forward", "update", "transfer")

#: GEMMs that read the same rows and stand next to each other are one GEMM with their columns side by side. Adapters of
#: such GEMMs, which have as many rows, are two: one launch for all first factors and one for all second ones.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("adapter_down", "adapter_down"),
    ("adapter_up", "adapter_up"),
)

#: (first, second) neighbours that stream the same rows through vector units and so need one pass over them.
_ROW_CHAINS: tuple[tuple[str, str], ...] = (
    ("embedding", "attn_norm"),
    ("qk_norm", "rope"),
    ("latent_norm", "rope"),
    ("attn_residual", "layernorm"),
    ("mlp_residual", "layernorm"),
    ("rope", "kv_append"),
    ("attn_residual", "mlp_norm"),
    ("mlp_norm", "carry_append"),
    ("mlp_residual", "attn_norm"),
    ("mlp_residual", "final_norm"),
    ("delta_scale", "weight_write"),
    ("short_conv", "l2_norm"),
    ("l2_norm", "state_gates"),
    ("post_norm", "attn_residual"),
    ("post_norm", "mlp_residual"),
    ("mlp_residual", "mlp_norm"),
)
#: Element-wise ops that a GEMM can apply to its output tile before storing it.
_EPILOGUES: tuple[tuple[str, str], ...] = (
    ("up_proj", "silu_mul"),
    ("up_proj", "gelu"),
    ("o_proj", "attn_residual"),
    ("down_proj", "mlp_residual"),
    ("fast_apply", "mlp_residual"),
    ("fast_gate_up", "silu_mul"),
    ("fast_back", "silu_mul_grad"),
    ("delta_gemm", "delta_scale"),
    ("outer_proj", "delta_scale"),
)
#: With an epilogue the tile holds only part of a row, so ops that reduce over rows start a kernel of their own.
_BROKEN_BY_EPILOGUE: tuple[tuple[str, str], ...] = (
    ("attn_residual", "mlp_norm"),
    ("attn_residual", "layernorm"),
    ("mlp_residual", "layernorm"),
    ("mlp_residual", "attn_norm"),
    ("mlp_residual", "final_norm"),
    ("mlp_residual", "mlp_norm"),
)


def _join_table(fusion: Fusion) -> npt.NDArray[np.bool_]:
    """[kind before, kind] -> may the second join the kernel of the first?"""
    table = np.zeros((len(OP_KINDS), len(OP_KINDS)), dtype=np.bool_)
    if fusion == "none":
        return table
    if fusion == "layer":
        table[:] = True
        table[:, [KIND["attn_norm"], KIND["final_norm"], KIND["delta_norm"], KIND["fast_init"]]] = False
        table[[KIND["delta_norm"], KIND["fast_init"]], :] = False
        table[KIND["embedding"], KIND["attn_norm"]] = True
        alone = [KIND["state_copy"], KIND["state_hash"]]
        table[alone, :] = table[:, alone] = False
        table[KIND["weight_write"], KIND["target_conv"]] = table[KIND["delta_write"], KIND["target_conv"]] = False
        between = [code for code, kind in enumerate(OP_KINDS) if kind.op_class == OpClass.COLLECTIVE]
        table[between, :] = table[:, between] = False  # what other chips make must be there before it is used
        return table
    for family in SIBLINGS:
        for first, second in pairwise(family):
            table[KIND[first], KIND[second]] = True
    for first, second in _ROW_CHAINS:
        table[KIND[first], KIND[second]] = True
    if fusion == "epilogue":
        for first, second in _EPILOGUES:
            table[KIND[first], KIND[second]] = True
        for first, second in _BROKEN_BY_EPILOGUE:
            table[KIND[first], KIND[second]] = False
    return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kernels:
    """``n`` kernels in the order of their first ops.

    ``of_op`` (n_ops,) kernel of each op; ``lead`` (n,) its first op; ``stream`` (n,);
    ``before`` (n,) the kernel before it in its stream, -1 for none;
    ``edges`` (n_edges, 2) pairs (kernel, earlier kernel it must wait for), unique and sorted.
    """

    n: int
    of_op: IntArray
    lead: IntArray
    stream: IntArray
    before: IntArray
    edges: IntArray


def form_kernels(trace: Trace, chip: Chip, dependencies: Dependencies, *, overlap: bool) -> Kernels:
    """Group the ops of ``trace`` into kernels for ``chip``.

    Transfers that need not be waited for where they stand (:data:`ttt_sim.ops.BESIDE`) have a stream of their own.
    ``overlap`` False puts updates into the forward stream, in program order: nothing runs beside them. The same
    happens on a chip whose weights cannot be written while others are read, or only through the host. A chip with a
    shadow bank writes a new version beside the old one, so write-after-read order does not bind there.
    """
    n_ops = trace.n_ops
    reuploads = chip.writability.mode == "reupload"
    separate = overlap and chip.writability.overlap and not reuploads
    stream = np.where(is_update(trace) & separate, UPDATE_STREAM, FORWARD_STREAM).astype(np.int64)
    stream[np.isin(trace.kind, [KIND[name] for name in BESIDE])] = TRANSFER_STREAM
    waiting = owners(dependencies.ptr)
    needed = dependencies.idx
    if chip.writability.shadow_bank:
        keep = ~((dependencies.hazard == int(Hazard.WAR)) & writes_fast_weight(trace)[waiting])
        waiting, needed = waiting[keep], needed[keep]

    starts = _kernel_starts(trace, chip.mapping.fusion, stream, waiting, needed)
    order = np.argsort(stream, kind="stable")  # by stream, program order inside
    run_of = np.empty(n_ops, dtype=np.int64)
    run_of[order] = np.cumsum(starts[order]) - 1
    first_op = order[starts[order]]  # first op of each run
    by_first = np.argsort(first_op, kind="stable")
    rank = np.empty_like(by_first)
    rank[by_first] = np.arange(by_first.size)
    of_op = rank[run_of]
    lead = first_op[by_first]
    kernel_stream = stream[lead]
    n = int(lead.size)

    before = np.full(n, -1, dtype=np.int64)
    for s in range(len(STREAMS)):
        members = np.flatnonzero(kernel_stream == s)
        before[members[1:]] = members[:-1]

    pairs = (of_op[waiting] * n + of_op[needed])[of_op[waiting] != of_op[needed]]
    if reuploads:  # the chip is drained before and does nothing else meanwhile
        alone = np.unique(of_op[writes_fast_weight(trace)])
        between = np.concatenate([alone[alone > 0], alone[alone < n - 1] + 1])
        pairs = np.concatenate([pairs, between * n + between - 1])
    pairs = np.unique(pairs)
    edges = np.stack([pairs // max(n, 1), pairs % max(n, 1)], axis=1)
    return Kernels(n=n, of_op=of_op, lead=lead, stream=kernel_stream, before=before, edges=edges)


def _kernel_starts(
    trace: Trace, fusion: Fusion, stream: IntArray, waiting: IntArray, needed: IntArray
) -> npt.NDArray[np.bool_]:
    """True where an op starts a kernel."""
    n_ops = trace.n_ops
    starts = np.ones(n_ops, dtype=np.bool_)
    table = _join_table(fusion)
    previous = np.full(n_ops, -1, dtype=np.int64)  # op before it in its stream
    for s in range(len(STREAMS)):
        members = np.flatnonzero(stream == s)
        previous[members[1:]] = members[:-1]
    has = previous >= 0
    p = previous[has]
    joins = table[trace.kind[p], trace.kind[has]] & (trace.step[p] == trace.step[has])
    joins &= (trace.chunk[p] == trace.chunk[has]) | (trace.chunk[p] < 0) | (trace.chunk[has] < 0)
    update = is_update(trace)
    joins &= (trace.phase[p] == trace.phase[has]) | (update[p] & update[has])
    if fusion != "layer":  # a GEMM takes in a neighbour only if both cover the same rows
        matmul = op_classes(trace) == int(OpClass.MATMUL)
        rows = trace.batch * trace.m
        joins &= ~matmul[p] | (rows[p] == rows[has])
    starts[has] = ~joins

    # A kernel is numbered by its first op, so no member may wait for an op of another stream that comes later than
    # that.
    foreign = stream[waiting] != stream[needed]
    latest = np.full(n_ops, -1, dtype=np.int64)
    np.maximum.at(latest, waiting[foreign], needed[foreign])
    for s in range(len(STREAMS)):
        members = np.flatnonzero(stream == s)
        if members.size:
            first = np.maximum.accumulate(np.where(starts[members], members, -1))
            starts[members] |= latest[members] >= first
    return starts


def sibling_group(kinds: Mapping[str, int] = KIND) -> IntArray:
    """Group number by op kind: siblings share one, every other kind has its own."""
    group = np.arange(len(OP_KINDS), dtype=np.int64)
    for family in SIBLINGS:
        group[[kinds[name] for name in family]] = kinds[family[0]]
    return group
