"""Outputs of the reference that are held fixed to the bit: what is computed, hashed, written and compared.

``digests.csv``   one row per case: the hash of its results, the same on every machine
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.golden.record import FOLDER
from ttt_sim.reference import (
    FORMATS,
    MlpWeights,
    StreamingMlp,
    TTTOptions,
    context_parallel,
    official_mlp,
    parallel,
)
from ttt_sim.reference.decoder import Decoder, DecoderShape, random_parameters, random_tokens
from ttt_sim.reference.exact import dot
from ttt_sim.reference.formats import Format, packed, round_stochastic, round_to
from ttt_sim.reference.kv_formats import KVFormat
from ttt_sim.reference.randomness import normal, raw

DIGESTS_FILE = FOLDER / "digests.csv"
REMEDY = (
    "If the change is meant, run `make golden` (python -m tests.golden.regenerate), review the diff of digests.csv "
    "and say in CHANGELOG.md which results moved and why."
)

Array = npt.NDArray[np.float64]


class Result(NamedTuple):
    """Numbers of a format, under a name that a difference can be traced to."""

    name: str
    values: Array
    fmt: Format


#: What a case computes.
Results = list[Result]

BF16, F16, F32, F64 = (FORMATS[name] for name in ("bfloat16", "float16", "float32", "float64"))
F8 = FORMATS["float8_e4m3fn"]
#: Sizes of the cases of a single layer.
D, F, TOKENS, CHUNK = 16, 24, 53, 12


def sha256(results: Iterable[Result]) -> str:
    """Hash of names, formats, shapes and values; the bytes are those of the format's own dtype, little-endian."""
    digest = hashlib.sha256()
    for name, values, fmt in results:
        digest.update(f"{name} {fmt.name} {values.shape}".encode())
        numbers = packed(values, fmt)
        bits = np.ascontiguousarray(numbers).view(f"u{numbers.dtype.itemsize}")
        digest.update(bits.astype(f"<u{numbers.dtype.itemsize}").tobytes())
    return digest.hexdigest()


# --- one layer --------------------------------------------------------------------------------------------------------


def _layer(fmt: Format, *, projection: bool = True) -> tuple[MlpWeights, Array, Array]:
    def draw(stream: int, shape: tuple[int, ...], scale: float) -> Array:
        return round_to(normal(0, stream, shape) * scale, fmt)

    weights = MlpWeights(
        gate=draw(0, (F, D), 1 / 4),
        up=draw(1, (F, D), 1 / 4),
        down=draw(2, (D, F), 1 / 5),
        conv=draw(3, (D, 5), 1 / 4),
        projection=draw(4, (D, D), 1 / 4) if projection else None,
    )
    return weights, draw(5, (2, TOKENS, D), 1.0), draw(6, (2, TOKENS, D), 1.0)


def _usual(fmt: Format) -> TTTOptions:
    return TTTOptions(chunk=CHUNK, rate=0.3, dtype=fmt, fast_dtype=fmt)


def _named(y: Array, versions: list[Array], o: TTTOptions) -> Results:
    return [
        Result("y", y, o.dtype),
        *(Result(f"W_{i}", version, o.fast_dtype) for i, version in enumerate(versions)),
    ]


def _streaming(
    o: TTTOptions, *, projection: bool = True, pieces: tuple[int, ...] = (30, 1, 1, 1, 1, 1, 1, 17)
) -> Results:
    weights, x, t = _layer(o.dtype, projection=projection)
    mlp, outputs, start = StreamingMlp(weights, o, 2), [], 0
    for n in pieces:
        outputs.append(mlp(x[:, start : start + n], t[:, start : start + n]))
        start += n
    out = _named(np.concatenate(outputs, axis=1), [version.applied for version in mlp.versions], o)
    masters = [version.master for version in mlp.versions if version.master is not None]
    return out + [Result(f"master {i}", master, F32) for i, master in enumerate(masters)]


def _parallel(o: TTTOptions) -> Results:
    weights, x, t = _layer(o.dtype)
    return _named(*parallel(weights, o, x, t), o)


def _context_parallel(o: TTTOptions, devices: int) -> Results:
    weights, x, t = _layer(o.dtype)
    return _named(*context_parallel(weights, o, x, t, devices=devices), o)


def _official(name: str) -> Results:
    weights, x, t = _layer(FORMATS[name])
    params = {
        "gate_proj": weights.gate,
        "up_proj": weights.up,
        "down_proj": weights.down,
        "ttt_conv": weights.conv[:, None],
        "ttt_proj": weights.projection,
    }
    y, w = official_mlp(params, x[0], t[0], chunk=CHUNK, lr=0.3, pieces=(20, 33), dtype=name)
    return [Result("y", y.astype(np.float64), FORMATS[name]), Result("W", w.astype(np.float64), FORMATS[name])]


# --- a whole model ----------------------------------------------------------------------------------------------------

_TOY = DecoderShape(
    n_layers=3, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=64, tied_embeddings=True,
    qk_norm=True, ttt_layers=(0, 2), ttt=_usual(BF16),
)  # fmt: skip


