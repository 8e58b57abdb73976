"""What a method is: pure functions from a model and settings to a trace and to the state it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError, UnsupportedError
from ttt_sim.model import Call, MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Trace
from ttt_sim.units import parse_tokens

T = TypeVar("T")

#: What can be simulated of a method. ``prefill``: a prompt from an empty state; ``ask``: a question after a context
#: that was taken in; ``decode``; ``train``: a step of training; ``index``: documents become an index to search.
PhaseName = Literal["prefill", "ask", "decode", "train", "index"]
#: What a method keeps a context in.
Family = Literal["cache", "fast_weights", "state", "training", "retrieval"]
PHASE_NAMES: tuple[PhaseName, ...] = get_args(PhaseName)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one sequence keeps between calls. The open chunk (carry) is taken at its largest, one token short.

    ``fast_weight_bytes``: all weights of its own, ``index_bytes``: what retrieval searches for it. ``far_bytes`` of all
    this lie behind the main memory. ``shared_bytes``: what all sequences keep together, beside it. ``optimiser_bytes``:
    moments that a step keeps for the next.
    """

    kv_bytes: int
    fast_weight_bytes: int = 0
    carry_bytes: int = 0
    index_bytes: int = 0
    far_bytes: int = 0
    shared_bytes: int = 0
    optimiser_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        parts = (self.kv_bytes, self.fast_weight_bytes, self.carry_bytes, self.index_bytes, self.optimiser_bytes)
        return sum(parts)


def _all_tokens(settings: MethodSettings, tokens: int) -> int:
    return tokens


def _chunk_of_ttt(settings: MethodSettings) -> int | None:
    return None if settings.ttt is None else settings.ttt.chunk_tokens


def _whole_context(settings: MethodSettings, tokens: int) -> Call:
    return Call(position=0, tokens=tokens, logits=False)


def _one_step(settings: MethodSettings, tokens: int) -> int:
    return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to adapt a model to a context.

    ``settings(window_tokens, kv_dtype, ttt)`` picks what the method uses; None stands for its own default.
    ``trace(model, settings, scenario)`` is the workload, ``state(model, settings, tokens, dtype)`` what a sequence
    keeps after ``tokens`` tokens with activations of ``dtype``.

    ``family``: what it keeps a context in; ``phases`` that it can run; ``adapts``: the one in which it takes a context
    in. ``held_tokens(settings, tokens)``: tokens before a question about a context of ``tokens`` tokens, where weights
    or an index hold the rest. ``step_tokens`` and ``steps``, with the same arguments: tokens of one step of training,
    and the steps that take a context in. ``batched`` False: every user has a model of its own, so users take turns
    instead of sharing steps.
    ``chunk_tokens(settings)``: decoding so many tokens has one step that costs more than the others; None without any.
    ``uneven_tokens`` steps after that one differ from those that follow. ``reruns_chunk``: it runs all rows of its
    chunk again, so it costs more the more of the context these see.
    ``options``: the class of ``MethodSettings.options``, a frozen dataclass with defaults. ``needs``: features of
    hardware beyond those of inference with a KV cache; ``caveat``: what published work says of its quality, with the
    source.

    ``step_call(settings, tokens)``: what a step of training calls the model with, at a context of ``tokens`` tokens. A
    method that has training but takes a context in by another phase trains after it.
    """

    name: str
    title: str
    settings: Callable[[int | None, str | None, TTTSettings | None], MethodSettings]
    trace: Callable[[Model, MethodSettings, Scenario], Trace]
    state: Callable[[Model, MethodSettings, int, str], State]
    family: Family = "cache"
    phases: tuple[PhaseName, ...] = ("prefill", "ask", "decode")
    adapts: PhaseName = "prefill"
    held_tokens: Callable[[MethodSettings, int], int] = _all_tokens
    step_tokens: Callable[[MethodSettings, int], int] = _all_tokens
    steps: Callable[[MethodSettings, int], int] = _one_step
    batched: bool = True
    options: type[Any] | None = None
    chunk_tokens: Callable[[MethodSettings], int | None] = _chunk_of_ttt
    uneven_tokens: int = 1
    reruns_chunk: bool = False
    needs: tuple[str, ...] = ()
    caveat: str = ""
    step_call: Callable[[MethodSettings, int], Call] = _whole_context


def one_after_another(name: str) -> UnsupportedError:
    """Why a method cannot share a context among context-parallel chips."""
    return UnsupportedError(
        f"method {name} cannot share a context among context-parallel chips: each chunk's gradient is taken at the "
        "weights that the chunk before left, so chunks run one after another"
    )


def options_of(settings: MethodSettings, kind: type[T]) -> T:
    """The options of ``settings``, which must be of this kind."""
    if not isinstance(settings.options, kind):
        raise ConfigError(f"method {settings.name} needs {kind.__name__} and has {settings.options!r}")
    return settings.options


def set_options(settings: MethodSettings, values: Mapping[str, str]) -> MethodSettings:
    """``settings`` with options given as text, each read as what it is declared as.

    Raises:
        ConfigError: the method has no such option, or the value is not one.
    """
    if not values:
        return settings
    options: Any = settings.options
    if not is_dataclass(options) or isinstance(options, type):
        raise ConfigError(f"option {next(iter(values))!r}: method {settings.name} has no options")
    known = tuple(field.name for field in fields(options))
    hints = get_type_hints(type(options))
    read: dict[str, object] = {}
    for name, text in values.items():
        if name not in known:
            raise ConfigError(
                f"unknown option {name!r} of method {settings.name}{did_you_mean(name, known)}; "
                f"options: {', '.join(known)}"
            )
        read[name] = _value(settings.name, name, text, hints[name])
    return replace(settings, options=replace(options, **read))


def _value(method: str, name: str, text: str, hint: Any) -> object:
    """``text`` as a value of the type ``hint``."""
    choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if NoneType in choices and text == "none":
        return None
    wanted = next(choice for choice in choices if choice is not NoneType)
    problem = f"option {name} of method {method}: {text!r}"
    if get_origin(wanted) is Literal:
        allowed = get_args(wanted)
        if text not in allowed:
            raise ConfigError(f"{problem} is not one of {', '.join(allowed)}{did_you_mean(text, allowed)}")
        return text
    if wanted is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{problem} must be true or false")
        return text == "true"
    try:
        if wanted is int:
            return parse_tokens(text) if text[-1:].isalpha() else int(text)
        return wanted(text)
    except (ValueError, ConfigError):
        expected = {int: "a whole number", float: "a number"}.get(wanted, "a value")
        raise ConfigError(f"{problem} must be {expected}" + (" or none" if NoneType in choices else "")) from None
