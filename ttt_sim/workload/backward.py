"""The backward pass of a decoder, op by op, and the steps of optimisers.

Operation list B1 to B11 of docs/methods.md. A product y = x W^T of the forward pass gives two products backward: the
gradient of x, with W read along its other axis, and the gradient of W, if W is trained. Activations that the backward
pass reads stay allocated from the op that made them, which is what makes training hold more memory than inference; with
recomputation only the input of each layer stays, and the layer is run again before its backward pass.

Gradients of norms' weights are left out, like the weights themselves: they are too small to count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, Protocol

import numpy as np

from ttt_sim.dtypes import tensor_bytes
from ttt_sim.model import Call
from ttt_sim.ops import Num, Phase, Role
from ttt_sim.workload.attention import attention_weights, dequantise_lanes, kv_token_bytes, stored_tokens, visible_pairs
from ttt_sim.workload.builder import Read, Run, Segment, TraceBuilder, Write, n_bytes
from ttt_sim.workload.transformer import Decoder, OtherMlp

Optimiser = Literal["sgd", "momentum", "adam"]
#: Moments, in fp32, that an optimiser keeps for each weight.
MOMENTS: dict[Optimiser, int] = {"sgd": 0, "momentum": 1, "adam": 2}
STATE_DTYPE = "fp32"
#: Shapes of weights by name.
Weights = Mapping[str, tuple[int, ...]]
#: Logits and their gradients.
LOGITS_DTYPE = "fp32"

#: Products of an MLP layer.
MLP_PRODUCTS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class TrainedMlp(OtherMlp, Protocol):
    """What stands in place of the plain MLP in some layers, and learns."""

    def declare_grad(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        """Declare gradients that layers share; ``rows``: shape of the residual stream."""

    def emit_grad_end(self, s: Segment) -> None:
        """Ops between the backward pass of the layers and that of the embedding."""

    def emit_grad(self, s: Segment, out_grad: Read, normed_grad: Write) -> None:
        """Backward from the gradient of its output to that of its input."""

    def weights(self) -> Weights:
        """What it trains beside the weights of a plain layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """The backward pass of the layers of ``decoder``.

    Families of gradients are named after what they are the gradient of, with ``_grad`` at the end.
    """

    decoder: Decoder

    def declare(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        """Declare the gradient of the residual stream, of shape ``rows`` (batch, tokens, d_model)."""
        builder.declare_stream(
            "residual_grad", rows, self.decoder.dtype, before="layer_input_grad", after="layer_output_grad",
            first="first_grad", last="last_grad",
        )  # fmt: skip

    # --- pieces -------------------------------------------------------------------------------------------------------

    def product(
        self, s: Segment, name: str, out_grad: Read, source: Read, in_grad: Write | None, *, n: int, k: int,
        adds: bool = False, sequences: int = 1, trained: bool | None = None, tokens: int | None = None,
        weight_dtype: str | None = None,
    ) -> None:  # fmt: skip
        """Backward of rows (k) times a weight (n, k): the gradient of the input, if wanted, and of the weight, if it is
        trained. ``adds``: to the newest version of ``in_grad``. ``sequences``: as many weights, one per sequence.
        ``weight_dtype`` of the weight, which is cast as it is read, and of its gradient, if not that of activations."""
        d = self.decoder
        sequences = d.batch if name in d.own else sequences
        kept = weight_dtype or d.dtype
        cast = sequences * n * k if kept != d.dtype else 0
        rows = d.batch * (s.run.tokens if tokens is None else tokens) // sequences
        if in_grad is not None:
            weight: Read = (f"{name}.weight", tensor_bytes(sequences * n * k, kept))
            s.op(
                "input_grad", reads=[out_grad, weight, *([in_grad] if adds else [])], writes=[in_grad], dtype=d.dtype,
                batch=sequences, m=rows, n=k, k=n, extra_lanes=cast + (sequences * rows * k if adds else 0),
            )  # fmt: skip
        if trained if trained is not None else name in d.trained:
            grad = s.buffer(f"{name}_grad", (sequences, n, k), kept, Role.GRADIENT)
            s.op(
                "weight_grad", reads=[out_grad, source], writes=[grad], dtype=d.dtype, batch=sequences, m=n, n=k, k=rows
            )
        if d.adapters is not None:
            d.adapters.emit_grad(s, name, out_grad, source, in_grad, n=n, k=k)

    def norm(
        self, s: Segment, name: str, out_grads: Sequence[Read], source: Read, skip: Read | None, in_grad: Write
    ) -> None:
        """Backward of an RMSNorm of width d_model, and the sum with ``skip``, the gradient that goes around it.

        ``out_grads`` hold the rows of the gradient of its output together.
        """
        d, rows = self.decoder, self.decoder.batch * s.run.tokens
        width = d.model.d_model
        part = in_grad if skip is None else s.buffer(f"{name}_in_grad", (d.batch, s.run.tokens, width), d.dtype)
        s.op(
            "norm_grad", reads=[*out_grads, source, (f"{name}.weight", d.size(width))], writes=[part], dtype=d.dtype,
            m=rows, n=width,
        )  # fmt: skip
        if skip is not None:
            s.op("grad_add", reads=[part, skip], writes=[in_grad], dtype=d.dtype, m=rows, n=width)

    def summed(self, s: Segment, grad: Write) -> Write:
        """A gradient of which every chip of a tensor-parallel group has a part."""
        if self.decoder.parallel.tp > 1:
            self.decoder.emit_sum(s, [grad], grad)
        return grad

    def mlp(
        self, s: Segment, out_grad: Read, normed_grad: Write | None, *, prefix: str = "", sequences: int = 1,
        trained: bool | None = None, weight_dtype: str | None = None,
    ) -> None:  # fmt: skip
        """Backward of a gated MLP from the gradient of its output to that of its input, if that is wanted.

        ``sequences``, ``trained`` and ``weight_dtype`` as of :meth:`product`. ``prefix`` of its families: weights
        ``gate_proj``, ``up_proj`` and ``down_proj``, activations ``mlp_normed``, ``gate``, ``up`` and ``hidden``.
        """
        d = self.decoder
        rows, width, f = d.batch * s.run.tokens, d.model.d_model, d.model.d_ff
        hidden_grad = s.buffer(f"{prefix}hidden_grad", (d.batch, s.run.tokens, f), d.dtype)
        self.product(
            s, f"{prefix}down_proj", out_grad, (f"{prefix}hidden", d.size(rows, f)), hidden_grad, n=width, k=f,
            sequences=sequences, trained=trained, weight_dtype=weight_dtype,
        )  # fmt: skip
        self.gated(
            s, hidden_grad, normed_grad, prefix=prefix, sequences=sequences, trained=trained, weight_dtype=weight_dtype
        )

    def gated(
        self, s: Segment, hidden_grad: Read, normed_grad: Write | None, *, prefix: str = "", sequences: int = 1,
        trained: bool | None = None, weight_dtype: str | None = None,
    ) -> None:  # fmt: skip
        """The part of :meth:`mlp` after its last product: from the gradient of the hidden rows."""
        d = self.decoder
        rows, width, f = d.batch * s.run.tokens, d.model.d_model, d.model.d_ff
        wide = (d.batch, s.run.tokens, f)

        def rows_of(name: str, n: int = f) -> Read:
            return prefix + name, d.size(rows, n)

        grads = [s.buffer(f"{prefix}{name}_grad", wide, d.dtype) for name in ("gate", "up")]
        s.op(
            "silu_mul_grad", reads=[rows_of("gate"), rows_of("up"), hidden_grad], writes=grads, dtype=d.dtype,
            m=rows, n=f,
        )  # fmt: skip
        for i, name in enumerate(("gate_proj", "up_proj")):
            self.product(
                s, prefix + name, grads[i], rows_of("mlp_normed", width), normed_grad, n=f, k=width, adds=i > 0,
                sequences=sequences, trained=trained, weight_dtype=weight_dtype,
            )  # fmt: skip
        if normed_grad is not None:
            self.summed(s, normed_grad)

    def attention(
        self, s: Segment, out_grad: Read, normed_grad: Write | None, *, cached: Sequence[Read] = (),
        keys: Num | None = None, pairs: Num | None = None, lanes: Num | None = None,
    ) -> None:  # fmt: skip
        """Backward of attention from the gradient of its output to that of its normed input, if that is wanted.

        ``cached``: keys and values from before the call, which have no gradient; ``keys`` that the core sees with them;
        ``pairs`` that it computes, if not all that a window or the causal order allows; ``lanes``: what it does to
        ``cached`` as it reads them, if that is not to scale all of them back.
        """
        d, model = self.decoder, self.decoder.model
        m, h = s.run.tokens, model.head_dim
        rows, width = d.batch * m, model.d_model
        q_width, kv_width = model.n_heads * h, model.n_kv_heads * h

        def rows_of(name: str, n: int) -> Read:
            return name, d.size(rows, n)

        def grad_of(name: str, n: int) -> Write:
            return s.buffer(f"{name}_grad", (d.batch, m, n), d.dtype)

        core_grad = grad_of("attn_core", q_width)
        self.product(s, "o_proj", out_grad, rows_of("attn_core", q_width), core_grad, n=width, k=q_width)
        q_grad, k_grad, v_grad = grad_of("q_rotated", q_width), grad_of("k_rotated", kv_width), grad_of("v", kv_width)
        n_keys = m if keys is None else keys
        if pairs is None:
            pairs = visible_pairs(d.kv, s.run.positions if cached else np.zeros_like(s.run.positions), m)
        if lanes is None:
            lanes = dequantise_lanes(d.kv, 2 * d.batch * model.n_kv_heads * h * (n_keys - m))
        s.op(
            "attention_grad",
            reads=[
                rows_of("q_rotated", q_width), rows_of("attn_core", q_width), core_grad, *cached,
                rows_of("k_rotated", kv_width), rows_of("v", kv_width),
            ],
            writes=[q_grad, k_grad, v_grad], dtype=d.dtype, batch=d.batch, m=m, n=n_keys, k=h, heads=model.n_heads,
            kv_heads=model.n_kv_heads, pairs=pairs, extra_lanes=lanes,
        )  # fmt: skip
        suffix = "_normed" if model.qk_norm else ""
        turned = [grad_of(f"q{suffix}", q_width), grad_of(f"k{suffix}", kv_width)]
        s.op(
            "rope_grad", reads=[q_grad, k_grad, ("rope_table", d.size(2 * m, h))], writes=turned, dtype=d.dtype,
            m=rows, n=q_width + kv_width,
        )  # fmt: skip
        if model.qk_norm:
            before = [grad_of("q", q_width), grad_of("k", kv_width)]
            s.op(
                "norm_grad", reads=[*turned, rows_of("q", q_width), rows_of("k", kv_width), ("qk_norm.weight", 0)],
                writes=before, dtype=d.dtype, m=rows * (model.n_heads + model.n_kv_heads), n=h,
            )  # fmt: skip
            turned = before
        for i, (name, grad, n) in enumerate(
            (("q_proj", turned[0], q_width), ("k_proj", turned[1], kv_width), ("v_proj", v_grad, kv_width))
        ):
            self.product(s, name, grad, rows_of("attn_normed", width), normed_grad, n=n, k=width, adds=i > 0)
        if normed_grad is not None:
            self.summed(s, normed_grad)

    def learns(self, products: Sequence[str]) -> bool:
        """A weight or an adapter of one of ``products`` of a layer is trained."""
        adapters = self.decoder.adapters
        return not self.decoder.trained.isdisjoint(products) or (adapters is not None and adapters.reaches(products))

    def layer(self, s: Segment, *, to_input: bool, other: TrainedMlp | None = None) -> None:
        """Backward of a layer with the plain MLP or ``other``, from ``layer_output_grad`` to ``layer_input_grad``, if
        that is wanted, else to the lowest product that learns."""
        d, rows = self.decoder, self.decoder.batch * s.run.tokens
        width = d.model.d_model
        shape, size = (d.batch, s.run.tokens, width), d.size(rows, width)
        out_grad: Read = ("layer_output_grad", size)
        if other is None and not to_input and not self.learns(ATTENTION_PRODUCTS):
            self.mlp(s, out_grad, None)
            return
        normed_grad = s.buffer("mlp_normed_grad", shape, d.dtype)
        if other is None:
            self.mlp(s, out_grad, normed_grad)
        else:
            other.emit_grad(s, out_grad, normed_grad)
        middle = s.buffer("attended_grad", shape, d.dtype)
        self.norm(s, "mlp_norm", [normed_grad], ("attended", size), out_grad, middle)
        stored = stored_tokens(d.kv, s.run.positions)
        cached: list[Read] = [("kv", d.batch * kv_token_bytes(d.model, d.kv) * stored)] if stored.any() else []
        self.attention(
            s, middle, s.buffer("attn_normed_grad", shape, d.dtype) if to_input else None, cached=cached,
            keys=stored + s.run.tokens if cached else None,
        )  # fmt: skip
        if to_input:
            self.norm(
                s, "attn_norm", [("attn_normed_grad", size)], ("layer_input", size), middle, ("layer_input_grad", size)
            )

    def head(self, s: Segment, *, tile_rows: int | None = None) -> None:
        """Final norm, head and loss over all rows, and back to ``last_grad``.

        ``tile_rows``: rows of logits that exist at a time; None for all of them.
        """
        d, model = self.decoder, self.decoder.model
        rows, width, vocab = d.batch * s.run.tokens, model.d_model, model.vocab_size
        name = "embedding" if model.tied_embeddings else "lm_head"
        last: Read = ("last", d.size(rows, width))
        normed = s.buffer("final_normed", (d.batch, s.run.tokens, width), d.dtype)
        s.op(
            "final_norm", reads=[last, ("final_norm.weight", d.size(width))], writes=[normed], dtype=d.dtype, m=rows,
            n=width, phase=Phase.FORWARD,
        )  # fmt: skip
        grad = s.buffer("final_normed_grad", (d.batch, s.run.tokens, width), d.dtype)
        tile = min(rows, tile_rows or rows)
        table: Read = (f"{name}.weight", d.size(vocab, width))
        table_grad: Write | None = None
        parts: list[Write] = []
        for first in range(0, rows, tile):
            count = min(tile, rows - first)
            part: Read = (normed[0], d.size(count, width))
            logits = s.buffer("logits", (count, vocab), LOGITS_DTYPE)
            # Not before the tile above is done, or the logits of all tiles would be there at once.
            above: list[Read] = [(done, 0) for done, _ in parts[-1:]]
            s.op(
                "lm_head", reads=[part, table, *above], writes=[logits], dtype=d.dtype, m=count, n=vocab, k=width,
                phase=Phase.FORWARD,
            )  # fmt: skip
            losses = s.buffer("losses", (count, 2), LOGITS_DTYPE)
            s.op("loss", reads=[logits], writes=[losses], dtype=LOGITS_DTYPE, m=count, n=vocab, phase=Phase.FORWARD)
            if d.parallel.tp > 1:  # the largest logit and the sum over all parts of the vocabulary
                s.op(
                    "allreduce", reads=[losses], writes=[losses], dtype=LOGITS_DTYPE, m=2 * count, n=1,
                    heads=d.parallel.tp, phase=Phase.FORWARD,
                )  # fmt: skip
            logits_grad = s.buffer("logits_grad", (count, vocab), d.dtype)
            s.op("loss_grad", reads=[logits, losses], writes=[logits_grad], dtype=LOGITS_DTYPE, m=count, n=vocab)
            parts.append((grad[0], d.size(count, width)))
            s.op("input_grad", reads=[logits_grad, table], writes=[parts[-1]], dtype=d.dtype, m=count, n=width, k=vocab)
            if name in d.trained:
                before = [] if table_grad is None else [table_grad]
                table_grad = s.buffer(f"{name}_grad", (vocab, width), d.dtype, Role.GRADIENT)
                s.op(
                    "weight_grad", reads=[logits_grad, part, *before], writes=[table_grad], dtype=d.dtype, m=vocab,
                    n=width, k=count, extra_lanes=vocab * width if before else 0,
                )  # fmt: skip
        out_grads: list[Read] = [(*part, len(parts) - 1 - i) for i, part in enumerate(parts)]
        if d.parallel.tp > 1:
            d.emit_sum(s, out_grads, grad)
            out_grads = [grad]
        self.norm(s, "final_norm", out_grads, last, None, ("last_grad", d.size(rows, width)))

    def embedding(self, s: Segment) -> None:
        """Gradient of the embedding: rows added where their tokens are, into that of the head if they share it."""
        d, rows = self.decoder, self.decoder.batch * s.run.tokens
        size = d.size(rows, d.model.d_model)
        grad = s.buffer("embedding_grad", (d.model.vocab_size, d.model.d_model), d.dtype, Role.GRADIENT)
        before: list[Read] = [("embedding_grad", size)] if d.model.tied_embeddings else []
        s.op(
            "grad_add", reads=[("first_grad", size), *before], writes=[(grad[0], size if before else grad[1])],
            dtype=d.dtype, m=rows, n=d.model.d_model,
        )  # fmt: skip


# --- optimisers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps of an optimiser on named weights, each of which the backward pass left a gradient of.

    ``master``: weights have an fp32 copy that the step is made on, rounded into the weight. ``clip``: by the norm over
    all gradients, so that no weight is written before all of them are there.
    """

    optimiser: Optimiser
    master: bool
    clip: bool
    dtype: str
    grad_dtype: str

    def declare(
        self, builder: TraceBuilder, name: str, shape: tuple[int, ...], *, layers: Sequence[int] | None
    ) -> None:
        """Declare what the optimiser keeps for the weight ``name`` of ``shape``."""
        kept = {"moments": MOMENTS[self.optimiser], "master": int(self.master)}
        for part, copies in kept.items():
            if copies:
                builder.declare(
                    f"{name}.{part}", (copies, *shape), STATE_DTYPE, Role.OPTIMISER, layers=layers, initial_version=0,
                    in_place=True,
                )  # fmt: skip

    def declare_norm(self, builder: TraceBuilder, sequences: int = 1) -> None:
        """Declare the norm over all gradients, of each of ``sequences``."""
        if self.clip:
            builder.declare(
                "grad_norm", (sequences,), STATE_DTYPE, Role.GRADIENT, layers=None, initial_version=0, in_place=True
            )

    def emit_norm(self, s: Segment, name: str, shape: tuple[int, ...]) -> None:
        """U4: what the gradient of ``name`` adds to the norm."""
        self.emit_norm_of_all(s, {name: shape})

    def emit(self, s: Segment, name: str, shape: tuple[int, ...]) -> None:
        """The step on the weight ``name``: U6, B10 or B11."""
        self.emit_all(s, {name: shape})

    def emit_norm_of_all(self, s: Segment, weights: Weights) -> None:
        """U4: what the gradients of ``weights``, gone over in one pass, add to the norm."""
        m, n = _rows(weights)
        s.op(
            "delta_norm", reads=[*self._grads(weights), ("grad_norm", 0)], writes=[("grad_norm", 0)],
            dtype=self.grad_dtype, m=m, n=n,
        )  # fmt: skip

    def emit_all(self, s: Segment, weights: Weights) -> None:
        """The step on ``weights``, in one pass over them: U6, B10 or B11."""
        m, n = _rows(weights)
        state: list[Write] = []
        changed: list[Write] = []
        for name, shape in weights.items():
            wide = int(n_bytes(_elements(shape), STATE_DTYPE))
            if self.master:
                state.append((f"{name}.master", wide))
            if MOMENTS[self.optimiser]:
                state.append((f"{name}.moments", MOMENTS[self.optimiser] * wide))
            changed.append((f"{name}.weight", int(n_bytes(_elements(shape), self.dtype))))
        norm: list[Read] = [("grad_norm", 0)] if self.clip else []
        kind = {"sgd": "weight_write", "momentum": "momentum_write", "adam": "adam_write"}[self.optimiser]
        # With a master copy the old weight need not be read; the operand of no bytes puts steps in order.
        old: list[Read] = [(name, 0 if self.master else size) for name, size in changed]
        s.op(
            kind, reads=[*self._grads(weights), *norm, *state, *old], writes=[*state, *changed],
            dtype=STATE_DTYPE if self.master else self.dtype, m=m, n=n, phase=Phase.WEIGHT_WRITE,
            extra_lanes=m * n if self.optimiser == "sgd" else 0,
        )  # fmt: skip

    def _grads(self, weights: Weights) -> list[Read]:
        return [(f"{name}_grad", int(n_bytes(_elements(shape), self.grad_dtype))) for name, shape in weights.items()]


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _rows(weights: Weights) -> tuple[int, int]:
    """Rows, and their width, of weights that are gone over in one pass; the widest rows that they all consist of."""
    width = gcd(*(shape[-1] for shape in weights.values()))
    return sum(_elements(shape) for shape in weights.values()) // width, width


# --- training of whole decoders ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A step of training on the sequences of a call: loss, backward pass, optimiser. A :class:`Learner`.

    ``loss_tile_rows``: rows of logits that exist at a time, None for all; ``recompute``: only the inputs of layers are
    kept, and layers run again before their backward pass; ``other``: the MLP of some layers.
    """

    decoder: Decoder
    steps: Steps
    recompute: bool
    loss_tile_rows: int | None
    other: TrainedMlp | None = None

    def weights(self) -> tuple[Weights, Weights]:
        """The trained weights of a layer, and those outside the layers."""
        model = self.decoder.model
        d, f = model.d_model, model.d_ff
        layer = {**attention_weights(model), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        table = (model.vocab_size, d)
        shared = {"embedding": table} | ({} if model.tied_embeddings else {"lm_head": table})
        trained, own = self.decoder.trained, self.decoder.own
        copies = (self.decoder.batch,)
        return (
            {name: (*copies, *shape) if name in own else shape for name, shape in layer.items() if name in trained},
            {name: shape for name, shape in shared.items() if name in trained},
        )

    def shape_key(self, call: Call) -> tuple[int, ...]:
        return ()

    def declare(self, builder: TraceBuilder, rows: tuple[int, ...]) -> None:
        Backward(decoder=self.decoder).declare(builder, rows)
        self.steps.declare_norm(builder)
        by_layer, shared = self.weights()
        every = range(self.decoder.model.n_layers)
        groups: list[tuple[Weights, Sequence[int] | None]] = [
            (by_layer, every), (self._adapters(), every), (shared, None)
        ]  # fmt: skip
        if self.other is not None:
            groups.append((self.other.weights(), self.other.layers))
            self.other.declare_grad(builder, rows)
        for weights, layers in groups:
            for name, shape in weights.items():
                self.steps.declare(builder, name, shape, layers=layers)

    def segments(self, builder: TraceBuilder, run: Run) -> list[tuple[Segment, int]]:
        n_layers = self.decoder.model.n_layers
        backward = Backward(decoder=self.decoder)
        out: list[tuple[Segment, int]] = []

        def add(layers: Sequence[int], phase: Phase = Phase.BACKWARD) -> Segment:
            return Segment(builder, run, layers, phase)

        head = add(())
        backward.head(head, tile_rows=self.loss_tile_rows)
        out.append((head, -1))
        _, shared = self.weights()
        special = () if self.other is None else tuple(self.other.layers)
        plain = tuple(layer for layer in range(n_layers) if layer not in special)
        again: dict[int, Segment] = {}
        back: dict[int, Segment] = {}
        for layers, other in ((plain, None), (special, self.other)):
            # Nothing below the first layer is trained but the embedding.
            for chosen in (tuple(layer for layer in layers if layer), tuple(layer for layer in layers if not layer)):
                segment = add(chosen)
                if chosen:
                    backward.layer(segment, to_input=chosen[0] > 0 or "embedding" in shared, other=other)
                back |= dict.fromkeys(chosen, segment)
            if layers and self.recompute:
                # Not before the layers above are done, or the rows of all layers would be there at once.
                segment = Segment(builder, run, layers, Phase.RECOMPUTE, after=("layer_output_grad",))
                self.decoder.emit_layer(segment, other)
                again |= dict.fromkeys(layers, segment)
        for layer in reversed(range(n_layers)):
            if self.recompute:
                out.append((again[layer], layer))
            out.append((back[layer], layer))
        if "embedding" in shared:
            bottom = add(())
            if self.other is not None:
                self.other.emit_grad_end(bottom)
            backward.embedding(bottom)
            out.append((bottom, -1))
        for norm in (True, False) if self.steps.clip else (False,):
            out += self._steps(add(range(n_layers)), add(special), add(()), norm=norm)
        return out

    def _steps(self, layers: Segment, special: Segment, outside: Segment, *, norm: bool) -> list[tuple[Segment, int]]:
        """One pass over all gradients: their norm, or the steps. ``special``: layers that have another MLP."""
        by_layer, shared = self.weights()
        more = {} if self.other is None else self.other.weights()
        for segment, weights in ((layers, by_layer), (special, more), (outside, shared)):
            for name, shape in weights.items():
                (self.steps.emit_norm if norm else self.steps.emit)(segment, name, shape)
        adapters = self._adapters()
        if adapters:  # so small that a launch for each would be most of the time
            (self.steps.emit_norm_of_all if norm else self.steps.emit_all)(layers, adapters)
        out = [(layers, layer) for layer in layers.layers if by_layer or adapters]
        out += [(special, layer) for layer in special.layers]
        return out + ([(outside, -1)] if shared else [])

    def _adapters(self) -> Weights:
        adapters = self.decoder.adapters
        return {} if adapters is None else adapters.weights()
