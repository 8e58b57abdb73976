"""A server as a process model in SimPy: arrivals, admission, batching, swapping. Time is in whole picoseconds.

The server does one step after the other. Before each it admits waiting requests, first come first served, while there
is room; then it runs a prefill call if a prompt is under way, else one decode step of all sequences. What a sequence
keeps is there from its admission on, and grows by pages. Where a step would need more than the memory has, the youngest
sequence leaves: its state goes to the host, or is forgotten and computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import simpy

from ttt_sim.ops import IntArray
from ttt_sim.serving.requests import Request
from ttt_sim.serving.steps import Cost, Room

#: When prompts are computed: before any sequence goes on, or one call and one decode step in turn.
Policy = Literal["prefill_first", "alternate"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
StepKind = Literal["prefill", "decode", "swap_out", "swap_in"]


class Times(Protocol):
    """What steps take: :class:`ttt_sim.serving.steps.StepTimes`, or anything that stands for it."""

    def ordinary(self, positions: IntArray) -> Cost: ...

    def n_completing(self, positions: IntArray) -> int: ...

    def added(self, positions: IntArray) -> Cost: ...

    def completing(self, n: int) -> Cost: ...

    def prefill(self, position: int, tokens: int, *, logits: bool) -> Cost: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The way out of the main memory, each chip over a link of its own. ``capacity`` in bytes for one chip, None for a
    host that holds everything. ``pj_per_byte`` of all chips together, for a byte of each."""

    ps_per_byte: float
    latency_ps: int
    pj_per_byte: float
    capacity: int | None


