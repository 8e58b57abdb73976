"""What a method is: pure functions from a model and settings to a trace and to the state it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ttt_sim.model import MethodSettings, Model, Scenario, TTTSettings
from ttt_sim.ops import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one sequence keeps between calls. The open chunk (carry) is taken at its largest, one token short."""

    kv_bytes: int
    fast_weight_bytes: int = 0
    carry_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.fast_weight_bytes + self.carry_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to remember a context.

    ``settings(window_tokens, kv_dtype, ttt)`` picks what the method uses; None stands for its own default.
    ``trace(model, settings, scenario)`` is the workload, ``state(model, settings, tokens, dtype)`` what a sequence
    keeps after ``tokens`` tokens with activations of ``dtype``.
    """

    name: str
    title: str
    settings: Callable[[int | None, str | None, TTTSettings | None], MethodSettings]
    trace: Callable[[Model, MethodSettings, Scenario], Trace]
    state: Callable[[Model, MethodSettings, int, str], State]
