"""The algebra that traces must agree with: sizes, FLOPs, bytes and crossovers as formulas, exact.

Independent of the trace generator, which does not use it; tests hold the two together, and reports print these values
beside simulated ones. Symbols of docs/workloads.md: d = d_model, f = d_ff, L layers of which s are TTT layers, H query
and G KV heads of width h, C tokens per chunk, w tokens of window, B sequences, kappa KV bytes per token, Phi
fast-weight bytes per sequence. Formats are given by name; an ideal 4-bit cache without scales is ``int4``.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from ttt_sim.dtypes import DTYPE_BITS
from ttt_sim.model import ONE_CHIP, Model, Parallel, TTTSettings, WeightWrite


def element_bytes(dtype: str) -> Fraction:
    """Bytes per element, half a byte for 4-bit formats."""
    return Fraction(DTYPE_BITS[dtype], 8)


# --- state ------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(model: Model, kv_dtype: str = "bf16") -> Fraction:
    """kappa = 2 G h L e_kv."""
    return 2 * model.n_kv_heads * model.head_dim * model.n_layers * element_bytes(kv_dtype)


def fast_weight_bytes(model: Model, ttt: TTTSettings) -> Fraction:
    """Phi = s u f e_f, where u rows of a weight are fast: d of them unless the settings say otherwise."""
    return len(ttt.layers_of(model)) * _fast_elements(model, ttt) * element_bytes(ttt.fast_dtype)


def _fast_elements(model: Model, ttt: TTTSettings) -> int:
    """u f."""
    return (model.d_model if ttt.update_rows is None else ttt.update_rows) * model.d_ff


def _value_width(model: Model, ttt: TTTSettings) -> int:
    """Columns of what is multiplied with hidden rows: u, or d before a projection."""
    if ttt.projection and outer_comes_first(model, ttt, model.d_ff):
        return model.d_model
    return _fast_elements(model, ttt) // model.d_ff


def _target_width(model: Model, ttt: TTTSettings) -> int:
    """Columns of targets that an update needs: d that a projection mixes, or u."""
    return model.d_model if ttt.projection or ttt.update_rows is None else ttt.update_rows


def official_carry_bytes(model: Model, ttt: TTTSettings, dtype: str = "bf16") -> Fraction:
    """2 s (C - 1) d e_a: inputs and targets of an open chunk that lacks one token; without projection, u columns of
    the targets."""
    width = model.d_model + _target_width(model, ttt)
    return len(ttt.layers_of(model)) * (ttt.chunk_tokens - 1) * width * element_bytes(dtype)


# --- crossovers, in tokens --------------------------------------------------------------------------------------------


def state_crossover(model: Model, ttt: TTTSettings, kv_dtype: str = "bf16") -> Fraction:
    """T_state = Phi / kappa: the fast weights equal that much KV cache.

    Also C_write: the chunk at which fused weight writes per token equal the KV append per token.
    """
    return fast_weight_bytes(model, ttt) / kv_bytes_per_token(model, kv_dtype)


def windowed_state_crossover(
    model: Model, ttt: TTTSettings, window_tokens: int, *, dtype: str = "bf16", kv_dtype: str = "bf16"
) -> Fraction:
    """w + (Phi + carry) / kappa: windowed TTT with its carry at its largest against a full cache."""
    held = fast_weight_bytes(model, ttt) + official_carry_bytes(model, ttt, dtype)
    return window_tokens + held / kv_bytes_per_token(model, kv_dtype)


def kv_copies(model: Model, parallel: Parallel) -> int:
    """Chips of a tensor-parallel group that hold the same KV head."""
    return max(parallel.tp // model.n_kv_heads, 1)


def traffic_crossover(
    model: Model,
    ttt: TTTSettings,
    window_tokens: int,
    batch: int,
    kv_dtype: str = "bf16",
    parallel: Parallel = ONE_CHIP,
) -> Fraction:
    """T_traffic(B) = w + (1 - 1/B) Phi / kappa: equal bytes of weights and KV per decode step of ``batch`` sequences.

    All chips of a system together: cp of them read the same fast weights, :func:`kv_copies` the same keys.
    """
    copies = Fraction(parallel.cp, kv_copies(model, parallel))
    return window_tokens + (1 - Fraction(1, batch)) * copies * state_crossover(model, ttt, kv_dtype)


def flop_crossover(model: Model, ttt: TTTSettings, window_tokens: int, parallel: Parallel = ONE_CHIP) -> Fraction:
    """T_flop = 2 w + s u (d + f) / (L H h): equal prefill FLOPs, for contexts much longer than the window.

    d (u f / C + f) in place of u (d + f) where the outer product comes first, u f without projection. Of a system:
    tp d, since tp chips project the same targets, and all of cp chips count as the last, whose tokens see all before
    them, (2 cp - 1) / cp times the mean of full attention.
    """
    d, f, fast = model.d_model, model.d_ff, _fast_elements(model, ttt)
    update = Fraction(fast)
    if ttt.projection and outer_comes_first(model, ttt, Fraction(f, parallel.tp)):
        update = d * (Fraction(fast, ttt.chunk_tokens) + f)
    elif ttt.projection:
        update += Fraction(parallel.tp * d * fast, f)
    extra = len(ttt.layers_of(model)) * update
    mean = window_tokens + extra / (2 * model.n_layers * model.n_heads * model.head_dim)
    return Fraction(2 * parallel.cp, 2 * parallel.cp - 1) * mean


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def linear_flops_per_token(model: Model) -> int:
    """Products with the weights of all layers: 2 FLOPs per parameter."""
    return 2 * model.block_parameters


def visible_pairs(tokens: int, before: int = 0, window_tokens: int | None = None) -> int:
    """Query-key pairs: m p + m (m + 1) / 2, less what lies outside the window."""
    pairs = tokens * before + tokens * (tokens + 1) // 2
    if window_tokens is None:
        return pairs

    def outside(end: int) -> int:  # pairs that the first `end` rows of a sequence lose
        lost = max(0, end - window_tokens)
        return lost * (lost + 1) // 2

    return pairs - outside(before + tokens) + outside(before)


class RingTransfers(NamedTuple):
    """Transfers to a chip, and the tokens of which they bring keys and values."""

    transfers: int
    tokens: int


def ring_transfers(part_tokens: int, chips: int, window_tokens: int | None = None) -> RingTransfers:
    """What the last of ``chips`` gets to see of the parts before its own: all, one part a transfer; of a window the
    last w - 1 tokens, from ceil((w - 1) / part) chips."""
    if window_tokens is None or window_tokens > (chips - 1) * part_tokens:
        return RingTransfers(chips - 1, (chips - 1) * part_tokens)
    return RingTransfers(-(-(window_tokens - 1) // part_tokens), window_tokens - 1)


def attention_flops(model: Model, tokens: int, before: int = 0, window_tokens: int | None = None) -> int:
    """4 H h N in every layer: scores and weighted sum."""
    pairs = visible_pairs(tokens, before, window_tokens)
    return 4 * model.n_heads * model.head_dim * model.n_layers * pairs


def outer_comes_first(model: Model, ttt: TTTSettings, columns: Fraction | int) -> bool:
    """Whether a delta of that many hidden columns x is projected after its outer product: the cheaper order from
    C = d u x / (u (d + x) - d x) tokens on, which is x where u = d; never where d x is no less than u (d + x)."""
    if ttt.contraction != "auto":
        return ttt.contraction == "outer_first"
    d, rows = model.d_model, _fast_elements(model, ttt) // model.d_ff
    saved = rows * (d + columns) - d * columns
    return saved > 0 and ttt.chunk_tokens >= d * rows * Fraction(columns) / saved


def update_flops(model: Model, ttt: TTTSettings) -> int:
    """F_upd of one chunk, one layer, one sequence: 10 C d + 2 C d u + 2 C u f; 10 C u + 2 C u f without projection.

    10 C d + 2 C d f + 2 d u f where the outer product comes first.
    """
    chunk, d, f, fast = ttt.chunk_tokens, model.d_model, model.d_ff, _fast_elements(model, ttt)
    convolution = 10 * chunk * _target_width(model, ttt)
    if not ttt.projection:
        return convolution + 2 * chunk * fast
    if outer_comes_first(model, ttt, f):
        return convolution + 2 * chunk * d * f + 2 * d * fast
    return convolution + 2 * chunk * d * (fast // f) + 2 * chunk * fast


def update_lane_ops(model: Model, ttt: TTTSettings) -> int:
    """Scale and add, 2 u f; with a clip the norm as well, 4 u f."""
    return (2 if ttt.clip is None else 4) * _fast_elements(model, ttt)


def update_share(model: Model, ttt: TTTSettings) -> Fraction:
    """Update FLOPs over the forward FLOPs of all linear layers."""
    per_token = Fraction(len(ttt.layers_of(model)) * update_flops(model, ttt), ttt.chunk_tokens)
    return per_token / linear_flops_per_token(model)


def mlp_update_share(model: Model) -> Fraction:
    """(d + f) / (3 f): the two products of an update over the forward of the same MLP."""
    return Fraction(model.d_model + model.d_ff, 3 * model.d_ff)


def boundary_flops(model: Model, ttt: TTTSettings) -> int:
    """Extra FLOPs of the decode step that completes a chunk, official: s (C (4 d f + 2 u f) + F_upd), the MLP computed
    again but for the frozen rows of its down projection."""
    again = ttt.chunk_tokens * (4 * model.d_model * model.d_ff + 2 * _fast_elements(model, ttt))
    return len(ttt.layers_of(model)) * (again + update_flops(model, ttt))


def boundary_update_flops(model: Model, ttt: TTTSettings) -> int:
    """The same step with hidden rows kept: s F_upd."""
    return len(ttt.layers_of(model)) * update_flops(model, ttt)


# --- bytes ------------------------------------------------------------------------------------------------------------


class WriteBytes(NamedTuple):
    """Bytes that taking one delta into one weight reads and writes, the operands of the delta GEMM left out."""

    read: Fraction
    written: Fraction


def weight_write_bytes(
    model: Model, fast_dtype: str, variant: WeightWrite, update_rows: int | None = None
) -> WriteBytes:
    """The weight-write variants, from what the delta GEMM writes to the new weight; a delta has the weight's format.

    ``official``: reads u f (2 e_g + e_f), writes the same. ``fused``, ``tile_wise``, ``resident``: u f e_f each way
    (resident: on chip). ``master``: reads the fp32 master, writes it and the shadow. u: ``update_rows``, or d.
    """
    elements = (model.d_model if update_rows is None else update_rows) * model.d_ff
    e_f = element_bytes(fast_dtype)
    if variant == "official":
        return WriteBytes(elements * 3 * e_f, elements * 3 * e_f)
    if variant == "master":
        return WriteBytes(elements * element_bytes("fp32"), elements * (element_bytes("fp32") + e_f))
    return WriteBytes(elements * e_f, elements * e_f)


def update_intensity(model: Model, chunk_tokens: int, update_rows: int | None = None) -> Fraction:
    """FLOPs per byte of the fused update, 2-byte elements: C / (C (u + f) / (u f) + 2)."""
    return chunk_tokens / (chunk_tokens / replay_breakeven_tokens(model, update_rows) + 2)


def compute_bound_chunk(model: Model, flops_per_byte: Fraction, update_rows: int | None = None) -> Fraction | None:
    """Chunk at which the fused update reaches a machine balance; None where no chunk does."""
    share = flops_per_byte / replay_breakeven_tokens(model, update_rows)
    return 2 * flops_per_byte / (1 - share) if share < 1 else None


def replay_breakeven_tokens(model: Model, update_rows: int | None = None) -> Fraction:
    """u f / (u + f): tokens whose logged factors are as large as one dense weight; the limit of the intensity."""
    rows = model.d_model if update_rows is None else update_rows
    return Fraction(rows * model.d_ff, rows + model.d_ff)


def step_weight_bytes(model: Model, dtype: str = "bf16") -> Fraction:
    """W_all: weights that a step with logits reads, norms and the projections of updates left out."""
    return (model.block_parameters + model.vocab_size * model.d_model) * element_bytes(dtype)


def decode_bytes_kv(model: Model, tokens: int, batch: int, *, dtype: str = "bf16", kv_dtype: str = "bf16") -> Fraction:
    """Weights and KV that one decode step reads: W_all + B T kappa."""
    return step_weight_bytes(model, dtype) + batch * tokens * kv_bytes_per_token(model, kv_dtype)


def decode_bytes_ttt(
    model: Model,
    ttt: TTTSettings,
    tokens: int,
    batch: int,
    *,
    window_tokens: int | None,
    dtype: str = "bf16",
    kv_dtype: str = "bf16",
) -> Fraction:
    """The same with fast weights: W_all less the frozen weights that they replace, + B Phi + B min(T, w) kappa."""
    replaced = len(ttt.layers_of(model)) * _fast_elements(model, ttt) * element_bytes(dtype)
    seen = tokens if window_tokens is None else min(tokens, window_tokens)
    weights = step_weight_bytes(model, dtype) - replaced + batch * fast_weight_bytes(model, ttt)
    return weights + batch * seen * kv_bytes_per_token(model, kv_dtype)


def official_carry_traffic(model: Model, ttt: TTTSettings, dtype: str = "bf16") -> WriteBytes:
    """Mean bytes per decoded token that copying the open chunk moves: s (C - 1) d e_a read, s (C + 1) d e_a written;
    half of them are targets, u columns of which are kept without projection."""
    width = Fraction(model.d_model + _target_width(model, ttt), 2)
    row = len(ttt.layers_of(model)) * width * element_bytes(dtype)
    return WriteBytes((ttt.chunk_tokens - 1) * row, (ttt.chunk_tokens + 1) * row)


# --- states of fixed size ---------------------------------------------------------------------------------------------


def delta_net_elements(heads: int, d_k: int, d_v: int) -> int:
    """State of a layer of Gated DeltaNet."""
    return heads * d_k * d_v


def delta_net_step_ops(d_k: int, d_v: int) -> int:
    """7 d_k d_v per head and token: decay, k^T S, outer product, q^T S."""
    return 7 * d_k * d_v


def delta_net_chunk_flops(chunk: int, d_k: int, d_v: int) -> int:
    """One head: Q K^T and K K^T 4 c^2 d_k, solve c^2 (d_k + d_v), output within the chunk 2 c^2 d_v, state
    6 c d_k d_v."""
    return chunk * chunk * (4 * d_k + d_k + d_v + 2 * d_v) + 6 * chunk * d_k * d_v


def delta_net_part_flops(tokens: int, chunk: int, d_k: int, d_v: int) -> int:
    """One head of a context-parallel chip with ``tokens`` in whole chunks: its part from no state and, as d_k columns
    more, from the identity; the state before it through that to the state after, 2 d_v d_k^2, and to the outputs,
    2 m d_v d_k."""
    alone = tokens // chunk * delta_net_chunk_flops(chunk, d_k, d_v + d_k)
    return alone + 2 * d_v * d_k * d_k + 2 * tokens * d_v * d_k


def mamba2_step_ops(head_dim: int, state_dim: int) -> int:
    """6 n k per head and token: h <- a h + dt B x^T (four), y = C h (two)."""
    return 6 * head_dim * state_dim


def mamba2_chunk_flops(chunk: int, heads: int, head_dim: int, state_dim: int) -> int:
    """All heads: C B^T once, its product with the values, the chunk's states, and what outputs read of earlier ones."""
    return 2 * chunk * chunk * (state_dim + heads * head_dim) + 4 * chunk * heads * head_dim * state_dim


