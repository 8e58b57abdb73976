"""The transformer around In-Place TTT: attention, norms, rotary embedding, caches, prefill against decode."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.reference_tools import BF16, F64, Array, options, same_bits
from ttt_sim.reference import FORMATS, InputError, elementary
from ttt_sim.reference.decoder import Decoder, DecoderShape, parameter_shapes, random_parameters, random_tokens
from ttt_sim.reference.formats import FLOAT8_E4M3, Format, is_in, nearest, round_to
from ttt_sim.reference.kv_formats import KVFormat
from ttt_sim.reference.layers import attention, rms_norm, rotate
from ttt_sim.reference.meter import Meter, OpCount
from ttt_sim.reference.randomness import normal

F32, F16 = FORMATS["float32"], FORMATS["float16"]

#: Two layers, the first with a fast weight; four query heads on two KV heads.
SMALL = DecoderShape(
    n_layers=2, d_model=12, d_ff=20, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=31, tied_embeddings=True,
    qk_norm=True, ttt_layers=(0,), ttt=options(),
)  # fmt: skip


def small(**changes: Any) -> DecoderShape:
    shape = replace(SMALL, **changes)
    if shape.ttt is not None and "ttt" not in changes:
        shape = replace(shape, ttt=replace(shape.ttt, dtype=shape.dtype, fast_dtype=shape.dtype))
    return shape


def generate(
    shape: DecoderShape, calls: list[int], batch: int = 1, seed: int = 0
) -> tuple[list[Array], Array, Decoder]:
    """Outputs of every layer (batch, n, d), the logits of every call (batch, calls, V), and the decoder."""
    decoder = Decoder(shape, random_parameters(shape, seed), batch)
    tokens = random_tokens(shape, seed, batch, sum(calls))
    return (*feed(decoder, tokens, calls), decoder)


def feed(decoder: Decoder, tokens: Any, calls: list[int]) -> tuple[list[Array], Array]:
    outputs: list[list[Array]] = [[] for _ in range(decoder.shape.n_layers)]
    logits, start = [], 0
    for n in calls:
        recorded = decoder(tokens[:, start : start + n])
        for kept, y in zip(outputs, recorded.outputs, strict=True):
            kept.append(y)
        assert recorded.logits is not None
        logits.append(recorded.logits)
        start += n
    return [np.concatenate(kept, axis=1) for kept in outputs], np.stack(logits, axis=1)


def assert_prefill_is_decode(shape: DecoderShape, n: int = 13, batch: int = 1) -> None:
    want, last, one = generate(shape, [1] * n, batch)
    for calls in ([n], [4, 6, n - 10], [2, 1, n - 3]):
        got, logits, decoder = generate(shape, calls, batch)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        assert same_bits(logits[:, -1], last[:, -1])
        for layer in shape.ttt_layers:
            pairs = zip(decoder.weights_of(layer), one.weights_of(layer), strict=True)
            assert all(same_bits(a.applied, b.applied) for a, b in pairs)
        for a, b in zip(decoder.caches, one.caches, strict=True):
            assert same_bits(a.keys, b.keys)
            assert same_bits(a.values, b.values)


# --- prefill and decode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["bf16", "fp16", "fp32", "fp8", "int8", "fp4", "int4"])
def test_prefill_is_decode_with_a_full_cache_in_every_kv_format(kv):
    """Rows are stored before they are attended to, so every row is read as it is stored."""
    assert_prefill_is_decode(small(kv=KVFormat(name=kv, group=8)))


@pytest.mark.parametrize("window", [1, 2, 5, 12, 13, 40])
@pytest.mark.parametrize("kv", ["bf16", "fp32"])
def test_prefill_is_decode_in_a_window_if_the_cache_holds_activations_exactly(window, kv):
    assert_prefill_is_decode(small(window=window, kv=KVFormat(name=kv)))


def test_a_quantised_window_is_read_unquantised_by_the_call_that_brings_it():
    """Rows of a call of several attend to each other as they are; a single row reads itself as it is stored."""
    shape = small(window=5, kv=KVFormat(name="int4", group=8))
    one_by_one, _, _ = generate(shape, [1] * 13)
    together, _, _ = generate(shape, [13])
    assert not same_bits(together[0], one_by_one[0])
    plain, _, _ = generate(small(window=5), [13])
    assert same_bits(together[0], plain[0])
    # Token by token, a window that is never full is a full cache.
    one_by_one, _, _ = generate(small(window=13, kv=shape.kv), [1] * 13)
    full, _, _ = generate(small(kv=shape.kv), [1] * 13)
    assert all(same_bits(a, b) for a, b in zip(one_by_one, full, strict=True))
    # Nothing but the cache is quantised: keys of layer 0 do not depend on attention.
    first, second = (generate(shape, calls)[2].caches[0] for calls in ([13], [1] * 13))
    assert same_bits(first.keys, second.keys)
    assert first.keys.shape == (1, 5, 2, 6)


@pytest.mark.parametrize("carry", ["ring", "keep_z"])
@pytest.mark.parametrize("own_targets", [True, False])
def test_prefill_is_decode_with_every_row_carry(carry, own_targets):
    ttt = replace(options(carry=carry, own_targets=own_targets), chunk=3)
    assert_prefill_is_decode(small(ttt=ttt, ttt_layers=(0, 1)))


@pytest.mark.parametrize("fmt", ["float32", "float16", "float64"])
def test_prefill_is_decode_in_every_format_of_activations(fmt):
    kv = {"float32": "fp32", "float16": "fp16", "float64": "fp32"}[fmt]
    assert_prefill_is_decode(small(dtype=FORMATS[fmt], kv=KVFormat(name=kv)), batch=2)


def test_without_any_fast_weight():
    assert_prefill_is_decode(small(ttt_layers=(), ttt=None))


def test_the_model_can_be_of_the_other_family():
    assert_prefill_is_decode(small(qk_norm=False, tied_embeddings=False, n_kv_heads=1, projection=False))


@pytest.mark.parametrize(
    "changes", [{}, {"window": 4}, {"kv": KVFormat(name="int4", group=8)}, {"window": 3, "qk_norm": False}]
)
def test_sequences_of_a_batch_are_independent(changes):
    shape = small(**changes)
    parameters, tokens, calls = random_parameters(shape, 0), random_tokens(shape, 0, 3, 13), [7, 1, 5]
    outputs, logits = feed(Decoder(shape, parameters, 3), tokens, calls)
    for b in range(3):
        alone, alone_logits = feed(Decoder(shape, parameters, 1), tokens[b : b + 1], calls)
        assert all(same_bits(a[b : b + 1], x) for a, x in zip(outputs, alone, strict=True))
        assert same_bits(logits[b : b + 1], alone_logits)
    assert not same_bits(outputs[0][0], outputs[0][1])


def test_reset_equals_a_fresh_start():
    for changes in ({}, {"window": 4}):
        shape = small(**changes)
        want, want_logits, fresh = generate(shape, [7, 6])
        decoder = Decoder(shape, random_parameters(shape, 0))
        decoder(random_tokens(shape, 5, 1, 9))
        decoder.reset()
        assert decoder.position == 0
        got, logits = feed(decoder, random_tokens(shape, 0, 1, 13), [7, 6])
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        assert same_bits(logits, want_logits)
        assert len(decoder.weights_of(0)) == len(fresh.weights_of(0)) == 3


def test_a_prompt_shorter_than_a_chunk_is_the_base_model():
    shape = small(ttt=options(chunk=14))
    parameters = random_parameters(shape, 0)
    base = small(ttt_layers=(), ttt=None)
    tokens = random_tokens(shape, 0, 1, 13)
    with_ttt, logits = feed(Decoder(shape, parameters), tokens, [10, 3])
    without, base_logits = feed(Decoder(base, parameters), tokens, [10, 3])
    assert all(same_bits(a, b) for a, b in zip(with_ttt, without, strict=True))
    assert same_bits(logits, base_logits)
    moved, _ = feed(Decoder(SMALL, parameters), tokens, [10, 3])
    assert same_bits(moved[0][:, :5], with_ttt[0][:, :5])
    assert not same_bits(moved[0][:, 5:], with_ttt[0][:, 5:])


def test_targets_are_the_layers_inputs_or_the_embeddings():
    own, _, _ = generate(SMALL, [13])
    shared, _, _ = generate(small(ttt=options(own_targets=False)), [13])
    assert same_bits(own[0][:, :5], shared[0][:, :5])
    assert not same_bits(own[0][:, 5:], shared[0][:, 5:])


# --- against a plain model in float64 ---------------------------------------------------------------------------------


def plain_model(shape: DecoderShape, parameters: dict[str, Array], tokens: Any) -> Array:
    """Logits after the last token of one sequence; attention with loops over heads, queries and keys."""
    assert shape.ttt is not None

    def norm(x: Array, gain: Array) -> Array:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + shape.norm_epsilon) * gain

    x = parameters["embedding.weight"][tokens]
    n, h, half = len(tokens), shape.head_dim, shape.head_dim // 2
    for layer in range(shape.n_layers):
        p = {k.split(".")[2]: v for k, v in parameters.items() if k.startswith(f"layers.{layer}.")}
        a = norm(x, p["attn_norm"])
        q, k, v = ((a @ p[f"{name}_proj"].T).reshape(n, -1, h) for name in "qkv")
        q, k = norm(q, p["qk_norm"][0]), norm(k, p["qk_norm"][1])
        angle = np.arange(n)[:, None] / shape.rotary_base ** (2 * np.arange(half) / h)
        turn = np.exp(1j * angle)[:, None]
        pairs = [(y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k)]
        q, k = (np.concatenate([y.real, y.imag], axis=-1) for y in pairs)
        core = np.zeros((n, shape.n_heads, h))
        for head in range(shape.n_heads):
            kv = head // (shape.n_heads // shape.n_kv_heads)
            for i in range(n):
                first = 0 if shape.window is None else max(0, i - shape.window + 1)
                weights = [math.exp(q[i, head] @ k[j, kv] / math.sqrt(h)) for j in range(first, i + 1)]
                core[i, head] = sum(w * v[j, kv] for w, j in zip(weights, range(first, i + 1), strict=True)) / sum(
                    weights
                )
        x = x + core.reshape(n, -1) @ p["o_proj"].T
        m = norm(x, p["mlp_norm"])
        gate = m @ p["gate_proj"].T
        z, w = gate / (1 + np.exp(-gate)) * (m @ p["up_proj"].T), p["down_proj"]
        if layer in shape.ttt_layers:
            size, rows = shape.ttt.chunk, []
            for begin in range(0, n, size):
                part = slice(begin, begin + size)
                rows.append(z[part] @ w.T)
                if begin + size <= n:
                    padded = np.pad(m[part], ((2, 2), (0, 0)))
                    conv = sum((padded[i : i + size] * p["ttt_conv"][:, i] for i in range(5)), np.zeros_like(m[part]))
                    w = w + shape.ttt.rate * (conv @ p["ttt_proj"]).T @ z[part]
            x = x + np.concatenate(rows)
        else:
            x = x + z @ w.T
    return norm(x[-1], parameters["final_norm.weight"]) @ parameters["embedding.weight"].T


@pytest.mark.parametrize("window", [None, 4])
def test_whole_model_against_plain_numpy(window):
    shape = small(dtype=F64, window=window, kv=KVFormat(name="fp32"))
    parameters = random_parameters(shape, 1)
    tokens = random_tokens(shape, 1, 1, 13)
    got = Decoder(shape, parameters)(tokens).logits
    assert got is not None
    want = plain_model(shape, parameters, tokens[0])
    # A cache in float32 limits the full window; the rows of one call in a window are attended to as they are.
    tolerance = 1e-13 if window else 1e-6
    # Tables of cosines are rounded to the activations, here float64.
    assert np.abs(got[0] - want).max() <= tolerance * np.abs(want).max()


# --- attention --------------------------------------------------------------------------------------------------------


def heads(stream: int, batch: int, n: int, n_heads: int, width: int, fmt: Format = F64) -> Array:
    return round_to(normal(31, stream, (batch, n, n_heads, width)), fmt)


def causal(m: int, n: int) -> Any:
    return np.arange(n)[None, :] <= np.arange(n - m, n)[:, None]


def naive_attention(q: Array, k: Array, v: Array, visible: Any) -> Array:
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, i, head in np.ndindex(*q.shape[:3]):
        scores = {
            j: sum(float(x) * float(y) for x, y in zip(q[b, i, head], k[b, j, head // group], strict=True))
            for j in range(k.shape[1])
            if visible[i, j]
        }
        weights = {j: math.exp(s / math.sqrt(q.shape[3])) for j, s in scores.items()}
        for e in range(q.shape[3]):
            total = sum(w * float(v[b, j, head // group, e]) for j, w in weights.items())
            out[b, i, head, e] = total / sum(weights.values())
    return out


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("m", [1, 3, 9])
def test_attention_against_loops(n_heads, n_kv_heads, m):
    q, k, v = heads(0, 2, m, n_heads, 4), heads(1, 2, 9, n_kv_heads, 4), heads(2, 2, 9, n_kv_heads, 4)
    visible = causal(m, 9)
    got = attention(q, k, v, visible, F64, OpCount())
    want = naive_attention(q, k, v, visible)
    assert np.abs(got - want).max() < 1e-14 * 4
    for fmt, tolerance in ((F32, 1e-6), (BF16, 0.01)):
        narrow = [round_to(x, fmt) for x in (q, k, v)]
        y = attention(narrow[0], narrow[1], narrow[2], visible, fmt, OpCount())
        assert is_in(y, fmt)
        assert np.abs(y - naive_attention(narrow[0], narrow[1], narrow[2], visible)).max() < tolerance


def test_attention_in_bf16_to_the_bit():
    """The rounding points one by one: scores twice and p to float32, sums exact, their quotient to bf16."""
    q, k, v = heads(0, 1, 1, 1, 4, BF16), heads(1, 1, 7, 1, 4, BF16), heads(2, 1, 7, 1, 4, BF16)

    def r(x: Array) -> Array:
        return x.astype(np.float32).astype(np.float64)

    scores = r(r(k[0, :, 0] @ q[0, 0, 0]) * 0.5)  # exact in float64 before it is rounded
    p = r(elementary.exp(scores - scores.max()))
    want = nearest(r(p @ v[0, :, 0]) / r(p.sum()), BF16)
    assert same_bits(attention(q, k, v, np.ones((1, 7), dtype=np.bool_), BF16, OpCount())[0, 0, 0], want)


def test_hidden_keys_have_no_influence():
    q, k, v = heads(0, 1, 5, 2, 4, BF16), heads(1, 1, 9, 1, 4, BF16), heads(2, 1, 9, 1, 4, BF16)
    visible = causal(5, 9)
    visible[:, 2] = False
    want = attention(q, k, v, visible, BF16, OpCount())
    for scale in (0.0, 1e4):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, 2], other_v[:, 2] = 1.0, round_to(np.full(4, scale), BF16)
        assert same_bits(attention(q, other_k, other_v, visible, BF16, OpCount()), want)
    kept = [j for j in range(9) if j != 2]
    assert same_bits(attention(q, k[:, kept], v[:, kept], visible[:, kept], BF16, OpCount()), want)


def test_order_of_the_keys_is_irrelevant_to_the_bit():
    q, k, v = heads(0, 1, 1, 2, 4, BF16), heads(1, 1, 40, 1, 4, BF16), heads(2, 1, 40, 1, 4, BF16)
    everything = np.ones((1, 40), dtype=np.bool_)
    order = np.argsort(normal(3, 3, (40,)))
    want = attention(q, k, v, everything, BF16, OpCount())
    assert same_bits(attention(q, k[:, order], v[:, order], everything, BF16, OpCount()), want)


def test_large_scores_do_not_overflow():
    q, k = np.full((1, 1, 1, 4), 1e4), np.zeros((1, 3, 1, 4))
    k[0, 1] = 1e4
    v = np.arange(12.0).reshape(1, 3, 1, 4)
    got = attention(q, k, v, np.ones((1, 3), dtype=np.bool_), F32, OpCount())
    assert same_bits(got, v[:, 1:2])


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("calls", [[1] * 9, [9], [4, 1, 4], [2, 7]])
def test_windows_hide_the_right_keys(monkeypatch, window, calls):
    """The keys that each query sees, by position, against the definition: the last w tokens, its own included."""
    shape = small(n_layers=1, ttt_layers=(), ttt=None, window=window)
    decoder = Decoder(shape, random_parameters(shape, 0))
    tokens = random_tokens(shape, 0, 1, 9)
    # Every key and value by position, from a model that keeps them all; layer 0 does not depend on attention.
    full = Decoder(replace(shape, window=None), random_parameters(shape, 0))
    full(tokens)
    known = {row.tobytes(): i for i, row in enumerate(full.caches[0].keys[0])}
    assert len(known) == 9
    seen: list[set[int]] = []

    def spy(q: Array, k: Array, v: Array, visible: Any, *rest: Any) -> Array:
        positions = [known[np.ascontiguousarray(row).tobytes()] for row in k[0]]
        for i in range(q.shape[1]):
            seen.append({p for j, p in enumerate(positions) if visible[i, j]})
        return attention(q, k, v, visible, *rest)

    monkeypatch.setattr("ttt_sim.reference.decoder.attention", spy)
    feed(decoder, tokens, calls)
    assert seen == [set(range(max(0, i - window + 1), i + 1)) for i in range(9)]
    assert decoder.caches[0].keys.shape[1] == min(window, 9)
    assert same_bits(decoder.caches[0].keys, full.caches[0].keys[:, -window:])


# --- norms and rotary embedding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_norm_against_its_formula(scale):
    x, gain = normal(1, 0, (2, 3, 8)) * scale, 1 + normal(1, 1, (8,)) / 8
    want = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain
    assert np.abs(rms_norm(x, gain, 1e-6, F64, OpCount()) - want).max() < 1e-14 * np.abs(want).max()
    for fmt in (F32, BF16, F16):
        narrow, g = round_to(x, fmt), round_to(gain, fmt)
        got = rms_norm(narrow, g, 1e-6, fmt, OpCount())
        mean = np.mean(narrow * narrow, axis=-1, keepdims=True)
        unrounded = narrow / np.sqrt(mean + 1e-6)
        assert is_in(got, fmt)
        assert np.abs(got - unrounded * g).max() <= 2.0 ** (1 - fmt.precision) * np.abs(unrounded * g).max()
        if fmt is not F32:  # the rounding before the gain shows; float32 sums of squares are finer than these formats
            assert same_bits(got, nearest(nearest(unrounded, fmt) * g, fmt))


def test_norm_of_zeros_and_of_large_numbers():
    assert same_bits(rms_norm(np.zeros((1, 4)), np.ones(4), 1e-6, BF16, OpCount()), np.zeros((1, 4)))
    assert same_bits(rms_norm(np.full((1, 4), 2.0**60), np.ones(4), 1e-6, BF16, OpCount()), np.ones((1, 4)))


@pytest.mark.parametrize("width", [2, 6, 16])
def test_rotation_pairs_the_halves(width):
    x = normal(2, 0, (1, 5, 3, width))
    cos, sin = elementary.rotary_tables(np.arange(5.0), width, 1e4)
    got = rotate(x, cos, sin, F64, OpCount())
    for n, head, i in np.ndindex(5, 3, width // 2):
        angle = n / 1e4 ** (2 * i / width)
        a, b = x[0, n, head, i], x[0, n, head, i + width // 2]
        assert got[0, n, head, i] == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-14)
        assert got[0, n, head, i + width // 2] == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-14)
    assert same_bits(got[:, 0], x[:, 0])  # position 0


def test_scores_depend_on_the_distance_only():
    q, k = normal(2, 1, (8,)), normal(2, 2, (8,))

    def turned(x: Array, position: float) -> Array:
        cos, sin = elementary.rotary_tables(np.array([position]), 8, 1e4)
        return rotate(x.reshape(1, 1, 1, 8), cos, sin, F64, OpCount()).ravel()

    for distance in (0, 1, 7, 100):
        scores = [turned(q, p + distance) @ turned(k, p) for p in (0.0, 1.0, 50.0, 1000.0)]
        assert np.ptp(scores) < 1e-11
        assert abs(np.linalg.norm(turned(q, distance)) - np.linalg.norm(q)) < 1e-14
    assert abs(turned(q, 3) @ turned(k, 0) - turned(q, 0) @ turned(k, 3)) > 1e-3


def test_positions_go_on_from_call_to_call():
    shape = small(n_layers=1, ttt_layers=(), ttt=None)
    together, apart = (generate(shape, calls)[2].caches[0] for calls in ([9], [4, 5]))
    assert same_bits(together.keys, apart.keys)
    # The same token at another position has another key and the same value.
    decoder = Decoder(shape, random_parameters(shape, 0))
    decoder(np.full((1, 3), 7))
    assert not same_bits(decoder.caches[0].keys[:, 0], decoder.caches[0].keys[:, 1])
    assert same_bits(decoder.caches[0].values[:, 0], decoder.caches[0].values[:, 1])


# --- KV formats -------------------------------------------------------------------------------------------------------

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def rows(scale: float = 1.0, n_heads: int = 2, width: int = 10) -> Array:
    return round_to(normal(3, 0, (2, 5, n_heads, width)) * scale, BF16)


def half(x: float) -> float:
    return float(np.float16(x))


def grouped(x: Array, name: str, group: int) -> Array:
    """Element by element: groups along all heads of a token, the last one maybe short."""
    out = np.zeros_like(x)
    for b, n in np.ndindex(*x.shape[:2]):
        token = x[b, n].ravel()
        for start in range(0, len(token), group):
            part = token[start : start + group]
            low, high = float(part.min()), float(part.max())
            if name == "int4":
                zero, scale = half(low), half((high - low) / 15)
            else:
                zero, scale = half((low + high) / 2), half((high - low) / 12)
            for i, value in enumerate(part.tolist()):
                ratio = (value - zero) / (scale or 1.0)
                if name == "int4":
                    code = float(min(max(round(ratio), 0), 15))
                else:  # ties to the even code of the table
                    code = math.copysign(E2M1[min(range(8), key=lambda c: (abs(E2M1[c] - abs(ratio)), c % 2))], ratio)
                out[b, n].reshape(-1)[start + i] = code * scale + zero
    return nearest(out, BF16)


@pytest.mark.parametrize("name", ["int4", "fp4"])
@pytest.mark.parametrize("group", [1, 4, 8, 16, 20, 32])  # 20 elements per token: short last groups
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 300.0])
def test_four_bit_groups(name, group, scale):
    x = rows(scale)
    got = KVFormat(name=name, group=group).stored(x, BF16)
    assert same_bits(got, grouped(x, name, group))
    if group >= 8:
        assert len(np.unique(got[0, 0].ravel()[:group])) <= 16


@pytest.mark.parametrize("name", ["int4", "fp4"])
def test_groups_of_equal_numbers_are_kept_as_their_zero_point(name):
    x = np.full((1, 1, 2, 8), 1.5)
    assert same_bits(KVFormat(name=name, group=4).stored(x, BF16), x)
    assert same_bits(KVFormat(name=name, group=4).stored(-x, BF16), -x)
    assert same_bits(KVFormat(name=name, group=4).stored(0 * x, BF16), 0 * x)


def test_tie_of_fp4_codes_goes_to_even():
    """Codes 0, 0.5, 1, ...: a group from -6 to 6 has the scale 1, and 2.5 lies between 2 and 3."""
    x = np.array([[[[-6.0, 6.0, 2.5, 3.5, 5.0, -0.25, 0.75, 1.25]]]])
    got = KVFormat(name="fp4", group=8).stored(x, BF16)
    assert got.ravel().tolist() == [-6, 6, 2, 4, 4, 0, 1, 1]


def test_int8_with_a_fixed_scale():
    x = np.array([[[[0.0, 1 / 16, 1 / 32, 3 / 32, -1 / 32, 7.9375, 8.0, -8.0, -100.0, 0.03]]]])
    got = KVFormat(name="int8").stored(x, BF16)
    want = [0, 1 / 16, 0, 1 / 8, 0, 7.9375, 7.9375, -7.9375, -7.9375, 0]
    assert same_bits(got.ravel(), np.array(want))


def test_fp8_with_a_fixed_scale():
    x = np.array([[[[0.0, 1.0, 1.06, -1.07, 448.0, 449.0, 1000.0, -1e6, 2.0**-9, 2.0**-11]]]])
    got = KVFormat(name="fp8").stored(x, BF16)
    assert same_bits(got.ravel(), np.array([0, 1, 1, -1.125, 448, 448, 448, -448, 2.0**-9, 0]))


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 500.0])
def test_scale_of_each_head_and_token(name, scale):
    x = rows(scale)
    x[1, 2, 1] = 0.0  # a head of zeros has no scale
    top = {"int8": 127.0, "fp8": 448.0}[name]
    want = np.zeros_like(x)
    for b, n, head in np.ndindex(*x.shape[:3]):
        factor = half(float(np.abs(x[b, n, head]).max()) / top) or 1.0
        for i, value in enumerate(x[b, n, head].tolist()):
            code = (
                float(round(value / factor))
                if name == "int8"
                else float(nearest(np.array(value / factor), FLOAT8_E4M3))
            )
            want[b, n, head, i] = min(max(code, -top), top) * factor
    got = KVFormat(name=name, per_token_scale=True).stored(x, BF16)
    assert same_bits(got, nearest(want, BF16))
    assert np.abs(got - x).max() <= (0.006 if name == "int8" else 0.045) * np.abs(x).max()


@pytest.mark.parametrize(("name", "fmt"), [("bf16", BF16), ("fp16", F16), ("fp32", F32)])
def test_plain_formats_round(name, fmt):
    x = normal(3, 1, (1, 3, 2, 4))
    assert same_bits(KVFormat(name=name).stored(x, F64), nearest(x, fmt))
    with pytest.raises(InputError, match=r"^kv_append: element"):
        KVFormat(name="fp16").stored(np.full((1, 1, 1, 1), 1e6), F32)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp8", "int8", "fp4", "int4"])
@pytest.mark.parametrize("per_token_scale", [True, False])
def test_tokens_are_stored_independently_and_inputs_stay(name, per_token_scale):
    kv = KVFormat(name=name, group=8, per_token_scale=per_token_scale)
    x = rows()
    before = x.copy()
    x.flags.writeable = False
    whole = kv.stored(x, BF16)
    assert same_bits(x, before)
    assert not np.shares_memory(whole, x)
    assert not np.signbit(whole[whole == 0]).any()
    for b, n in np.ndindex(2, 5):
        assert same_bits(kv.stored(x[b : b + 1, n : n + 1], BF16)[0, 0], whole[b, n])


@pytest.mark.parametrize(
    ("kv", "nbytes"),
    [
        (KVFormat(name="bf16"), 40),
        (KVFormat(name="fp16"), 40),
        (KVFormat(name="fp32"), 80),
        (KVFormat(name="fp8"), 20),
        (KVFormat(name="fp8", per_token_scale=True), 24),
        (KVFormat(name="int8", per_token_scale=True), 24),
        (KVFormat(name="int4", group=20), 14),
        (KVFormat(name="int4", group=8), 22),
        (KVFormat(name="fp4", group=16), 18),
    ],
)
def test_bytes_of_a_token(kv, nbytes):
    assert kv.row_bytes(2, 10) == nbytes


def test_odd_numbers_of_four_bit_elements_fill_a_byte():
    assert KVFormat(name="int4", group=32).row_bytes(1, 5) == 3 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "int3"}, "^KV format: 'int3' is unknown; expected one of fp32, bf16, fp16, fp8, int8, fp4, int4"),
        ({"group": 0}, "^group: is 0, expected a whole number of at least 1"),
        ({"group": -4}, "^group: is -4"),
        ({"group": 2.0}, "^group: is 2.0"),
    ],
)
def test_kv_formats_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        KVFormat(**changes)


# --- shapes and parameters --------------------------------------------------------------------------------------------


def test_parameters():
    shape = small(tied_embeddings=False, ttt_layers=(1,))
    parameters = random_parameters(shape, 0)
    sizes = parameter_shapes(shape)
    assert list(parameters) == list(sizes)
    assert all(parameters[name].shape == size for name, size in sizes.items())
    assert all(is_in(value, BF16) for value in parameters.values())
    assert sizes["lm_head.weight"] == (31, 12)
    assert sizes["layers.1.ttt_proj.weight"] == (12, 12)
    assert "layers.0.ttt_conv.weight" not in sizes
    assert same_bits(random_parameters(shape, 0)["embedding.weight"], parameters["embedding.weight"])
    assert not same_bits(random_parameters(shape, 1)["embedding.weight"], parameters["embedding.weight"])


def test_inputs_stay():
    parameters = random_parameters(SMALL, 0)
    copies = {name: value.copy() for name, value in parameters.items()}
    tokens = random_tokens(SMALL, 0, 2, 13)
    for array in (*parameters.values(), tokens):
        array.flags.writeable = False
    feed(Decoder(SMALL, parameters, 2), tokens, [7, 6])
    assert all(same_bits(value, copies[name]) for name, value in parameters.items())


def test_logits_are_left_out_on_request_and_change_nothing_else():
    tokens = random_tokens(SMALL, 0, 1, 8)
    quiet, loud = (Decoder(SMALL, random_parameters(SMALL, 0)) for _ in range(2))
    assert quiet(tokens[:, :4], logits=False).logits is None
    loud(tokens[:, :4])
    a, b = quiet(tokens[:, 4:]), loud(tokens[:, 4:])
    assert a.logits is not None
    assert b.logits is not None
    assert same_bits(a.logits, b.logits)
    assert a.logits.shape == (1, 31)
    assert same_bits(a.embedded, quiet.parameters["embedding.weight"][tokens[:, 4:]])


def test_a_meter_of_the_callers_is_used():
    meter = Meter()
    decoder = Decoder(SMALL, random_parameters(SMALL, 0), 1, meter)
    decoder(random_tokens(SMALL, 0, 1, 3))
    assert meter.step == 1
    assert {c.layer for c in meter.counts} == {-1, 0, 1}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), dtype=np.int64), r"^tokens: shape is \(2, 3\), expected \(1, at least 1\)"),
        (np.zeros((1, 0), dtype=np.int64), r"^tokens: shape is \(1, 0\)"),
        (np.zeros(3, dtype=np.int64), r"^tokens: shape is \(3,\)"),
        (np.array([[0, 31]]), r"^tokens: ids from 0 to 31, expected 0 to 30"),
        (np.array([[-1, 3]]), r"^tokens: ids from -1 to 3"),
    ],
)
def test_tokens_that_cannot_be(tokens, message):
    decoder = Decoder(SMALL, random_parameters(SMALL, 0))
    with pytest.raises(InputError, match=message):
        decoder(tokens)
    assert decoder.position == 0
    assert decoder.meter.counts == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "^n_heads: is 4, expected a multiple of n_kv_heads, 3"),
        ({"head_dim": 5}, "^head_dim: is 5, expected an even number"),
        ({"window": 0}, "^window: is 0, expected a whole number of at least 1"),
        ({"ttt_layers": (2,)}, r"^ttt_layers: \(2,\), expected layers from 0 to 1"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


def test_parameters_that_do_not_fit():
    parameters = random_parameters(SMALL, 0)
    with pytest.raises(
        InputError, match=r"^parameters\['layers.1.o_proj.weight'\]: got nothing, expected shape \(12, 24\)"
    ):
        Decoder(SMALL, {name: v for name, v in parameters.items() if name != "layers.1.o_proj.weight"})
    with pytest.raises(
        InputError, match=r"^parameters\['final_norm.weight'\]: got shape \(11,\), expected shape \(12,\)"
    ):
        Decoder(SMALL, parameters | {"final_norm.weight": np.ones(11)})
    with pytest.raises(InputError, match=r"^shape: has TTT layers, expected TTT options"):
        Decoder(replace(SMALL, ttt=None), parameters)


def test_overflow_names_the_op():
    shape = small(dtype=F16, kv=KVFormat(name="fp16"))
    parameters = random_parameters(shape, 0)
    parameters["layers.1.gate_proj.weight"] = np.full((20, 12), 65504.0)
    with pytest.raises(InputError, match=r"^gate_proj: element .* largest number of float16"):
        Decoder(shape, parameters)(random_tokens(shape, 0, 1, 3))
