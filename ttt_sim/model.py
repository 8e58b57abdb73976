"""The model, the settings of a method and the calls made to it. Nothing here knows a chip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ttt_sim.errors import UnsupportedError, WorkloadError

Target = Literal["hidden_states", "input_embed"]
Convolution = Literal["symmetric", "causal"]
#: What is kept of the open chunk. ``official``: inputs and targets, concatenated at each call, hidden rows
#: recomputed at the
#: boundary; ``ring``: the same rows in a ring buffer; ``keep_z``: hidden rows and targets in a ring buffer, nothing
#: recomputed;
#: ``online``: the delta is accumulated token by token, two tokens late, no rows kept but those the convolution spans.
Carry = Literal["official", "ring", "keep_z", "online"]
#: What calls are for. ``infer``: new tokens for sequences that go on; ``ask``: a question about a context that was
#: taken in; ``train``: each call is a step of training on whole sequences, with a loss over all rows; ``index``:
#: documents become an index to search.
Task = Literal["infer", "ask", "train", "index"]
#: How a delta reaches the weight. ``official``: delta GEMM, scale and add are three ops; ``fused``: the GEMM
#: accumulates into W;
#: ``resident``: fused, W pinned on chip; ``master``: fused into an fp32 master with a 16-bit shadow for the apply;
#: ``tile_wise``: fused, C-row panels streamed per output tile.
WeightWrite = Literal["official", "fused", "resident", "master", "tile_wise"]
Contraction = Literal["auto", "project_first", "outer_first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only transformer of the Llama or Qwen3 family; names as in Hugging Face ``config.json``."""

    name: str
    family: Literal["llama", "qwen3"]
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    max_context_tokens: int

    @property
    def block_parameters(self) -> int:
        """Parameters of all layers, norms left out: L (2 d H h + 2 d G h + 3 d f)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return self.n_layers * (2 * self.d_model * q + 2 * self.d_model * kv + 3 * self.d_model * self.d_ff)

    @property
    def parameters(self) -> int:
        """Parameters with embeddings, norms left out."""
        return self.block_parameters + self.vocab_size * self.d_model * (1 if self.tied_embeddings else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """What attention keeps. ``window_tokens`` None: everything; else the last w tokens, the current one included.

    ``group``: elements that share a 16-bit scale and zero point (int4 only); fp8 and int8 keep one 16-bit scale per
    head and token when ``per_token_scale``, else one per tensor.
    """

    window_tokens: int | None = None
    dtype: str = "bf16"
    group: int = 32
    per_token_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TTTSettings:
    """In-Place TTT (arXiv 2604.06169). ``layers`` None: layers 0, 6, 12, ... that the model has. ``update_rows``: the
    first rows (outputs) of a down projection that are fast, the rest stays as trained; None: all of them."""

    layers: tuple[int, ...] | None = None
    chunk_tokens: int = 1024
    rate: float = 3.0
    target: Target = "hidden_states"
    projection: bool = True
    convolution: Convolution = "symmetric"
    clip: float | None = None
    fast_dtype: str = "bf16"
    carry: Carry = "official"
    weight_write: WeightWrite = "official"
    contraction: Contraction = "auto"
    update_rows: int | None = None

    def layers_of(self, model: Model) -> tuple[int, ...]:
        """The TTT layers that exist in ``model``, ascending."""
        wanted = range(0, model.n_layers, 6) if self.layers is None else sorted(set(self.layers))
        return tuple(layer for layer in wanted if 0 <= layer < model.n_layers)

    def rows_of(self, model: Model) -> int:
        """Rows of a down projection that are fast."""
        return model.d_model if self.update_rows is None else self.update_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """One method with everything it needs: its registry name, what attention keeps, TTT settings (None without
    In-Place TTT), and the settings of its own that other methods have (a frozen dataclass, None without any)."""

    name: str
    kv: KVSettings
    ttt: TTTSettings | None = None
    options: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a model is spread over chips.

    ``tp`` chips share every layer (query heads, KV heads, MLP columns, vocabulary; sums over them after attention and
    MLP); ``pp`` groups of them each hold a range of layers and pass activations on; ``cp`` copies of all that each hold
    a part of the context: consecutive tokens of a prompt, in whole chunks, and as many of the keys while decoding.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.cp


ONE_CHIP = Parallel()


def shard(model: Model, tp: int) -> Model:
    """What one of ``tp`` chips holds of ``model``: its heads, MLP columns and part of the vocabulary.

    KV heads are copied where there are fewer of them than chips.

    Raises:
        WorkloadError: the chips cannot share the model evenly.
    """
    if tp == 1:
        return model
    uneven = [
        f"{amount} {what}"
        for amount, what in ((model.n_heads, "query heads"), (model.d_ff, "MLP columns"))
        if amount % tp
    ]
    if model.n_kv_heads % tp and tp % model.n_kv_heads:
        uneven.append(f"{model.n_kv_heads} KV heads")
    if uneven:
        raise WorkloadError(f"tp: {tp} chips cannot share {' and '.join(uneven)} of {model.name} evenly")
    return replace(
        model, n_heads=model.n_heads // tp, n_kv_heads=max(model.n_kv_heads // tp, 1), d_ff=model.d_ff // tp,
        vocab_size=-(-model.vocab_size // tp),
    )  # fmt: skip


def stage_starts(model: Model, pp: int) -> tuple[int, ...]:
    """Where each pipeline stage but the first begins, ``pp - 1`` of: 0 to L - 1 before that layer, L before the head.

    Embedding, layers and head stay in order, none is cut, and the stage with most parameters has as few as possible.

    Raises:
        WorkloadError: more stages than parts.
    """
    table = model.vocab_size * model.d_model
    sizes = [table, *([model.block_parameters // model.n_layers] * model.n_layers), table]
    if pp > len(sizes):
        raise WorkloadError(
            f"pp: {pp} stages are more than the {len(sizes)} parts (layers, embedding, head) of a model"
        )

    def filled(limit: int) -> list[int]:
        """First part of each stage when stages take what fits the limit, at least one part each."""
        starts, held = [0], 0
        for i, size in enumerate(sizes):
            if held and held + size > limit:
                starts.append(i)
                held = 0
            held += size
        return starts

    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(middle)) <= pp else (middle + 1, high)
    starts = filled(low)
    while len(starts) < pp:  # cut the longest stages further
        ends = [*starts[1:], len(sizes)]
        longest = max(range(len(starts)), key=lambda i: (ends[i] - starts[i], -i))
        starts.insert(longest + 1, (starts[longest] + ends[longest] + 1) // 2)
    return tuple(start - 1 for start in starts[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the model on every sequence: ``tokens`` new tokens each, after ``position`` earlier ones."""

    position: int
    tokens: int
    logits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Calls in the order in which they are made, by ``batch`` sequences in lockstep.

    Positions rise. Where a call does not continue the one before it, the calls between are left out of the trace
    (sampled decode) and the state is taken to be what those calls would have left.

    ``parallel``: the calls run on several chips, and the trace is that of one of them, which does the most: of a
    context-parallel group the last, whose tokens see all others. A prompt of such a group is one call, at the position
    of its first token. ``taken_tokens``: of the context that was taken in before the calls, where a method may hold
    fewer of them; None for the position of the first call.
    """

    batch: int
    dtype: str
    calls: tuple[Call, ...]
    parallel: Parallel = ONE_CHIP
    task: Task = "infer"
    taken_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise WorkloadError(f"batch is {self.batch}, expected at least 1")
        if not self.calls:
            raise WorkloadError("a scenario needs at least one call")
        end = 0
        for call in self.calls:
            if call.tokens < 1 or call.position < end:
                raise WorkloadError(
                    f"call of {call.tokens} tokens at position {call.position}: calls need at least one token and may "
                    f"not start before position {end}, where the call before ends"
                )
            end = call.position + call.tokens

    @staticmethod
    def prefill(
        tokens: int, *, batch: int = 1, dtype: str = "bf16", call_tokens: int = 8192, parallel: Parallel = ONE_CHIP
    ) -> Scenario:
        """``tokens`` from an empty state in calls of ``call_tokens``, logits after the last one.

        A context-parallel group takes the whole prompt in one call, shared evenly.

        Raises:
            UnsupportedError: a group in which a chip would have less than two tokens, or the last one none.
        """
        if tokens < 1 or call_tokens < 1:
            raise WorkloadError(f"prefill of {tokens} tokens in calls of {call_tokens}: both must be at least 1")
        if parallel.cp > 1:
            mine = -(-tokens // parallel.cp)
            if mine < 2 or (parallel.cp - 1) * mine >= tokens:
                raise UnsupportedError(
                    f"{parallel.cp} chips cannot share a prompt of {tokens} tokens: in equal parts of at least 2 it is "
                    f"enough for {-(-tokens // max(mine, 2))}"
                )
            last = Call(position=(parallel.cp - 1) * mine, tokens=mine, logits=True)
            return Scenario(batch=batch, dtype=dtype, calls=(last,), parallel=parallel)
        starts = range(0, tokens, call_tokens)
        calls = tuple(
            Call(position=p, tokens=min(call_tokens, tokens - p), logits=p + call_tokens >= tokens) for p in starts
        )
        return Scenario(batch=batch, dtype=dtype, calls=calls, parallel=parallel)

    @staticmethod
    def decode(
        positions: tuple[int, ...] | range, *, batch: int = 1, dtype: str = "bf16", parallel: Parallel = ONE_CHIP
    ) -> Scenario:
        """One token at each of the given positions (tokens already seen), with logits."""
        calls = tuple(Call(position=p, tokens=1, logits=True) for p in positions)
        return Scenario(batch=batch, dtype=dtype, calls=calls, parallel=parallel)

    @staticmethod
    def ask(
        held_tokens: int, tokens: int, *, batch: int = 1, dtype: str = "bf16", parallel: Parallel = ONE_CHIP
    ) -> Scenario:
        """A question of ``tokens`` tokens after ``held_tokens``, with logits after its last token."""
        call = Call(position=held_tokens, tokens=tokens, logits=True)
        return Scenario(batch=batch, dtype=dtype, calls=(call,), parallel=parallel, task="ask")

    @staticmethod
    def train(tokens: int, *, batch: int = 1, dtype: str = "bf16", parallel: Parallel = ONE_CHIP) -> Scenario:
        """One step of training on ``batch`` sequences of ``tokens`` tokens."""
        call = Call(position=0, tokens=tokens, logits=False)
        return Scenario(batch=batch, dtype=dtype, calls=(call,), parallel=parallel, task="train")

    @property
    def shares_prompt(self) -> bool:
        """The one call is a context-parallel chip's part of a prompt."""
        return self.parallel.cp > 1 and self.task == "infer" and self.calls[0].tokens > 1

    @property
    def from_empty(self) -> bool:
        """The sequences begin without a state."""
        return self.calls[0].position == 0 or self.shares_prompt

    @property
    def context_tokens(self) -> int:
        """Tokens held after the last call."""
        return self.calls[-1].position + self.calls[-1].tokens