def ttt_linear_flops(mini_batch: int, head_dim: int) -> int:
    """6 b h^2 + 4 b^2 h, one head and mini-batch in the dual form."""
    return 6 * mini_batch * head_dim**2 + 4 * mini_batch**2 * head_dim


def ttt_mlp_flops(mini_batch: int, head_dim: int) -> int:
    """56 b h^2 + 20 b^2 h with a hidden width of 4 h."""
    return 56 * mini_batch * head_dim**2 + 20 * mini_batch**2 * head_dim


def titans_flops(chunk: int, head_dim: int) -> int:
    """88 c h^2 + 20 c^2 h: an MLP like that of TTT-MLP, and four products more with and for the momentum."""
    return ttt_mlp_flops(chunk, head_dim) + 32 * chunk * head_dim**2


def ttt_weights(layers: int, heads: int, head_dim: int, *, mlp: bool) -> int:
    """Weights without biases: h^2, or 8 h^2 of an MLP."""
    return layers * heads * head_dim**2 * (8 if mlp else 1)


def lact_elements(model: Model, heads: int, expand: int = 1) -> Fraction:
    """Sx = 3 r d^2 / heads of a layer: three matrices of every head."""
    return Fraction(3 * expand * model.d_model**2, heads)


def lact_flops_per_token(model: Model, heads: int, expand: int = 1) -> Fraction:
    """6 Sx: two products with keys, four for the gradients, three to apply, of 2 Sx / 3 each."""
    return 6 * lact_elements(model, heads, expand)


