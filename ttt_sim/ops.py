"""The trace: what a workload computes, moves and writes, as columns, one row per op. It knows no chip.

An op reads and writes *versions* of tensors. Version order carries the hazards: a reader of ``(tensor, v)`` follows
the op that wrote ``(tensor, v)`` (read after write), and the op that overwrites ``(tensor, v)`` in place with ``v + 1``
follows every reader of ``v`` (write after read). Only tensors that live across ops in one place (fast weights, carries,
optimiser state, ring buffers) are overwritten; each version of an activation is a buffer of its own.

Byte columns are *compulsory unfused* traffic: every operand read once, every result written once. What really reaches
a memory is decided by :mod:`ttt_sim.lower` from fusion and residency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ttt_sim.dtypes import DTYPE_BITS, DTYPES

IntArray = npt.NDArray[np.int64]


class Role(IntEnum):
    """What a tensor is for; decides capacity and traffic classes."""

    WEIGHT = 0  # frozen parameters, shared by the sequences of a batch
    FAST_WEIGHT = 1  # per sequence, overwritten at run time
    KV = 2  # keys and values kept for attention
    CARRY = 3  # rows of the unfinished chunk (inputs, targets, hidden rows, online accumulator)
    ACTIVATION = 4
    GRADIENT = 5  # weight deltas, gradients and other temporaries of an update
    OPTIMISER = 6  # moments and master copies that training keeps
    INDEX = 7  # vectors and codes that retrieval searches


#: Roles of tensors that live from the op that makes them to the last op that uses them, not between calls.
TEMPORARY_ROLES: tuple[Role, ...] = (Role.ACTIVATION, Role.GRADIENT)

#: Reporting classes of memory traffic, by role.
TRAFFIC_CLASSES: tuple[str, ...] = (
    "weights", "fast_weights", "kv", "activations", "gradients", "optimiser", "index",
)  # fmt: skip
CLASS_OF_ROLE: Mapping[Role, str] = {
    Role.WEIGHT: "weights",
    Role.FAST_WEIGHT: "fast_weights",
    Role.KV: "kv",
    Role.CARRY: "activations",
    Role.ACTIVATION: "activations",
    Role.GRADIENT: "gradients",
    Role.OPTIMISER: "optimiser",
    Role.INDEX: "index",
}


class Phase(IntEnum):
    FORWARD = 0
    RECOMPUTE = 1  # forward work done again for an update (official control flow)
    BACKWARD = 2  # building the delta or the gradient
    WEIGHT_WRITE = 3  # the op whose output is a new version of a fast weight


#: Phases that form the update stream; the others form the forward stream.
UPDATE_PHASES: tuple[Phase, ...] = (Phase.BACKWARD, Phase.WEIGHT_WRITE)


class OpClass(IntEnum):
    """How a mapper treats an op."""

    MATMUL = 0  # C[m,n] = A[m,k] B[k,n], `batch` independent products
    ATTENTION = 1  # `batch` sequences, m query rows, n key rows, head width k, `pairs` visible pairs per sequence
    VECTOR = 2  # m rows of width n on vector units, streaming its operands
    COPY = 3  # moves bytes, computes nothing
    SCAN = 4  # `batch` sequences x `heads` states of k x n, updated along m tokens in order, `pairs` at a time
    COLLECTIVE = 5  # m elements move between `heads` chips, see TRANSFERS


class OpKind(NamedTuple):
    """One kind of op. ``spec`` is its id in the operation lists of docs/workloads.md."""

    name: str
    spec: str
    op_class: OpClass
    title: str


#: Every op kind, in the order in which one layer runs them. The trace stores the index.
OP_KINDS: tuple[OpKind, ...] = (
    OpKind("embedding", "F0", OpClass.COPY, "token embedding look-up"),
    OpKind("attn_norm", "F1", OpClass.VECTOR, "RMSNorm before attention"),
    OpKind("q_proj", "F2", OpClass.MATMUL, "query projection"),
    OpKind("k_proj", "F3", OpClass.MATMUL, "key projection"),
    OpKind("v_proj", "F3", OpClass.MATMUL, "value projection"),
    OpKind("qk_norm", "F4", OpClass.VECTOR, "RMSNorm of queries and keys"),
    OpKind("rope", "F5", OpClass.VECTOR, "rotary position embedding"),
    OpKind("kv_append", "F6", OpClass.VECTOR, "KV cache append"),
    OpKind("attention", "F7", OpClass.ATTENTION, "attention core"),
    OpKind("o_proj", "F8", OpClass.MATMUL, "output projection"),
    OpKind("attn_residual", "F9", OpClass.VECTOR, "residual add after attention"),
    OpKind("mlp_norm", "F10", OpClass.VECTOR, "RMSNorm before the MLP"),
    OpKind("carry_append", "C1", OpClass.VECTOR, "append to the rows of the open chunk"),
    OpKind("gate_proj", "F11", OpClass.MATMUL, "gate projection"),
    OpKind("up_proj", "F12", OpClass.MATMUL, "up projection"),
    OpKind("silu_mul", "F13", OpClass.VECTOR, "SiLU and product"),
    OpKind("down_proj", "F14", OpClass.MATMUL, "down projection, frozen"),
    OpKind("fast_apply", "F14", OpClass.MATMUL, "down projection with the fast weight"),
    OpKind("mlp_residual", "F15", OpClass.VECTOR, "residual add after the MLP"),
    OpKind("final_norm", "F16", OpClass.VECTOR, "final RMSNorm"),
    OpKind("lm_head", "F16", OpClass.MATMUL, "language-model head"),
    OpKind("target_conv", "U1", OpClass.VECTOR, "depthwise convolution of the targets"),
    OpKind("target_proj", "U2", OpClass.MATMUL, "target projection"),
    OpKind("delta_gemm", "U3", OpClass.MATMUL, "delta GEMM (outer product over the chunk)"),
    OpKind("outer_gemm", "U3'", OpClass.MATMUL, "unprojected delta GEMM, chunk at least d_ff"),
    OpKind("outer_proj", "U2'", OpClass.MATMUL, "projection of the delta, chunk at least d_ff"),
    OpKind("delta_norm", "U4", OpClass.VECTOR, "norm of a delta or gradient (barrier)"),
    OpKind("delta_scale", "U5", OpClass.VECTOR, "scale of the delta by the rate"),
    OpKind("weight_write", "U6", OpClass.VECTOR, "add of the delta into the fast weight"),
    OpKind("delta_write", "U3+U5+U6", OpClass.MATMUL, "delta GEMM that accumulates into the fast weight"),
    OpKind("online_update", "C2", OpClass.MATMUL, "rank-one update of the online accumulator"),
    OpKind("fast_init", "C3", OpClass.COPY, "copy of the trained weight into a fast weight"),
    OpKind("product", "M1", OpClass.MATMUL, "matrix product on its own"),
    OpKind("layernorm", "M2", OpClass.VECTOR, "LayerNorm"),
    OpKind("softmax", "M3", OpClass.VECTOR, "softmax of rows"),
    OpKind("gelu", "M4", OpClass.VECTOR, "GELU"),
    OpKind("quantise", "M5", OpClass.VECTOR, "quantisation of activations"),
    OpKind("delta_rule", "S6", OpClass.SCAN, "gated delta rule in chunks: a fast-weight state per value head"),
    OpKind("delta_step", "S6", OpClass.SCAN, "gated delta rule, one token"),
    OpKind("allreduce", "P1", OpClass.COLLECTIVE, "sum over the chips of a group"),
    OpKind("allgather", "P2", OpClass.COLLECTIVE, "parts of all chips of a group, side by side"),
    OpKind("stage_send", "P3", OpClass.COLLECTIVE, "activations to the chips of the next layers"),
    OpKind("kv_ring", "P4", OpClass.COLLECTIVE, "keys and values one step around the ring"),
    OpKind("delta_sum", "P5", OpClass.VECTOR, "sum of the deltas of a chip's chunks"),
    OpKind("delta_scan", "P6", OpClass.COLLECTIVE, "sum of the deltas of all chips before this one"),
    OpKind("loss", "B1", OpClass.VECTOR, "cross-entropy over the vocabulary"),
    OpKind("loss_grad", "B2", OpClass.VECTOR, "gradient of the logits"),
    OpKind("input_grad", "B3", OpClass.MATMUL, "gradient of a product's input"),
    OpKind("weight_grad", "B4", OpClass.MATMUL, "gradient of a weight (outer product over tokens)"),
    OpKind("attention_grad", "B5", OpClass.ATTENTION, "attention core, backward"),
    OpKind("norm_grad", "B6", OpClass.VECTOR, "RMSNorm, backward"),
    OpKind("rope_grad", "B7", OpClass.VECTOR, "rotary position embedding, backward"),
    OpKind("silu_mul_grad", "B8", OpClass.VECTOR, "SiLU and product, backward"),
    OpKind("grad_add", "B9", OpClass.VECTOR, "sum of gradients that meet"),
    OpKind("momentum_write", "B10", OpClass.VECTOR, "step of gradient descent with momentum"),
    OpKind("adam_write", "B11", OpClass.VECTOR, "step of Adam"),
    OpKind("join_parts", "K1", OpClass.VECTOR, "outputs of attention over two parts of the keys become one"),
    OpKind("kv_fetch", "K2", OpClass.COPY, "keys and values from behind the main memory, ahead of their use"),
    OpKind("latent_proj", "K3", OpClass.MATMUL, "projection down to a latent"),
    OpKind("latent_norm", "K4", OpClass.VECTOR, "RMSNorm of latents"),
    OpKind("latent_up", "K5", OpClass.MATMUL, "keys and values from latents"),
    OpKind("absorb_q", "K6", OpClass.MATMUL, "queries into the space of latents"),
    OpKind("absorb_out", "K7", OpClass.MATMUL, "sums of latents to values"),
    OpKind("adapter_down", "L1", OpClass.MATMUL, "rows times the first factor of an adapter"),
    OpKind("adapter_up", "L2", OpClass.MATMUL, "the same times the second factor, added to what it adapts"),
    OpKind("own_proj", "L3", OpClass.MATMUL, "projection with a weight that each sequence has its own copy of"),
    OpKind("weight_scan", "T1", OpClass.VECTOR, "running sums of the deltas of all chunks, or of gradients of weights"),
    OpKind("conv_grad", "T2", OpClass.VECTOR, "depthwise convolution of the targets, backward"),
    OpKind("in_proj", "S1", OpClass.MATMUL, "all inputs of a state layer, side by side"),
    OpKind("short_conv", "S2", OpClass.VECTOR, "causal convolution of four taps and SiLU"),
    OpKind("l2_norm", "S3", OpClass.VECTOR, "rows to unit length"),
    OpKind("state_gates", "S4", OpClass.VECTOR, "rates and decays of a state layer"),
    OpKind("gated_norm", "S5", OpClass.VECTOR, "RMSNorm and SiLU gate of a state layer's output"),
    OpKind("ssm_scores", "S7", OpClass.MATMUL, "outputs with inputs of a chunk (Mamba2), one for all heads"),
    OpKind("ssm_mix", "S8", OpClass.MATMUL, "decayed scores times values of a chunk (Mamba2)"),
    OpKind("ssm_states", "S9", OpClass.MATMUL, "what a chunk adds to the states (Mamba2)"),
    OpKind("state_pass", "S10", OpClass.VECTOR, "states from chunk to chunk (Mamba2)"),
    OpKind("ssm_read", "S11", OpClass.MATMUL, "outputs of a chunk from the states before it (Mamba2)"),
    OpKind("ssm_step", "S12", OpClass.SCAN, "Mamba2, one token"),
    OpKind("linear_update", "S13", OpClass.SCAN, "TTT-Linear: gradient steps of a linear model per head"),
    OpKind("mlp_update", "S14", OpClass.SCAN, "TTT-MLP: gradient steps of an MLP per head"),
    OpKind("memory_update", "S15", OpClass.SCAN, "Titans: gradient steps of an MLP with momentum and forgetting"),
    OpKind("fast_gate_up", "S16", OpClass.MATMUL, "gate and up projection with fast weights"),
    OpKind("fast_back", "S17", OpClass.MATMUL, "gradient of hidden rows through a fast weight"),
    OpKind("muon_product", "S18", OpClass.MATMUL, "product of a Newton-Schulz iteration"),
    OpKind("norm_write", "S19", OpClass.VECTOR, "add of a gradient and norm of the rows of a fast weight"),
    OpKind("branch_join", "S20", OpClass.VECTOR, "RMSNorm, gain and sum of the outputs of two branches"),
    OpKind("index_write", "R1", OpClass.COPY, "vectors or codes into an index"),
    OpKind("index_scan", "R2", OpClass.MATMUL, "distances to all vectors, or to all centroids"),
    OpKind("pq_table", "R3", OpClass.MATMUL, "distances to the centroids of a product quantiser"),
    OpKind("pq_scan", "R4", OpClass.VECTOR, "distances to codes, from tables"),
    OpKind("graph_search", "R5", OpClass.MATMUL, "distances to the nodes of a walk, hop after hop"),
    OpKind("top_k", "R6", OpClass.VECTOR, "the best of the scores of a row"),
    OpKind("embed_pool", "R7", OpClass.VECTOR, "mean of the rows of a sequence"),
    OpKind("embed_proj", "R8", OpClass.MATMUL, "projection to the vector of a sequence"),
    OpKind("latent_attention", "K8", OpClass.ATTENTION, "attention core whose keys are wider than its values"),
    OpKind("state_copy", "V1", OpClass.COPY, "copy of what a sequence keeps"),
    OpKind("state_hash", "V2", OpClass.VECTOR, "hash of what a sequence keeps"),
    OpKind("history_scores", "V3", OpClass.MATMUL, "hidden rows by those of earlier chunks"),
    OpKind("history_apply", "V4", OpClass.MATMUL, "these scores by the values of earlier chunks"),
    OpKind("post_norm", "E14", OpClass.VECTOR, "RMSNorm of what a branch adds"),
    OpKind("state_join", "P7", OpClass.MATMUL, "state after a chip's part of a prompt from the one before it"),
    OpKind("state_read", "P8", OpClass.MATMUL, "what outputs of a chip's part read of the state before it"),
)
#: Kinds that no decoder emits: ops of which latencies are published, simulated one by one.
MEASURED_ALONE: frozenset[str] = frozenset(kind.name for kind in OP_KINDS if kind.spec.startswith("M"))
#: Kinds of a trace that is one chip's part of several: what only makes sense beside the parts of the others.
BETWEEN_CHIPS: frozenset[str] = frozenset(kind.name for kind in OP_KINDS if kind.spec.startswith("P"))
#: Transfers that run beside the other work of a chip.
BESIDE: tuple[str, ...] = ("kv_ring", "delta_scan", "kv_fetch")
KIND: Mapping[str, int] = {kind.name: code for code, kind in enumerate(OP_KINDS)}
#: Products that an attention core is: scores and weighted sum; backward the scores again, and the gradients of weights,
#: values, queries and keys.
ATTENTION_PRODUCTS: Mapping[str, int] = {"attention": 2, "attention_grad": 5, "latent_attention": 2}
#: Operands as large as the queries that a core reads: queries; backward also its output and the gradient of that.
_QUERY_OPERANDS: Mapping[str, int] = {"attention": 1, "attention_grad": 3}
#: The first operands of a latent core are its queries: the part that meets latents or keys, and the rotated part.
_LATENT_QUERIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A named buffer. ``shape`` includes the batch for per-sequence tensors; ``nbytes`` is the whole allocation.

    ``initial_version`` is the version that exists before the first op (-1: none; it must be written first).
    ``in_place``: a new version overwrites the old one, so write-after-read order holds.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    nbytes: int
    initial_version: int = -1
    in_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Ops in program order as int64 columns of length ``n_ops``.

    ``kind`` index into :data:`OP_KINDS`; ``phase`` a :class:`Phase`; ``layer`` -1 outside the layers; ``chunk`` index
    of the chunk of the sequence, -1 for ops that belong to none; ``step`` index of the call in the scenario;
    ``position`` tokens before its rows; ``dtype`` index into :data:`DTYPES` of the multiplied operands; ``batch, m, n,
    k`` as :class:`OpClass` says; ``heads, kv_heads, pairs`` for attention, ``heads`` also for scans, collectives and
    the hops of a walk, else 0 (``pairs``: visible query-key pairs per sequence; of scans the tokens of a chunk, 0 where
    they go token by token); ``flops`` multiply-adds counted as two; ``vector_ops`` lane operations, of which ``exp_ops,
    rsqrt_ops, div_ops`` are transcendental, reciprocal root and divide.

    Operands are kept as CSR columns: op i reads entries ``read_ptr[i]:read_ptr[i+1]`` of (``read_tensor``,
    ``read_version``, ``read_bytes``), and likewise for writes. ``after_ptr``/``after_idx`` are explicit extra
    dependencies on earlier ops.
    """

    kind: IntArray
    phase: IntArray
    layer: IntArray
    chunk: IntArray
    step: IntArray
    position: IntArray
    dtype: IntArray
    batch: IntArray
    m: IntArray
    n: IntArray
    k: IntArray
    heads: IntArray
    kv_heads: IntArray
    pairs: IntArray
    flops: IntArray
    vector_ops: IntArray
    exp_ops: IntArray
    rsqrt_ops: IntArray
    div_ops: IntArray
    read_ptr: IntArray
    read_tensor: IntArray
    read_version: IntArray
    read_bytes: IntArray
    write_ptr: IntArray
    write_tensor: IntArray
    write_version: IntArray
    write_bytes: IntArray
    after_ptr: IntArray
    after_idx: IntArray
    tensors: tuple[Tensor, ...]
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def n_ops(self) -> int:
        return int(self.kind.shape[0])


