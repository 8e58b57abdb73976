"""Closed forms against the printed numbers of published tables and hand arithmetic.

The expected numbers are those of docs/workloads.md: model shapes from each model's config.json, and the crossovers,
spikes and intensities derived from them. Bytes are bf16 unless said otherwise.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from ttt_sim.model import TTTSettings
from ttt_sim.model_config import load_model
from ttt_sim.workload import closed_forms as forms

MODELS = ("Qwen3-4B", "Qwen3-8B", "Llama-3.1-8B", "Qwen3-14B", "Qwen3-1.7B")
DEFAULT = TTTSettings()
MIB = 2**20


def chunk(tokens: int) -> TTTSettings:
    return TTTSettings(chunk_tokens=tokens)


@pytest.mark.parametrize(
    ("name", "n_ttt_layers", "kappa", "phi_mib"),
    [
        ("Qwen3-4B", 6, 147456, 285),
        ("Qwen3-8B", 6, 147456, 576),
        ("Llama-3.1-8B", 6, 131072, 672),
        ("Qwen3-14B", 7, 163840, 1190),
        ("Qwen3-1.7B", 5, 114688, 120),
    ],
)
def test_state_sizes(name, n_ttt_layers, kappa, phi_mib):
    model = load_model(name)
    assert len(DEFAULT.layers_of(model)) == n_ttt_layers
    assert forms.kv_bytes_per_token(model) == kappa
    assert forms.fast_weight_bytes(model, DEFAULT) == phi_mib * MIB


@pytest.mark.parametrize(
    ("name", "bf16", "fp32_fast", "fp8_kv", "int4_kv"),
    [
        ("Qwen3-4B", 2027, 4053, 4053, 8107),
        ("Qwen3-8B", 4096, 8192, 8192, 16384),
        ("Llama-3.1-8B", 5376, 10752, 10752, 21504),
        ("Qwen3-14B", 7616, 15232, 15232, 30464),
        ("Qwen3-1.7B", 1097, 2194, 2194, 4389),
    ],
)
def test_state_crossover(name, bf16, fp32_fast, fp8_kv, int4_kv):
    model = load_model(name)
    assert round(forms.state_crossover(model, DEFAULT)) == bf16
    assert round(forms.state_crossover(model, TTTSettings(fast_dtype="fp32"))) == fp32_fast
    assert round(forms.state_crossover(model, DEFAULT, "fp8")) == fp8_kv
    assert round(forms.state_crossover(model, DEFAULT, "int4")) == int4_kv


def test_state_crossover_is_exact():
    # 6 * 2560 * 9728 * 2 B / (2 * 8 * 128 * 36 * 2 B) = 298844160 / 147456 = 6080 / 3
    assert forms.state_crossover(load_model("Qwen3-4B"), DEFAULT) == Fraction(6080, 3)


@pytest.mark.parametrize(
    ("name", "at_1024", "at_4096"),
    [
        ("Qwen3-4B", 3477, 4757),
        ("Qwen3-8B", 5802, 7850),
        ("Llama-3.1-8B", 7167, 9471),
        ("Qwen3-14B", 9535, 12223),
        ("Qwen3-1.7B", 2486, 3584),
    ],
)
def test_windowed_state_crossover(name, at_1024, at_4096):
    model = load_model(name)
    assert round(forms.windowed_state_crossover(model, chunk(1024), 1024)) == at_1024
    assert round(forms.windowed_state_crossover(model, chunk(4096), 1024)) == at_4096


@pytest.mark.parametrize(
    ("name", "batch_8", "batch_32", "flops"),
    [
        ("Qwen3-4B", 2797, 2987, 3328),
        ("Qwen3-8B", 4608, 4992, 4779),
        ("Llama-3.1-8B", 5728, 6232, 5504),
        ("Qwen3-14B", 7688, 8402, 5990),
    ],
)
def test_traffic_and_flop_crossovers(name, batch_8, batch_32, flops):
    model = load_model(name)
    assert round(forms.traffic_crossover(model, DEFAULT, 1024, 8)) == batch_8
    assert round(forms.traffic_crossover(model, DEFAULT, 1024, 32)) == batch_32
    assert round(forms.flop_crossover(model, DEFAULT, 1024)) == flops


def test_flop_crossover_of_the_smallest_model():
    assert round(forms.flop_crossover(load_model("Qwen3-1.7B"), DEFAULT, 1024)) == 3511


def test_traffic_crossover_of_one_sequence_is_the_window():
    assert forms.traffic_crossover(load_model("Qwen3-4B"), DEFAULT, 1024, 1) == 1024


@pytest.mark.parametrize(
    ("name", "spikes", "updates"),
    [
        ("Qwen3-4B", ("1.30", "5.22"), ("0.39", "1.55")),
        ("Qwen3-8B", ("2.68", "10.72"), ("0.82", "3.30")),
        ("Llama-3.1-8B", ("3.09", "12.37"), ("0.93", "3.71")),
        ("Qwen3-14B", ("5.49", "21.95"), ("1.65", "6.62")),
    ],
)
def test_boundary_step(name, spikes, updates):
    model = load_model(name)
    for tokens, spike, update in zip((1024, 4096), spikes, updates, strict=True):
        # TFLOP to two decimals; the table leaves out the 10 C d of the convolution, which changes no printed digit
        assert f"{forms.boundary_flops(model, chunk(tokens)) / 1e12:.2f}" == spike
        assert f"{forms.boundary_update_flops(model, chunk(tokens)) / 1e12:.2f}" == update


@pytest.mark.parametrize(
    ("name", "percent"), [("Qwen3-4B", 5.2), ("Qwen3-8B", 5.8), ("Llama-3.1-8B", 6.5), ("Qwen3-14B", 6.1)]
)
def test_update_share_of_linear_flops(name, percent):
    model = load_model(name)
    shares = [float(100 * forms.update_share(model, chunk(tokens))) for tokens in (512, 1024, 4096)]
    assert {f"{share:.1f}" for share in shares} == {str(percent)}
    assert max(shares) - min(shares) < 5e-3  # independent of C to three digits


def test_update_share_of_the_same_mlp():
    assert f"{float(forms.mlp_update_share(load_model('Qwen3-4B'))):.2f}" == "0.42"


@pytest.mark.parametrize(("tokens", "intensity"), [(512, 227), (1024, 409), (2048, 680), (4096, 1019)])
def test_update_intensity(tokens, intensity):
    assert round(forms.update_intensity(load_model("Qwen3-4B"), tokens)) == intensity


@pytest.mark.parametrize(
    ("name", "tokens"), [("Qwen3-4B", 690), ("Qwen3-8B", 653), ("Llama-3.1-8B", 650), ("Qwen3-14B", 638)]
)
def test_compute_bound_chunk(name, tokens):
    # At a machine balance of 989 TFLOP/s / 3.35 TB/s = 295 FLOP/B; 4B: 690.51, printed as "about 690"
    found = forms.compute_bound_chunk(load_model(name), Fraction(295))
    assert found is not None
    assert abs(found - tokens) < Fraction(6, 10)
    assert forms.update_intensity(load_model(name), 10**12) > 295
    assert forms.compute_bound_chunk(load_model(name), Fraction(10**6)) is None


@pytest.mark.parametrize(
    ("name", "tokens"), [("Qwen3-4B", 2027), ("Qwen3-8B", 3072), ("Llama-3.1-8B", 3186), ("Qwen3-14B", 3956)]
)
def test_replay_breakeven(name, tokens):
    assert round(forms.replay_breakeven_tokens(load_model(name))) == tokens


def test_decode_bytes_example():
    # Qwen3-4B, 32 sequences of 32K: 8.04 GB weights + 32 * 32768 * 147456 B = 162.7 GB, against 22.1 GB with a window
    model = load_model("Qwen3-4B")
    assert f"{float(forms.decode_bytes_kv(model, 32768, 32)) / 1e9:.1f}" == "162.7"
    windowed = forms.decode_bytes_ttt(model, DEFAULT, 32768, 32, window_tokens=1024)
    assert f"{float(windowed) / 1e9:.1f}" == "22.1"


@pytest.mark.parametrize("name", MODELS)
def test_decode_bytes_cross_where_the_closed_form_says(name):
    model = load_model(name)
    for batch in (1, 8, 32):
        tokens = forms.traffic_crossover(model, DEFAULT, 1024, batch)
        whole = int(tokens)
        windowed = forms.decode_bytes_ttt(model, DEFAULT, whole, batch, window_tokens=1024)
        assert forms.decode_bytes_kv(model, whole, batch) <= windowed
        assert forms.decode_bytes_kv(model, whole + 1, batch) > windowed


def test_state_at_128k():
    # KV 19.3 GB against 0.51 GB: 37.7 times smaller
    model, tokens = load_model("Qwen3-4B"), 131072
    kappa = forms.kv_bytes_per_token(model)
    held = forms.fast_weight_bytes(model, DEFAULT) + 1024 * kappa + forms.official_carry_bytes(model, DEFAULT)
    assert f"{float(tokens * kappa) / 1e9:.1f}" == "19.3"
    assert f"{float(held) / 1e9:.2f}" == "0.51"
    assert f"{float(tokens * kappa / held):.1f}" == "37.7"


def test_attention_flops_at_128k():
    # 38.7 GFLOP per token with full attention, 0.60 with a window of 1024; the update adds 0.38
    model, tokens = load_model("Qwen3-4B"), 131072
    assert f"{forms.attention_flops(model, tokens) / tokens / 1e9:.1f}" == "38.7"
    assert f"{forms.attention_flops(model, tokens, window_tokens=1024) / tokens / 1e9:.2f}" == "0.60"
    assert f"{6 * forms.update_flops(model, DEFAULT) / 1024 / 1e9:.2f}" == "0.38"


@pytest.mark.parametrize(("tokens", "before", "window"), [(5, 0, None), (5, 3, None), (5, 0, 3), (4, 2, 3), (6, 9, 1)])
def test_visible_pairs_counted_one_by_one(tokens, before, window):
    seen = sum(min(window or 10**9, before + i) for i in range(1, tokens + 1))
    assert forms.visible_pairs(tokens, before, window) == seen


def test_weight_bytes_per_token_against_kv_append():
    # Qwen3-4B: 285 KiB written per token at C = 1024, 71 KiB at 4096, against an append of 144 KiB
    model = load_model("Qwen3-4B")
    per_chunk = 6 * forms.weight_write_bytes(model, "bf16", "fused").written
    assert per_chunk / 1024 == 285 * 1024
    assert round(per_chunk / 4096 / 1024) == 71
    assert forms.kv_bytes_per_token(model) == 144 * 1024
    assert per_chunk / forms.state_crossover(model, DEFAULT) == forms.kv_bytes_per_token(model)  # C_write = T_state


def test_official_carry_traffic():
    # C = 4096, six layers of Qwen3-4B: 120 MiB read and 120 MiB written per token
    read, written = forms.official_carry_traffic(load_model("Qwen3-4B"), chunk(4096))
    assert round(read / MIB) == 120
    assert round(written / MIB) == 120
    assert written - read == 2 * 6 * 2560 * 2


@pytest.mark.parametrize(
    ("variant", "read", "written"),
    [("official", 6, 6), ("fused", 2, 2), ("resident", 2, 2), ("tile_wise", 2, 2), ("master", 4, 6)],
)
def test_weight_write_bytes_per_element(variant, read, written):
    model = load_model("Qwen3-4B")
    found = forms.weight_write_bytes(model, "bf16", variant)
    assert found == (2560 * 9728 * read, 2560 * 9728 * written)


def test_extra_parameters_of_ttt_layers():
    # Projection d^2 and taps 5 d per TTT layer: Qwen3-4B 39.4 M, 8B models 100.8 M, Qwen3-14B 183.7 M
    for name, millions in (("Qwen3-4B", 39.4), ("Qwen3-8B", 100.8), ("Llama-3.1-8B", 100.8), ("Qwen3-14B", 183.7)):
        model = load_model(name)
        extra = len(DEFAULT.layers_of(model)) * (model.d_model**2 + 5 * model.d_model)
        assert f"{extra / 1e6:.1f}" == str(millions)