def muon_flops(head_dim: int, expand: int = 1) -> int:
    """Five Newton-Schulz steps of one matrix: X X^T 2 r h^3, its square 2 h^3, times X 2 r h^3."""
    return 5 * (4 * expand + 2) * head_dim**3


# --- training ---------------------------------------------------------------------------------------------------------


def training_flops(model: Model, tokens: int, *, recompute: bool) -> int:
    """FLOPs of a step on one sequence: forward and twice as much backward for every product with a weight, 5 products
    for 2 in the attention core; with recomputation the layers' forward pass once more."""
    layers, core = linear_flops_per_token(model) * tokens, attention_flops(model, tokens)
    head = 2 * model.d_model * model.vocab_size * tokens
    return 3 * (layers + head) + core + core * 5 // 2 + (layers + core if recompute else 0)


def adam_state_bytes(parameters: int, dtype: str = "bf16") -> Fraction:
    """What a weight costs in mixed precision, its gradient left out: itself, an fp32 master copy and two moments."""
    return parameters * (element_bytes(dtype) + 3 * element_bytes("fp32"))


# --- forms of a cache -------------------------------------------------------------------------------------------------


def paged_kv_bytes(model: Model, tokens: int, block_tokens: int, kv_dtype: str = "bf16") -> Fraction:
    """Whole blocks of one sequence, and 8 bytes of table for each."""
    blocks = -(-tokens // block_tokens)
    return blocks * (block_tokens * kv_bytes_per_token(model, kv_dtype) + 8)


def prefix_step_bytes(
    model: Model, tokens: int, shared_tokens: int, batch: int, *, dtype: str = "bf16", kv_dtype: str = "bf16"
) -> Fraction:
    """Weights and KV that a decode step reads where the prefix is read once: W_all + (s + B (T - s)) kappa."""
    seen = shared_tokens + batch * (tokens - shared_tokens)
    return step_weight_bytes(model, dtype) + seen * kv_bytes_per_token(model, kv_dtype)


def latent_bytes_per_token(model: Model, latent: int, rope: int, kv_dtype: str = "bf16") -> Fraction:
    """L (u + r) e_kv: one latent and one rotated key in every layer."""
    return model.n_layers * (latent + rope) * element_bytes(kv_dtype)


def latent_attention_flops(
    model: Model, tokens: int, before: int = 0, *, latent: int, rope: int, absorbed: bool, query_latent: int = 0
) -> int:
    """Projections and cores of all layers for ``tokens`` rows after ``before``, one sequence."""
    d, heads, h, pairs = model.d_model, model.n_heads, model.head_dim, visible_pairs(tokens, before)
    queries = heads * (h + rope) * (query_latent or d) + query_latent * d
    per_row = queries + (latent + rope) * d + heads * h * d
    if absorbed:
        core = 2 * tokens * heads * h * latent + heads * (2 * latent + rope) * pairs
    else:
        core = 2 * (before + tokens) * heads * h * latent + heads * (2 * h + rope) * pairs
    return 2 * model.n_layers * (tokens * per_row + core)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_widths(model: Model, *, attention: bool, mlp: bool) -> int:
    """Inputs and outputs of all adapted products of a layer, added up."""
    q, kv, d, f = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.d_model, model.d_ff
    return (4 * d + 2 * q + 2 * kv if attention else 0) + (3 * (d + f) if mlp else 0)


def adapter_parameters(model: Model, rank: int, *, attention: bool = True, mlp: bool = True) -> int:
    """r (inputs + outputs) of every adapted product."""
    return rank * model.n_layers * adapter_widths(model, attention=attention, mlp=mlp)


def lora_training_flops(
    model: Model, tokens: int, rank: int, *, attention: bool = True, mlp: bool = True, recompute: bool
) -> int:
    """FLOPs of a step on one sequence: forward and once as much backward for frozen products, for adapters three times
    their forward. What lies below the lowest adapter has no backward pass."""
    d, f, q, kv = model.d_model, model.d_ff, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    frozen = linear_flops_per_token(model)
    core_layer = attention_flops(model, tokens) // model.n_layers
    adapter = 2 * adapter_parameters(model, rank, attention=attention, mlp=mlp)
    if attention:  # the first layer's queries, keys and values need no gradient of their input
        below, below_core = 2 * d * (q + 2 * kv) + 2 * rank * 3 * d, 0
    else:  # nor does its MLP, and its attention has no backward pass
        below, below_core = 2 * d * (2 * f + 2 * q + 2 * kv) + 2 * rank * 2 * d, core_layer
    core = core_layer * model.n_layers
    forward = tokens * (frozen + adapter) + core
    head = 4 * tokens * d * model.vocab_size
    backward = tokens * (frozen + 2 * adapter - below) + (core - below_core) * 5 // 2
    return forward + backward + head + (forward if recompute else 0)


def query_step_flops(model: Model, tokens: int, span: int, *, rank: int | None, recompute: bool) -> int:
    """FLOPs of a step of query-only training on one sequence: ``span`` rows that see ``tokens`` cached ones.

    ``rank`` of adapters on queries; None: the projections themselves learn.
    """
    d, q, kv = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    frozen, core = span * linear_flops_per_token(model), attention_flops(model, span, tokens)
    learns = 2 * span * model.n_layers * (d * q if rank is None else rank * (d + q))
    forward = frozen + core + (0 if rank is None else learns)
    # The first layer's queries, keys and values need no gradient of their input.
    below = 2 * span * (d * (q + 2 * kv) + (0 if rank is None else rank * d))
    backward = frozen + core * 5 // 2 + (learns if rank is None else 2 * learns) - below
    return forward + backward + 4 * span * d * model.vocab_size + (forward if recompute else 0)


# --- outer training of In-Place TTT -----------------------------------------------------------------------------------


def outer_training_flops(model: Model, ttt: TTTSettings, tokens: int, *, recompute: bool) -> int:
    """FLOPs of a step on one sequence of k chunks: that of all weights, and in every TTT layer k - 1 updates, each of
    which has a backward pass of twice its FLOPs. The last chunk is padded in the products with the fast weights."""
    chunks = -(-tokens // ttt.chunk_tokens)
    times = 4 if recompute else 3
    update = update_flops(model, replace(ttt, contraction="project_first"))
    padding = 2 * (chunks * ttt.chunk_tokens - tokens) * model.d_model * model.d_ff
    extra = len(ttt.layers_of(model)) * times * ((chunks - 1) * update + padding)
    return training_flops(model, tokens, recompute=recompute) + extra


def fast_list_bytes(model: Model, ttt: TTTSettings, tokens: int) -> Fraction:
    """k d f e_f: the fast weights of all chunks of one sequence, in one TTT layer. A scan reads and writes as much."""
    chunks = -(-tokens // ttt.chunk_tokens)
    return chunks * model.d_model * model.d_ff * element_bytes(ttt.fast_dtype)


# --- retrieval --------------------------------------------------------------------------------------------------------


def encoder_flops(layers: int, width: int, ff: int, tokens: int, dimension: int) -> int:
    """A sequence of ``tokens`` through an encoder that sees all of them, and its vector."""
    per_layer = 8 * tokens * width * width + 4 * tokens * width * ff + 4 * tokens * tokens * width
    return layers * per_layer + (0 if dimension == width else 2 * width * dimension)


class Search(NamedTuple):
    """What one query takes of an index: FLOPs of distances, and bytes of the index that are read."""

    flops: int
    read: Fraction


def flat_search(vectors: int, dimension: int, dtype: str = "bf16") -> Search:
    """2 n D FLOPs, n D e bytes."""
    return Search(2 * vectors * dimension, vectors * dimension * element_bytes(dtype))


def ivf_pq_search(
    vectors: int, dimension: int, lists: int, probes: int, code_bytes: int, dtype: str = "bf16"
) -> Search:
    """Distances to all centroids and to 256 values of each part of a vector; codes of the lists that are probed."""
    candidates = -(-vectors * probes // lists)
    tables = lists + 256
    return Search(2 * tables * dimension, tables * dimension * element_bytes(dtype) + candidates * code_bytes)


def graph_search(vectors: int, dimension: int, degree: int, hops: int, dtype: str = "bf16") -> Search:
    """2 hops degree D FLOPs; so many vectors, and 4 bytes for each link. No node is visited twice."""
    visited = min(hops * degree, vectors)
    walked = min(-(-visited // degree), vectors)
    return Search(2 * visited * dimension, visited * dimension * element_bytes(dtype) + Fraction(4 * degree * walked))


# --- lifecycle of fast weights, one sequence unless a batch is given --------------------------------------------------


def state_bytes(
    model: Model,
    ttt: TTTSettings | None,
    tokens: int,
    *,
    window_tokens: int | None = None,
    dtype: str = "bf16",
    kv_dtype: str = "bf16",
) -> Fraction:
    """Phi + carry + kappa min(T, w): what a checkpoint holds, with the official carry at its largest."""
    kv = kv_bytes_per_token(model, kv_dtype) * (tokens if window_tokens is None else min(tokens, window_tokens))
    return kv if ttt is None else kv + fast_weight_bytes(model, ttt) + official_carry_bytes(model, ttt, dtype)


def factor_log_bytes(model: Model, ttt: TTTSettings, tokens: int, dtype: str = "bf16") -> Fraction:
    """s n (u + f) e: values and hidden rows of n tokens; d columns of values that are projected later."""
    width = _value_width(model, ttt) + model.d_ff
    return len(ttt.layers_of(model)) * tokens * width * element_bytes(dtype)


def replay_bytes(model: Model, ttt: TTTSettings, chunks: int, *, batch: int = 1, dtype: str = "bf16") -> WriteBytes:
    """Replay of fused updates from logged factors: the trained weight once, then each chunk's factors and the weight;
    read and written."""
    trained = len(ttt.layers_of(model)) * _fast_elements(model, ttt) * element_bytes(dtype)
    weight, logged = fast_weight_bytes(model, ttt), factor_log_bytes(model, ttt, chunks * ttt.chunk_tokens, dtype)
    return WriteBytes(trained + batch * (logged + chunks * weight), batch * (1 + chunks) * weight)


def replay_flops(model: Model, ttt: TTTSettings, chunks: int) -> int:
    """s n 2 C u f: the delta products alone; d for u where they come before the projection."""
    return len(ttt.layers_of(model)) * chunks * 2 * ttt.chunk_tokens * _value_width(model, ttt) * model.d_ff


def subtract_bytes(model: Model, ttt: TTTSettings) -> WriteBytes:
    """s u f (e_g + e_f) read and s u f e_f written: a kept delta taken off the weight; a delta has its format."""
    weight = fast_weight_bytes(model, ttt)
    return WriteBytes(2 * weight, weight)


def form_bytes(
    model: Model, ttt: TTTSettings, form: str, *, batch: int, history_tokens: int = 0, dtype: str = "bf16"
) -> Fraction:
    """Bytes of weights and history that the down projections of all TTT layers read in one decode step.

    ``merged`` s (d - u) f e + B Phi; ``split`` s d f e + B Phi; ``kernel`` s d f e + B s n (u + f) e.
    """
    whole, n_layers = model.d_model * model.d_ff, len(ttt.layers_of(model))
    trained = n_layers * whole * element_bytes(dtype)
    if form == "merged":
        frozen = n_layers * (whole - _fast_elements(model, ttt)) * element_bytes(dtype)
        return frozen + batch * fast_weight_bytes(model, ttt)
    if form == "split":
        return trained + batch * fast_weight_bytes(model, ttt)
    width = _fast_elements(model, ttt) // model.d_ff + model.d_ff
    return trained + batch * n_layers * history_tokens * width * element_bytes(dtype)


def form_flops(model: Model, ttt: TTTSettings, form: str, *, batch: int, history_tokens: int = 0) -> int:
    """The same products: 2 B d f, of the change 2 B u f, of the history 2 B n (u + f)."""
    dense, fast = 2 * model.d_model * model.d_ff, _fast_elements(model, ttt)
    history = 2 * history_tokens * (fast // model.d_ff + model.d_ff)
    change = {"merged": 0, "split": 2 * fast, "kernel": history}[form]
    return batch * len(ttt.layers_of(model)) * (dense + change)


def form_breakeven_tokens(
    model: Model, batch: int | None = None, *, dtype: str = "bf16", fast_dtype: str = "bf16",
    update_rows: int | None = None,
) -> Fraction:  # fmt: skip
    """History up to which the kernel form reads no more than the split form; with a batch, than the merged form.

    u f / (u + f) of split, (1 - 1/B) of that of merged; times e_f / e, and (e_f - e / B) / e, where formats differ.
    """
    own, shared = element_bytes(fast_dtype), element_bytes(dtype)
    saved = own if batch is None else own - shared / batch
    return saved / shared * replay_breakeven_tokens(model, update_rows)


# --- TTT-E2E ----------------------------------------------------------------------------------------------------------


class E2EFlops(NamedTuple):
    """FLOPs of one mini-batch of one sequence, by parts E1 to E9 of docs/methods.md."""

    prefix: int
    suffix_attention: int
    suffix_mlp: int
    head: int
    head_grad: int
    static_grad: int
    prime_weight_grad: int
    prime_input_grad: int
    projections_grad: int
    core_grad: int


def e2e_suffix(model: Model) -> int:
    """Ls = L // 4."""
    return model.n_layers // 4


def e2e_mlp_width(model: Model) -> int:
    """f' = f L / (L + Ls), up to the next multiple of 128, no wider than before: the prime MLPs take the rest."""
    share = Fraction(model.d_ff * model.n_layers, 128 * (model.n_layers + e2e_suffix(model)))
    return min(model.d_ff, 128 * -(-share.numerator // share.denominator))


def e2e_prime_parameters(model: Model) -> int:
    """3 Ls d f'."""
    return 3 * e2e_suffix(model) * model.d_model * e2e_mlp_width(model)


def e2e_state_crossover(
    model: Model, window_tokens: int, *, fast_dtype: str = "fp32", kv_dtype: str = "bf16"
) -> Fraction:
    """T_state = w + Phi / kappa at the end of a mini-batch, against a full cache of the same model."""
    held = e2e_prime_parameters(model) * element_bytes(fast_dtype)
    return window_tokens + held / kv_bytes_per_token(model, kv_dtype)


def e2e_flops(model: Model, mini_batch: int, before: int, window_tokens: int, *, dense: bool) -> E2EFlops:
    """A mini-batch after ``before`` tokens. Attention of the prefix, and of the suffix unless ``dense``, counts what a
    window lets a query see; dense is every query with all of the window and the mini-batch."""
    b, d, f, suffix = mini_batch, model.d_model, e2e_mlp_width(model), e2e_suffix(model)
    width = model.n_heads * model.head_dim
    projections = 4 * d * (model.n_heads + model.n_kv_heads) * model.head_dim
    seen = visible_pairs(b, before, window_tokens)
    pairs = b * (min(before, window_tokens) + b) if dense else seen
    head = 2 * b * d * model.vocab_size
    return E2EFlops(
        prefix=(model.n_layers - suffix) * (b * (projections + 6 * d * f) + 4 * width * seen),
        suffix_attention=suffix * (b * projections + 4 * width * pairs),
        suffix_mlp=suffix * b * 12 * d * f,
        head=head,
        head_grad=head,
        static_grad=suffix * 6 * b * d * f,
        prime_weight_grad=suffix * 6 * b * d * f,
        prime_input_grad=(suffix - 1) * 6 * b * d * f + 2 * b * d * f,
        projections_grad=(suffix - 1) * b * projections,
        core_grad=(suffix - 1) * 10 * width * pairs,
    )


def e2e_kept_activations(model: Model, mini_batch: int, *, dtype: str = "bf16") -> Fraction:
    """Bytes per suffix layer, but the first, that the backward pass reads: input, middles and what three branches add,
    normed rows of the prime MLP; queries, keys and values as they go into norms, rotation and core; gates and ups, and
    the hidden rows of the prime MLP."""
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    row = 7 * model.d_model + 3 * q + 4 * kv + 5 * e2e_mlp_width(model)
    return mini_batch * row * element_bytes(dtype)
