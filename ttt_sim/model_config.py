"""Models and TTT settings from files: Hugging Face ``config.json`` as it is, and small YAML or JSON settings files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ttt_sim.config.yaml_reader import Problems, YamlList, YamlNode, YamlScalar, describe, read_yaml
from ttt_sim.data_files import did_you_mean, find, names
from ttt_sim.errors import ConfigError
from ttt_sim.model import Carry, Contraction, Convolution, Model, Target, TTTSettings, WeightWrite
from ttt_sim.units import parse_tokens

_FOLDER, _SUFFIX = "model_configs", ".json"
#: Supported ``model_type`` values, with what their configuration classes assume when the file is silent.
_FAMILIES: Mapping[str, Mapping[str, int | None]] = {
    "llama": {"head_dim": None, "max_position_embeddings": 2048},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768},
}
#: Names under which model families give their number of experts.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
#: No dimension of a real model comes near; beyond it byte and FLOP counts could leave 64 bits.
_LARGEST_DIMENSION = 2**24
_LARGEST_CONTEXT = 2**40

#: Formats in which a weight can be updated; int8, for chips that have nothing wider, can be simulated but not executed.
FAST_DTYPES: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp8", "int8")

#: Settings by name, with their sources.
PRESETS: Mapping[str, TTTSettings] = {
    # Layers 0, 6, 12, ...; the chunk that the paper prefers for speed among its two best; rate and the rest as in the
    # released configuration files.
    "default": TTTSettings(),
    # The paper's text (arXiv 2604.06169): embeddings as targets, causal convolution, clip used with Qwen3-4B. It states
    # no rate. Deltas clipped to 1e-5 are lost in a 16-bit weight, so the weight is fp32 here.
    "paper": TTTSettings(target="input_embed", convolution="causal", clip=1e-5, fast_dtype="fp32"),
    # Defaults of the released configuration classes (github.com/ByteDance-Seed/In-Place-TTT, commit be2324829b0e).
    "released_class": TTTSettings(layers=(0, 6, 12, 18, 24, 30), chunk_tokens=8192, rate=0.3),
    # The YAML files released beside them.
    "released_yaml": TTTSettings(layers=(0, 6, 12, 18, 24, 30, 36), chunk_tokens=4096, rate=3.0),
    # For the model ``toy``: two of its four layers, chunks short enough to see several in a small run.
    "toy": TTTSettings(layers=(0, 2), chunk_tokens=32),
}


def model_names() -> list[str]:
    """Names of the built-in models."""
    return names(_FOLDER, _SUFFIX)


def load_model(name_or_path: str | Path) -> Model:
    """A built-in model by name, or any Llama or Qwen3 ``config.json`` (or the folder that holds one).

    Keys that do not bear on cost are ignored. Raises :class:`ConfigError` that names file, line and key: unknown model,
    unreadable file, another model family, missing or impossible values.
    """
    text = str(name_or_path)
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    elif not (path.is_file() or path.suffix == _SUFFIX or len(path.parts) > 1):
        path = find(_FOLDER, text, _SUFFIX)
    source = _Config(path)
    family = source.family()
    source.refuse_other_mlps()
    defaults = _FAMILIES[family]
    d_model, n_heads = source.integer("hidden_size"), source.integer("num_attention_heads")
    head_dim = source.optional_integer("head_dim", defaults["head_dim"])
    if head_dim is None:
        if d_model % n_heads:
            source.fail(
                "num_attention_heads", f"is {n_heads}, which does not divide hidden_size {d_model}; give head_dim"
            )
        head_dim = d_model // n_heads
    n_kv_heads = source.optional_integer("num_key_value_heads", n_heads)
    assert n_kv_heads is not None
    if n_heads % n_kv_heads:
        source.fail("num_key_value_heads", f"is {n_kv_heads}, expected a divisor of num_attention_heads {n_heads}")
    context = source.optional_integer("max_position_embeddings", defaults["max_position_embeddings"], _LARGEST_CONTEXT)
    assert context is not None
    return Model(
        name=(path.resolve().parent.name or path.stem) if path.name == "config.json" else path.stem,
        family=family,
        n_layers=source.integer("num_hidden_layers"),
        d_model=d_model,
        d_ff=source.integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=source.integer("vocab_size"),
        tied_embeddings=source.boolean("tie_word_embeddings", default=False),
        qk_norm=family == "qwen3",
        max_context_tokens=context,
    )


class _Config:
    """One JSON object of a file, with the lines of its keys for messages."""

    def __init__(self, path: Path) -> None:
        self._label = str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text") from None
        self._lines = _top_level_lines(text)
        try:
            values = json.loads(text, object_pairs_hook=self._unique)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from None
        except RecursionError:
            raise ConfigError(f"{path}: is nested too deeply") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}:1: must be a JSON object such as a Hugging Face config.json")
        self._values: dict[str, Any] = values

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                self.fail(key, "is given twice")
            found[key] = value
        return found

    def fail(self, key: str, what: str) -> None:
        line = self._lines.get(key)
        raise ConfigError(f"{self._label}:{line or 1}: {key}: {what}")

    def family(self) -> Literal["llama", "qwen3"]:
        value = self._values.get("model_type")
        if not isinstance(value, str) or value not in _FAMILIES:
            shown = "is missing" if "model_type" not in self._values else f"is {json.dumps(value)}"
            hint = did_you_mean(value, tuple(_FAMILIES)) if isinstance(value, str) else ""
            self.fail("model_type", f"{shown}{hint}; supported model families: {', '.join(_FAMILIES)}")
        return cast(Literal["llama", "qwen3"], value)

    def refuse_other_mlps(self) -> None:
        """Fail for an MLP that is not one gated SiLU MLP per layer: its costs would be others."""
        for key in _EXPERT_KEYS:
            if self._values.get(key) not in (None, 0, 1):
                self.fail(key, f"is {_short(self._values[key])}; mixtures of experts are not supported")
        if self._values.get("hidden_act", "silu") != "silu":
            self.fail("hidden_act", f"is {_short(self._values['hidden_act'])}, expected silu")

    def integer(self, key: str) -> int:
        if self._values.get(key) is None:
            near = did_you_mean(key, tuple(self._values))
            self.fail(key, f"is missing{near}")
        value = self.optional_integer(key, None)
        assert value is not None
        return value

    def optional_integer(self, key: str, default: int | None, largest: int = _LARGEST_DIMENSION) -> int | None:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            self.fail(key, f"is {_short(value)}, expected a whole number from 1 to {largest}")
        return cast(int, value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"is {_short(value)}, expected true or false")
        return cast(bool, value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _top_level_lines(text: str) -> dict[str, int]:
    """Line of each key of the outermost object (its last, where a key is given twice)."""
    lines: dict[str, int] = {}
    depth, line, end = 0, 1, 0
    for match in re.finditer(r'("(?:[^"\\\n]|\\.)*")(\s*:)?|[\[{]|[\]}]', text):
        line += text.count("\n", end, match.start())
        end = match.start()
        if match.group(1):
            if match.group(2) and depth == 1:
                lines[match.group(1)[1:-1]] = line
        else:
            depth += 1 if match.group() in "[{" else -1
    return lines


# --- TTT settings -----------------------------------------------------------------------------------------------------


def load_ttt(name_or_path: str | Path, **overrides: object) -> TTTSettings:
    """A preset of :data:`PRESETS` by name, or a YAML or JSON file with fields of :class:`TTTSettings`; then
    ``overrides``.

    A file states what differs from the preset ``default``. Raises :class:`ConfigError`.
    """
    text = str(name_or_path)
    path = Path(text)
    if text in PRESETS:
        settings = PRESETS[text]
    elif path.is_file() or path.suffix in (".yaml", ".yml", ".json"):
        settings = _read_ttt(path)
    else:
        known = tuple(PRESETS)
        raise ConfigError(
            f"unknown TTT settings {text!r}{did_you_mean(text, known)}; presets: {', '.join(known)}; or give the path "
            "of a .yaml or .json file"
        )
    known = tuple(field.name for field in fields(TTTSettings))
    for name in overrides:
        if name not in known:
            raise ConfigError(f"unknown TTT setting {name!r}{did_you_mean(name, known)}; settings: {', '.join(known)}")
    settings = replace(settings, **cast(dict[str, Any], overrides))
    try:
        check_ttt(settings)
    except ConfigError as error:
        raise ConfigError(f"{text}: {error}") from None
    return settings


def check_ttt(settings: TTTSettings, model: Model | None = None) -> None:
    """Raise :class:`ConfigError` for settings that cannot be, in themselves or (where given) for ``model``."""
    for field in fields(settings):
        problem = _problem(field.name, getattr(settings, field.name))
        if problem:
            raise ConfigError(f"TTT setting {field.name}: {problem}")
    if settings.weight_write == "master" and settings.fast_dtype == "fp32":
        raise ConfigError(
            "TTT setting weight_write: master keeps an fp32 copy of a narrower weight, but fast_dtype is fp32"
        )
    if settings.contraction == "outer_first" and not settings.projection:
        raise ConfigError("TTT setting contraction: outer_first orders a projection, but projection is off")
    if model is not None and not settings.layers_of(model):
        raise ConfigError(
            f"TTT setting layers: none of {_short(settings.layers)} exists in {model.name}, which has layers "
            f"0 to {model.n_layers - 1}"
        )
    if model is not None and settings.rows_of(model) > model.d_model:
        raise ConfigError(
            f"TTT setting update_rows: is {settings.update_rows}, but a down projection of {model.name} has "
            f"{model.d_model} rows"
        )


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "target": get_args(Target),
    "convolution": get_args(Convolution),
    "fast_dtype": FAST_DTYPES,
    "carry": get_args(Carry),
    "weight_write": get_args(WeightWrite),
    "contraction": get_args(Contraction),
}


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with one setting, None if nothing is."""
    if name in _CHOICES:
        allowed = _CHOICES[name]
        if value in allowed:
            return None
        return f"is {value!r}{did_you_mean(str(value), allowed)}; allowed: {', '.join(allowed)}"
    if name == "layers":
        fits = value is None or (
            isinstance(value, tuple) and value != () and all(_is_int(layer) and layer >= 0 for layer in value)
        )
        return None if fits else f"is {value!r}, expected layer numbers from 0, or nothing for every sixth layer"
    if name == "chunk_tokens":
        return (
            None
            if _is_int(value) and 1 <= value <= _LARGEST_DIMENSION
            else (f"is {value!r}, expected a whole number from 1 to {_LARGEST_DIMENSION}")
        )
    if name == "update_rows":
        return (
            None
            if value is None or (_is_int(value) and 1 <= value <= _LARGEST_DIMENSION)
            else (f"is {value!r}, expected a whole number from 1 to {_LARGEST_DIMENSION}, or nothing for all rows")
        )
    if name == "projection":
        return None if isinstance(value, bool) else f"is {value!r}, expected true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if number or (name == "clip" and value is None):
        return None
    return f"is {value!r}, expected a finite number above 0" + (", or nothing for no clip" if name == "clip" else "")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_ttt(path: Path) -> TTTSettings:
    tree, _ = read_yaml(path, str(path))
    known = tuple(field.name for field in fields(TTTSettings))
    problems, values = Problems(), dict[str, Any]()
    for key, node in tree.entries.items():
        if key not in known:
            problems.add(tree.key_places[key], key, f"unknown key{did_you_mean(key, known)}; keys: {', '.join(known)}")
            continue
        try:
            values[key] = _READERS.get(key, _text)(node)
            problem = _problem(key, values[key])
        except (ValueError, ConfigError) as error:
            problem = str(error)
        if problem:
            problems.add(node.place, key, problem)
    problems.raise_if_any()
    return replace(PRESETS["default"], **values)