class Step(NamedTuple):
    """One thing that the server did. ``batch``: sequences in the step, ``tokens`` that it put in, ``completing``: of
    its sequences, those that completed a chunk, ``waiting``: requests not admitted, ``used_bytes`` of one chip's room
    for sequences."""

    start_ps: int
    ps: int
    kind: StepKind
    batch: int
    tokens: int
    completing: int
    waiting: int
    used_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Served:
    """What became of a request, in ps, -1 until it has come. ``tokens`` whose state is held, ``made`` outputs."""

    number: int
    request: Request
    admitted_ps: int = -1
    first_token_ps: int = -1
    finished_ps: int = -1
    longest_gap_ps: int = 0
    swaps: int = 0
    recomputes: int = 0
    tokens: int = 0
    made: int = 0
    swapped: bool = False
    last_token_ps: int = -1

    @property
    def to_compute(self) -> int:
        """Tokens of its next prefill: the prompt, and all that it has made when it is computed again."""
        return self.request.prompt_tokens + self.made

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the state that it is admitted with."""
        return self.tokens if self.swapped else self.to_compute


@dataclass(slots=True, kw_only=True, eq=False)
class Server:
    """One run. ``gaps_ps``: times between two tokens of a sequence, in an array for each step that gave tokens."""

    requests: Sequence[Request]
    times: Times
    room: Room
    most_sequences: int
    call_tokens: int
    policy: Policy = "prefill_first"
    swap: Swap | None = None
    served: list[Served] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    gaps_ps: list[IntArray] = field(default_factory=list)
    dynamic_pj: int = 0
    recomputed_tokens: int = 0
    _waiting: deque[Served] = field(default_factory=deque)
    _prompts: deque[Served] = field(default_factory=deque)  # admitted, prompt not yet computed
    _computed: int = 0  # tokens of the first of them
    _running: list[Served] = field(default_factory=list)
    _swapped_bytes: int = 0
    _finished: int = 0
    _arrived: simpy.Event = field(init=False)

    def run(self) -> None:
        """Serve all requests."""
        env = simpy.Environment()
        self._arrived = env.event()
        env.process(self._arrive(env))
        env.process(self._serve(env))
        env.run()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _arrive(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        self.served = [Served(number=number, request=request) for number, request in enumerate(self.requests)]
        for one in self.served:
            yield env.timeout(one.request.arrival_ps - env.now)
            self._waiting.append(one)
            if not self._arrived.triggered:
                self._arrived.succeed()

    def _serve(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        after_call = False
        while self._finished < len(self.requests):
            if not (self._waiting or self._prompts or self._running):
                self._arrived = env.event()
                yield self._arrived
            yield from self._admit(env)
            turn = self.policy == "alternate" and after_call and bool(self._running)
            after_call = bool(self._prompts) and not turn
            if after_call:
                yield from self._call(env)
            elif self._running:
                yield from self._decode(env)

    def _step(
        self, env: simpy.Environment, kind: StepKind, cost: Cost, *, batch: int, tokens: int, completing: int = 0
    ) -> simpy.Event:
        """Note a step that begins now; the event of its end."""
        self.steps.append(
            Step(int(env.now), cost.ps, kind, batch, tokens, completing, len(self._waiting), self._used_bytes())
        )
        self.dynamic_pj += cost.pj
        return env.timeout(cost.ps)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _positions(self) -> IntArray:
        return np.array([one.tokens for one in self._running], dtype=np.int64)

    def _used_bytes(self) -> int:
        reserved = sum(self.room.of_one(one.to_compute) for one in self._prompts)
        return reserved + int(self.room.of(self._positions()).sum())

    def _admit(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """Take waiting requests in while they fit, with a page to spare for each sequence that grows."""
        while self._waiting:
            active = len(self._prompts) + len(self._running)
            one = self._waiting[0]
            needed = self._used_bytes() + self.room.of_one(one.reserved_tokens)
            if active and (
                active >= self.most_sequences or needed + active * self.room.page_bytes > self.room.for_state
            ):
                return
            self._waiting.popleft()
            one.admitted_ps = int(env.now) if one.admitted_ps < 0 else one.admitted_ps
            if not one.swapped:
                self._prompts.append(one)
                continue
            nbytes = self.room.of_one(one.tokens)
            self._swapped_bytes -= nbytes
            one.swapped = False
            self._running.append(one)
            yield self._step(env, "swap_in", self._swap_cost(nbytes), batch=1, tokens=0)

    def _make_room(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """Send the youngest sequences away until each of the others can take another token."""
        while self._running:
            reserved = sum(self.room.of_one(one.to_compute) for one in self._prompts)
            if reserved + int(self.room.of(self._positions() + 1).sum()) <= self.room.for_state:
                return
            one = max(self._running, key=lambda other: other.number)
            self._running.remove(one)
            self._waiting.appendleft(one)
            nbytes = self.room.of_one(one.tokens)
            fits = self.swap is not None and (
                self.swap.capacity is None or self._swapped_bytes + nbytes <= self.swap.capacity
            )
            if fits:
                one.swapped, one.swaps = True, one.swaps + 1
                self._swapped_bytes += nbytes
                yield self._step(env, "swap_out", self._swap_cost(nbytes), batch=1, tokens=0)
            else:
                one.tokens, one.recomputes = 0, one.recomputes + 1
                self.recomputed_tokens += one.to_compute - 1

    def _swap_cost(self, nbytes: int) -> Cost:
        assert self.swap is not None
        return Cost(self.swap.latency_ps + round(nbytes * self.swap.ps_per_byte), round(nbytes * self.swap.pj_per_byte))

    # --- steps --------------------------------------------------------------------------------------------------------

    def _call(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """The next call of the first prompt; its last one gives a token."""
        one = self._prompts[0]
        position, total = self._computed, one.to_compute
        tokens = min(self.call_tokens, total - position)
        last = position + tokens == total
        cost = self.times.prefill(position, tokens, logits=last)
        yield self._step(env, "prefill", cost, batch=1, tokens=tokens)
        self._computed += tokens
        if not last:
            return
        self._prompts.popleft()
        self._computed, one.tokens = 0, total
        now = int(env.now)
        if one.first_token_ps < 0:
            one.first_token_ps = now
        else:
            self.gaps_ps.append(np.array([now - one.last_token_ps], dtype=np.int64))
            one.longest_gap_ps = max(one.longest_gap_ps, now - one.last_token_ps)
        self._running.append(one)
        self._take_token(one, now)

    def _decode(self, env: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """A token for every sequence."""
        yield from self._make_room(env)
        if not self._running:
            return
        positions = self._positions()
        completing = self.times.n_completing(positions)
        ordinary, extra = self.times.ordinary(positions), self.times.added(positions)
        cost = Cost(ordinary.ps + extra.ps, ordinary.pj + extra.pj)
        n = len(self._running)
        yield self._step(env, "decode", cost, batch=n, tokens=n, completing=completing)
        now = int(env.now)
        gaps = now - np.array([one.last_token_ps for one in self._running], dtype=np.int64)
        self.gaps_ps.append(gaps)
        for one, gap in zip(tuple(self._running), gaps.tolist(), strict=True):
            one.tokens += 1
            one.longest_gap_ps = max(one.longest_gap_ps, gap)
            self._take_token(one, now)

    def _take_token(self, one: Served, now: int) -> None:
        one.made += 1
        one.last_token_ps = now
        if one.made == one.request.output_tokens:
            one.finished_ps = now
            self._running.remove(one)
            self._finished += 1
