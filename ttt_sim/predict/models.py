"""Whole dense models as rows: a step of one layer, a step of the head, and what the serving software adds.

Kernels of a layer follow one another, and so do layers, so the time of a model is that of its first layer times their
number, plus head and embedding. With tensor parallelism every chip holds a part of heads and MLP columns and two sums
over all chips follow in each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ttt_sim.errors import WorkloadError
from ttt_sim.ops import Role
from ttt_sim.predict.rows import ROW_DTYPES, Row
from ttt_sim.predict.workloads import Operand, OpSpec, Step, size, visible_pairs
from ttt_sim.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Shape of a dense transformer; ``gated``: gate and up projections and SiLU (Llama), else one projection and GELU;
    ``causal`` False: an encoder."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    causal: bool = True


def _shape(numbers: str, *, gated: bool = True, causal: bool = True) -> ModelShape:
    layers, d, f, heads, kv, head, vocab = map(int, numbers.split())
    return ModelShape(
        n_layers=layers, d_model=d, d_ff=f, n_heads=heads, n_kv_heads=kv, head_dim=head, vocab=vocab, gated=gated,
        causal=causal,
    )  # fmt: skip


#: Layers, model width, MLP width, query heads, KV heads, head width, vocabulary; from public configurations.
MODELS: Mapping[str, ModelShape] = {
    "Llama-2-7b": _shape("32 4096 11008 32 32 128 32000"),
    "Llama-2-13b": _shape("40 5120 13824 40 40 128 32000"),
    "Llama-2-70b": _shape("80 8192 28672 64 8 128 32000"),
    "Llama-3.2-1B": _shape("16 2048 8192 32 8 64 128256"),
    "Llama-3.2-3B": _shape("28 3072 8192 24 8 128 128256"),
    "Llama-3-8B": _shape("32 4096 14336 32 8 128 128256"),
    "Llama-3-70B": _shape("80 8192 28672 64 8 128 128256"),
    "Llama-3.1-405B": _shape("126 16384 53248 128 8 128 128256"),
    "Mistral-7B": _shape("32 4096 14336 32 8 128 32000"),
    "Qwen2-7B": _shape("28 3584 18944 28 4 128 152064"),
    "Qwen2-72B": _shape("80 8192 29568 64 8 128 152064"),
    "Qwen3-32B": _shape("64 5120 25600 64 8 128 151936"),
    "Granite-3B-14": _shape("14 4096 14336 32 8 128 49152"),  # the first 14 layers of Granite-8B-Code
    "opt_13": _shape("24 2048 8192 32 32 64 50272", gated=False),
    "gpt3_xl": _shape("24 3072 12288 24 24 128 50257", gated=False),
    "gpt3_27": _shape("32 2560 10240 32 32 80 50257", gated=False),
    "gpt2_large": _shape("36 1280 5120 20 20 64 50257", gated=False),
    "bert_large": _shape("24 1024 4096 16 16 64 30522", gated=False, causal=False),
}


#: Bits of a stored weight where a block of them shares a scale, in halves of a bit: 32 four-bit weights and 16 bits
#: (q4, as ggml's q4_0), 16 four-bit floats and 8 bits (nvfp4).
BLOCK_HALF_BITS: Mapping[str, int] = {"q4": 9, "nvfp4": 9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Number formats of a model: ``product`` of the operands that the matrix units multiply, ``weights`` as stored (a
    format or one of :data:`BLOCK_HALF_BITS`), ``act`` of activations, attention and the head, ``kv`` of stored keys and
    values."""

    product: str
    weights: str
    act: str
    kv: str

    @classmethod
    def of(cls, dtype: str) -> Formats:
        """Weights and products in ``dtype``; activations, keys and values of 8 and 4 bit models have 16 bits."""
        act = dtype if dtype in ("fp32", "fp16", "bf16") else "bf16"
        return cls(product=dtype, weights=dtype, act=act, kv=act)