def _decoder(shape: DecoderShape, calls: tuple[int, ...] = (17, 6, 1, 1, 1, 1, 1, 1)) -> Results:
    """Every layer's outputs, logits, fast weights, and what the caches hold."""
    decoder, out, start = Decoder(shape, random_parameters(shape, 0), 2), [], 0
    tokens = random_tokens(shape, 0, 2, sum(calls))
    for i, n in enumerate(calls):
        recorded = decoder(tokens[:, start : start + n])
        assert recorded.logits is not None
        out += [Result(f"call {i} layer {layer}", y, shape.dtype) for layer, y in enumerate(recorded.outputs)]
        out.append(Result(f"call {i} logits", recorded.logits, shape.dtype))
        start += n
    for layer in shape.ttt_layers:
        assert shape.ttt is not None
        for i, version in enumerate(decoder.weights_of(layer)):
            out.append(Result(f"layer {layer} W_{i}", version.applied, shape.ttt.fast_dtype))
    for layer, cache in enumerate(decoder.caches):
        out += [Result(f"layer {layer} {name}", getattr(cache, name), F64) for name in ("keys", "values")]
    return out


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _products() -> Results:
    a, b = normal(1, 0, (20, 300)) / 8, normal(1, 1, (300, 30)) / 8
    b *= np.ldexp(1.0, np.arange(300)[:, None] % 40 - 39)
    return [Result(fmt.name, dot(a, b, fmt), fmt) for fmt in FORMATS.values()]


def _stochastic() -> Results:
    x, random = normal(2, 0, (4000,)), raw(2, 1, (4000,))
    return [Result(fmt.name, round_stochastic(x, fmt, random), fmt) for fmt in FORMATS.values()]


def cases() -> dict[str, Callable[[], Results]]:
    """Every case by name: the usual layer and model, and their options one at a time."""
    o = _usual(BF16)
    master = replace(o, write="master")
    shared = replace(o, carry="ring", own_targets=False)
    return {
        "products": _products,
        "stochastic rounding": _stochastic,
        "streaming bfloat16": lambda: _streaming(o),
        "streaming float16": lambda: _streaming(_usual(F16)),
        "streaming float32": lambda: _streaming(_usual(F32)),
        "streaming float64": lambda: _streaming(_usual(F64)),
        "streaming bfloat16, weights float8_e4m3fn": lambda: _streaming(replace(o, fast_dtype=F8)),
        "streaming bfloat16, weights float32": lambda: _streaming(replace(o, fast_dtype=F32)),
        "streaming bfloat16, fused": lambda: _streaming(replace(o, write="fused")),
        "streaming bfloat16, master": lambda: _streaming(master),
        "streaming bfloat16, outer first": lambda: _streaming(replace(o, contraction="outer_first")),
        "streaming bfloat16, outer first, master": lambda: _streaming(replace(master, contraction="outer_first")),
        "streaming bfloat16, causal": lambda: _streaming(replace(o, convolution="causal")),
        "streaming bfloat16, clip": lambda: _streaming(replace(o, clip=0.5)),
        "streaming bfloat16, clip, master": lambda: _streaming(replace(master, clip=0.5)),
        "streaming bfloat16, no projection": lambda: _streaming(o, projection=False),
        "streaming bfloat16, online": lambda: _streaming(replace(o, carry="online")),
        "streaming bfloat16, online, outer first": lambda: _streaming(
            replace(o, carry="online", contraction="outer_first")
        ),
        "parallel bfloat16": lambda: _parallel(o),
        "parallel bfloat16, clip": lambda: _parallel(replace(o, clip=0.5)),
        "parallel bfloat16, master": lambda: _parallel(master),
        "context parallel bfloat16, weights float32, 3 devices": lambda: _context_parallel(
            replace(o, fast_dtype=F32), 3
        ),
        "context parallel float64, 2 devices": lambda: _context_parallel(_usual(F64), 2),
        "official float64": lambda: _official("float64"),
        "official float32": lambda: _official("float32"),
        "official bfloat16": lambda: _official("bfloat16"),
        "decoder bfloat16": lambda: _decoder(_TOY),
        "decoder bfloat16, no TTT": lambda: _decoder(replace(_TOY, ttt_layers=(), ttt=None)),
        "decoder bfloat16, window": lambda: _decoder(replace(_TOY, window=7)),
        "decoder bfloat16, window, int4": lambda: _decoder(replace(_TOY, window=7, kv=KVFormat(name="int4", group=12))),
        "decoder bfloat16, fp4": lambda: _decoder(replace(_TOY, kv=KVFormat(name="fp4"))),
        "decoder bfloat16, fp8 scaled": lambda: _decoder(replace(_TOY, kv=KVFormat(name="fp8", per_token_scale=True))),
        "decoder bfloat16, int8": lambda: _decoder(replace(_TOY, kv=KVFormat(name="int8"))),
        "decoder bfloat16, embeddings as targets": lambda: _decoder(replace(_TOY, ttt=shared)),
        "decoder float32, other family": lambda: _decoder(
            replace(
                _TOY, dtype=F32, qk_norm=False, tied_embeddings=False, ttt=_usual(F32), kv=KVFormat(name="fp32"),
                rotary_base=5e5,
            )
        ),
    }  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------------------


def write_digests(digests: Mapping[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "sha256"))
    writer.writerows(digests.items())
    DIGESTS_FILE.write_text(text.getvalue(), encoding="utf-8")


def read_digests() -> dict[str, str]:
    if not DIGESTS_FILE.exists():
        return {}
    with DIGESTS_FILE.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["sha256"] for row in csv.DictReader(file)}
