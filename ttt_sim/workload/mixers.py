"""What layers have in common that keep a state of fixed size instead of keys and values.

A layer is a norm, one product for all its inputs (queries, keys, values, gates, side by side), the method's own ops, an
output projection and the residual. The model keeps its MLP, norms and vocabulary. Heads are shared evenly by the chips
of a tensor-parallel group, the last of which may have fewer than the one that is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from ttt_sim.data_files import did_you_mean
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Num, Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import emit_step_to_next
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import one_after_another
from ttt_sim.workload.transformer import Decoder, Mixer, decoder_trace

Options = TypeVar("Options")

#: Taps of the short convolutions.
CONV_TAPS = 4
#: Format of states by default.
STATE_DTYPE = "fp32"


def check_options(options: Any) -> None:
    """Raise :class:`ConfigError` for numbers that are not positive and formats that do not exist."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"option {field.name} is {value}, expected at least 1")
        if field.name == "state_dtype" and value not in DTYPES:
            hint = did_you_mean(value, DTYPES)
            raise ConfigError(f"option state_dtype {value!r} is unknown{hint}; allowed: {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayer:
    """Norm, inputs, output and residual of a state layer.

    ``inputs``: columns of the input projection; ``outputs``: width of what the output projection reads; ``conv``:
    channels of a short convolution, 0 without one, over ``conv_inputs`` of the inputs (as many, if not said).
    """

    decoder: Decoder
    inputs: int
    outputs: int
    conv: int = 0
    conv_inputs: int = 0

    @property
    def convolved(self) -> int:
        """Inputs that the convolution looks back at."""
        return self.conv_inputs or self.conv

    def rows(self, s: Segment, width: int) -> int:
        """Bytes of all rows of a call, ``width`` elements each."""
        return self.decoder.size(self.decoder.batch * s.run.tokens, width)

    def buffer(self, s: Segment, name: str, width: int) -> Write:
        """A buffer for all rows of a call."""
        return s.buffer(name, (self.decoder.batch, s.run.tokens, width), self.decoder.dtype)

    def declare(self, builder: TraceBuilder) -> None:
        """Weights, and the rows that the convolution looks back at."""
        decoder, d = self.decoder, self.decoder.model.d_model
        layers = range(decoder.model.n_layers)
        weights: dict[str, tuple[int, ...]] = {
            "attn_norm": (d,), "in_proj": (self.inputs, d), "o_proj": (d, self.outputs)
        }  # fmt: skip
        if self.conv:
            weights["short_conv"] = (self.conv, CONV_TAPS)
            builder.declare(
                "conv_state", (decoder.batch, CONV_TAPS - 1, self.convolved), decoder.dtype, Role.CARRY, layers=layers,
                initial_version=0, in_place=True,
            )  # fmt: skip
        for name, shape in weights.items():
            decoder.declare_weight(builder, name, shape, layers=layers)

    def emit_inputs(self, s: Segment) -> None:
        """F1 and S1, and S2 where there is a convolution; writes ``inputs`` and ``convolved``."""
        decoder, d = self.decoder, self.decoder.model.d_model
        rows = decoder.batch * s.run.tokens
        normed = self.buffer(s, "attn_normed", d)
        stream: Read = ("layer_input", self.rows(s, d))
        s.op(
            "attn_norm", reads=[stream, ("attn_norm.weight", decoder.size(d))], writes=[normed], dtype=decoder.dtype,
            m=rows, n=d,
        )  # fmt: skip
        decoder.project(s, "in_proj", [normed], self.buffer(s, "inputs", self.inputs), n=self.inputs, k=d)
        if self.conv:
            looked_at = self.convolved
            kept = ("conv_state", decoder.size(decoder.batch * min(s.run.tokens, CONV_TAPS - 1), looked_at))
            before: list[Read] = [("conv_state", decoder.size(decoder.batch * (CONV_TAPS - 1), looked_at))]
            if s.run.from_empty:
                before = [("conv_state", 0)]
            elif decoder.shares_prompt:  # the last rows of the chip before
                rows_before = decoder.batch * min(s.run.tokens, CONV_TAPS - 1)
                received = s.buffer("conv_before", (rows_before, looked_at), decoder.dtype)
                emit_step_to_next(s, ("inputs", received[1]), received, rows_before, decoder.dtype, decoder.parallel)
                before = [("conv_state", 0), received]
            weight: Read = ("short_conv.weight", decoder.size(self.conv, CONV_TAPS))
            s.op(
                "short_conv", reads=[("inputs", self.rows(s, looked_at)), weight, *before],
                writes=[self.buffer(s, "convolved", self.conv), kept], dtype=decoder.dtype, m=rows, n=self.conv,
            )  # fmt: skip

    def emit_output(self, s: Segment, source: Read) -> None:
        """F8, P1 between chips, and F9."""
        decoder, d = self.decoder, self.decoder.model.d_model
        projected = self.buffer(s, "attn_projected", d)
        decoder.project(s, "o_proj", [source], projected, n=d, k=self.outputs)
        if decoder.parallel.tp > 1:
            summed = self.buffer(s, "attn_summed", d)
            decoder.emit_sum(s, [projected], summed)
            projected = summed
        s.op(
            "attn_residual", reads=[("layer_input", self.rows(s, d)), projected],
            writes=[self.buffer(s, "attended", d)], dtype=decoder.dtype, m=decoder.batch * s.run.tokens, n=d,
        )  # fmt: skip


def declare_state(
    builder: TraceBuilder, decoder: Decoder, name: str, shape: Sequence[int], dtype: str, role: Role = Role.FAST_WEIGHT
) -> None:
    """A state of every sequence and layer; version 0 is what it begins with."""
    builder.declare(
        name, (decoder.batch, *shape), dtype, role, layers=range(decoder.model.n_layers), initial_version=0,
        in_place=True,
    )  # fmt: skip


def state_bytes(decoder: Decoder, elements: int, dtype: str) -> Num:
    """Bytes of a state of ``elements`` of all sequences."""
    return n_bytes(decoder.batch * elements, dtype)


def emit_state_scan(s: Segment, decoder: Decoder, part: str, elements: int, dtype: str) -> Read:
    """P6: the state before a chip's part of a prompt, of ``elements`` for each sequence. Every chip adds what its part
    leaves (``part``) to what it got, and passes that on."""
    before = s.buffer("state_before", (decoder.batch, elements), dtype)
    s.op(
        "delta_scan", reads=[(part, before[1])], writes=[before], dtype=dtype, m=decoder.batch * elements, n=1,
        heads=decoder.parallel.cp, kv_heads=decoder.parallel.tp * decoder.parallel.cp,
    )  # fmt: skip
    return before


def local_heads(heads: int, decoder: Decoder) -> int:
    """Heads of one chip of a tensor-parallel group."""
    return ceil_div(heads, decoder.parallel.tp)


def no_shape(call: Call) -> tuple[int, ...]:
    """Calls of as many tokens are alike wherever they stand."""
    return ()


def state_trace(
    model: Model, settings: MethodSettings, scenario: Scenario, make: Callable[[Decoder], Mixer], *,
    linear: bool = False,
) -> Trace:  # fmt: skip
    """The decoder with ``make``'s mixer in all layers. ``linear``: a part of a prompt acts on the state before it as a
    product and a sum, which chips find out before they know that state.

    Raises:
        UnsupportedError: a context-parallel group, where updates are not linear in the state.
    """
    if scenario.parallel.cp > 1 and not linear:
        raise one_after_another(settings.name)
    mixer = make(Decoder.of(model, settings.kv, scenario))
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(settings.options), "pinned": [],  # type: ignore[call-overload]
    }  # fmt: skip
    return decoder_trace(Decoder.of(model, settings.kv, scenario, mixer=mixer), scenario, meta=meta)


def options_of(settings: MethodSettings, kind: type[Options]) -> Options:
    """The options of a method; raises :class:`ConfigError` where they are missing."""
    if not isinstance(settings.options, kind):
        raise ConfigError(f"method {settings.name} needs {kind.__name__} and has {settings.options!r}")
    return settings.options


def settings_with(name: str, options: object) -> Callable[[int | None, str | None, TTTSettings | None], MethodSettings]:
    """The settings of a method that keeps no keys and values."""

    def settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
        return MethodSettings(name=name, kv=KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE), options=options)

    return settings
