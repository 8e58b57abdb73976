"""LaCT (arXiv 2505.23884): fast weights updated in large chunks, beside attention over a window.

Every layer is attention over a window, with as many KV heads as query heads, all together as wide as the model, and the
same queries, keys and values go through a SwiGLU MLP per fast head, whose three matrices are the state: its output for
queries is added to that of attention. After each chunk the MLP takes a step of gradient descent on -<f(k), v>, with a
learned rate per token, optionally orthogonalised by Newton-Schulz iterations (Muon), and the rows of its matrices are
brought back to their length. The window keeps the rows of an open chunk, so a chunk is no longer than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Num, Phase, Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import attention_weights, declare_kv, emit_attention, kv_bytes, kv_token_bytes
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State
from ttt_sim.workload.mixers import STATE_DTYPE, check_options, local_heads, options_of, state_trace
from ttt_sim.workload.transformer import Decoder

DEFAULT_WINDOW_TOKENS = 2048
#: Learned rates per token and fast head, one for each matrix.
_RATES = 3
#: Lane operations per element of fast queries, keys and values besides the norm: scale, shift, SiLU.
_FEATURE_LANES = 6
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LactOptions:
    """``heads`` of fast weights, as wide as the model together; ``expand``: hidden width in widths of a head;
    ``chunk_tokens``: as many as the window has, if not said; ``muon``: orthogonalise gradients."""

    heads: int = 4
    expand: int = 1
    chunk_tokens: int | None = None
    muon: bool = False
    state_dtype: str = STATE_DTYPE

    def __post_init__(self) -> None:
        check_options(self)

    def width(self, model: Model) -> int:
        """Width of a head."""
        return ceil_div(model.d_model, self.heads)


def chunk_tokens(settings: MethodSettings) -> int:
    """Tokens of a chunk.

    Raises:
        ConfigError: there is no window, or a shorter one.
    """
    chunk, window = options_of(settings, LactOptions).chunk_tokens, settings.kv.window_tokens
    if window is None:
        raise ConfigError("method lact needs an attention window")
    if (chunk or 1) > window:
        raise ConfigError(f"option chunk_tokens is {chunk}, expected at most the {window} tokens of the window")
    return chunk or window


def attention_of(model: Model, heads: int | None = None) -> Model:
    """``model`` with as many KV heads as query heads, together as wide as the model, or ``heads`` of them."""
    heads = heads or ceil_div(model.d_model, model.head_dim)
    return replace(model, n_heads=heads, n_kv_heads=heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lact:
    """The mixer."""

    decoder: Decoder
    options: LactOptions
    chunk: int
    scenario: Scenario

    @property
    def _attention(self) -> Model:
        model = self.decoder.model
        return attention_of(model, local_heads(ceil_div(model.d_model, model.head_dim), self.decoder))

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(fast heads of this chip, width of one, its hidden width)."""
        h = self.options.width(self.decoder.model)
        return local_heads(self.options.heads, self.decoder), h, self.options.expand * h

    def shape_key(self, call: Call) -> tuple[int, ...]:
        open_rows = call.position % self.chunk
        return (1, open_rows) if open_rows + call.tokens >= self.chunk else (0, 0)

    def declare(self, builder: TraceBuilder) -> None:
        decoder, model = self.decoder, self._attention
        layers = range(model.n_layers)
        heads, h, hidden = self._shape
        weights = attention_weights(model) | {
            "in_proj": (_RATES * heads, model.d_model), "state_init": (heads, 3, hidden, h), "branch_join": (heads * h,)
        }  # fmt: skip
        for name, shape in weights.items():
            decoder.declare_weight(builder, name, shape, layers=layers)
        table = (2, self.scenario.context_tokens, model.head_dim)
        builder.declare("rope_table", table, decoder.dtype, Role.WEIGHT, layers=None, initial_version=0)
        declare_kv(builder, model, decoder.kv, self.scenario)
        builder.declare(
            "state", (decoder.batch, heads, 3, hidden, h), self.options.state_dtype, Role.FAST_WEIGHT, layers=layers,
            initial_version=-1 if self.scenario.from_empty else 0, in_place=True,
        )  # fmt: skip
        builder.declare(
            "rates", (decoder.batch, self.chunk, _RATES * heads), decoder.dtype, Role.CARRY, layers=layers,
            initial_version=0, in_place=True,
        )  # fmt: skip

    def emit_layer(self, s: Segment) -> None:
        decoder = self.decoder

        def beside(q: Read, k: Read, v: Read) -> Read:
            return self._emit_fast(s, q, k, v)

        emit_attention(
            s, self._attention, decoder.kv, decoder.batch, decoder.dtype, decoder.parallel, decoder.project,
            beside=beside,
        )  # fmt: skip

    def _rows(self, rows: int, width: int) -> int:
        """Bytes of ``rows`` rows of every sequence."""
        return self.decoder.size(self.decoder.batch * rows, width)

    def _state(self, matrices: int) -> Write:
        """``matrices`` of the three of every head."""
        heads, h, hidden = self._shape
        return "state", int(n_bytes(self.decoder.batch * heads * matrices * hidden * h, self.options.state_dtype))

    def _emit_fast(self, s: Segment, q: Read, k: Read, v: Read) -> Read:
        """The branch of the fast weights, and its sum with that of attention."""
        decoder, (heads, h, hidden) = self.decoder, self._shape
        batch, dtype, m = decoder.batch, decoder.dtype, s.run.tokens
        rows, width = batch * m, heads * h
        if s.run.from_empty:
            s.op(
                "fast_init", reads=[("state_init.weight", decoder.size(3 * heads, hidden, h))], writes=[self._state(3)],
                dtype=self.options.state_dtype, m=batch * heads * 3 * hidden, n=h,
            )  # fmt: skip
        features = s.buffer("fast_features", (batch, m, 3 * width), dtype)
        s.op(
            "l2_norm", reads=[q, k, v], writes=[features], dtype=dtype, m=rows * 2 * heads, n=h,
            extra_lanes=_FEATURE_LANES * rows * 3 * width,
        )  # fmt: skip
        raw = s.buffer("raw_rates", (batch, m, _RATES * heads), dtype)
        normed: Read = ("attn_normed", self._rows(m, decoder.model.d_model))
        decoder.project(s, "in_proj", [normed], raw, n=_RATES * heads, k=decoder.model.d_model)
        rates = s.buffer("gates", (batch, m, _RATES * heads), dtype)
        kept: Write = ("rates", self._rows(min(m, self.chunk), _RATES * heads))
        s.op("state_gates", reads=[raw], writes=[rates, kept], dtype=dtype, m=rows, n=_RATES * heads)

        open_rows = int(s.run.positions[0]) % self.chunk
        completes = open_rows + m >= self.chunk
        n_chunks = ceil_div(open_rows + m, self.chunk) if completes else 1
        first: Num = s.run.positions // self.chunk
        outputs: list[Read] = []
        for i in range(n_chunks):
            old = open_rows if completes and i == 0 else 0
            new = min((i + 1) * self.chunk, open_rows + m) - max(i * self.chunk, open_rows) if completes else m
            self._emit_hidden(s, new, [("fast_features", self._rows(new, width))], Phase.FORWARD, first + i)
            out = s.buffer("fast_out", (batch, new, width), dtype)
            s.op(
                "fast_apply", reads=[("fast_hidden", self._rows(new, heads * hidden)), self._state(1)], writes=[out],
                dtype=dtype, batch=batch * heads, m=new, n=h, k=hidden, chunk=first + i,
            )  # fmt: skip
            outputs.append((out[0], out[1], n_chunks - 1 - i))
            if completes and old + new == self.chunk:
                self._emit_update(s, first + i, old, new)
        model = self._attention
        core: Read = ("attn_core", self._rows(m, model.n_heads * model.head_dim))
        joined = s.buffer("joined", (batch, m, model.n_heads * model.head_dim), dtype)
        gain: Read = ("branch_join.weight", decoder.size(width))
        s.op("branch_join", reads=[core, *outputs, gain], writes=[joined], dtype=dtype, m=rows, n=width)
        return joined

    def _emit_hidden(self, s: Segment, tokens: int, sources: Sequence[Read], phase: Phase, chunk: Num) -> None:
        """S16 and F13 on ``tokens`` rows of every sequence: ``fast_gates`` and ``fast_hidden``."""
        decoder, (heads, h, hidden) = self.decoder, self._shape
        batch, dtype = decoder.batch, decoder.dtype
        both = s.buffer("fast_gates", (batch, tokens, 2 * heads * hidden), dtype)
        s.op(
            "fast_gate_up", reads=[*sources, self._state(2)], writes=[both], dtype=dtype, batch=batch * heads,
            m=tokens, n=2 * hidden, k=h, phase=phase, chunk=chunk,
        )  # fmt: skip
        s.op(
            "silu_mul", reads=[both], writes=[s.buffer("fast_hidden", (batch, tokens, heads * hidden), dtype)],
            dtype=dtype, m=batch * tokens * heads, n=hidden, phase=phase, chunk=chunk,
        )  # fmt: skip

    def _emit_update(self, s: Segment, chunk: Num, old: int, new: int) -> None:
        """The step from a chunk of ``old`` rows that the window keeps and ``new`` rows of the call."""
        decoder, (heads, h, hidden) = self.decoder, self._shape
        batch, dtype, rows = decoder.batch, decoder.dtype, old + new
        width, states = heads * h, batch * heads
        kept = batch * old * kv_token_bytes(self._attention, decoder.kv) // 2  # keys or values

        def sources(count: int) -> list[Read]:
            """``count`` of keys and values of the chunk."""
            found: list[Read] = [("fast_features", self._rows(count * new, width))]
            return [*found, ("kv", count * kept)] if old else found

        self._emit_hidden(s, rows, sources(1), Phase.BACKWARD, chunk)
        back = s.buffer("fast_back", (batch, rows, heads * hidden), dtype, Role.GRADIENT)
        s.op(
            "fast_back", reads=[*sources(1), self._state(1)], writes=[back], dtype=dtype, batch=states, m=rows,
            n=hidden, k=h, phase=Phase.BACKWARD, chunk=chunk,
        )  # fmt: skip
        rates: list[Read] = [("gates", self._rows(new, _RATES * heads))]
        if old:
            rates.append(("rates", self._rows(old, _RATES * heads)))
        wide = s.buffer("gates_back", (batch, rows, 3 * heads * hidden), dtype, Role.GRADIENT)
        s.op(
            "silu_mul_grad", reads=[back, ("fast_gates", self._rows(rows, 2 * heads * hidden)), *rates], writes=[wide],
            dtype=dtype, m=states * rows, n=hidden, phase=Phase.BACKWARD, chunk=chunk,
        )  # fmt: skip
        parts = [
            s.buffer(f"fast_grad_{name}", (batch, heads, n, h), dtype, Role.GRADIENT)
            for name, n in (("in", 2 * hidden), ("out", hidden))
        ]
        for part, columns in zip(parts, (2, 1), strict=True):
            wide_part: Read = (wide[0], self._rows(rows, columns * heads * hidden))
            s.op(
                "delta_gemm", reads=[wide_part, *sources(1)], writes=[part], dtype=dtype, batch=states,
                m=columns * hidden, n=h, k=rows, phase=Phase.BACKWARD, chunk=chunk,
            )  # fmt: skip
        step: list[Read] = [*parts]
        if self.options.muon:
            step = [self._emit_muon(s, parts, chunk)]
        s.op(
            "norm_write", reads=[*step, self._state(3)], writes=[self._state(3)], dtype=self.options.state_dtype,
            m=states * 3 * hidden, n=h, phase=Phase.WEIGHT_WRITE, chunk=chunk,
        )  # fmt: skip

    def _emit_muon(self, s: Segment, grads: Sequence[Read], chunk: Num) -> Read:
        """Five steps X <- a X + (b A + c A^2) X with A = X X^T, of all matrices at once."""
        decoder, (heads, h, hidden) = self.decoder, self._shape
        short, long = min(h, hidden), max(h, hidden)
        count = decoder.batch * heads * 3
        source: list[Read] = list(grads)
        for _ in range(NEWTON_SCHULZ_STEPS):
            shapes = (("gram", short, short, long, 0), ("square", short, short, short, 2 * short),
                      ("step", short, long, short, 2 * long))  # fmt: skip
            made: list[Read] = []
            for name, m, n, k, lanes in shapes:
                out = s.buffer(f"muon_{name}", (decoder.batch, heads, 3, m, n), decoder.dtype, Role.GRADIENT)
                reads = {"gram": source, "square": made, "step": [*source, *made[1:]]}[name]
                s.op(
                    "muon_product", reads=reads, writes=[out], dtype=decoder.dtype, batch=count, m=m, n=n, k=k,
                    phase=Phase.BACKWARD, chunk=chunk, extra_lanes=count * m * lanes,
                )  # fmt: skip
                made.append(out)
            source = made[2:]
        return source[0]


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """Ops of a model with LaCT layers.

    Raises:
        ConfigError: a chunk longer than the window.
    """
    options, chunk = options_of(settings, LactOptions), chunk_tokens(settings)
    return state_trace(
        model, settings, scenario,
        lambda decoder: Lact(decoder=decoder, options=options, chunk=chunk, scenario=scenario),
    )  # fmt: skip


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The window of keys and values, the fast weights, and the rates of an open chunk."""
    options, chunk = options_of(settings, LactOptions), chunk_tokens(settings)
    h = options.width(model)
    elements = options.heads * 3 * options.expand * h * h
    return State(
        kv_bytes=kv_bytes(attention_of(model), settings.kv, tokens),
        fast_weight_bytes=model.n_layers * tensor_bytes(elements, options.state_dtype),
        carry_bytes=model.n_layers * tensor_bytes(chunk * _RATES * options.heads, dtype),
    )


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    window = DEFAULT_WINDOW_TOKENS if window_tokens is None else window_tokens
    kv = KVSettings(window_tokens=window, dtype=kv_dtype or DEFAULT_KV_DTYPE)
    return MethodSettings(name="lact", kv=kv, options=LactOptions())


LACT = Method(
    name="lact", title="LaCT: large chunks over windowed attention", settings=_settings, trace=trace, state=state,
    family="state", options=LactOptions, chunk_tokens=chunk_tokens,
    needs=("fast weights per sequence", "gradients through a hidden layer", "attention over a window"),
    caveat="Published up to 3 B parameters and 32K tokens of context in language (arXiv 2505.23884).",
)  # fmt: skip
