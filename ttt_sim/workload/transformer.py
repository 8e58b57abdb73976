"""A decoder-only transformer: the ops of its calls, with room for another MLP in some of its layers.

Operation list F0 to F16 of docs/workloads.md. Frozen weights are shared by the sequences of a batch, so the rows of all
sequences are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import numpy as np

from ttt_sim.data_files import did_you_mean
from ttt_sim.dtypes import DTYPES, tensor_bytes
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.model import ONE_CHIP, Call, KVSettings, Model, Parallel, Scenario, stage_starts
from ttt_sim.ops import IntArray, Phase, Role, Trace
from ttt_sim.workload.attention import Cache, attention_weights, check_kv, declare_kv, emit_attention
from ttt_sim.workload.builder import Read, Run, Segment, TraceBuilder, Write


class OtherMlp(Protocol):
    """What stands in place of the plain MLP in some layers."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers that have it, ascending."""

    def shape_key(self, call: Call) -> tuple[int, ...]:
        """Neighbouring calls with equal keys (and equal tokens and logits) emit the same ops."""

    def declare(self, builder: TraceBuilder) -> None:
        """Declare weights and state."""

    def emit_layer(self, s: Segment) -> Sequence[Read]:
        """Ops from ``mlp_normed`` on. Returns what the residual add reads, ``batch * tokens`` rows in all."""

    def emit_end(self, s: Segment) -> None:
        """Ops after the last layer of a call."""


class Mixer(Protocol):
    """What stands in place of attention in all layers."""

    def shape_key(self, call: Call) -> tuple[int, ...]:
        """As of :class:`OtherMlp`."""

    def declare(self, builder: TraceBuilder) -> None:
        """Declare weights and state."""

    def emit_layer(self, s: Segment) -> None:
        """Ops from ``layer_input`` to ``attended``, the residual stream in the middle of the layer."""