def weight_bytes(elements: int, stored: str) -> int:
    """Bytes of ``elements`` stored weights, scales of blocks included."""
    half_bits = BLOCK_HALF_BITS.get(stored)
    return size(elements, stored) if half_bits is None else ceil_div(elements * half_bits, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serving software adds to the kernels of each call of the model, in microseconds: ``step_us``, and
    ``sequence_us`` for each sequence of the batch (sampling, scheduling, text)."""

    step_us: float = 0.0
    sequence_us: float = 0.0


#: Current engines replay graphs and hide the host behind the device.
CURRENT = Serving()
#: Software of 2023 to 2024 by its name in rows of LLM-Inference-Bench, from whole batches served offline; fitted there,
#: two numbers each for 157 rows (8.2 and 6.8 % error, cross-validated by shape).
OFFLINE: Mapping[str, Serving] = {
    "vLLM": Serving(step_us=1650.0, sequence_us=74.0),
    "TensorRT-LLM": Serving(step_us=505.0, sequence_us=33.0),
}


def serving_of(row: Row) -> Serving:
    """The serving software behind a row."""
    return OFFLINE.get(row.software, CURRENT) if row.source == "LLM-Inference-Bench" else CURRENT


@dataclass(frozen=True, slots=True)
class Part:
    """``step`` times ``count`` is part of a row's time."""

    step: Step
    count: float


def split_by(model: ModelShape, tp: int) -> None:
    """Raise :class:`WorkloadError` if ``tp`` chips cannot share the model."""
    if model.n_heads % tp or model.d_ff % tp:
        raise WorkloadError(
            f"tp: {tp} chips cannot share {model.n_heads} query heads and an MLP of {model.d_ff} evenly"
        )


def layer_step(
    model: ModelShape, *, batch: int, tokens: int, before: int, formats: Formats, tp: int, eager: bool = False,
    padded: bool = False,
) -> Step:  # fmt: skip
    """One layer on one of ``tp`` chips: ``tokens`` new tokens of each of ``batch`` sequences after ``before``.

    ``padded``: heads and MLP columns that do not divide evenly are rounded up on every chip; refused otherwise.
    """
    if not padded:
        split_by(model, tp)
    act = formats.act
    rows, d, f = batch * tokens, model.d_model, ceil_div(model.d_ff, tp)
    kv_heads = ceil_div(model.n_kv_heads, tp)
    heads = ceil_div(ceil_div(model.n_heads, tp), kv_heads) * kv_heads
    q_width, kv_width = heads * model.head_dim, kv_heads * model.head_dim
    keys = before + tokens
    ops: list[OpSpec] = []

    def act_of(name: str, width: int) -> Operand:
        return Operand(name, size(rows * width, act))

    def row(kind: str, width: int, reads: tuple[str, ...], write: str) -> None:
        inputs = tuple(act_of(name, width) for name in reads)
        ops.append(OpSpec(kind, act, rows, width, reads=inputs, writes=(act_of(write, width),)))

    def product(kind: str, source: str, k: int, n: int, write: str) -> None:
        a = act_of(source, k)
        weight = Operand(f"{write}.weight", weight_bytes(n * k, formats.weights), Role.WEIGHT)
        ops.append(OpSpec(kind, formats.product, rows, n, k, reads=(a, weight), writes=(act_of(write, n),)))

    def reduce(name: str) -> str:
        if tp == 1:
            return name
        summed = f"{name}.sum"
        ops.append(
            OpSpec("allreduce", act, rows * d, 1, heads=tp, reads=(act_of(name, d),), writes=(act_of(summed, d),))
        )
        return summed

    norm = "attn_norm" if model.gated else "layernorm"
    row(norm, d, ("stream",), "normed")
    for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        product(f"{name}_proj", "normed", d, width, name)
    if model.gated:
        q, k = act_of("q", q_width), act_of("k", kv_width)
        ops.append(
            OpSpec(
                "rope", act, rows, q_width + kv_width, reads=(q, k),
                writes=(act_of("q_rot", q_width), act_of("k_rot", kv_width)),
            )
        )  # fmt: skip
    q_name, k_name = ("q_rot", "k_rot") if model.gated else ("q", "k")
    kv = Operand("kv", size(2 * batch * keys * kv_width, formats.kv), Role.KV)
    flash = [
        OpSpec(
            "kv_append", act, rows, 2 * kv_width, reads=(act_of(k_name, kv_width), act_of("v", kv_width)),
            writes=(Operand("kv", size(2 * rows * kv_width, formats.kv), Role.KV),),
        ),
        OpSpec(
            "attention", act, tokens, keys, model.head_dim, batch, heads, kv_heads,
            visible_pairs(tokens, keys, model.causal and tokens > 1), before,
            reads=(act_of(q_name, q_width), kv), writes=(act_of("core", q_width),),
        ),
    ]  # fmt: skip
    if eager:  # scores, mask and softmax are kernels of their own, and so is a copy of the heads
        pairs = batch * heads * tokens * keys
        scores, masked, weights = (Operand(name, size(pairs, act)) for name in ("scores", "masked", "softmax"))
        q, k, v = act_of("q", q_width), act_of("k", kv_width), act_of("v", kv_width)
        chains = batch * heads
        ops += [
            OpSpec("product", act, tokens, keys, model.head_dim, chains, reads=(q, k), writes=(scores,)),
            OpSpec("mlp_residual", act, chains * tokens, keys, reads=(scores,), writes=(masked,)),
            OpSpec("softmax", act, chains * tokens, keys, reads=(masked,), writes=(weights,)),
            OpSpec(
                "product", act, tokens, model.head_dim, keys, chains, reads=(weights, v),
                writes=(act_of("core", q_width),),
            ),
        ]  # fmt: skip
    else:
        ops += flash
    product("o_proj", "core", q_width, d, "attn_out")
    row("attn_residual", d, ("stream", reduce("attn_out")), "attended")
    row("mlp_norm" if model.gated else "layernorm", d, ("attended",), "mlp_normed")
    if model.gated:
        product("gate_proj", "mlp_normed", d, f, "gate")
    product("up_proj", "mlp_normed", d, f, "up")
    row("silu_mul" if model.gated else "gelu", f, ("gate", "up") if model.gated else ("up",), "hidden")
    product("down_proj", "hidden", f, d, "mlp_out")
    row("mlp_residual", d, ("attended", reduce("mlp_out")), "next")
    return tuple(ops)


def head_step(model: ModelShape, *, rows: int, act: str, tp: int) -> Step:
    """Final norm and language-model head on ``rows`` rows, in the format of activations."""
    d, n = model.d_model, ceil_div(model.vocab, tp)
    normed = Operand("normed", size(rows * d, act))
    return (
        OpSpec("final_norm", act, rows, d, reads=(Operand("stream", size(rows * d, act)),), writes=(normed,)),
        OpSpec(
            "lm_head", act, rows, n, d, reads=(normed, Operand("head", size(n * d, act), Role.WEIGHT)),
            writes=(Operand("logits", size(rows * n, act)),),
        ),
    )  # fmt: skip


def call_parts(
    model: ModelShape,
    *,
    batch: int,
    tokens: int,
    before: int,
    formats: Formats,
    tp: int,
    logits: int,
    eager: bool = False,
    padded: bool = False,
) -> list[Part]:
    """One call of a model: all layers, and the head on ``logits`` rows."""
    layer = layer_step(
        model, batch=batch, tokens=tokens, before=before, formats=formats, tp=tp, eager=eager, padded=padded
    )
    return [Part(layer, model.n_layers), Part(head_step(model, rows=logits, act=formats.act, tp=tp), 1)]


def parts_of(row: Row) -> tuple[list[Part], float]:
    """Steps of a whole-model row with their counts, and the time in microseconds that the software adds.

    Decode steps stand at the mean context of a run, since a step is an affine function of it. A row of loaded serving
    (closed loop at a fixed concurrency) also holds the prefills that run between decode steps: each of ``batch``
    requests brings one prompt per ``out_len`` steps.
    """
    model, formats = MODELS[row.model], Formats.of(ROW_DTYPES[row.dtype])
    serving = serving_of(row)
    batch, tp = row.batch, row.tp
    per_step = serving.step_us + batch * serving.sequence_us

    def scaled(parts: list[Part], factor: float) -> list[Part]:
        return [Part(part.step, part.count * factor) for part in parts]

    if row.op in ("e2e_prefill", "e2e_train_step"):
        logits = batch * (row.context if row.dtype == "fp32" else 1)
        parts = call_parts(
            model,
            batch=batch,
            tokens=row.context,
            before=0,
            formats=formats,
            tp=tp,
            logits=logits,
            eager="eager" in row.software,
        )
        # A backward pass does the products twice, for its inputs and for its weights.
        return (scaled(parts, 3.0), per_step) if row.op == "e2e_train_step" else (parts, per_step)
    if row.op == "e2e_generate":
        prefill = call_parts(model, batch=batch, tokens=row.context, before=0, formats=formats, tp=tp, logits=batch)
        mean = row.context + row.out_len // 2
        decode = call_parts(model, batch=batch, tokens=1, before=mean, formats=formats, tp=tp, logits=batch)
        return [*prefill, *scaled(decode, row.out_len)], per_step * (row.out_len + 1)
    decode = call_parts(
        model, batch=batch, tokens=1, before=max(row.context - 1, 0), formats=formats, tp=tp, logits=batch
    )
    if row.out_len and "closed-loop" in row.note:
        prompt = max(row.context - row.out_len // 2, 1)
        prefill = call_parts(model, batch=1, tokens=prompt, before=0, formats=formats, tp=tp, logits=1)
        return [*decode, *scaled(prefill, batch / row.out_len)], per_step
    return decode, per_step
