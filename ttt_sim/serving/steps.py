"""What one step of a server takes, from simulated traces, remembered by what the step is composed of.

A *decode step* gives one token to each of n sequences, which are at positions of their own. Its time is the mean, over
these sequences, of the time that n sequences in lockstep would take at that position; where a step costs an affine
function of its positions, that is what their mixture costs. Lockstep steps are simulated at a few positions and are
interpolated linearly between them: along the start of the chunk that a position is in, and along the rows that the
chunk has. Up to 15 sequences every n is simulated, then every n of four significant bits.

Sequences that *complete a chunk* in a step add what a simulated lockstep of so many sequences takes more in the step
that completes its chunk, and what that holds up in the next, than in an ordinary step. Where such a step runs the whole
chunk again, what it adds grows with what the window holds: it is simulated for the first chunk and for one behind a
full window, and interpolated between them by the mean number of the chunks.

A *prefill call* takes the next tokens of one prompt and is a step of its own. Lengths up to 64 are simulated; of every
64 further ones the first and the last are, and those between interpolated, never across the end of a chunk: rows come
in tiles, so time jumps after a multiple of their height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.errors import CapacityError, ConfigError
from ttt_sim.model import ONE_CHIP, Call, MethodSettings, Model, Parallel, Scenario, shard
from ttt_sim.ops import IntArray
from ttt_sim.power import throttled_seconds
from ttt_sim.results import FloatArray
from ttt_sim.serving.requests import PS_PER_S
from ttt_sim.simulation import simulate_trace
from ttt_sim.system import holdings
from ttt_sim.units import ceil_div, format_bytes
from ttt_sim.workload import build_trace, find_method, state_per_sequence

#: Lengths of a prefill call between which times are interpolated.
CALL_STEP_TOKENS = 64
#: Keys that attention takes at a time on most chips.
KEY_BLOCK = 128
#: Sequences whose chunks are completed together at most; more follow in further rounds, which bounds their activations.
UPDATE_GROUP = 8
#: First rows of a chunk that may cost something of their own.
_FIRST_ROWS = 4
#: Shorter chunks leave no ordinary steps to tell apart.
LEAST_CHUNK_TOKENS = 8
PJ_PER_J = 10**12
#: What a served method may do.
SERVED_PHASES = ("prefill", "ask", "decode")
#: Some context, to see where a method keeps it.
_TYPICAL_TOKENS = 4096


class Cost(NamedTuple):
    """Time, and dynamic energy of all chips."""

    ps: int
    pj: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A model with a method on ``parallel.chips`` chips. ``call_tokens``: most tokens of a prefill call."""

    chip: Chip
    model: Model
    method: MethodSettings
    dtype: str
    call_tokens: int
    parallel: Parallel = ONE_CHIP

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens after which a sequence updates its weights; None without."""
        return find_method(self.method.name).chunk_tokens(self.method)

    @property
    def window_tokens(self) -> int | None:
        return self.method.kv.window_tokens

    def weight_bytes(self, tokens: int) -> int:
        """Bytes of frozen weights on one chip, with tables for ``tokens`` positions."""
        trace = build_trace(self.model, self.method, self._decode((tokens - 1,), 1))
        return holdings(trace, self.model.n_layers, pipelined=False).by_stage((), 0)[0]

    def state_bytes(self, tokens: int) -> int:
        """Bytes that a sequence keeps on one chip after ``tokens`` tokens."""
        part = shard(self.model, self.parallel.tp)
        return state_per_sequence(part, self.method, tokens, self.dtype).total_bytes

    def _decode(self, positions: Sequence[int], batch: int) -> Scenario:
        return Scenario.decode(tuple(positions), batch=batch, dtype=self.dtype, parallel=self.parallel)

    def lockstep(self, positions: Sequence[int], batch: int) -> Simulated:
        """Decode steps of ``batch`` sequences at these rising positions."""
        return self._simulate(self._decode(positions, batch))

    def call(self, position: int, tokens: int, *, logits: bool) -> Simulated:
        """A prefill call of one sequence."""
        call = Call(position=position, tokens=tokens, logits=logits)
        return self._simulate(Scenario(batch=1, dtype=self.dtype, calls=(call,), parallel=self.parallel))

    def _simulate(self, scenario: Scenario) -> Simulated:
        trace = build_trace(self.model, self.method, scenario)
        # What sequences keep is accounted for by the server: nothing is to be spilled here.
        result = simulate_trace(self.chip, trace, held_bytes=(1,))
        cycles = np.diff(result.step_finish_cycles(), prepend=0).tolist()
        joules = np.zeros(len(cycles), dtype=np.float64)
        for values in result.dynamic_energy_j().values():
            joules = joules + values
        chip = self.chip
        seconds = [throttled_seconds(chip, c / chip.clock_hz, float(j)) for c, j in zip(cycles, joules, strict=True)]
        return Simulated(np.array(seconds), joules * self.parallel.chips, result.peak_temporary_bytes())


class Simulated(NamedTuple):
    """By step: seconds, joules of all chips. ``peak_bytes`` of activations on one chip."""

    seconds: FloatArray
    joules: FloatArray
    peak_bytes: int


def check_served(model: Model, method: MethodSettings, dtype: str) -> None:
    """Refuse what does not fit a server of independent sequences.

    Raises:
        ConfigError: a method that does more than prefill and decode, has a model per user, or keeps state in common or
            behind the main memory; or chunks of a few tokens.
    """
    found = find_method(method.name)
    if not found.batched or found.adapts != "prefill" or not set(found.phases) <= set(SERVED_PHASES):
        raise ConfigError(
            f"method {method.name} is not served: taking a context in is more than the prefill of a prompt there"
        )
    state = state_per_sequence(model, method, _TYPICAL_TOKENS, dtype)
    if state.shared_bytes or state.far_bytes:
        raise ConfigError(
            f"method {method.name} is not served: the server gives every sequence a state of its own in main memory"
        )
    chunk = found.chunk_tokens(method)
    if chunk is not None and chunk < LEAST_CHUNK_TOKENS:
        raise ConfigError(f"chunk: {chunk} is less than {LEAST_CHUNK_TOKENS} tokens, the shortest that is served")


def batch_between(n: int) -> tuple[int, int]:
    """The simulated numbers of sequences at or below ``n`` and above it: those of at most four significant bits."""
    step = 1 << max(n.bit_length() - 4, 0)
    low = n - n % step
    return low, low + step


def _spread(end: int, bits: int) -> set[int]:
    """Whole numbers up to ``end`` and itself: those up to 8, and of the others those of so many significant bits."""
    few = {digits << shift for digits in range(1 << bits) for shift in range(end.bit_length())}
    return {number for number in {*range(9), *few, end} if number <= end}


def position_knots(longest: int, window_tokens: int | None) -> list[int]:
    """Positions up to ``longest`` at which steps without chunks are simulated: both ends of blocks of keys that
    attention takes at a time, and where a window fills up."""
    end = longest if window_tokens is None else min(longest, window_tokens - 1)
    ends = {block * KEY_BLOCK + key for block in _spread(end // KEY_BLOCK, 2) for key in (0, KEY_BLOCK - 1)}
    return sorted({min(max(position, 1), max(end, 1)) for position in ends} | {max(end, 1)})


def chunk_knots(longest: int, chunk: int, window_tokens: int | None) -> list[int]:
    """Chunks in which steps are simulated, up to where ``longest`` ends or a window is full."""
    end = ceil_div(longest, chunk)
    if window_tokens is None:
        return sorted(_spread(end, 3))
    full = ceil_div(window_tokens, chunk)
    return sorted(number for number in _spread(end, 3) | {full - 1, full} if number <= min(end, full))


@dataclass(slots=True, kw_only=True, eq=False)
class StepTimes:
    """Times of steps on a machine, up to ``longest`` tokens of a sequence; simulates what it has not met before."""

    machine: Machine
    longest: int
    tables: dict[int, IntArray] = field(default_factory=dict)  # by batch: ps and pJ (2, longest + 1) by position
    extras: dict[tuple[int, int], Cost] = field(
        default_factory=dict
    )  # by sequences that complete a chunk, and its number
    calls: dict[tuple[int, int, bool], Cost] = field(default_factory=dict)
    simulated: int = 0  # traces so far

    def decode(self, positions: IntArray) -> Cost:
        """A step of the sequences at ``positions`` (n,), the numbers of tokens that they hold."""
        ordinary, extra = self.ordinary(positions), self.added(positions)
        return Cost(ordinary.ps + extra.ps, ordinary.pj + extra.pj)

    def n_completing(self, positions: IntArray) -> int:
        """How many of the sequences complete a chunk in the step at ``positions``."""
        chunk = self.machine.chunk_tokens
        return 0 if chunk is None else int(np.count_nonzero((positions + 1) % chunk == 0))

    def added(self, positions: IntArray) -> Cost:
        """What those of the sequences at ``positions`` add that complete a chunk."""
        n = self.n_completing(positions)
        if not n:
            return Cost(0, 0)
        chunk = self.machine.chunk_tokens
        assert chunk is not None
        done = positions[(positions + 1) % chunk == 0]
        return self.completing(n, self.mean_number(done, np.ones_like(done)))

    def mean_number(self, positions: IntArray, weights: IntArray) -> float:
        """Mean number, from 1, of the chunks that ``positions`` (n,) are in; those behind a full window are alike."""
        chunk = self.machine.chunk_tokens
        assert chunk is not None
        numbers = np.minimum(positions // chunk + 1, self._boundaries()[-1])
        return int((numbers * weights).sum()) / int(weights.sum())

    def ordinary(self, positions: IntArray) -> Cost:
        """The step at ``positions`` without what completing chunks adds."""
        n = positions.size
        low, high = batch_between(n)
        ps, pj = self._mean(low, positions)
        if low < n:
            above = self._mean(high, positions)
            ps += (above.ps - ps) * (n - low) // (high - low)
            pj += (above.pj - pj) * (n - low) // (high - low)
        return Cost(ps, pj)

    def lockstep_ps(self, batch: int, positions: IntArray) -> IntArray:
        """By position, the time of an ordinary step of ``batch`` sequences that are all there."""
        low, high = batch_between(batch)
        ps = self._of(low)[0, positions]
        if low < batch:
            ps = ps + (self._of(high)[0, positions] - ps) * (batch - low) // (high - low)
        return np.asarray(ps)

    def _of(self, batch: int) -> IntArray:
        if batch not in self.tables:
            self.tables[batch] = self._table(batch)
        return self.tables[batch]

    def _mean(self, batch: int, positions: IntArray) -> Cost:
        ps, pj = self._of(batch)[:, positions].sum(axis=1).tolist()
        return Cost(ps // positions.size, pj // positions.size)

    def _table(self, batch: int) -> IntArray:
        chunk, window = self.machine.chunk_tokens, self.machine.window_tokens
        at: FloatArray = np.arange(self.longest + 1, dtype=np.float64)
        if chunk is None:
            knots = position_knots(self.longest, window)
            found = self._steps_at(knots, batch)
            return _counts(_interpolated(at, knots, found))
        chunks, ends = chunk_knots(self.longest, chunk, window), (min(_FIRST_ROWS, chunk - 3), chunk - 2)
        steps = [k * chunk + row for k in chunks for row in ends]
        found = self._steps_at(steps, batch)
        number, row = np.floor(at / chunk), at % chunk
        first, last = (_interpolated(number, chunks, found[:, i::2]) for i in (0, 1))
        return _counts(first + (last - first) * ((row - ends[0]) / (ends[1] - ends[0])))

    def _steps_at(self, positions: Sequence[int], batch: int) -> FloatArray:
        """(2, n_positions) seconds and joules. The step before the first fills caches, the one after the last
        overwrites what else would have to leave them."""
        return self._lockstep([positions[0] - 1, *positions, positions[-1] + 1], batch)[:, 1:-1]

    def _lockstep(self, positions: Sequence[int], batch: int) -> FloatArray:
        """(2, n_steps) seconds and joules."""
        self.simulated += 1
        found = self.machine.lockstep(positions, batch)
        return np.stack([found.seconds, found.joules])

    def completing(self, n: int, number: float | None = None) -> Cost:
        """What ``n`` sequences that complete a chunk in a step add to it, in rounds of :data:`UPDATE_GROUP`.
        ``number``: of the chunk, on average (the last that differs, if not said)."""
        rounds, rest = divmod(n, UPDATE_GROUP)
        ps = pj = 0
        for size, times in ((UPDATE_GROUP, rounds), (rest, 1)):
            if size and times:
                extra = self._extra(size, number)
                ps, pj = ps + times * extra.ps, pj + times * extra.pj
        return Cost(ps, pj)

    def _extra(self, n: int, number: float | None) -> Cost:
        first, last = self._boundaries()
        there = self._extra_of(n, last)
        if first == last or number is None:
            return there
        here, share = self._extra_of(n, first), (last - number) / (last - first)
        return Cost(there.ps - round((there.ps - here.ps) * share), there.pj - round((there.pj - here.pj) * share))

    def _extra_of(self, n: int, number: int) -> Cost:
        if (n, number) not in self.extras:
            seconds, joules = self._lockstep(self._around_boundary(number), n)
            held_up = max(float(seconds[3] - seconds[4]), 0.0)
            self.extras[n, number] = _cost(float(seconds[2] - seconds[1]) + held_up, float(joules[2] - joules[1]))
        return self.extras[n, number]

    def _boundaries(self) -> tuple[int, int]:
        """First and last number of the chunks whose ends are simulated; the second for both where all cost the same."""
        machine = self.machine
        if not find_method(machine.method.name).reruns_chunk:
            return 2, 2
        assert machine.chunk_tokens is not None
        reached = max(self.longest // machine.chunk_tokens, 1)
        if machine.window_tokens is None:
            return 1, reached
        return 1, min(ceil_div(machine.window_tokens, machine.chunk_tokens) + 1, reached)

    def _around_boundary(self, number: int) -> list[int]:
        """Two steps before the one that completes chunk ``number`` of a sequence, it, and three after it."""
        chunk = self.machine.chunk_tokens
        assert chunk is not None
        return [number * chunk - 1 + i for i in range(-2, 4)]

    def prefill(self, position: int, tokens: int, *, logits: bool) -> Cost:
        """A call of one sequence: ``tokens`` after ``position`` others; ``logits``: the last of its prompt."""
        low, high = self._calls_beside(position, tokens)
        if tokens in (low, high):
            return self._call(position, tokens, logits)
        here, above = self._call(position, low, logits), self._call(position, high, logits)
        part, whole = tokens - low, high - low
        return Cost(here.ps + (above.ps - here.ps) * part // whole, here.pj + (above.pj - here.pj) * part // whole)

    def _calls_beside(self, position: int, tokens: int) -> tuple[int, int]:
        """Lengths that are simulated, at most and at least ``tokens``: the ends of the range that fills as many tiles
        and completes as many chunks."""
        if tokens <= CALL_STEP_TOKENS:
            return tokens, tokens
        low = tokens - (tokens - 1) % CALL_STEP_TOKENS
        high = low + CALL_STEP_TOKENS - 1
        chunk = self.machine.chunk_tokens
        if chunk is not None:
            open_rows = position % chunk
            completed = (open_rows + tokens) // chunk
            low = max(low, completed * chunk - open_rows)
            high = min(high, (completed + 1) * chunk - open_rows - 1)
        return low, high

    def _call(self, position: int, tokens: int, logits: bool) -> Cost:
        key = position, tokens, logits
        if key not in self.calls:
            self.simulated += 1
            found = self.machine.call(position, tokens, logits=logits)
            self.calls[key] = _cost(float(found.seconds[0]), float(found.joules[0]))
        return self.calls[key]

    def prompt(self, tokens: int) -> Cost:
        """All calls of a prompt."""
        ps = pj = 0
        for position in range(0, tokens, self.machine.call_tokens):
            now = min(self.machine.call_tokens, tokens - position)
            cost = self.prefill(position, now, logits=position + now == tokens)
            ps, pj = ps + cost.ps, pj + cost.pj
        return Cost(ps, pj)

    def activation_bytes(self, longest_prompt: int, most_sequences: int) -> int:
        """Room for activations on one chip: of the largest prefill call, a step of ``most_sequences``, and an update of
        as many of them as complete chunks together."""
        machine = self.machine
        found = [
            machine.call(0, min(machine.call_tokens, longest_prompt), logits=True).peak_bytes,
            machine.lockstep((1,), most_sequences).peak_bytes,
        ]
        if machine.chunk_tokens is not None:
            around = self._around_boundary(self._boundaries()[-1])
            found.append(machine.lockstep(around, min(UPDATE_GROUP, most_sequences)).peak_bytes)
        return max(found)


def _interpolated(at: FloatArray, knots: Sequence[int], values: FloatArray) -> FloatArray:
    """``values`` (2, n_knots) at the knots, linear between and constant outside them, (2, n)."""
    x = np.array(knots, dtype=np.float64)
    if x.size == 1:
        return values[:, [0] * at.size]
    inside = np.clip(at, x[0], x[-1])
    right = np.clip(np.searchsorted(x, inside, side="right"), 1, x.size - 1)
    share = (inside - x[right - 1]) / (x[right] - x[right - 1])
    found: FloatArray = values[:, right - 1] + (values[:, right] - values[:, right - 1]) * share
    return found


def _counts(values: FloatArray) -> IntArray:
    """Seconds and joules in whole ps and pJ."""
    scale = np.array([[PS_PER_S], [PJ_PER_J]], dtype=np.float64)
    return np.asarray(np.rint(values * scale), dtype=np.int64)


def _cost(seconds: float, joules: float) -> Cost:
    return Cost(round(seconds * PS_PER_S), round(joules * PJ_PER_J))


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Room:
    """Memory of one chip. ``state_bytes`` is what a sequence takes by its number of pages.

    ``weights``, ``activations``, ``capacity``  bytes
    """

    capacity: int
    weights: int
    activations: int
    page_tokens: int
    state_bytes: IntArray

    @property
    def for_state(self) -> int:
        """Bytes left for sequences."""
        return self.capacity - self.weights - self.activations

    def of(self, tokens: IntArray) -> IntArray:
        """Bytes of sequences with ``tokens`` (n,) tokens each, whole pages."""
        return np.asarray(self.state_bytes[-(-tokens // self.page_tokens)])

    def of_one(self, tokens: int) -> int:
        return int(self.state_bytes[ceil_div(tokens, self.page_tokens)])

    @property
    def page_bytes(self) -> int:
        """Most that one more page adds."""
        return int(np.diff(self.state_bytes[1:]).max(initial=0))


def room_on(times: StepTimes, *, longest_prompt: int, most_sequences: int, page_tokens: int) -> Room:
    """What a machine has room for beside its weights.

    Raises:
        CapacityError: not even one sequence of ``times.longest`` tokens fits.
        UnsupportedError: the chip cannot run the method.
    """
    machine, longest = times.machine, times.longest
    weights, capacity = machine.weight_bytes(longest), machine.chip.main_memory.capacity_bytes
    one = machine.state_bytes(longest)
    activations = 0
    if weights + one <= capacity:
        activations = times.activation_bytes(longest_prompt, most_sequences)
    pages = ceil_div(longest, page_tokens)
    if weights + one + activations > capacity:
        chips = f"each of {machine.parallel.chips} chips" if machine.parallel.chips > 1 else "the chip"
        beside = f" and activations of {format_bytes(activations)}" if activations else ""
        raise CapacityError(
            f"weights of {format_bytes(weights)} and one sequence of {longest} tokens with {format_bytes(one)}{beside} "
            f"do not fit the {format_bytes(capacity)} of {chips}"
        )
    sizes = [0] + [machine.state_bytes(min(page * page_tokens, longest)) for page in range(1, pages + 1)]
    return Room(
        capacity=capacity, weights=weights, activations=activations, page_tokens=page_tokens,
        state_bytes=np.array(sizes, dtype=np.int64),
    )  # fmt: skip