#: Scalar columns of a trace, in the order in which files list them.
OP_COLUMNS: tuple[str, ...] = (
    "kind", "phase", "layer", "chunk", "step", "position", "dtype", "batch", "m", "n", "k", "heads", "kv_heads",
    "pairs", "flops", "vector_ops", "exp_ops", "rsqrt_ops", "div_ops",
)  # fmt: skip


# --- cost rules -------------------------------------------------------------------------------------------------------

#: A whole number, or one whole number per call (an int64 array).
Num = int | IntArray


class LaneCost(NamedTuple):
    """Cost of a row-wise op per element of its m x n rows, and per row. ``lanes`` includes the transcendentals;
    ``lanes_per_row`` does not."""

    lanes: int = 0
    exp: int = 0
    div: int = 0
    rsqrt: int = 0
    rsqrt_per_row: int = 0
    flops: int = 0
    lanes_per_row: int = 0
    exp_per_row: int = 0
    div_per_row: int = 0


#: The cost rule of every kind of class VECTOR; matrix products and attention have one rule each, in :func:`op_cost`.
LANE_COST: Mapping[str, LaneCost] = {
    "attn_norm": LaneCost(lanes=4, rsqrt_per_row=1),
    "qk_norm": LaneCost(lanes=4, rsqrt_per_row=1),
    "rope": LaneCost(lanes=3),
    "kv_append": LaneCost(),
    "attn_residual": LaneCost(lanes=1),
    "mlp_norm": LaneCost(lanes=4, rsqrt_per_row=1),
    "carry_append": LaneCost(),
    "silu_mul": LaneCost(lanes=5, exp=1, div=1),
    "mlp_residual": LaneCost(lanes=1),
    "final_norm": LaneCost(lanes=4, rsqrt_per_row=1),
    "target_conv": LaneCost(flops=10),  # five taps, a multiply-add each
    "delta_norm": LaneCost(lanes=2),
    "delta_scale": LaneCost(lanes=1),
    "weight_write": LaneCost(lanes=1),
    "layernorm": LaneCost(lanes=6, rsqrt_per_row=1),
    "softmax": LaneCost(lanes=32, exp=1),
    "gelu": LaneCost(lanes=8, exp=1),
    "quantise": LaneCost(lanes=3),
    "delta_sum": LaneCost(lanes=1),
    "loss": LaneCost(lanes=4, exp=1),
    "loss_grad": LaneCost(lanes=2),
    "norm_grad": LaneCost(lanes=6, rsqrt_per_row=1),
    "rope_grad": LaneCost(lanes=3),
    "silu_mul_grad": LaneCost(lanes=12, exp=1, div=1),
    "grad_add": LaneCost(lanes=1),
    "momentum_write": LaneCost(lanes=4),
    "adam_write": LaneCost(lanes=12, rsqrt=1, div=1),
    # Of each row the larger maximum, two differences and a sum; then two products and a sum per element.
    "join_parts": LaneCost(lanes=3, lanes_per_row=4, exp_per_row=2, div_per_row=1),
    "latent_norm": LaneCost(lanes=4, rsqrt_per_row=1),
    "weight_scan": LaneCost(lanes=2),
    "conv_grad": LaneCost(flops=20),  # five taps, a multiply-add each, for the targets and for the taps
    "short_conv": LaneCost(lanes=4, exp=1, div=1, flops=8),  # four taps, a multiply-add each
    "l2_norm": LaneCost(lanes=3, rsqrt_per_row=1),
    "state_gates": LaneCost(lanes=6, exp=2, div=1),
    "gated_norm": LaneCost(lanes=9, exp=1, div=1, rsqrt_per_row=1),
    "state_pass": LaneCost(lanes=2),
    "norm_write": LaneCost(lanes=5, rsqrt_per_row=1),
    "branch_join": LaneCost(lanes=5, rsqrt_per_row=1),
    "pq_scan": LaneCost(lanes=2),  # a look-up and a sum
    "top_k": LaneCost(lanes=2),  # a comparison and a move
    "embed_pool": LaneCost(lanes=1),
    "state_hash": LaneCost(),  # that of the hash function is added
    "post_norm": LaneCost(lanes=4, rsqrt_per_row=1),
}
#: Lane operations per visible pair and head, one of them an exponential.
_PAIR_LANES: Mapping[str, int] = {"attention": 5, "attention_grad": 6, "latent_attention": 5}


