"""Gated DeltaNet (arXiv 2412.06464) in place of attention, shapes by the defaults of flash-linear-attention.

Per head S <- a S (I - b k k^T) + b v k^T and o = S q, with one decay a and rate b per token and head. A prompt goes in
chunks of 64 tokens, a token by itself through the recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import Call, MethodSettings, Model, Scenario
from ttt_sim.ops import Trace, scan_chunks
from ttt_sim.workload.builder import Read, Segment, TraceBuilder
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.mixers import (
    CONV_TAPS,
    STATE_DTYPE,
    StateLayer,
    check_options,
    declare_state,
    emit_state_scan,
    local_heads,
    no_shape,
    options_of,
    settings_with,
    state_bytes,
    state_trace,
)
from ttt_sim.workload.transformer import Decoder

#: Lane operations per pair of tokens of a chunk: the decay from one to the other.
_PAIR_LANES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNetOptions:
    """``head_dim`` of keys, 256 or an eighth of a narrow model; ``heads`` whose keys are 0.75 d wide together, rounded
    up; values are ``expand_v`` times as wide as keys."""

    heads: int | None = None
    head_dim: int | None = None
    expand_v: int = 2
    chunk_tokens: int = 64
    state_dtype: str = STATE_DTYPE

    def __post_init__(self) -> None:
        check_options(self)

    def shape(self, model: Model) -> tuple[int, int, int]:
        """(heads, width of a key, width of a value)."""
        d_k = self.head_dim or min(256, max(model.d_model // 8, 1))
        return self.heads or -(-3 * model.d_model // (4 * d_k)), d_k, self.expand_v * d_k


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """The mixer."""

    decoder: Decoder
    options: GatedDeltaNetOptions

    @property
    def _shape(self) -> tuple[int, int, int]:
        heads, d_k, d_v = self.options.shape(self.decoder.model)
        return local_heads(heads, self.decoder), d_k, d_v

    @property
    def _layer(self) -> StateLayer:
        heads, d_k, d_v = self._shape
        conv = heads * (2 * d_k + d_v)  # queries, keys and values
        return StateLayer(
            decoder=self.decoder, inputs=conv + heads * (d_v + 2), outputs=heads * d_v, conv=conv
        )  # and a gate per value, a decay and a rate

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return no_shape(call)

    def declare(self, builder: TraceBuilder) -> None:
        self._layer.declare(builder)
        declare_state(builder, self.decoder, "state", self._shape, self.options.state_dtype)

    def emit_layer(self, s: Segment) -> None:
        layer, (heads, d_k, d_v) = self._layer, self._shape
        batch, dtype, m = self.decoder.batch, self.decoder.dtype, s.run.tokens
        rows = batch * m
        layer.emit_inputs(s)
        keys = layer.buffer(s, "unit_keys", 2 * heads * d_k)
        s.op(
            "l2_norm", reads=[("convolved", layer.rows(s, 2 * heads * d_k))], writes=[keys], dtype=dtype,
            m=rows * 2 * heads, n=d_k,
        )  # fmt: skip
        gates = layer.buffer(s, "gates", 2 * heads)
        s.op(
            "state_gates", reads=[("inputs", layer.rows(s, 2 * heads))], writes=[gates], dtype=dtype, m=rows,
            n=2 * heads,
        )  # fmt: skip
        elements = heads * d_k * d_v
        size = state_bytes(self.decoder, elements, self.options.state_dtype)
        chunk = 0 if m == 1 else self.options.chunk_tokens
        chunks = scan_chunks(m, chunk)
        pairs = sum(times * tokens * tokens for tokens, times in chunks)
        before: list[Read] = [("state", 0 if s.run.from_empty else size)]
        out = layer.buffer(s, "mixed", heads * d_v)
        writes, columns, shares = [out, ("state", size)], d_v, self.decoder.shares_prompt
        if shares:
            # From no state; d_k columns more, from the identity, are what the part makes of the state before it.
            before, columns = [], d_v + d_k
            writes = [
                layer.buffer(s, "mixed_part", heads * d_v), layer.buffer(s, "queries_part", heads * d_k),
                s.buffer("part_state", (batch, heads, columns, d_k), self.options.state_dtype),
            ]  # fmt: skip
        s.op(
            "delta_step" if m == 1 else "delta_rule",
            reads=[keys, ("convolved", layer.rows(s, heads * d_v)), gates, *before], writes=writes,
            dtype=dtype, batch=batch, m=m, n=columns, k=d_k, heads=heads, pairs=chunk,
            extra_lanes=batch * heads * (columns * d_k * sum(times for _, times in chunks) + _PAIR_LANES * pairs),
        )  # fmt: skip
        if shares:
            arrived = emit_state_scan(s, self.decoder, "part_state", elements, self.options.state_dtype)
            s.op(
                "state_join", reads=[arrived, writes[2]], writes=[("state", size)], dtype=dtype, batch=batch * heads,
                m=d_v, n=d_k, k=d_k, extra_lanes=batch * elements,
            )  # fmt: skip
            s.op(
                "state_read", reads=[writes[1], arrived, writes[0]], writes=[out], dtype=dtype, batch=batch * heads,
                m=m, n=d_v, k=d_k, extra_lanes=rows * heads * d_v,
            )  # fmt: skip
        normed = layer.buffer(s, "mixed_normed", heads * d_v)
        s.op(
            "gated_norm", reads=[out, ("inputs", layer.rows(s, heads * d_v))], writes=[normed], dtype=dtype,
            m=rows * heads, n=d_v,
        )  # fmt: skip
        layer.emit_output(s, normed)


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops of a model with Gated DeltaNet in all layers."""
    options = options_of(settings, GatedDeltaNetOptions)
    return state_trace(
        model, settings, scenario, lambda decoder: GatedDeltaNet(decoder=decoder, options=options), linear=True
    )


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The states of all layers, and the rows that convolutions look back at."""
    options = options_of(settings, GatedDeltaNetOptions)
    heads, d_k, d_v = options.shape(model)
    return State(
        kv_bytes=0,
        fast_weight_bytes=model.n_layers * tensor_bytes(heads * d_k * d_v, options.state_dtype),
        carry_bytes=model.n_layers * tensor_bytes((CONV_TAPS - 1) * heads * (2 * d_k + d_v), dtype),
    )


GATED_DELTANET = Method(
    name="gated_deltanet", title="Gated DeltaNet", settings=settings_with("gated_deltanet", GatedDeltaNetOptions()),
    trace=trace, state=state, family="state", options=GatedDeltaNetOptions,
    needs=("a state rewritten at every token", "chains of dependent products"),
    caveat="A state of fixed size forgets: exact recall falls with the number of facts to keep (arXiv 2402.18668).",
)  # fmt: skip
