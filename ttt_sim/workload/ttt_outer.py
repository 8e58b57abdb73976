"""Outer training of In-Place TTT: all weights learn through the updates that a sequence makes to its fast weights.

A TTT layer runs in its parallel form. Of k chunks i of C rows, with hidden rows Z_i and targets t_i:

    A_j = dwconv5(t_j; K)    V_j = A_j P    D_j = V_j^T Z_j           j < k - 1: the last delta is never applied
    W_i = W_0 + eta sum_{j<i} D_j                                     one running sum, all k weights are kept
    O_i = Z_i W_i^T

and backward from dO_i, where dZ_j is the sum of both of its terms:

    dZ_i = dO_i W_i          dW_i = dO_i^T Z_i
    dD_j = eta sum_{i>j} dW_i        dW_0 = sum_i dW_i                one running sum from the end
    dV_j = Z_j dD_j^T        dZ_j += V_j dD_j
    dA_j = dV_j P^T          dP = sum_j A_j^T dV_j
    dt_j and dK: backward of the convolution; dt_j joins the gradient of the layer's input or of the embeddings

Everything else is the backward pass of the decoder. The last chunk is padded to C rows in the products with distinct
weights. The projection comes before the outer product, whichever is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.model import Call, KVSettings, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.model_config import check_ttt
from ttt_sim.ops import Role, Trace
from ttt_sim.units import ceil_div
from ttt_sim.workload import in_place_ttt
from ttt_sim.workload.backward import Backward
from ttt_sim.workload.builder import Read, Segment, TraceBuilder, Write
from ttt_sim.workload.fast_state import CONV_TAPS, own_targets
from ttt_sim.workload.fine_tuning import StepOptions, all_weights, check_training, training_of
from ttt_sim.workload.kv_cache import DEFAULT_KV_DTYPE
from ttt_sim.workload.method import Method
from ttt_sim.workload.transformer import Decoder, decoder_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterMlp:
    """The MLP of a TTT layer in its parallel form; :class:`ttt_sim.workload.backward.TrainedMlp`.

    ``chunks`` k of every sequence, at least 2. Lists of matrices are (B, k or k - 1, d, f).
    """

    decoder: Decoder
    ttt: TTTSettings
    chunks: int

    @property
    def layers(self) -> tuple[int, ...]:
        return self.ttt.layers_of(self.decoder.model)

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return ()

    def weights(self) -> dict[str, tuple[int, ...]]:
        d = self.decoder.model.d_model
        return {"ttt_conv": (d, CONV_TAPS), **({"ttt_proj": (d, d)} if self.ttt.projection else {})}

    def declare(self, builder: TraceBuilder) -> None:
        for name, shape in self.weights().items():
            self.decoder.declare_weight(builder, name, shape, layers=self.layers)

    def emit_end(self, s: Segment) -> None:
        pass

    def emit_layer(self, s: Segment) -> Sequence[Read]:
        d, f, k = self.decoder.model.d_model, self.decoder.model.d_ff, self.chunks
        self.decoder.emit_hidden(s, s.run.tokens, [self._rows("mlp_normed", s.run.tokens, d)])
        values = self._learning(s, "convolved_targets")
        self._op(
            s, "target_conv", [self._targets(), ("ttt_conv.weight", self.decoder.size(CONV_TAPS, d))], [values],
            m=self.decoder.batch * self._learning_rows, n=d,
        )  # fmt: skip
        if self.ttt.projection:
            convolved, values = values, self._learning(s, "projected_targets")
            self._op(
                s, "target_proj", [convolved, ("ttt_proj.weight", self.decoder.size(d, d))], [values],
                m=self.decoder.batch * self._learning_rows, n=d, k=d,
            )  # fmt: skip
        deltas, fast = self._matrices(s, "deltas", k - 1), self._matrices(s, "fast_weights", k, Role.ACTIVATION)
        hidden = self._rows("hidden", self._learning_rows, f)
        self._products(s, "delta_gemm", [values, hidden], [deltas], k - 1, m=d, n=f, k=self._chunk)
        self._scan(s, [deltas, ("down_proj.weight", self.decoder.size(d, f))], [fast])
        out = s.buffer("fast_out", (self.decoder.batch, s.run.tokens, d), self.decoder.dtype)
        self._products(
            s, "fast_apply", [self._rows("hidden", s.run.tokens, f), fast], [out], k, m=self._chunk, n=d, k=f
        )
        return [out]

    def emit_grad(self, s: Segment, out_grad: Read, normed_grad: Write) -> None:
        model, k = self.decoder.model, self.chunks
        d, f, chunk, tokens = model.d_model, model.d_ff, self._chunk, s.run.tokens
        hidden_grad = s.buffer("hidden_grad", (self.decoder.batch, tokens, f), self.decoder.dtype)
        hidden, fast = self._rows("hidden", tokens, f), self._matrices(s, "fast_weights", k, Role.ACTIVATION)
        self._products(s, "input_grad", [out_grad, fast], [hidden_grad], k, m=chunk, n=f, k=d)
        grads, delta_grads = self._matrices(s, "fast_grads", k), self._matrices(s, "delta_grads", k - 1)
        self._products(s, "weight_grad", [out_grad, hidden], [grads], k, m=d, n=f, k=chunk)
        first = s.buffer("down_proj_grad", (1, d, f), self.decoder.dtype, Role.GRADIENT)
        self._scan(s, [grads], [delta_grads, first], extra_lanes=(self.decoder.batch - 1) * d * f)

        learning = self._learning_rows
        values_grad = self._learning(s, "values_grad")
        values = self._learning(s, "projected_targets" if self.ttt.projection else "convolved_targets")
        self._products(
            s, "input_grad", [self._rows("hidden", learning, f), delta_grads], [values_grad], k - 1, m=chunk, n=d, k=f
        )
        rows = self.decoder.batch * learning
        if self.decoder.parallel.tp > 1:  # every chip has a part of the hidden columns
            self._op(s, "allreduce", [values_grad], [values_grad], m=rows * d, n=1, heads=self.decoder.parallel.tp)
        more = self._rows("hidden_grad", learning, f)
        self._products(
            s, "input_grad", [values, delta_grads, more], [more], k - 1, m=chunk, n=f, k=d, extra_lanes=rows * f
        )
        convolved_grad = values_grad
        if self.ttt.projection:
            convolved_grad = self._learning(s, "convolved_grad")
            self._op(
                s, "input_grad", [values_grad, ("ttt_proj.weight", self.decoder.size(d, d))], [convolved_grad],
                m=rows, n=d, k=d,
            )  # fmt: skip
            projection_grad = s.buffer("ttt_proj_grad", (d, d), self.decoder.dtype, Role.GRADIENT)
            convolved = self._learning(s, "convolved_targets")
            self._op(s, "weight_grad", [values_grad, convolved], [projection_grad], m=d, n=d, k=rows)
        Backward(decoder=self.decoder).gated(s, hidden_grad, normed_grad)
        into = normed_grad[0] if own_targets(self.ttt) else "target_grad"
        target_grad = self._rows(into, learning, d)
        conv_grad = s.buffer("ttt_conv_grad", (d, CONV_TAPS), self.decoder.dtype, Role.GRADIENT)
        taps: Read = ("ttt_conv.weight", self.decoder.size(CONV_TAPS, d))
        self._op(
            s, "conv_grad", [convolved_grad, self._targets(), taps, target_grad], [target_grad, conv_grad], m=rows, n=d,
            extra_lanes=rows * d,
        )  # fmt: skip

    def declare_grad(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        if not own_targets(self.ttt):  # all TTT layers add to it
            builder.declare(
                "target_grad", rows, self.decoder.dtype, Role.GRADIENT, layers=None, initial_version=0, in_place=True
            )

    def emit_grad_end(self, s: Segment) -> None:
        if not own_targets(self.ttt):
            rows, d = self.decoder.batch * self._learning_rows, self.decoder.model.d_model
            first = self._rows("first_grad", self._learning_rows, d)
            self._op(s, "grad_add", [first, self._rows("target_grad", self._learning_rows, d)], [first], m=rows, n=d)

    @property
    def _chunk(self) -> int:
        return self.ttt.chunk_tokens

    @property
    def _learning_rows(self) -> int:
        """Rows of a sequence in chunks of which the delta is applied."""
        return (self.chunks - 1) * self._chunk

    def _targets(self) -> Read:
        target = "mlp_normed" if own_targets(self.ttt) else "first"
        return self._rows(target, self._learning_rows, self.decoder.model.d_model)

    def _rows(self, name: str, rows: int, width: int) -> Write:
        """``rows`` rows of every sequence."""
        return name, self.decoder.size(self.decoder.batch * rows, width)

    def _learning(self, s: Segment, name: str) -> Write:
        """A buffer of rows of width d in chunks of which the delta is applied."""
        shape = (self.decoder.batch, self._learning_rows, self.decoder.model.d_model)
        return s.buffer(name, shape, self.decoder.dtype)

    def _matrices(self, s: Segment, name: str, count: int, role: Role = Role.GRADIENT) -> Write:
        shape = (self.decoder.batch, count, self.decoder.model.d_model, self.decoder.model.d_ff)
        return s.buffer(name, shape, self.ttt.fast_dtype, role)

    def _products(
        self, s: Segment, kind: str, reads: Sequence[Read], writes: Sequence[Write], count: int, *, m: int, n: int,
        k: int, extra_lanes: int = 0,
    ) -> None:  # fmt: skip
        """``count`` products per sequence, each with a matrix of its own."""
        self._op(s, kind, reads, writes, batch=self.decoder.batch * count, m=m, n=n, k=k, extra_lanes=extra_lanes)

    def _scan(self, s: Segment, reads: Sequence[Read], writes: Sequence[Write], *, extra_lanes: int = 0) -> None:
        """T1: k - 1 scaled additions per sequence."""
        model = self.decoder.model
        s.op(
            "weight_scan", reads=reads, writes=writes, dtype=self.ttt.fast_dtype,
            m=self.decoder.batch * (self.chunks - 1) * model.d_model, n=model.d_ff, extra_lanes=extra_lanes,
        )  # fmt: skip

    def _op(
        self, s: Segment, kind: str, reads: Sequence[Read], writes: Sequence[Write], *, m: int, n: int, k: int = 0,
        batch: int = 1, heads: int = 0, extra_lanes: int = 0,
    ) -> None:  # fmt: skip
        s.op(
            kind, reads=reads, writes=writes, dtype=self.decoder.dtype, batch=batch, m=m, n=n, k=k, heads=heads,
            extra_lanes=extra_lanes,
        )  # fmt: skip


def trace(model: Model, settings: MethodSettings, scenario: Scenario) -> Trace:
    """A step of training, or the calls of the trained model.

    Raises:
        ConfigError: settings without a rule for their backward pass.
        WorkloadError: sequences of one chunk, in which no update is applied.
        UnsupportedError: training on stages or context-parallel chips.
    """
    if scenario.task != "train":
        return in_place_ttt.trace(model, settings, scenario)
    ttt, options = settings.ttt, settings.options
    if ttt is None or not isinstance(options, StepOptions):
        raise ConfigError(f"method {settings.name} needs TTT settings and StepOptions and has {ttt!r}, {options!r}")
    check_ttt(ttt, model)
    if ttt.clip is not None:
        raise ConfigError(f"method {settings.name} has no rule for gradients through a clip of deltas; leave clip out")
    if ttt.rows_of(model) != model.d_model:
        raise ConfigError(f"method {settings.name} trains whole fast weights; leave update_rows out")
    tokens = scenario.calls[0].tokens
    chunks = ceil_div(tokens, ttt.chunk_tokens)
    if chunks < 2:
        raise WorkloadError(
            f"method {settings.name}: sequences of {tokens} tokens are one chunk of {ttt.chunk_tokens}, in which no "
            "update is applied; take longer sequences or smaller chunks"
        )
    check_training(scenario)
    names = all_weights(model) | {"ttt_conv", "ttt_proj"}
    decoder = Decoder.of(model, settings.kv, scenario, trained=names)
    mlp = OuterMlp(decoder=decoder, ttt=ttt, chunks=chunks)
    meta: dict[str, object] = {
        "model": model.name, "method": settings.name, "kv": asdict(settings.kv),
        "ttt": {**asdict(ttt), "layers": list(mlp.layers)}, "options": asdict(options), "pinned": [],
    }  # fmt: skip
    return decoder_trace(decoder, scenario, other=mlp, learner=training_of(decoder, options, other=mlp), meta=meta)


def _settings(window_tokens: int | None, kv_dtype: str | None, ttt: TTTSettings | None) -> MethodSettings:
    kv = KVSettings(dtype=kv_dtype or DEFAULT_KV_DTYPE)
    return MethodSettings(name="ttt_outer", kv=kv, ttt=ttt or TTTSettings(), options=StepOptions())


TTT_OUTER = Method(
    name="ttt_outer", title="outer training of In-Place TTT", settings=_settings, trace=trace, state=in_place_ttt.state,
    family="fast_weights", phases=("train",), adapts="train", options=StepOptions,
    needs=(
        "a backward pass", "optimiser state in memory", "all weights writable", "a list of fast weights per sequence",
    ),
    caveat="Without it In-Place TTT changes nothing: its convolution starts at zero and so do the updates "
    "(arXiv 2604.06169 and its code).",
)  # fmt: skip