class Adapters(Protocol):
    """What is added to products with frozen weights."""

    def declare(self, builder: TraceBuilder) -> None:
        """Declare weights and state."""

    def emit(self, s: Segment, name: str, sources: Sequence[Read], out: Write, *, n: int, k: int) -> None:
        """Ops after the product ``name`` of the rows of ``sources`` with a weight (n, k), which wrote ``out``."""

    def emit_grad(
        self, s: Segment, name: str, out_grad: Read, source: Read, in_grad: Write | None, *, n: int, k: int
    ) -> None:
        """The same backward: what adds to ``in_grad``, if that is wanted, and the gradients of the adapter."""

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a layer has of them."""

    def reaches(self, products: Sequence[str]) -> bool:
        """One of ``products`` is adapted."""


class Learner(Protocol):
    """What learns after the forward pass of a call."""

    def declare(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        """Declare gradients and optimiser state; ``rows``: shape of the residual stream."""

    def shape_key(self, call: Call) -> tuple[int, ...]:
        """As of :class:`OtherMlp`."""

    def segments(self, builder: TraceBuilder, run: Run) -> Sequence[tuple[Segment, int]]:
        """Segments with their layers (-1: none) that follow the forward pass of every call of ``run``."""


class Ahead(Protocol):
    """What runs before the first call."""

    def declare(self, builder: TraceBuilder) -> None:
        """Declare weights and state."""

    def emit(self, s: Segment) -> Sequence[Read]:
        """Ops before the call. Returns what the call waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The model as ``batch`` sequences in lockstep run it; ``dtype`` of weights and activations.

    Of a model that several chips share, ``model`` is what one of them holds (:func:`ttt_sim.model.shard`). ``stages``:
    layers before which activations move to other chips; the number of layers stands for the head. ``trained``: weights
    that change (names without ``.weight``); ``own``: those of which every sequence has a copy; ``trains``: calls are
    steps of training, of which no KV cache is kept. ``shared_tokens``: so many first tokens are the same in all
    sequences and run once. ``post_norms``: what a branch adds to the residual stream is normed before.
    ``shares_prompt``: the call is a context-parallel chip's part of a prompt.
    """

    model: Model
    kv: KVSettings
    batch: int
    dtype: str
    parallel: Parallel = ONE_CHIP
    stages: tuple[int, ...] = ()
    mixer: Mixer | None = None
    adapters: Adapters | None = None
    trained: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    trains: bool = False
    cache: Cache | None = None
    shared_tokens: int = 0
    post_norms: bool = False
    shares_prompt: bool = False

    @staticmethod
    def of(
        model: Model,
        kv: KVSettings,
        scenario: Scenario,
        *,
        mixer: Mixer | None = None,
        adapters: Adapters | None = None,
        trained: frozenset[str] = frozenset(),
        own: frozenset[str] = frozenset(),
        cache: Cache | None = None,
        shared_tokens: int = 0,
    ) -> Decoder:
        """The decoder that runs ``scenario``."""
        return Decoder(
            model=model, kv=kv, batch=scenario.batch, dtype=scenario.dtype, parallel=scenario.parallel,
            stages=stage_starts(model, scenario.parallel.pp), mixer=mixer, adapters=adapters, trained=trained,
            own=own, trains=scenario.task == "train", cache=cache, shared_tokens=shared_tokens,
            shares_prompt=scenario.shares_prompt,
        )  # fmt: skip

    def size(self, *shape: int) -> int:
        """Bytes of a tensor in the model's format."""
        elements = 1
        for length in shape:
            elements *= length
        return tensor_bytes(elements, self.dtype)

    def declare(self, builder: TraceBuilder, scenario: Scenario, longest: int) -> None:
        """Declare weights and KV state, the trained down projection also where a fast weight stands for it.

        ``longest``: most rows of a sequence that run at a time.
        """
        model, d, f = self.model, self.model.d_model, self.model.d_ff
        layer_weights = {"mlp_norm": (d,), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        if self.post_norms:
            layer_weights["mlp_post_norm"] = (d,)
        if self.mixer is None:
            layer_weights = attention_weights(model) | layer_weights
        shared = {"embedding": (model.vocab_size, d), "final_norm": (d,), "lm_head": (model.vocab_size, d)}
        if model.tied_embeddings:
            del shared["lm_head"]
        for name, shape in shared.items():
            self.declare_weight(builder, name, shape, layers=None)
        if self.mixer is None:
            # Cosines and sines by position; not parameters, but held and shared like them.
            table = (2, scenario.context_tokens, model.head_dim)
            builder.declare("rope_table", table, self.dtype, Role.WEIGHT, layers=None, initial_version=0)
        for name, shape in layer_weights.items():
            self.declare_weight(builder, name, shape, layers=range(model.n_layers))
        if self.mixer is not None:
            self.mixer.declare(builder)
        elif self.cache is not None:
            self.cache.declare(builder)
        elif not self.trains or scenario.calls[0].position:
            declare_kv(builder, model, self.kv, scenario)
        if self.adapters is not None:
            self.adapters.declare(builder)
        builder.declare_stream(
            "residual", (self.batch, longest, d), self.dtype, before="layer_input", after="layer_output",
            first="first", last="last",
        )  # fmt: skip

    def declare_weight(
        self, builder: TraceBuilder, name: str, shape: tuple[int, ...], *, layers: Sequence[int] | None
    ) -> None:
        """Declare a weight that sequences share, frozen unless it is trained, or their copies of it."""
        changes = name in self.trained | self.own
        if name in self.own:
            shape = (self.batch, *shape)
        builder.declare(
            f"{name}.weight", shape, self.dtype, Role.FAST_WEIGHT if changes else Role.WEIGHT, layers=layers,
            initial_version=0, in_place=changes,
        )  # fmt: skip

    def emit_start(self, s: Segment, chosen_by: Sequence[Read] = ()) -> None:
        """F0. Token ids are too small to count; ``chosen_by``: what says which they are."""
        rows, d = self.batch * s.run.tokens, self.model.d_model
        size, shape = self.size(rows, d), (self.batch, s.run.tokens, d)
        first: Write = ("first", size)
        sent = s.buffer("embedding_sent", shape, self.dtype) if 0 in self.stages else first
        looked_up = s.buffer("embedding_part", shape, self.dtype) if self.parallel.tp > 1 else sent
        reads: list[Read] = [("embedding.weight", size), *chosen_by]
        s.op("embedding", reads=reads, writes=[looked_up], dtype=self.dtype, m=rows, n=d)
        if self.parallel.tp > 1:  # a row is on one chip, the others add zeros
            self.emit_sum(s, [looked_up], sent)
        if 0 in self.stages:
            self.emit_send(s, sent, first)

    def project(
        self, s: Segment, name: str, sources: Sequence[Read], out: Write, /, *, n: int, k: int,
        tokens: int | None = None, phase: Phase | None = None,
    ) -> None:  # fmt: skip
        """``tokens`` rows of every sequence (those of the call), which ``sources`` hold together, times a weight (n, k)
        that the sequences share, or have a copy of, and what adapters add."""
        copies = self.batch if name in self.own else 1
        rows = self.batch * (s.run.tokens if tokens is None else tokens) // copies
        weight: Read = (f"{name}.weight", self.size(copies, n, k))
        s.op(
            "own_proj" if name in self.own else name, reads=[*sources, weight], writes=[out], dtype=self.dtype,
            batch=copies, m=rows, n=n, k=k, phase=phase,
        )  # fmt: skip
        if self.adapters is not None:
            self.adapters.emit(s, name, sources, out, n=n, k=k)

    def emit_sum(self, s: Segment, parts: Sequence[Read], total: Write) -> None:
        """P1: what the chips of a tensor-parallel group have of the same rows becomes its sum on all of them."""
        rows = self.batch * s.run.tokens
        s.op(
            "allreduce", reads=parts, writes=[total], dtype=self.dtype, m=rows * self.model.d_model, n=1,
            heads=self.parallel.tp,
        )  # fmt: skip

    def emit_send(self, s: Segment, sent: Read, received: Write) -> None:
        """P3: the residual stream moves from a stage of ``kv_heads`` chips to those of the next."""
        rows = self.batch * s.run.tokens
        s.op(
            "stage_send", reads=[sent], writes=[received], dtype=self.dtype, m=rows * self.model.d_model, n=1, heads=2,
            kv_heads=self.parallel.tp * self.parallel.cp,
        )  # fmt: skip

    def emit_layer(self, s: Segment, other: OtherMlp | None, *, sends: bool = False) -> None:
        """F1 to F15 of one layer, with the plain MLP or ``other``; ``sends``: the next layer is on other chips."""
        rows, d = self.batch * s.run.tokens, self.model.d_model
        if self.mixer is None:
            emit_attention(
                s, self.model, self.kv, self.batch, self.dtype, self.parallel, self.project, cached=not self.trains,
                cache=self.cache, shares_prompt=self.shares_prompt,
            )  # fmt: skip
        else:
            self.mixer.emit_layer(s)
        stream: Read = ("attended", self.size(rows, d))
        normed = s.buffer("mlp_normed", (self.batch, s.run.tokens, d), self.dtype)
        s.op(
            "mlp_norm", reads=[stream, ("mlp_norm.weight", self.size(d))], writes=[normed],
            dtype=self.dtype, m=rows, n=d,
        )  # fmt: skip
        added = self.emit_mlp(s) if other is None else other.emit_layer(s)
        shape = (self.batch, s.run.tokens, d)
        if self.parallel.tp > 1:
            total = s.buffer("mlp_summed", shape, self.dtype)
            self.emit_sum(s, added, total)
            added = [total]
        if self.post_norms:
            added = [self.emit_post_norm(s, "mlp", added)]
        output: Write = ("layer_output", self.size(rows, d))
        written = s.buffer("layer_sent", shape, self.dtype) if sends else output
        s.op("mlp_residual", reads=[stream, *added], writes=[written], dtype=self.dtype, m=rows, n=d)
        if sends:
            self.emit_send(s, written, output)

    def emit_mlp(self, s: Segment) -> Sequence[Read]:
        """F11 to F14, from ``mlp_normed``."""
        rows, d, f = self.batch * s.run.tokens, self.model.d_model, self.model.d_ff
        self.emit_hidden(s, s.run.tokens, [("mlp_normed", self.size(rows, d))])
        down = s.buffer("mlp_out", (self.batch, s.run.tokens, d), self.dtype)
        self.project(s, "down_proj", [("hidden", self.size(rows, f))], down, n=d, k=f)
        return [down]

    def emit_post_norm(self, s: Segment, branch: str, sources: Sequence[Read]) -> Write:
        """E14: RMSNorm of what ``branch`` adds to the residual stream, which ``sources`` hold together."""
        rows, d = self.batch * s.run.tokens, self.model.d_model
        out = s.buffer(f"{branch}_post_normed", (self.batch, s.run.tokens, d), self.dtype)
        s.op(
            "post_norm", reads=[*sources, (f"{branch}_post_norm.weight", self.size(d))], writes=[out],
            dtype=self.dtype, m=rows, n=d,
        )  # fmt: skip
        return out

    def emit_hidden(self, s: Segment, tokens: int, inputs: Sequence[Read], phase: Phase | None = None) -> None:
        """F11 to F13 on ``tokens`` rows of every sequence, which ``inputs`` hold together; writes ``hidden``."""
        rows, d, f = self.batch * tokens, self.model.d_model, self.model.d_ff
        outputs = []
        for name in ("gate", "up"):
            out = s.buffer(name, (self.batch, tokens, f), self.dtype)
            self.project(s, f"{name}_proj", inputs, out, n=f, k=d, tokens=tokens, phase=phase)
            outputs.append(out)
        hidden = s.buffer("hidden", (self.batch, tokens, f), self.dtype)
        s.op("silu_mul", reads=outputs, writes=[hidden], dtype=self.dtype, m=rows, n=f, phase=phase)

    def emit_end(self, s: Segment) -> None:
        """F16 on the last row of every sequence, if the call returns logits."""
        if not s.run.logits:
            return
        model, d = self.model, self.model.d_model
        head = "embedding.weight" if model.tied_embeddings else "lm_head.weight"
        row = s.buffer("final_normed", (self.batch, d), self.dtype)
        s.op(
            "final_norm", reads=[("last", self.size(self.batch, d)), ("final_norm.weight", self.size(d))], writes=[row],
            dtype=self.dtype, m=self.batch, n=d,
        )  # fmt: skip
        logits = s.buffer("logits", (self.batch, model.vocab_size), self.dtype)
        s.op(
            "lm_head", reads=[row, (head, self.size(model.vocab_size, d))], writes=[logits],
            dtype=self.dtype, m=self.batch, n=model.vocab_size, k=d,
        )  # fmt: skip
        if self.parallel.tp > 1:
            ranks = self.parallel.tp
            gathered = s.buffer("all_logits", (self.batch, ranks * model.vocab_size), self.dtype)
            s.op(
                "allgather", reads=[logits], writes=[gathered], dtype=self.dtype, m=self.batch * model.vocab_size, n=1,
                heads=ranks,
            )  # fmt: skip


def decoder_trace(
    decoder: Decoder,
    scenario: Scenario,
    *,
    other: OtherMlp | None = None,
    learner: Learner | None = None,
    ahead: Ahead | None = None,
    rows_of: Callable[[Run], Run] | None = None,
    apart: Sequence[int] = (),
    meta: Mapping[str, object],
) -> Trace:
    """The trace of ``scenario``; layers that ``other`` names have its MLP, and ``learner`` learns after each call;
    ``ahead`` runs before the first.

    ``rows_of``: the rows that the calls of a run take through the layers, if they are not the new ones; ``apart``:
    layers that the decoder's mixer treats in another way than the rest.
    ``meta`` is kept, with ``batch``, ``dtype`` and ``calls`` ([position, tokens, logits] each) added, and ``updates``
    of training, which are of all layers and, unless ``meta`` says ``together``, of all sequences.
    Raises :class:`ConfigError` for a dtype or cache that cannot be, :class:`WorkloadError` for a scenario too large to
    count in 64 bits.
    """
    check_kv(decoder.kv)
    check_dtype(decoder.dtype)
    _check_size(decoder.model, scenario)
    builder = TraceBuilder(decoder.model.n_layers)
    longest = max(call.tokens for call in scenario.calls)
    keys = [part.shape_key for part in (other, learner, decoder.mixer) if part is not None]
    if rows_of is not None:
        longest = max(rows_of(run).tokens for run in _runs(scenario, keys))
    decoder.declare(builder, scenario, longest)
    if other is not None:
        other.declare(builder)
    if learner is not None:
        learner.declare(builder, (scenario.batch, longest, decoder.model.d_model))
    if ahead is not None:
        ahead.declare(builder)
    special = tuple(other.layers if other is not None else apart)
    plain = tuple(layer for layer in range(decoder.model.n_layers) if layer not in special)
    if decoder.shared_tokens:
        scenario = replace(scenario, calls=tuple(_cut(scenario.calls, decoder.shared_tokens)))
        keys.append(lambda call: (int(call.position < decoder.shared_tokens),))
    everyone = decoder
    for run in _runs(scenario, keys):
        decoder = replace(everyone, batch=1) if int(run.positions[0]) < everyone.shared_tokens else everyone
        rows = run if rows_of is None else rows_of(run)
        phase = Phase.RECOMPUTE if rows.again else Phase.FORWARD
        before, start, end = (Segment(builder, rows, (), phase) for _ in range(3))
        decoder.emit_start(start, ahead.emit(before) if ahead is not None and run.first_step == 0 else ())
        by_layer: dict[int, Segment] = {}
        for layers, mlp in ((plain, None), (special, other)):
            for sends in (False, True):
                chosen = tuple(layer for layer in layers if (layer + 1 in decoder.stages) == sends)
                if chosen:
                    segment = Segment(builder, rows, chosen, phase)
                    decoder.emit_layer(segment, mlp, sends=sends)
                    by_layer |= dict.fromkeys(chosen, segment)
        decoder.emit_end(end)
        if other is not None:
            other.emit_end(end)
        order = [(by_layer[layer], layer) for layer in range(decoder.model.n_layers)]
        learning = learner.segments(builder, run) if learner is not None else ()
        builder.add_run(run, [(before, -1), (start, -1), *order, (end, -1), *learning])
    calls = [[call.position, call.tokens, call.logits] for call in scenario.calls]
    if decoder.trains:
        meta = {"updates": "once", **meta}
    return builder.build({**meta, "batch": scenario.batch, "dtype": scenario.dtype, "calls": calls})


def check_dtype(dtype: str) -> None:
    """Raise :class:`ConfigError` for a format that does not exist."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown{did_you_mean(dtype, DTYPES)}; allowed: {', '.join(DTYPES)}")


def _check_size(model: Model, scenario: Scenario) -> None:
    """Refuse a scenario of which an op would not fit the 64-bit columns of a trace."""
    longest, context = max(call.tokens for call in scenario.calls), scenario.context_tokens
    width = max(model.n_heads * model.head_dim, model.d_ff, model.d_model)
    per_row = 8 * width * max(context, width, model.vocab_size)
    if scenario.batch * longest * per_row >= 2**63:
        raise WorkloadError(
            f"{scenario.batch} sequences, {longest} tokens in a call, {context} in all: an op would have more than "
            "2^63 operations; make the calls shorter or simulate fewer sequences"
        )


def _cut(calls: Sequence[Call], at: int) -> Iterator[Call]:
    """The calls, of which none has tokens before ``at`` and after."""
    for call in calls:
        first = min(max(at - call.position, 0), call.tokens)
        if 0 < first < call.tokens:
            yield replace(call, tokens=first, logits=False)
            call = replace(call, position=at, tokens=call.tokens - first)
        yield call


def _runs(scenario: Scenario, keys: Sequence[Callable[[Call], tuple[int, ...]]]) -> Iterator[Run]:
    """Cut the calls into runs of alike calls."""

    def key(call: Call) -> tuple[object, ...]:
        return call.tokens, call.logits, call.position == 0, *(shape_key(call) for shape_key in keys)

    step = 0
    for _, group in groupby(scenario.calls, key):
        calls = list(group)
        positions: IntArray = np.array([call.position for call in calls], dtype=np.int64)
        yield Run(first_step=step, positions=positions, tokens=calls[0].tokens, logits=calls[0].logits)
        step += len(calls)
