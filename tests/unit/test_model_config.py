"""Hugging Face configurations as they are, built-in models, and TTT settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.trace_tools import TOY
from ttt_sim.errors import ConfigError
from ttt_sim.model import TTTSettings
from ttt_sim.model_config import PRESETS, check_ttt, load_model, load_ttt, model_names

#: As published with the model, keys that do not bear on cost included.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
    "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def write(folder: Path, values: dict[str, object], name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "params", "blocks"),
    [
        ("Qwen3-1.7B", 1.72, 1.41),
        ("Qwen3-4B", 4.02, 3.63),
        ("Qwen3-8B", 8.19, 6.95),
        ("Llama-3.1-8B", 8.03, 6.98),
        ("Qwen3-14B", 14.77, 13.21),
    ],
)
def test_built_in_models_have_their_parameters(name, params, blocks):
    model = load_model(name)
    assert model.name == name
    assert round(model.parameters / 1e9, 2) == params
    assert round(model.block_parameters / 1e9, 2) == blocks
    assert model.qk_norm is name.startswith("Qwen3")


def test_toy():
    assert load_model("toy") == TOY
    assert "toy" in model_names()


@pytest.mark.parametrize(("values", "name"), [(LLAMA, "Llama-3.1-8B"), (QWEN3, "Qwen3-4B")])
def test_published_files_are_read_as_they_are(tmp_path: Path, values, name):
    """A config.json is named after its folder; the folder may be given instead of the file."""
    path = write(tmp_path / name, values)
    assert load_model(path) == load_model(str(path.parent)) == load_model(name)


def test_defaults_of_the_families(tmp_path: Path):
    """What the published configuration classes assume when a key is missing or null."""
    short = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 8, "vocab_size": 1000, "num_key_value_heads": None,
    }  # fmt: skip
    model = load_model(write(tmp_path, short, "small.json"))
    assert (model.name, model.head_dim, model.n_kv_heads, model.tied_embeddings) == ("small", 64, 8, False)
    assert model.max_context_tokens == 2048
    qwen = load_model(write(tmp_path, {**short, "model_type": "qwen3"}, "small.json"))
    assert (qwen.head_dim, qwen.qk_norm, qwen.max_context_tokens) == (128, True, 32768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, 'model_type: is "gpt2"; supported model families: llama, qwen3'),
        ({"model_type": "qwen3_moe"}, 'model_type: is "qwen3_moe", did you mean qwen3?; supported'),
        ({"model_type": None}, "model_type: is null; supported"),
        ({"hidden_size": 0}, "hidden_size: is 0, expected a whole number from 1"),
        ({"hidden_size": -4}, "hidden_size: is -4, expected"),
        ({"hidden_size": "big"}, 'hidden_size: is "big", expected'),
        ({"hidden_size": 4096.0}, "hidden_size: is 4096.0, expected"),
        ({"hidden_size": True}, "hidden_size: is true, expected"),
        ({"hidden_size": 10**12}, "hidden_size: is 1000000000000, expected a whole number from 1 to 16777216"),
        ({"vocab_size": None}, "vocab_size: is missing"),
        (
            {"num_attention_heads": 30},
            "num_attention_heads: is 30, which does not divide hidden_size 4096; give head_dim",
        ),
        ({"num_key_value_heads": 5}, "num_key_value_heads: is 5, expected a divisor of num_attention_heads 32"),
        ({"num_local_experts": 8}, "num_local_experts: is 8; mixtures of experts are not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act: is "gelu", expected silu'),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings: is "no", expected true or false'),
    ],
)
def test_impossible_values_name_file_line_and_key(tmp_path: Path, changes, message):
    path = write(tmp_path, {**LLAMA, **changes})
    starts = [text.startswith(f'  "{next(iter(changes))}":') for text in path.read_text().splitlines()]
    line = 1 + starts.index(True)
    with pytest.raises(ConfigError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


def test_missing_keys(tmp_path: Path):
    values = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    path = write(tmp_path, {**values, "hiden_size": 4096})
    with pytest.raises(ConfigError, match="hidden_size: is missing, did you mean hiden_size"):
        load_model(path)


def test_keys_inside_nested_objects_do_not_count(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"text_config": {"model_type": "llama"},\n "model_type": "bert"}')
    with pytest.raises(ConfigError, match=r'config\.json:2: model_type: is "bert"'):
        load_model(path)


def test_duplicate_keys(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama",\n"hidden_size": 1,\n"hidden_size": 2}')
    with pytest.raises(ConfigError, match=r"config\.json:3: hidden_size: is given twice"):
        load_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\n'a': 1}", r":2: is not valid JSON"),
        (b"[1]", r":1: must be a JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100000, "nested too deeply"),
        (b"", "is not valid JSON"),
    ],
)
def test_files_that_are_not_configurations(tmp_path: Path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_model(path)


def test_unknown_models():
    with pytest.raises(ConfigError, match=r"unknown model 'Qwen3-4b', did you mean Qwen3-4B"):
        load_model("Qwen3-4b")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_model("missing/config.json")


# --- TTT settings -----------------------------------------------------------------------------------------------------


def test_presets():
    assert load_ttt("default") == TTTSettings()
    assert load_ttt("default", chunk_tokens=512, carry="ring") == TTTSettings(chunk_tokens=512, carry="ring")
    paper = load_ttt("paper")
    assert (paper.target, paper.convolution, paper.clip, paper.fast_dtype) == ("input_embed", "causal", 1e-5, "fp32")
    released = load_ttt("released_class")
    assert (released.chunk_tokens, released.rate, released.clip) == (8192, 0.3, None)
    assert (load_ttt("released_yaml").chunk_tokens, load_ttt("released_yaml").rate) == (4096, 3.0)


@pytest.mark.parametrize(("name", "n_layers"), [("Qwen3-8B", 6), ("Llama-3.1-8B", 6), ("Qwen3-14B", 7)])
def test_released_layer_list_meets_the_model(name, n_layers):
    """Layer 36 exists in models of 37 layers or more."""
    assert len(load_ttt("released_yaml").layers_of(load_model(name))) == n_layers


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_possible(name):
    check_ttt(PRESETS[name], TOY)


def test_settings_files(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "layers: [0, 3]\nchunk_tokens: 2k\nrate: 1e-2\ntarget: input_embed\nprojection: false\nconvolution: causal\n"
        "clip: 0.5\nfast_dtype: fp32\ncarry: keep_z\nweight_write: fused\ncontraction: project_first\n"
        "update_rows: 48\n"
    )
    expected = TTTSettings(
        layers=(0, 3), chunk_tokens=2048, rate=0.01, target="input_embed", projection=False, convolution="causal",
        clip=0.5, fast_dtype="fp32", carry="keep_z", weight_write="fused", contraction="project_first",
        update_rows=48,
    )  # fmt: skip
    assert load_ttt(path) == expected
    assert load_ttt(path, rate=2.0).rate == 2.0
    (tmp_path / "my.json").write_text('{"layers": null, "clip": null, "chunk_tokens": 64, "update_rows": null}')
    assert load_ttt(tmp_path / "my.json") == TTTSettings(chunk_tokens=64)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("chunk_token: 3\n", [":1: chunk_token: unknown key, did you mean chunk_tokens", "keys: layers, chunk_tokens"]),
        ("rate: 0\n", [":1: rate: is 0.0, expected a finite number above 0"]),
        ("rate: .nan\n", ["rate: is '.nan', expected a number"]),
        ("rate: nan\n", ["rate: is nan, expected a finite number above 0"]),
        ("rate: fast\n", ["rate: is 'fast', expected a number"]),
        ("rate: [1]\n", ["rate: expected one value, found a list of 1"]),
        ("carry: 3\nrate: 1\nclip: -1\n", [":1: carry: is '3'", ":3: clip: is -1.0, expected a finite number above 0"]),
        ("chunk_tokens: 0\n", ["chunk_tokens: '0' is not a number of tokens"]),
        ("chunk_tokens: 1G\n", ["chunk_tokens: '1G' is not a number of tokens"]),
        ("chunk_tokens: 100M\n", ["chunk_tokens: is 104857600, expected a whole number from 1 to 16777216"]),
        ("layers: 3\n", ["layers: expected a list of layer numbers"]),
        ("layers: []\n", ["layers: is (), expected layer numbers from 0"]),
        ("layers: [-1]\n", ["layers: is '-1', expected a whole number from 0"]),
        ("projection: maybe\n", ["projection: is 'maybe', expected true or false"]),
        ("update_rows: 0\n", [":1: update_rows: is 0, expected a whole number from 1 to", "or nothing for all rows"]),
        ("update_rows: -3\n", ["update_rows: is '-3', expected a whole number from 0"]),
        ("update_row: 3\n", [":1: update_row: unknown key, did you mean update_rows"]),
        ("fast_dtype: int4\n", ["fast_dtype: is 'int4'", "allowed: fp32, bf16, fp16, fp8, int8"]),
        (
            "contraction: outer_first\nprojection: false\n",
            ["my.yaml: TTT setting contraction: outer_first orders a projection, but"],
        ),
    ],
)
def test_broken_settings_files(tmp_path: Path, text, messages):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ttt(path)
    for message in messages:
        assert message in str(caught.value)


def test_unknown_settings():
    with pytest.raises(
        ConfigError, match=r"unknown TTT settings 'papper', did you mean paper.*presets: default, paper"
    ):
        load_ttt("papper")
    with pytest.raises(ConfigError, match="unknown TTT setting 'chunk_token', did you mean chunk_tokens"):
        load_ttt("default", chunk_token=3)
    with pytest.raises(ConfigError, match="carry: is 'keepz', did you mean keep_z"):
        load_ttt("default", carry="keepz")
    with pytest.raises(ConfigError, match="rate: is True, expected a finite number"):
        load_ttt("default", rate=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_ttt("missing.yaml")
