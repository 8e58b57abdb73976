"""TTT-Linear and TTT-MLP (arXiv 2407.04620) in place of attention: every head trains a model of its own on its tokens.

The model f(x) = x + LN(g(x)), with g a matrix or an MLP of four times the width, learns to give values for keys: one
step of gradient descent per mini-batch of 16 tokens, all gradients at the weights of its start. The dual form computes
a mini-batch with products of whole matrices; the primal one, as decoding does, one token after the other. Around it
stands the layer that the paper calls the Mamba backbone: one projection for queries and keys with a short convolution
each, values, a gate, a learned rate per token and head.

While a mini-batch is open, two copies are kept: the weights at its start, where gradients are taken, and those with the
steps so far. The first token of a mini-batch could do with one of them and is charged like the others; mini-batches
begin with a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

Inner = Literal["linear", "mlp"]
Form = Literal["dual", "primal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TTTLayerOptions:
    """Heads of ``head_dim``, 64 or a quarter of a narrow model, together as wide as the model; ``hidden`` width of an
    MLP in widths of a head."""

    head_dim: int | None = None
    hidden: int = 4
    mini_batch: int = 16
    form: Form = "dual"
    state_dtype: str = STATE_DTYPE

    def __post_init__(self) -> None:
        check_options(self)

    def shape(self, model: Model) -> tuple[int, int]:
        """(heads, width of one)."""
        width = self.head_dim or min(64, max(model.d_model // 4, 1))
        return -(-model.d_model // width), width

    def elements(self, width: int, inner: Inner) -> int:
        """Weights and biases of one head."""
        if inner == "linear":
            return width * width + width
        return 2 * self.hidden * width * width + (self.hidden + 1) * width


@dataclass(frozen=True, slots=True, kw_only=True)
class TTTLayer:
    """The mixer."""

    decoder: Decoder
    options: TTTLayerOptions
    inner: Inner

    @property
    def _shape(self) -> tuple[int, int]:
        heads, width = self.options.shape(self.decoder.model)
        return local_heads(heads, self.decoder), width

    @property
    def _layer(self) -> StateLayer:
        heads, h = self._shape
        width = heads * h
        return StateLayer(
            decoder=self.decoder, inputs=3 * width + heads, outputs=width, conv=2 * width, conv_inputs=width
        )  # queries and keys, values, gate, a rate per head

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return no_shape(call)

    def declare(self, builder: TraceBuilder) -> None:
        (heads, h), dtype = self._shape, self.decoder.dtype
        elements = self.options.elements(h, self.inner)
        self._layer.declare(builder)
        self.decoder.declare_weight(builder, "state_init", (heads, elements), layers=range(self.decoder.model.n_layers))
        declare_state(builder, self.decoder, "state", (heads, elements), self.options.state_dtype)
        declare_state(builder, self.decoder, "state_start", (heads, elements), self.options.state_dtype, Role.CARRY)
        table = (2, self.options.mini_batch, h)
        builder.declare("rope_table", table, dtype, Role.WEIGHT, layers=None, initial_version=0)

    def emit_layer(self, s: Segment) -> None:
        layer, (heads, h), options = self._layer, self._shape, self.options
        batch, dtype, m = self.decoder.batch, self.decoder.dtype, s.run.tokens
        rows, width = batch * m, layer.outputs
        layer.emit_inputs(s)
        rotated = layer.buffer(s, "rotated", 2 * width)
        table: Read = ("rope_table", self.decoder.size(2, min(m, options.mini_batch), h))
        s.op(
            "rope", reads=[("convolved", layer.rows(s, 2 * width)), table], writes=[rotated], dtype=dtype, m=rows,
            n=2 * width,
        )  # fmt: skip
        rates = layer.buffer(s, "gates", heads)
        s.op("state_gates", reads=[("inputs", layer.rows(s, heads))], writes=[rates], dtype=dtype, m=rows, n=heads)

        elements = heads * options.elements(h, self.inner)
        size = state_bytes(self.decoder, elements, options.state_dtype)
        before: list[Read] = [("state", size)]
        if s.run.from_empty:
            before = [("state_init.weight", self.decoder.size(elements)), ("state", 0)]
        mixed = layer.buffer(s, "mixed", width)
        writes = [mixed, ("state", size)]
        if m == 1:
            before.append(("state_start", size))
        elif m % options.mini_batch:  # a mini-batch stays open
            writes.append(("state_start", size))
        s.op(
            "linear_update" if self.inner == "linear" else "mlp_update",
            reads=[rotated, ("inputs", layer.rows(s, width)), rates, *before], writes=writes, dtype=dtype, batch=batch,
            m=m, n=h if self.inner == "linear" else options.hidden * h, k=h, heads=heads,
            pairs=0 if m == 1 or options.form == "primal" else options.mini_batch,
        )  # fmt: skip
        normed = layer.buffer(s, "mixed_normed", width)
        s.op(
            "gated_norm", reads=[mixed, ("inputs", layer.rows(s, width))], writes=[normed], dtype=dtype, m=rows, n=width
        )
        layer.emit_output(s, normed)


def _method(name: str, title: str, inner: Inner, needs: tuple[str, ...], caveat: str) -> Method:
    def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
        """Ops of a model with TTT layers instead of attention."""
        options = options_of(settings, TTTLayerOptions)
        return state_trace(
            model, settings, scenario, lambda decoder: TTTLayer(decoder=decoder, options=options, inner=inner)
        )

    def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
        """The weights of all heads, those at the start of an open mini-batch, and rows for convolutions."""
        options = options_of(settings, TTTLayerOptions)
        heads, h = options.shape(model)
        weights = model.n_layers * tensor_bytes(heads * options.elements(h, inner), options.state_dtype)
        rows = model.n_layers * tensor_bytes((CONV_TAPS - 1) * heads * h, dtype)
        return State(kv_bytes=0, fast_weight_bytes=weights, carry_bytes=weights + rows)

    return Method(
        name=name, title=title, settings=settings_with(name, TTTLayerOptions()), trace=trace, state=state,
        family="state", options=TTTLayerOptions, needs=needs, caveat=caveat,
    )  # fmt: skip


_LINEAR_NEEDS = ("weights rewritten every mini-batch", "chains of small products")
TTT_LINEAR = _method(
    "ttt_linear", "TTT-Linear", "linear", _LINEAR_NEEDS,
    "Published up to 1.3 B parameters and 32K tokens of context (arXiv 2407.04620).",
)  # fmt: skip
TTT_MLP = _method(
    "ttt_mlp", "TTT-MLP", "mlp", (*_LINEAR_NEEDS, "gradients through a hidden layer"),
    "Published up to 1.3 B parameters; its authors call it bound by memory on GPUs (arXiv 2407.04620).",
)  # fmt: skip