def _text(node: YamlNode) -> str:
    if not isinstance(node, YamlScalar):
        raise ValueError(f"expected one value, found {describe(node)}")
    return node.text


def _number(node: YamlNode) -> float:
    text = _text(node)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"is {text!r}, expected a number") from None


def _integer(node: YamlNode) -> int:
    text = _text(node)
    if not re.fullmatch(r"\d{1,15}", text):
        raise ValueError(f"is {text!r}, expected a whole number from 0")
    return int(text)


def _boolean(node: YamlNode) -> bool:
    text = _text(node)
    if text not in ("true", "false"):
        raise ValueError(f"is {text!r}, expected true or false")
    return text == "true"


def _absent(node: YamlNode) -> bool:
    return isinstance(node, YamlScalar) and node.text in ("", "null", "~")


def _layers(node: YamlNode) -> tuple[int, ...] | None:
    if _absent(node):
        return None
    if not isinstance(node, YamlList):
        raise ValueError(f"expected a list of layer numbers, found {describe(node)}")
    return tuple(_integer(item) for item in node.items)


_READERS: Mapping[str, Callable[[YamlNode], Any]] = {
    "layers": _layers,
    "chunk_tokens": lambda node: parse_tokens(_text(node)),
    "rate": _number,
    "clip": lambda node: None if _absent(node) else _number(node),
    "projection": _boolean,
    "update_rows": lambda node: None if _absent(node) else _integer(node),
}
