"""The neural memory of Titans (arXiv 2501.00663) in place of attention, without the attention that its variants add.

Per head an MLP with one hidden layer is the memory. It learns to give values for keys with momentum and forgetting:
S <- e S - t grad, M <- (1 - a) M + S, gradients at the memory of the start of a chunk, as the paper trains it. The
paper prints no widths; those of TTT-MLP are taken. While a chunk is open, the memory at its start is kept besides. The
first token of a chunk could do without that copy and is charged like the others; chunks begin with a call.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import Call, MethodSettings, Model, Scenario
from ttt_sim.ops import Role, Trace
from ttt_sim.workload.builder import Read, Segment, TraceBuilder
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.mixers import (
    CONV_TAPS,
    STATE_DTYPE,
    StateLayer,
    check_options,
    declare_state,
    local_heads,
    no_shape,
    options_of,
    settings_with,
    state_bytes,
    state_trace,
)
from ttt_sim.workload.transformer import Decoder

#: Rate, momentum and forgetting of a token and head.
_GATES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TitansOptions:
    """Heads of ``head_dim``, 64 or a quarter of a narrow model, together as wide as the model; ``hidden`` width of the
    memory in widths of a head."""

    head_dim: int | None = None
    hidden: int = 4
    chunk_tokens: int = 64
    state_dtype: str = STATE_DTYPE

    def __post_init__(self) -> None:
        check_options(self)

    def shape(self, model: Model) -> tuple[int, int]:
        """(heads, width of one)."""
        width = self.head_dim or min(64, max(model.d_model // 4, 1))
        return -(-model.d_model // width), width

    def elements(self, model: Model, heads: int) -> int:
        """Weights of the memory of ``heads`` heads, without momentum."""
        return heads * 2 * self.hidden * self.shape(model)[1] ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Titans:
    """The mixer."""

    decoder: Decoder
    options: TitansOptions

    @property
    def _shape(self) -> tuple[int, int]:
        heads, width = self.options.shape(self.decoder.model)
        return local_heads(heads, self.decoder), width

    @property
    def _layer(self) -> StateLayer:
        heads, h = self._shape
        width = heads * h
        return StateLayer(
            decoder=self.decoder, inputs=4 * width + _GATES * heads, outputs=width, conv=3 * width
        )  # queries, keys and values, an output gate, three numbers per head

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return no_shape(call)

    def declare(self, builder: TraceBuilder) -> None:
        heads, _ = self._shape
        elements = self.options.elements(self.decoder.model, heads)
        self._layer.declare(builder)
        self.decoder.declare_weight(builder, "state_init", (elements,), layers=range(self.decoder.model.n_layers))
        for name, role in (("state", Role.FAST_WEIGHT), ("momentum", Role.FAST_WEIGHT), ("state_start", Role.CARRY)):
            declare_state(builder, self.decoder, name, (elements,), self.options.state_dtype, role)

    def emit_layer(self, s: Segment) -> None:
        layer, (heads, h), options = self._layer, self._shape, self.options
        batch, dtype, m = self.decoder.batch, self.decoder.dtype, s.run.tokens
        rows, width = batch * m, layer.outputs
        layer.emit_inputs(s)
        unit = layer.buffer(s, "unit_keys", 2 * width)
        s.op(
            "l2_norm", reads=[("convolved", layer.rows(s, 2 * width))], writes=[unit], dtype=dtype, m=rows * 2 * heads,
            n=h,
        )  # fmt: skip
        gates = layer.buffer(s, "gates", _GATES * heads)
        s.op(
            "state_gates", reads=[("inputs", layer.rows(s, _GATES * heads))], writes=[gates], dtype=dtype, m=rows,
            n=_GATES * heads,
        )  # fmt: skip
        elements = options.elements(self.decoder.model, heads)
        size = state_bytes(self.decoder, elements, options.state_dtype)
        before: list[Read] = [("state", size), ("momentum", size)]
        if s.run.from_empty:
            before = [("state_init.weight", self.decoder.size(elements)), ("state", 0), ("momentum", 0)]
        mixed = layer.buffer(s, "mixed", width)
        writes = [mixed, ("state", size), ("momentum", size)]
        if m == 1:
            before.append(("state_start", size))
        elif m % options.chunk_tokens:  # a chunk stays open
            writes.append(("state_start", size))
        s.op(
            "memory_update", reads=[unit, ("convolved", layer.rows(s, width)), gates, *before], writes=writes,
            dtype=dtype, batch=batch, m=m, n=options.hidden * h, k=h, heads=heads,
            pairs=0 if m == 1 else options.chunk_tokens,
        )  # fmt: skip
        normed = layer.buffer(s, "mixed_normed", width)
        s.op(
            "gated_norm", reads=[mixed, ("inputs", layer.rows(s, width))], writes=[normed], dtype=dtype, m=rows, n=width
        )
        layer.emit_output(s, normed)


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops of a model with neural memories instead of attention."""
    options = options_of(settings, TitansOptions)
    return state_trace(model, settings, scenario, lambda decoder: Titans(decoder=decoder, options=options))


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """Memory and momentum, the memory at the start of an open chunk, and rows for convolutions."""
    options = options_of(settings, TitansOptions)
    heads, h = options.shape(model)
    memory = model.n_layers * tensor_bytes(options.elements(model, heads), options.state_dtype)
    rows = model.n_layers * tensor_bytes((CONV_TAPS - 1) * 3 * heads * h, dtype)
    return State(kv_bytes=0, fast_weight_bytes=2 * memory, carry_bytes=memory + rows)


TITANS = Method(
    name="titans", title="Titans: neural memory", settings=settings_with("titans", TitansOptions()), trace=trace,
    state=state, family="state", options=TitansOptions,
    needs=(
        "weights and momentum rewritten every chunk", "gradients through a hidden layer", "chains of small products",
    ),
    caveat="Published up to 760 M parameters (arXiv 2501.00663); no code by its authors, widths are assumed.",
)  # fmt: skip