class OpCost(NamedTuple):
    """Values of the trace columns of the same names."""

    flops: Num
    vector_ops: Num
    exp_ops: Num
    rsqrt_ops: Num
    div_ops: Num


class ScanRule(NamedTuple):
    """What a scan does with every chunk of c tokens, for each state.

    ``products``: letters (rows, columns, depth) out of c, n and k; ``within``: more of them where there are chunks,
    which fall away where a scan goes token by token, and ``triangular`` ones, which take half. ``stages``: products
    from one state to the next of which each needs the one before. A state is ``states`` matrices of k x n. Lane
    operations: ``state_lanes`` per element of k x n and chunk, ``pair_lanes`` per pair of tokens of a chunk,
    ``n_lanes`` and ``k_lanes`` per token and n or k, of which ``n_exp`` exponentials; ``roots`` per token.
    """

    products: tuple[str, ...]
    stages: int
    within: tuple[str, ...] = ()
    triangular: tuple[str, ...] = ()
    states: int = 1
    state_lanes: int = 0
    pair_lanes: int = 0
    n_lanes: int = 0
    k_lanes: int = 0
    n_exp: int = 0
    roots: int = 0


# Correction, output and update of the state; keys with keys and with queries, output from the chunk, the solve.
_DELTA_RULE = ScanRule(
    products=("cnk", "cnk", "knc"), within=("cck", "cck", "cnc"), triangular=("ccn", "cck"), stages=2
)
# Keys through two matrices, the gradient back through the second, both updates, queries through both; within a chunk
# queries with keys, times gradients, for both.
_MLP, _MLP_WITHIN = ("cnk", "ckn", "cnk", "knc", "nkc", "cnk", "ckn"), ("cck", "cnc", "ccn", "ckc")
#: The rule of every kind of class SCAN.
SCAN_RULE: Mapping[str, ScanRule] = {
    "delta_rule": _DELTA_RULE,
    "delta_step": _DELTA_RULE,
    # step and decay per element as in the published kernel
    "ssm_step": ScanRule(products=("cnk", "knc"), stages=1, state_lanes=2),
    # LayerNorm forward, backward and of the output
    "linear_update": ScanRule(
        products=("cnk", "knc", "cnk"), within=("cck", "cnc"), stages=2, pair_lanes=2, n_lanes=26, roots=2
    ),
    # the same, and GELU twice forward and once backward
    "mlp_update": ScanRule(
        products=_MLP, within=_MLP_WITHIN, stages=4, states=2, pair_lanes=4, n_lanes=28, n_exp=3, k_lanes=26, roots=2
    ),
    # in chunks queries go through the momentum too, and gradients are summed for it with weights of its own
    "memory_update": ScanRule(
        products=_MLP, within=(*_MLP_WITHIN, "cnk", "ckn", "knc", "nkc"), stages=4, states=4, state_lanes=6,
        pair_lanes=4, n_lanes=28, n_exp=3, k_lanes=2,
    ),
}  # fmt: skip


