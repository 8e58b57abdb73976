"""TTT-E2E (arXiv 2512.23675): the last quarter of the layers learns by gradient descent on the model's own loss.

Attention is windowed. The last Ls = L // 4 layers (the suffix) have a second gated MLP, the *prime* MLP, before the
static one. Its three matrices belong to one sequence. After every mini-batch of b tokens they take one step on the mean
loss of those tokens, with the weights that the tokens were computed with; the clip is by the norm over all of them.
Gradients flow through the suffix only, down to the prime MLP of its first layer. Norms stand before and after each
branch, and on queries and keys.

Calls are cut at the ends of mini-batches. One that ends a mini-batch runs all b rows of it, those of earlier calls once
more (their activations are not kept), then the backward pass and the step. The keys and values of the window are those
of whole mini-batches; those of the open one stand beside them, so that running its rows again sees what the rows saw
before. Keys are stored before rotation and rotated by their place in the window: as the core reads them, but once for
all rows of a whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ttt_sim.dtypes import DTYPES, tensor_bytes
from ttt_sim.errors import ConfigError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import IntArray, Num, Phase, Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload.attention import (
    attention_weights,
    dequantise_lanes,
    emit_append,
    kv_bytes,
    kv_token_bytes,
    visible_pairs,
)
from ttt_sim.workload.backward import MOMENTS, STATE_DTYPE, Backward, Optimiser, Steps
from ttt_sim.workload.builder import Read, Run, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.fine_tuning import check_training
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method, State, one_after_another
from ttt_sim.workload.transformer import Decoder, decoder_trace

DEFAULT_WINDOW_TOKENS = 8192
#: Of a window that is no shorter.
DEFAULT_MINI_BATCH = 1024
#: Widths of MLPs are multiples of this.
_WIDTH_STEP = 128
#: Bytes of a token id.
_ID_BYTES = 4
#: Lane operations that rotate an element.
_ROTATE_LANES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class E2EOptions:
    """How a sequence learns. ``fast_dtype`` of the prime weights and their gradients; ``recompute``: only the inputs of
    suffix layers are kept for the backward pass; ``loss_tile_rows``: rows of logits that exist at a time, None for all;
    ``dense_attention``: the suffix computes all of a mini-batch's queries against all of the window and the mini-batch,
    as the released code does, not only what the window lets them see."""

    mini_batch: int = DEFAULT_MINI_BATCH
    optimiser: Optimiser = "sgd"
    clip: bool = True
    fast_dtype: str = "fp32"
    recompute: bool = False
    loss_tile_rows: int | None = None
    dense_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("mini_batch", "loss_tile_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"option {name} is {value}, expected at least 1")
        if self.fast_dtype not in DTYPES or self.fast_dtype == "tf32":
            raise ConfigError(f"option fast_dtype is {self.fast_dtype!r}, expected a format such as fp32 or bf16")


def suffix_layers(model: Model) -> range:
    """The last quarter of the layers.

    Raises:
        ConfigError: the model has less than four.
    """
    if model.n_layers < 4:
        raise ConfigError(f"ttt_e2e: {model.name} has {model.n_layers} layers, expected at least 4")
    return range(model.n_layers - model.n_layers // 4, model.n_layers)


def e2e_model(model: Model, tp: int = 1) -> Model:
    """The model with prime MLPs in the suffix and about as many parameters as ``model``, or what one of ``tp`` chips
    holds of it, padded where they cannot share evenly: all MLPs are narrower, f L / (L + Ls), and queries and keys are
    normed.
    """
    n, f = model.n_layers, model.d_ff * tp
    narrow = ceil_div(f * n, (n + len(suffix_layers(model))) * _WIDTH_STEP) * _WIDTH_STEP
    width = min(f, narrow)
    return replace(model, d_ff=ceil_div(width, tp), qk_norm=True)


def prime_weights(model: Model) -> dict[str, tuple[int, int]]:
    """Shapes (outputs, inputs) of the prime matrices of a layer of ``model``, which has the narrower MLPs."""
    d, f = model.d_model, model.d_ff
    return {"prime_gate_proj": (f, d), "prime_up_proj": (f, d), "prime_down_proj": (d, f)}


def cut(calls: Sequence[Call], mini_batch: int) -> tuple[Call, ...]:
    """The same tokens in calls that end no later than the mini-batch that they begin in."""
    out = []
    for call in calls:
        begin, end = call.position, call.position + call.tokens
        while begin < end:
            stop = min((begin // mini_batch + 1) * mini_batch, end)
            out.append(Call(position=begin, tokens=stop - begin, logits=call.logits and stop == end))
            begin = stop
    return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """The forward pass up to the static MLP. A :class:`ttt_sim.workload.transformer.Mixer`.

    ``decoder`` without a mixer; ``suffix`` layers have the prime MLP; ``window_rows`` that the caches hold at most,
    ``open_rows`` that they hold beside them.
    """

    decoder: Decoder
    options: E2EOptions
    suffix: range
    window_rows: int
    open_rows: int

    @property
    def window(self) -> int:
        """w."""
        assert self.decoder.kv.window_tokens is not None
        return self.decoder.kv.window_tokens

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return ()  # as of what learns

    def declare(self, builder: TraceBuilder) -> None:
        d, model = self.decoder, self.decoder.model
        layers = range(model.n_layers)
        for name, shape in (attention_weights(model) | {"attn_post_norm": (model.d_model,)}).items():
            d.declare_weight(builder, name, shape, layers=layers)
        for name in ("prime_norm", "prime_post_norm"):
            d.declare_weight(builder, name, (model.d_model,), layers=self.suffix)
        # Cosines and sines by place in the window and the mini-batch.
        places = self.window_rows + max(self.open_rows, self.options.mini_batch)
        builder.declare("rope_table", (2, places, model.head_dim), d.dtype, Role.WEIGHT, layers=None, initial_version=0)
        for name, matrix in prime_weights(model).items():
            # What every sequence starts from.
            builder.declare(f"{name}.trained", matrix, d.dtype, Role.WEIGHT, layers=self.suffix, initial_version=0)
            builder.declare(
                f"{name}.weight", (d.batch, *matrix), self.options.fast_dtype, Role.FAST_WEIGHT, layers=self.suffix,
                initial_version=0, in_place=True,
            )  # fmt: skip
        for cache, rows in (("kv", self.window_rows), ("open_kv", self.open_rows)):
            if rows:
                builder.declare(
                    cache, (d.batch, rows, 2, model.n_kv_heads, model.head_dim), d.kv.dtype, Role.KV, layers=layers,
                    size=d.batch * rows * kv_token_bytes(model, d.kv), initial_version=0, in_place=True,
                )  # fmt: skip
        if self.open_rows:
            builder.declare(
                "open_ids", (d.batch, self.open_rows), "fp32", Role.CARRY, layers=None,
                size=d.batch * self.open_rows * _ID_BYTES, initial_version=0, in_place=True,
            )  # fmt: skip

    def emit_layer(self, s: Segment) -> None:
        d, model = self.decoder, self.decoder.model
        m, width = s.run.tokens, model.d_model
        shape, size = (d.batch, m, width), d.size(d.batch * m, width)
        prime = s.layers[0] in self.suffix
        if prime and s.run.from_empty:
            self._init_weights(s)
        self._emit_attention(s, prime)
        added: Read = s.buffer("attn_projected", shape, d.dtype)
        q_width = model.n_heads * model.head_dim
        d.project(s, "o_proj", [("attn_core", d.size(d.batch * m, q_width))], (added[0], size), n=width, k=q_width)
        added = d.emit_post_norm(s, "attn", [self._summed(s, "attn", added)])
        middle = s.buffer("attn_stream" if prime else "attended", shape, d.dtype)
        s.op(
            "attn_residual", reads=[("layer_input", size), added], writes=[middle], dtype=d.dtype, m=d.batch * m,
            n=width,
        )  # fmt: skip
        if prime:
            self._emit_prime(s, middle)

    def _init_weights(self, s: Segment) -> None:
        """C3: every sequence starts from a copy of the trained prime matrices."""
        d = self.decoder
        for name, (n, k) in prime_weights(d.model).items():
            s.op(
                "fast_init", reads=[(f"{name}.trained", d.size(n, k))], writes=[(f"{name}.weight", self.fast(n, k))],
                dtype=self.options.fast_dtype, m=d.batch * n, n=k,
            )  # fmt: skip

    def _summed(self, s: Segment, branch: str, part: Read) -> Read:
        """The sum over a tensor-parallel group of what a branch adds."""
        d = self.decoder
        if d.parallel.tp == 1:
            return part
        total = s.buffer(f"{branch}_summed", (d.batch, s.run.tokens, d.model.d_model), d.dtype)
        d.emit_sum(s, [part], total)
        return total

    def fast(self, n: int, k: int) -> int:
        """Bytes of a prime matrix of every sequence."""
        return tensor_bytes(self.decoder.batch * n * k, self.options.fast_dtype)

    @property
    def cast(self) -> bool:
        """Prime matrices are rounded to the format of activations as they are read."""
        return self.options.fast_dtype != self.decoder.dtype

    # --- attention ----------------------------------------------------------------------------------------------------

    def _emit_attention(self, s: Segment, prime: bool) -> None:
        """F1 to F7: a whole mini-batch, or new rows of the open one."""
        d, model = self.decoder, self.decoder.model
        m, h, width = s.run.tokens, model.head_dim, model.d_model
        rows, q_width, kv_width = d.batch * m, model.n_heads * h, model.n_kv_heads * h

        def buffer(name: str, n: int) -> Write:
            return s.buffer(name, (d.batch, m, n), d.dtype)

        normed = buffer("attn_normed", width)
        s.op(
            "attn_norm", reads=[("layer_input", d.size(rows, width)), ("attn_norm.weight", d.size(width))],
            writes=[normed], dtype=d.dtype, m=rows, n=width,
        )  # fmt: skip
        q, k, v = buffer("q", q_width), buffer("k", kv_width), buffer("v", kv_width)
        for out, n in ((q, q_width), (k, kv_width), (v, kv_width)):
            d.project(s, f"{out[0]}_proj", [normed], out, n=n, k=width)
        normed_q, normed_k = buffer("q_normed", q_width), buffer("k_normed", kv_width)
        s.op(
            "qk_norm", reads=[q, k, ("qk_norm.weight", 0)], writes=[normed_q, normed_k], dtype=d.dtype,
            m=rows * (model.n_heads + model.n_kv_heads), n=h,
        )  # fmt: skip
        rotated = [buffer("q_rotated", q_width), buffer("k_rotated", kv_width)]
        s.op(
            "rope", reads=[normed_q, normed_k, ("rope_table", d.size(2 * m, h))], writes=rotated, dtype=d.dtype, m=rows,
            n=q_width + kv_width,
        )  # fmt: skip
        if m == self.options.mini_batch:
            self._emit_core(s, *self.window_keys(s, prime), fresh=[rotated[1], v])
            if not prime:  # the backward pass reads the window of suffix layers
                self.emit_shift(s)
        else:
            self._emit_open_core(s, normed_k, rotated[1], v)

    def window_keys(self, s: Segment, prime: bool) -> tuple[list[Read], IntArray, IntArray, Num]:
        """Keys and values from before a mini-batch, after their rotation (E13), how many they are, the pairs that its
        core computes, and its lane operations beside."""
        d, model = self.decoder, self.decoder.model
        m, h = s.run.tokens, model.head_dim
        dense = prime and self.options.dense_attention
        stored = np.minimum(s.run.positions, self.window - (0 if dense else 1))
        pairs = m * (stored + m) if dense else visible_pairs(d.kv, s.run.positions, m)
        elements = d.batch * stored * model.n_kv_heads * h
        if not stored[0]:
            return [], stored, pairs, 0
        half = d.batch * kv_token_bytes(model, d.kv) // 2 * stored
        shape = (d.batch, self.window_rows, model.n_kv_heads * h)
        name, _ = s.buffer("window_keys", shape, d.dtype)
        keys: Write = (name, n_bytes(elements, d.dtype))
        s.op(
            "rope", reads=[("kv", half), ("rope_table", n_bytes(2 * stored * h, d.dtype))], writes=[keys],
            dtype=d.dtype, m=d.batch * stored, n=model.n_kv_heads * h, extra_lanes=dequantise_lanes(d.kv, elements),
        )  # fmt: skip
        return [keys, ("kv", half)], stored, pairs, dequantise_lanes(d.kv, elements)

    def _emit_open_core(self, s: Segment, k: Write, rotated: Write, v: Write) -> None:
        """F6 and F7 of new rows of an open mini-batch, which read keys of the window and of the rows before them."""
        d, model = self.decoder, self.decoder.model
        positions = s.run.positions
        before = positions % self.options.mini_batch
        stored = np.minimum(positions, self.window - 1)
        emit_append(s, model, d.kv, d.batch, d.dtype, k, v, family="open_kv")
        token = d.batch * kv_token_bytes(model, d.kv)
        reads: list[Read] = []
        if positions[0] >= self.options.mini_batch:
            reads.append(("kv", token * (stored - before)))
        if before[0]:
            reads.append(("open_kv", token * before))
        elements: IntArray = d.batch * stored * model.n_kv_heads * model.head_dim
        lanes = _ROTATE_LANES * elements + dequantise_lanes(d.kv, 2 * elements)
        self._emit_core(s, reads, stored, visible_pairs(d.kv, positions, s.run.tokens), lanes, fresh=[rotated, v])

    def _emit_core(
        self, s: Segment, cached: Sequence[Read], stored: IntArray, pairs: Num, lanes: Num, *, fresh: Sequence[Read]
    ) -> None:
        d, model, m = self.decoder, self.decoder.model, s.run.tokens
        q_width = model.n_heads * model.head_dim
        s.op(
            "attention", reads=[("q_rotated", d.size(d.batch * m, q_width)), *cached, *fresh],
            writes=[s.buffer("attn_core", (d.batch, m, q_width), d.dtype)], dtype=d.dtype, batch=d.batch, m=m,
            n=stored + m, k=model.head_dim, heads=model.n_heads, kv_heads=model.n_kv_heads, pairs=pairs,
            extra_lanes=lanes,
        )  # fmt: skip

    def emit_shift(self, s: Segment) -> None:
        """E13: a whole mini-batch takes the place of the oldest rows of the window."""
        d, size = self.decoder, 0
        emit_append(s, d.model, d.kv, d.batch, d.dtype, ("k_normed", size), ("v", size))

    # --- prime MLP ----------------------------------------------------------------------------------------------------

    def _emit_prime(self, s: Segment, stream: Write) -> None:
        """E3: the branch of the prime MLP, with the matrices of each sequence."""
        d, model = self.decoder, self.decoder.model
        m, width, f = s.run.tokens, model.d_model, model.d_ff
        rows, size = d.batch * m, d.size(d.batch * m, width)

        def product(kind: str, source: Read, out: str, n: int, k: int) -> Write:
            written = s.buffer(f"prime_{out}", (d.batch, m, n), d.dtype)
            name = "down_proj" if kind == "fast_apply" else kind
            s.op(
                kind, reads=[source, (f"prime_{name}.weight", self.fast(n, k))], writes=[written], dtype=d.dtype,
                batch=d.batch, m=m, n=n, k=k, extra_lanes=d.batch * n * k if self.cast else 0,
            )  # fmt: skip
            return written

        normed = s.buffer("prime_mlp_normed", (d.batch, m, width), d.dtype)
        s.op(
            "mlp_norm", reads=[stream, ("prime_norm.weight", d.size(width))], writes=[normed], dtype=d.dtype, m=rows,
            n=width,
        )  # fmt: skip
        halves = [product(f"{name}_proj", normed, name, f, width) for name in ("gate", "up")]
        hidden = s.buffer("prime_hidden", (d.batch, m, f), d.dtype)
        s.op("silu_mul", reads=halves, writes=[hidden], dtype=d.dtype, m=rows, n=f)
        added = self._summed(s, "prime", product("fast_apply", hidden, "out", width, f))
        added = d.emit_post_norm(s, "prime", [added])
        s.op(
            "mlp_residual", reads=[stream, added], writes=[s.buffer("attended", (d.batch, m, width), d.dtype)],
            dtype=d.dtype, m=rows, n=width,
        )  # fmt: skip
        assert stream[1] == size


@dataclass(frozen=True, slots=True, kw_only=True)
class _MiniBatches:
    """The step after each whole mini-batch. A :class:`ttt_sim.workload.transformer.Learner`."""

    decoder: Decoder
    layers: _Layers
    steps: Steps

    @property
    def options(self) -> E2EOptions:
        return self.layers.options

    def shape_key(self, call: Call) -> tuple[int, ...]:
        size = self.options.mini_batch
        before = call.position % size
        return int(before + call.tokens == size), int(before > 0), int(call.position >= size)

    def completes(self, run: Run) -> bool:
        """The calls of ``run`` end mini-batches."""
        return int(run.positions[0] + run.tokens) % self.options.mini_batch == 0

    def rows_of(self, run: Run) -> Run:
        """The rows that calls run: of those that end a mini-batch all of it. Its head gives the logits."""
        if not self.completes(run):
            return run
        size = self.options.mini_batch
        again = run.tokens < size
        return replace(run, positions=run.positions // size * size, tokens=size, logits=False, again=again)

    def declare(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        Backward(decoder=self.decoder).declare(builder, rows)
        self.steps.declare_norm(builder, self.decoder.batch)
        for name, matrix in prime_weights(self.decoder.model).items():
            self.steps.declare(builder, name, (self.decoder.batch, *matrix), layers=self.layers.suffix)

    def segments(self, builder: TraceBuilder, run: Run) -> list[tuple[Segment, int]]:
        if not self.completes(run):
            return []
        rows, suffix = self.rows_of(run), self.layers.suffix

        def add(layers: Sequence[int]) -> Segment:
            return Segment(builder, rows, layers, Phase.BACKWARD)

        head, above, first = add(()), add(suffix[1:]), add(suffix[:1])
        # Not before the layers above are done, or the rows of all layers would be there at once.
        again = Segment(builder, replace(rows, again=True), suffix, Phase.RECOMPUTE, after=("layer_output_grad",))
        Backward(decoder=self.decoder).head(head, tile_rows=self.options.loss_tile_rows)
        if self.options.recompute:
            self.decoder.emit_layer(again, None)
        for segment in (above, first):
            if segment.layers:
                self._emit_layer(segment, to_input=segment is above)
        out = [(head, -1)]
        for layer in reversed(suffix):
            if self.options.recompute:
                out.append((again, layer))
            out.append((first if layer == suffix[0] else above, layer))
        for norm in (True, False) if self.options.clip else (False,):
            every = add(suffix)
            for name, matrix in prime_weights(self.decoder.model).items():
                (self.steps.emit_norm if norm else self.steps.emit)(every, name, (self.decoder.batch, *matrix))
            out += [(every, layer) for layer in suffix]
            if norm and self.decoder.parallel.tp > 1:
                total = add(())
                total.op(
                    "allreduce", reads=[("grad_norm", 0)], writes=[("grad_norm", 0)], dtype=STATE_DTYPE,
                    m=self.decoder.batch, n=1, heads=self.decoder.parallel.tp,
                )  # fmt: skip
                out.append((total, -1))
        return out

    def _emit_layer(self, s: Segment, *, to_input: bool) -> None:
        """E6 to E10 of a suffix layer, down to its input or to the hidden rows of its prime MLP; E13."""
        d, back = self.decoder, Backward(decoder=self.decoder)
        shape = (d.batch, s.run.tokens, d.model.d_model)
        size = d.size(*shape)
        branch_out = {"mlp": "mlp_out", "prime": "prime_out", "attn": "attn_projected"}

        def into(branch: str, grad: Write) -> Write:
            """Backward of the norm of what a branch adds."""
            name = branch_out[branch] if d.parallel.tp == 1 else f"{branch}_summed"
            inside = s.buffer(f"{branch_out[branch]}_grad", shape, d.dtype)
            back.norm(s, f"{branch}_post_norm", [grad], (name, size), None, inside)
            return inside

        out_grad: Write = ("layer_output_grad", size)
        normed = s.buffer("mlp_normed_grad", shape, d.dtype)
        back.mlp(s, into("mlp", out_grad), normed)
        attended = s.buffer("attended_grad", shape, d.dtype)
        back.norm(s, "mlp_norm", [normed], ("attended", size), out_grad, attended)
        normed = s.buffer("prime_mlp_normed_grad", shape, d.dtype)
        back.mlp(
            s, into("prime", attended), normed if to_input else None, prefix="prime_", sequences=d.batch, trained=True,
            weight_dtype=self.options.fast_dtype,
        )  # fmt: skip
        if to_input:
            stream = s.buffer("attn_stream_grad", shape, d.dtype)
            back.norm(s, "prime_norm", [normed], ("attn_stream", size), attended, stream)
            projected = into("attn", stream)
            cached, stored, pairs, lanes = self.layers.window_keys(s, prime=True)
            normed = s.buffer("attn_normed_grad", shape, d.dtype)
            back.attention(s, projected, normed, cached=cached, keys=stored + s.run.tokens, pairs=pairs, lanes=lanes)
            back.norm(s, "attn_norm", [normed], ("layer_input", size), stream, ("layer_input_grad", size))
        self.layers.emit_shift(s)


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """The calls of ``scenario``, cut at the ends of mini-batches, and a step after each of these.

    Raises:
        ConfigError: settings that cannot be.
        UnsupportedError: stages or context-parallel chips, through which the backward pass has no rule.
    """
    options = _checked(settings)
    if scenario.parallel.cp > 1:
        raise one_after_another(settings.name)
    check_training(scenario)
    scenario = replace(scenario, calls=cut(scenario.calls, options.mini_batch))
    shape = e2e_model(model, scenario.parallel.tp)
    size, context = options.mini_batch, scenario.context_tokens
    splits = any(call.tokens < size for call in scenario.calls)
    plain = replace(Decoder.of(shape, settings.kv, scenario), post_norms=True)
    layers = _Layers(
        decoder=plain, options=options, suffix=suffix_layers(shape),
        window_rows=_window_rows(settings.kv, options, context), open_rows=min(size - 1, context) if splits else 0,
    )  # fmt: skip
    decoder = replace(plain, mixer=layers)
    steps = Steps(
        optimiser=options.optimiser, master=False, clip=options.clip, dtype=options.fast_dtype,
        grad_dtype=options.fast_dtype,
    )  # fmt: skip
    learner = _MiniBatches(decoder=decoder, layers=layers, steps=steps)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv), "ttt": None,
        "options": asdict(options), "pinned": [], "updates": "together",
    }  # fmt: skip
    return decoder_trace(decoder, scenario, learner=learner, rows_of=learner.rows_of, apart=layers.suffix, meta=meta)


def state(model: Model, settings: MethodSettings, tokens: int, dtype: str) -> State:
    """The window of whole mini-batches, the prime matrices, and the open mini-batch at its largest."""
    options = _checked(settings)
    shape = e2e_model(model)
    elements = 3 * len(suffix_layers(model)) * shape.d_model * shape.d_ff
    open_rows = options.mini_batch - 1
    whole = replace(settings.kv, window_tokens=None)
    return State(
        kv_bytes=kv_bytes(shape, whole, _window_rows(settings.kv, options, tokens)),
        fast_weight_bytes=tensor_bytes(elements, options.fast_dtype),
        carry_bytes=kv_bytes(shape, whole, open_rows) + open_rows * _ID_BYTES,
        optimiser_bytes=tensor_bytes(MOMENTS[options.optimiser] * elements, STATE_DTYPE),
    )


def _window_rows(kv: KVSettings, options: E2EOptions, tokens: int) -> int:
    """Rows of whole mini-batches that a window holds after ``tokens`` tokens."""
    assert kv.window_tokens is not None
    return min(kv.window_tokens, tokens // options.mini_batch * options.mini_batch)


def _checked(settings: MethodSettings) -> E2EOptions:
    options, window = settings.options, settings.kv.window_tokens
    if not isinstance(options, E2EOptions):
        raise ConfigError(f"method {settings.name} needs E2EOptions and has {options!r}")
    if window is None or window < options.mini_batch:
        raise ConfigError(
            f"method {settings.name}: a window of {window} tokens does not hold a mini-batch of {options.mini_batch}; "
            "expected at least as many (option mini_batch)"
        )
    return options


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    window = DEFAULT_WINDOW_TOKENS if window_tokens is None else window_tokens
    kv = KVSettings(window_tokens=window, dtype=kv_dtype or DEFAULT_KV_DTYPE)
    options = E2EOptions(mini_batch=min(DEFAULT_MINI_BATCH, window))
    return MethodSettings(name="ttt_e2e", kv=kv, options=options)


def _chunk(settings: MethodSettings) -> int:
    return _checked(settings).mini_batch


TTT_E2E = Method(
    name="ttt_e2e", title="TTT-E2E over windowed attention", settings=_settings, trace=trace, state=state,
    family="fast_weights", chunk_tokens=_chunk, uneven_tokens=2, reruns_chunk=True, options=E2EOptions,
    needs=(
        "a backward pass through several layers", "weights read along both axes",
        "a buffer for all gradients of a step", "weights of each sequence, writable at run time",
        "a norm over all gradients before any weight is written",
    ),
    caveat="Needle recall at 128K tokens is 0.06, that of full attention 0.99 (arXiv 2512.23675 table 2, summarised).",
)  # fmt: skip
