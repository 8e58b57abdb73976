"""Mamba2 (arXiv 2405.21060) in place of attention, shapes by its defaults.

Per head h <- a h + dt B x^T and y = C h. B and C are shared by all heads. A prompt goes in chunks, all of which are
computed side by side: scores within a chunk, what it adds to the states, the states from chunk to chunk (row-wise),
and what outputs read of them. A token by itself goes through the recurrence. The original has no MLP between its
layers; here the model keeps its own, so a layer is a mixer and an MLP like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import Call, MethodSettings, Model, Scenario
from ttt_sim.ops import Trace, scan_chunks
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write
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

#: Lane operations per pair of tokens of a chunk and head: the decay from one to the other.
_PAIR_LANES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Options:
    """Heads of ``head_dim``, ``expand`` times as wide as the model together, each with ``state_dim`` x ``head_dim``."""

    expand: int = 2
    head_dim: int = 64
    state_dim: int = 128
    chunk_tokens: int = 256
    state_dtype: str = STATE_DTYPE

    def __post_init__(self) -> None:
        check_options(self)

    def heads(self, model: Model) -> int:
        return -(-self.expand * model.d_model // self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """The mixer."""

    decoder: Decoder
    options: Mamba2Options

    @property
    def _heads(self) -> int:
        return local_heads(self.options.heads(self.decoder.model), self.decoder)

    @property
    def _layer(self) -> StateLayer:
        inner, both = self._heads * self.options.head_dim, 2 * self.options.state_dim
        return StateLayer(
            decoder=self.decoder, inputs=2 * inner + both + self._heads, outputs=inner, conv=inner + both
        )  # gate and x, B and C, a step per head

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return no_shape(call)

    def declare(self, builder: TraceBuilder) -> None:
        shape = (self._heads, self.options.head_dim, self.options.state_dim)
        self._layer.declare(builder)
        declare_state(builder, self.decoder, "state", shape, self.options.state_dtype)

    def emit_layer(self, s: Segment) -> None:
        layer, heads, width = self._layer, self._heads, self._layer.outputs
        rows, dtype = self.decoder.batch * s.run.tokens, self.decoder.dtype
        layer.emit_inputs(s)
        gates = layer.buffer(s, "gates", 2 * heads)  # step and decay
        s.op("state_gates", reads=[("inputs", layer.rows(s, heads))], writes=[gates], dtype=dtype, m=rows, n=heads)
        mixed = self._emit_step(s, gates) if s.run.tokens == 1 else self._emit_chunks(s, gates)
        normed = layer.buffer(s, "mixed_normed", width)
        s.op(
            "gated_norm", reads=[*mixed, ("inputs", layer.rows(s, width))], writes=[normed], dtype=dtype, m=rows,
            n=width,
        )  # fmt: skip
        layer.emit_output(s, normed)

    def _before(self, s: Segment) -> tuple[Read, int]:
        """The state before a call, which is zero at first, and its bytes."""
        elements = self._heads * self.options.head_dim * self.options.state_dim
        size = int(state_bytes(self.decoder, elements, self.options.state_dtype))
        return ("state", 0 if s.run.from_empty else size), size

    def _emit_step(self, s: Segment, gates: Read) -> list[Read]:
        layer, options = self._layer, self.options
        before, size = self._before(s)
        mixed = layer.buffer(s, "mixed", layer.outputs)
        s.op(
            "ssm_step", reads=[("convolved", layer.rows(s, layer.conv)), gates, before],
            writes=[mixed, ("state", size)], dtype=self.decoder.dtype, batch=self.decoder.batch, m=1,
            n=options.head_dim, k=options.state_dim, heads=self._heads,
        )  # fmt: skip
        return [mixed]

    def _emit_chunks(self, s: Segment, gates: Read) -> list[Read]:
        """S7 to S11; the last chunk may be shorter than the others and has products of its own."""
        layer, options, heads = self._layer, self.options, self._heads
        batch, dtype, m = self.decoder.batch, self.decoder.dtype, s.run.tokens
        head, state = options.head_dim, options.state_dim
        before, size = self._before(s)
        chunks = scan_chunks(m, min(options.chunk_tokens, m))

        def part(name: str, width: int, tokens: int) -> Read:
            """``tokens`` rows of every sequence."""
            return name, self.decoder.size(batch * tokens, width)

        mixed, added, entered = [], [], []

        def within(i: int, length: int, times: int) -> None:
            """S7 and S8."""
            tokens, name = length * times, "_rest" if i else ""
            scores = s.buffer(f"ssm_scores{name}", (batch, times, length, length), dtype)
            s.op(
                "ssm_scores", reads=[part("convolved", 2 * state, tokens)], writes=[scores], dtype=dtype,
                batch=batch * times, m=length, n=length, k=state,
            )  # fmt: skip
            mixed.append(s.buffer(f"mixed{name}", (batch, tokens, layer.outputs), dtype))
            s.op(
                "ssm_mix",
                reads=[scores, part(gates[0], 2 * heads, tokens), part("convolved", layer.outputs, tokens)],
                writes=[mixed[i]], dtype=dtype, batch=batch * heads * times, m=length, n=head, k=length,
                extra_lanes=_PAIR_LANES * batch * heads * times * length * length,
            )  # fmt: skip

        def passed(reads: list[Read], writes: list[Write], states: int) -> None:
            """S10 over ``states`` of every sequence."""
            s.op(
                "state_pass", reads=reads, writes=writes, dtype=options.state_dtype, m=batch * states,
                n=heads * head * state,
            )  # fmt: skip

        shares = self.decoder.shares_prompt
        for i, (length, times) in enumerate(chunks):
            if not shares:
                within(i, length, times)
            tokens, name = length * times, "_rest" if i else ""
            shape = (batch, times, heads, head, state)
            added.append(s.buffer(f"chunk_states{name}", shape, options.state_dtype))
            entered.append(s.buffer(f"entered_states{name}", shape, options.state_dtype))
            s.op(
                "ssm_states",
                reads=[part("convolved", 2 * state, tokens), part("convolved", layer.outputs, tokens),
                       part(gates[0], 2 * heads, tokens)],
                writes=[added[i]], dtype=dtype, batch=batch * heads * times, m=head, n=state, k=length,
            )  # fmt: skip
        n_chunks = sum(times for _, times in chunks)
        if shares:  # what the part leaves by itself; scores beside the scan; then all chunks after the state before it
            left = s.buffer("part_state", (batch, heads, head, state), options.state_dtype)
            passed([*added, gates], [left], n_chunks)
            arrived = emit_state_scan(s, self.decoder, left[0], heads * head * state, options.state_dtype)
            for i, (length, times) in enumerate(chunks):
                within(i, length, times)
            passed([arrived, left, (gates[0], 0)], [("state", size)], 1)
            passed([*added, gates, arrived], [*entered], n_chunks)
        else:
            passed([*added, gates, before], [*entered, ("state", size)], n_chunks)
        joined: list[Read] = []
        for i, (length, times) in enumerate(chunks):
            tokens, name = length * times, "_rest" if i else ""
            out = s.buffer(f"mixed_joined{name}", (batch, tokens, layer.outputs), dtype)
            s.op(
                "ssm_read", reads=[part("convolved", state, tokens), entered[i], mixed[i]], writes=[out], dtype=dtype,
                batch=batch * heads * times, m=length, n=head, k=state, extra_lanes=2 * batch * tokens * layer.outputs,
            )  # fmt: skip
            joined.append(out)
        return joined


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops of a model with Mamba2 in all layers."""
    options = options_of(settings, Mamba2Options)
    return state_trace(model, settings, scenario, lambda decoder: Mamba2(decoder=decoder, options=options), linear=True)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The states of all layers, and the rows that convolutions look back at."""
    options = options_of(settings, Mamba2Options)
    inner = options.heads(model) * options.head_dim
    return State(
        kv_bytes=0,
        fast_weight_bytes=model.n_layers * tensor_bytes(inner * options.state_dim, options.state_dtype),
        carry_bytes=model.n_layers * tensor_bytes((CONV_TAPS - 1) * (inner + 2 * options.state_dim), dtype),
    )


MAMBA2 = Method(
    name="mamba2", title="Mamba2", settings=settings_with("mamba2", Mamba2Options()), trace=trace, state=state,
    family="state", options=Mamba2Options, needs=("a state rewritten at every token",),
    caveat="A state of fixed size forgets: recurrent models copy and recall worse than attention (arXiv 2402.01032).",
)  # fmt: skip