def scan_chunks(m: int, chunk: int) -> list[tuple[int, int]]:
    """(tokens, times) of the chunks of ``m`` tokens, whole ones and the rest; ``chunk`` 0: token by token, (0, m)."""
    full, rest = divmod(m, max(chunk, 1))
    return [(size, times) for size, times in ((chunk, full), (rest, int(rest > 0))) if times]


class ScanProduct(NamedTuple):
    """C[rows, cols] of one state and chunk. ``half``: it is triangular; ``over_tokens``: what is added to a state, a
    product over the tokens of the chunk."""

    rows: int
    cols: int
    depth: int
    half: bool
    over_tokens: bool


def scan_products(kind: str, *, n: int, k: int, chunk: int) -> list[ScanProduct]:
    """The products of a chunk; ``chunk`` 0: one token by itself."""
    rule, size = SCAN_RULE[kind], {"c": max(chunk, 1), "n": n, "k": k}
    within = ((rule.within, False), (rule.triangular, True)) if chunk else ()
    return [
        ScanProduct(size[name[0]], size[name[1]], size[name[2]], half, name[2] == "c" and name[0] != "c")
        for names, half in ((rule.products, False), *within)
        for name in names
    ]


def _scan_cost(kind: str, *, states: int, m: int, n: int, k: int, chunk: int, extra_lanes: Num) -> OpCost:
    rule, flops, lanes = SCAN_RULE[kind], 0, 0
    for size, times in scan_chunks(m, chunk):
        for part in scan_products(kind, n=n, k=k, chunk=size):
            flops += times * part.rows * part.cols * part.depth * (1 if part.half else 2)
        lanes += times * (rule.state_lanes * n * k + rule.pair_lanes * size * size)
    lanes += m * (rule.n_lanes * n + rule.k_lanes * k + rule.roots)
    exps, roots = m * rule.n_exp * n, m * rule.roots
    return OpCost(states * flops, states * lanes + extra_lanes, states * exps, states * roots, 0)


