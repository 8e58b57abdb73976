"""The same stream of requests under several methods on one system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttt_sim.chip import Chip
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import CapacityError, ConfigError, UnsupportedError
from ttt_sim.grid import method_on
from ttt_sim.model import MethodSettings, Model, Parallel, TTTSettings
from ttt_sim.serving.records import (
    RECORD_COLUMNS,
    REQUEST_COLUMNS,
    FullLoad,
    full_load,
    identity,
    request_rows,
    server_record,
    step_frame,
)
from ttt_sim.serving.requests import PS_PER_S, Lengths, Request, offered_per_s, poisson_requests
from ttt_sim.serving.server import POLICIES, Policy, Server, Swap
from ttt_sim.serving.steps import PJ_PER_J, Machine, Room, StepTimes, check_served, room_on
from ttt_sim.system import tensor_parallel_sizes

if TYPE_CHECKING:
    import pandas as pd

#: The method that the premium of the others is counted from.
BASELINE = "kv"
#: Share of what the slowest method sustains that is offered where no rate is given.
DEFAULT_LOAD = 0.8
PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Random requests, see :func:`ttt_sim.serving.requests.poisson_requests`. ``rate_per_s`` None: a share of what the
    slowest method sustains."""

    count: int = 1000
    rate_per_s: float | None = None
    prompt: int = 2048
    output: int = 256
    lengths: Lengths = "exponential"
    seed: int = 0

    def requests(self, rate_per_s: float) -> tuple[Request, ...]:
        """The stream at this rate."""
        return poisson_requests(
            count=self.count, rate_per_s=rate_per_s, prompt=self.prompt, output=self.output, lengths=self.lengths,
            seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What ``serve`` simulates. ``stream``: random requests, or those of a file. ``tp`` None: as few chips as hold
    every method.

    Raises:
        ConfigError: a value is out of range, or a method is not one that can be served.
    """

    chip: Chip
    model: Model
    methods: tuple[str, ...]
    stream: Stream | tuple[Request, ...]
    ttt: TTTSettings
    window: int
    dtype: str
    kv_dtype: str | None = None
    call_tokens: int = 8192
    most_sequences: int = 256
    policy: Policy = "prefill_first"
    tp: int | None = None

    def __post_init__(self) -> None:
        if self.most_sequences < 1:
            raise ConfigError(f"batch: {self.most_sequences} must be at least 1")
        if self.policy not in POLICIES:
            raise ConfigError(
                f"policy: {self.policy!r} is not one of {', '.join(POLICIES)}{did_you_mean(self.policy, POLICIES)}"
            )
        for name in self.methods:
            check_served(self.model, self.settings(name), self.dtype)
        self.requests()

    def requests(self, rate_per_s: float = 1.0) -> tuple[Request, ...]:
        """The requests; random ones come at ``rate_per_s`` unless their own rate is given."""
        if not isinstance(self.stream, Stream):
            return self.stream
        own = self.stream.rate_per_s
        return self.stream.requests(rate_per_s if own is None else own)

    def settings(self, name: str) -> MethodSettings:
        """The method as it runs on the chip."""
        return method_on(
            self.chip, name, window_tokens=self.window, kv_dtype=self.kv_dtype, ttt=self.ttt, dtype=self.dtype
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ready:
    """A method that fits: times of its steps, memory, and what it does at full load."""

    times: StepTimes
    room: Room
    full: FullLoad


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """``records`` with :data:`RECORD_COLUMNS`, ``requests`` with :data:`REQUEST_COLUMNS`, ``steps`` with the
    columns of :func:`step_frame`, of every method. ``simulated``: traces that times come from, by method."""

    settings: Serving
    stream: tuple[Request, ...]
    records: pd.DataFrame
    requests: pd.DataFrame
    steps: pd.DataFrame
    simulated: Mapping[str, int]

    @property
    def offered_per_s(self) -> float | None:
        return offered_per_s(self.stream)

    def record(self, method: str) -> Mapping[str, Any]:
        return dict(self.records.set_index("method", drop=False).loc[method])


def swap_of(chip: Chip, chips: int) -> Swap | None:
    """Where states go that the memory has no room for: the host, over the fastest link to it, or a memory behind the
    main memory; None where the chip file has neither."""
    hosts = [link for link in chip.links if link.topology == "host"]
    if hosts:
        link = max(hosts, key=lambda one: one.bytes_per_s)
        return Swap(
            ps_per_byte=PS_PER_S / link.bytes_per_s, latency_ps=round((link.start_s + link.latency_s) * PS_PER_S),
            pj_per_byte=link.energy_j_per_byte * PJ_PER_J * chips, capacity=None,
        )  # fmt: skip
    behind = chip.backing
    if behind is None:
        return None
    rate = min(behind.read_bytes_per_s, behind.write_bytes_per_s) * behind.achievable_frac
    energy = (behind.read_energy_j_per_byte + behind.write_energy_j_per_byte) / 2
    return Swap(
        ps_per_byte=PS_PER_S / rate, latency_ps=round(behind.latency_s * PS_PER_S),
        pj_per_byte=energy * PJ_PER_J * chips, capacity=behind.capacity_bytes,
    )  # fmt: skip


def serve(settings: Serving) -> Run:
    """Serve the stream under every method.

    Raises:
        ConfigError: no method can be served on the chip; the message says why.
    """
    import pandas as pd

    requests = settings.requests()
    ready, reasons = _prepared(settings, requests)
    if not ready:
        lines = [f"{name}: {reason}" for name, reason in reasons.items()]
        if settings.tp is None:
            most = max(tensor_parallel_sizes(settings.model))
            lines.append(
                f"no group of up to {most} chips that share every layer of {settings.model.name} serves it either; "
                "pipelines are not simulated"
            )
        raise ConfigError("\n".join(lines))
    rate = DEFAULT_LOAD * min(one.full.requests_per_s for one in ready.values())
    requests = settings.requests(float(f"{rate:.3g}"))
    records, rows, steps = [], [], []
    for name in settings.methods:
        if name not in ready:
            machine = _machine(settings, name, Parallel(tp=settings.tp or 1))
            records.append({**identity(machine), "fits": False, "reason": reasons[name], "requests": len(requests)})
            continue
        one = ready[name]
        server = Server(
            requests=requests, times=one.times, room=one.room, most_sequences=settings.most_sequences,
            call_tokens=settings.call_tokens, policy=settings.policy,
            swap=swap_of(settings.chip, one.times.machine.parallel.chips),
        )  # fmt: skip
        server.run()
        records.append(server_record(server, one.times.machine, one.full))
        rows += request_rows(name, server)
        steps.append(step_frame(name, server))
    _add_premiums(records)
    return Run(
        settings=settings,
        stream=requests,
        records=pd.DataFrame(records, columns=list(RECORD_COLUMNS)),
        requests=pd.DataFrame(rows, columns=list(REQUEST_COLUMNS)),
        steps=pd.concat(steps, ignore_index=True),
        simulated={name: one.times.simulated for name, one in ready.items()},
    )


def _machine(settings: Serving, name: str, parallel: Parallel) -> Machine:
    return Machine(
        chip=settings.chip, model=settings.model, method=settings.settings(name), dtype=settings.dtype,
        call_tokens=settings.call_tokens, parallel=parallel,
    )  # fmt: skip


def _prepared(settings: Serving, requests: Sequence[Request]) -> tuple[dict[str, Ready], dict[str, str]]:
    """Every method on as many chips as the one that needs most of them; why not, for the others."""
    sizes = tuple(tensor_parallel_sizes(settings.model)) if settings.tp is None else (settings.tp,)
    longest = max(request.tokens for request in requests)
    best: dict[str, tuple[StepTimes, Room]] = {}
    why: dict[str, str] = {}
    for size in sizes:
        found: dict[str, tuple[StepTimes, Room]] = {}
        reasons: dict[str, str] = {}
        too_small = False
        for name in settings.methods:
            times = StepTimes(machine=_machine(settings, name, Parallel(tp=size)), longest=longest)
            try:
                room = room_on(
                    times, longest_prompt=longest, most_sequences=settings.most_sequences, page_tokens=PAGE_TOKENS
                )
                found[name] = times, room
            except UnsupportedError as error:  # more chips do not help
                reasons[name] = str(error)
            except CapacityError as error:
                reasons[name] = str(error)
                too_small = True
        if size == sizes[0] or len(found) > len(best):
            best, why = found, reasons
        if not too_small:
            break
    ready = {
        name: Ready(times=times, room=room, full=full_load(requests, times, room, settings.most_sequences))
        for name, (times, room) in best.items()
    }
    return ready, why


def _add_premiums(records: Sequence[dict[str, object]]) -> None:
    """Chip time per token over that of the baseline, at full load and at this one; nothing without a baseline."""
    fitting = {str(record["method"]): record for record in records if record["fits"]}
    baseline = fitting.get(BASELINE)
    if baseline is None:
        return
    for record in fitting.values():
        for column, of in (
            ("cost_ratio", lambda r: float(r["full_load_chip_seconds_per_million_tokens"])),
            ("cost_ratio_at_this_load", lambda r: r["chips"] / float(r["tokens_per_s"])),
        ):
            record[column] = of(record) / of(baseline)