def op_cost(
    kind: str, *, batch: int, m: Num, n: Num, k: Num, heads: int = 0, pairs: Num = 0, extra_lanes: Num = 0
) -> OpCost:
    """The cost rule: what an op of these dimensions computes.

    ``extra_lanes``: lane operations that the op does besides its own (quantising, dequantising, a fused scale and add).
    """
    op_class = OP_KINDS[KIND[kind]].op_class
    if op_class == OpClass.MATMUL:
        return OpCost(2 * batch * m * n * k, extra_lanes, 0, 0, 0)
    if op_class == OpClass.ATTENTION:
        scores = batch * heads * pairs
        return OpCost(2 * ATTENTION_PRODUCTS[kind] * k * scores, _PAIR_LANES[kind] * scores + extra_lanes, scores, 0, 0)
    if op_class in (OpClass.COPY, OpClass.COLLECTIVE):
        return OpCost(0, extra_lanes, 0, 0, 0)
    if op_class == OpClass.SCAN:
        return _scan_cost(
            kind, states=batch * heads, m=int(m), n=int(n), k=int(k), chunk=int(pairs), extra_lanes=extra_lanes
        )
    rule, rows, elements = LANE_COST[kind], batch * m, batch * m * n
    per_row = rule.lanes_per_row + rule.rsqrt_per_row + rule.exp_per_row + rule.div_per_row
    return OpCost(
        rule.flops * elements,
        rule.lanes * elements + per_row * rows + extra_lanes,
        rule.exp * elements + rule.exp_per_row * rows,
        rule.rsqrt * elements + rule.rsqrt_per_row * rows,
        rule.div * elements + rule.div_per_row * rows,
    )


# --- columns that follow from others ----------------------------------------------------------------------------------


def total_by(index: IntArray, values: IntArray, n: int) -> IntArray:
    """Sums of ``values`` by ``index``, (n,)."""
    out = np.zeros(n, dtype=np.int64)
    np.add.at(out, index, values)
    return out


def op_classes(trace: Trace) -> IntArray:
    """:class:`OpClass` of each op."""
    return np.array([int(kind.op_class) for kind in OP_KINDS], dtype=np.int64)[trace.kind]


def element_bits(trace: Trace) -> IntArray:
    """Bits of an element of each op's operands."""
    return np.array([DTYPE_BITS[dtype] for dtype in DTYPES], dtype=np.int64)[trace.dtype]


def query_bytes(trace: Trace) -> IntArray:
    """Bytes of the queries of each attention core, and of what else it reads of their size; of other ops without
    meaning."""
    operands = np.array([_QUERY_OPERANDS.get(kind.name, 1) for kind in OP_KINDS], dtype=np.int64)[trace.kind]
    queries: IntArray = operands * -(-trace.batch * trace.heads * trace.m * trace.k * element_bits(trace) // 8)
    for op in np.flatnonzero(trace.kind == KIND["latent_attention"]):
        first = int(trace.read_ptr[op])
        queries[op] = trace.read_bytes[first : first + _LATENT_QUERIES].sum()
    return queries


def overwritten(trace: Trace) -> npt.NDArray[np.bool_]:
    """Reads (n_read_entries,) of a tensor of which the same op writes a version: what a sum is added to."""
    n = len(trace.tensors)
    written = owners(trace.write_ptr) * n + trace.write_tensor
    return np.asarray(np.isin(owners(trace.read_ptr) * n + trace.read_tensor, written), dtype=np.bool_)


def is_update(trace: Trace) -> npt.NDArray[np.bool_]:
    """Whether each op belongs to the update stream."""
    return np.isin(trace.phase, [int(phase) for phase in UPDATE_PHASES])


def persistent_bytes(trace: Trace) -> int:
    """Bytes of weights and state: what lives from before the first op to after the last."""
    return sum(tensor.nbytes for tensor in trace.tensors if tensor.role not in TEMPORARY_ROLES)


def lane_ops(trace: Trace) -> tuple[IntArray, IntArray]:
    """(ordinary lane operations, special-function operations) of each op; FLOPs of row-wise ops run on lanes too."""
    special = trace.exp_ops + trace.rsqrt_ops + trace.div_ops
    rowwise = op_classes(trace) == int(OpClass.VECTOR)
    return trace.vector_ops - special + np.where(rowwise, trace.flops, 0), special


# --- dependencies -----------------------------------------------------------------------------------------------------


class Hazard(IntEnum):
    """Why an op waits for an earlier one; of several reasons the first in this order is kept."""

    RAW = 0  # it reads what the other writes
    WAR = 1  # it overwrites in place what the other reads
    WAW = 2  # it overwrites in place what the other wrote
    AFTER = 3  # the trace says so


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dependencies:
    """Op i waits for ops ``idx[ptr[i]:ptr[i+1]]``, earlier ones, rising, each once; ``hazard`` says why."""

    ptr: IntArray
    idx: IntArray
    hazard: IntArray


def version_slots(trace: Trace) -> tuple[IntArray, IntArray, int]:
    """Number the (tensor, version) pairs of a trace densely, versions of one tensor next to each other.

    Returns the slot of each read entry, the slot of each write entry, and the number of slots. Slot - 1 is the version
    before, also for the first version of a tensor.
    """
    n_tensors = len(trace.tensors)
    low = np.array([tensor.initial_version for tensor in trace.tensors], dtype=np.int64)
    high = low.copy()
    for tensor, version in ((trace.read_tensor, trace.read_version), (trace.write_tensor, trace.write_version)):
        np.minimum.at(low, tensor, version)
        np.maximum.at(high, tensor, version)
    start = np.zeros(n_tensors + 1, dtype=np.int64)
    np.cumsum(high - low + 2, out=start[1:])
    base = start[:-1] + 1 - low
    return base[trace.read_tensor] + trace.read_version, base[trace.write_tensor] + trace.write_version, int(start[-1])


def owners(ptr: IntArray) -> IntArray:
    """Index of the op that each entry of a CSR column belongs to."""
    return np.repeat(np.arange(ptr.size - 1, dtype=np.int64), np.diff(ptr))


def dependencies(trace: Trace) -> Dependencies:
    """What each op of a verified trace waits for (see the module text). Array code, linear but for one sort."""
    n = trace.n_ops
    read_slot, write_slot, n_slots = version_slots(trace)
    reader, writer_op = owners(trace.read_ptr), owners(trace.write_ptr)
    writer = np.full(n_slots, -1, dtype=np.int64)
    writer[write_slot] = writer_op

    waiting, needed, hazard = [], [], []

    def add(ops: IntArray, on: IntArray, code: Hazard) -> None:
        keep = (on >= 0) & (on != ops)
        waiting.append(ops[keep])
        needed.append(on[keep])
        hazard.append(np.full(int(keep.sum()), int(code), dtype=np.int64))

    add(reader, writer[read_slot], Hazard.RAW)
    in_place = np.array([tensor.in_place for tensor in trace.tensors], dtype=np.bool_)
    overwrites = in_place[trace.write_tensor]
    over_op, over_slot = writer_op[overwrites], write_slot[overwrites]
    # Readers of the overwritten version, as a ragged range per write.
    read_in_place = np.flatnonzero(in_place[trace.read_tensor])
    by_slot = read_in_place[np.argsort(read_slot[read_in_place], kind="stable")]
    left = np.searchsorted(read_slot[by_slot], over_slot - 1, side="left")
    counts = np.searchsorted(read_slot[by_slot], over_slot - 1, side="right") - left
    entry = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(left - np.cumsum(counts) + counts, counts)
    add(np.repeat(over_op, counts), reader[by_slot[entry]], Hazard.WAR)
    add(over_op, writer[over_slot - 1], Hazard.WAW)
    add(owners(trace.after_ptr), trace.after_idx, Hazard.AFTER)

    key = (np.concatenate(waiting) * max(n, 1) + np.concatenate(needed)) * len(Hazard) + np.concatenate(hazard)
    key.sort(kind="stable")
    pair = key // len(Hazard)
    first = np.ones(key.size, dtype=np.bool_)
    first[1:] = pair[1:] != pair[:-1]
    pair = pair[first]
    ptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(pair // max(n, 1), minlength=n), out=ptr[1:])
    return Dependencies(ptr=ptr, idx=pair % max(n, 1), hazard=key[first] % len(Hazard))
