"""The lifecycle of changing weights on one chip, operation by operation: each a trace of its own, simulated.

Checkpoint and rollback, audit, swapping, forks, rejected drafts, resets and shared prefixes of fast weights, beside the
same for the keys and values of a full cache; and the forms in which a decode step can apply weights that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from ttt_sim.chip import Chip
from ttt_sim.data_files import did_you_mean
from ttt_sim.engine import prepare
from ttt_sim.errors import CapacityError, ConfigError, UnsupportedError
from ttt_sim.grid import method_on
from ttt_sim.lower.placement import far_names
from ttt_sim.model import ONE_CHIP, MethodSettings, Model, Parallel, Scenario, TTTSettings, shard, stage_starts
from ttt_sim.ops import TEMPORARY_ROLES, Role, Trace
from ttt_sim.parallel import Progress, run_all
from ttt_sim.power import throttled_seconds
from ttt_sim.results import Result
from ttt_sim.simulation import DEFAULT_CALL_TOKENS, Point, simulate_point, simulate_trace
from ttt_sim.system import holdings, least_system
from ttt_sim.units import format_bytes
from ttt_sim.workload import build_trace
from ttt_sim.workload import lifecycle as traces
from ttt_sim.workload.closed_forms import form_breakeven_tokens
from ttt_sim.workload.lifecycle import FORMS, HASHES, Form, Held

if TYPE_CHECKING:
    import pandas as pd

Subject = Literal["fast weights", "KV cache"]

#: Columns of the table of operations, one row each; docs/lifecycle.md explains them.
COLUMNS: tuple[str, ...] = (
    "operation", "subject", "group", "title", "fits", "missing", "reason", "read_bytes", "write_bytes",
    "outside_bytes", "held_bytes", "flops", "lane_ops", "seconds", "energy_j", "bound_by", "chunk_share", "exact",
    "why", "needs",
)  # fmt: skip
#: Columns of the table of forms, one row per form and history.
FORM_COLUMNS: tuple[str, ...] = (
    "form", "history_tokens", "state_bytes", "read_bytes", "flops", "seconds", "energy_j", "missing",
)  # fmt: skip
#: Columns of the table of break-evens.
BREAKEVEN_COLUMNS: tuple[str, ...] = ("against", "by", "closed_form_tokens", "simulated_tokens")

#: A history longer than any whose break-even is of interest.
LONGEST_HISTORY = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """What ``lifecycle`` simulates: every operation on all ``batch`` sequences at once, after ``context`` tokens.

    ``beams`` sequences into which each one forks, ``draft`` tokens that are rejected, ``hash_function`` of the audit
    trail. ``parallel`` None: the least number of chips that holds model and sequences.
    """

    chip: Chip
    model: Model
    method: str
    ttt: TTTSettings
    window: int
    context: int
    batch: int
    dtype: str
    kv_dtype: str | None = None
    beams: int = 4
    draft: int = 8
    hash_function: str = "blake3"
    call_tokens: int = DEFAULT_CALL_TOKENS
    parallel: Parallel | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch", "draft"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.beams < 2:
            raise ConfigError(f"beams: {self.beams} must be at least 2")
        if self.hash_function not in HASHES:
            known = tuple(HASHES)
            hint = did_you_mean(self.hash_function, known)
            raise ConfigError(f"hash: {self.hash_function!r} is not one of {', '.join(known)}{hint}")
        if self.settings(self.method).ttt is None:
            raise ConfigError(f"method: method {self.method} has no fast weights")

    def settings(self, method: str) -> MethodSettings:
        """The method as it runs on the chip."""
        return method_on(
            self.chip, method, window_tokens=self.window, kv_dtype=self.kv_dtype, ttt=self.ttt, dtype=self.dtype
        )

    @property
    def chunks(self) -> int:
        """Chunks that the context completes."""
        return self.context // self.ttt.chunk_tokens

    def system(self, method: str) -> Parallel:
        if self.parallel is not None:
            return self.parallel
        least = least_system(
            self.chip, self.model, [self.settings(method)], context_tokens=self.context + self.ttt.chunk_tokens,
            batch=self.batch, dtype=self.dtype,
        )  # fmt: skip
        return least or ONE_CHIP

    def decode_point(self) -> Point:
        """Decoding of one chunk after the context."""
        return Point(
            chip=self.chip, model=self.model, method=self.settings(self.method), phase="decode",
            context_tokens=self.context, batch=self.batch, dtype=self.dtype, chunk_tokens=self.ttt.chunk_tokens,
            parallel=self.system(self.method),
        )  # fmt: skip

    def replay_point(self) -> Point:
        """The prefill of all whole chunks."""
        return Point(
            chip=self.chip, model=self.model, method=self.settings(self.method), phase="prefill",
            context_tokens=self.chunks * self.ttt.chunk_tokens, batch=self.batch, dtype=self.dtype,
            chunk_tokens=self.ttt.chunk_tokens, call_tokens=self.call_tokens, parallel=self.system(self.method),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """``build(settings, held)`` gives its trace on one chip, None if nothing moves; no ``build``: the prompt again.

    ``exact``: whether the state afterwards has the bits that it should have, and ``why``; ``integers``: only where
    weights are integers. ``needs``: what the chip must have beside memory; ``chunks`` that must be over.
    """

    subject: Subject
    group: str
    title: str
    build: Callable[[Lifecycle, Held], Trace | None] | None
    exact: Literal["yes", "no", "integers", ""] = ""
    why: str = ""
    needs: str = ""
    chunks: int = 0


_WRITES = "weights that can be written"
_OUTSIDE = "a link to a host, or a memory behind the main one"
_LANES = "vector lanes"
_COPIED = "bits are copied"


def _nothing(settings: Lifecycle, held: Held) -> None:
    return None


#: Every operation by name, in the order in which a report shows them.
OPERATIONS: Mapping[str, Operation] = {
    "snapshot": Operation(
        subject="fast weights", group="checkpoint", title="snapshot of the state", exact="yes", why=_COPIED,
        build=lambda s, h: traces.snapshot(h),
    ),
    "restore": Operation(
        subject="fast weights", group="rollback", title="back to a snapshot", exact="yes", why=_COPIED, needs=_WRITES,
        build=lambda s, h: traces.restore(h),
    ),
    "subtract": Operation(
        subject="fast weights", group="rollback", title="subtract the kept delta of a chunk", exact="integers",
        why="a floating-point sum is rounded, so subtracting does not undo it; integers that do not overflow are exact",
        needs=_WRITES, build=lambda s, h: traces.subtract(h), chunks=1,
    ),
    "subtract_logged": Operation(
        subject="fast weights", group="rollback", title="subtract the delta made again from its factors",
        exact="integers", why="as subtracting a kept delta", needs=_WRITES,
        build=lambda s, h: traces.subtract_logged(h), chunks=1,
    ),
    "replay_factors": Operation(
        subject="fast weights", group="rollback", title="replay of all chunks from logged factors", exact="yes",
        why="the same kernels round the same products in the same order", needs=_WRITES,
        build=lambda s, h: traces.replay_factors(h, s.chunks), chunks=1,
    ),
    "replay_tokens": Operation(
        subject="fast weights", group="rollback", title="replay of all chunks from token ids", exact="yes",
        why="only with deterministic kernels and the same grid of chunks", needs=_WRITES, build=None, chunks=1,
    ),
    "hash_weights": Operation(
        subject="fast weights", group="audit", title="hash of the weights", needs=_LANES,
        build=lambda s, h: traces.hash_state(h, "weights", s.hash_function),
    ),
    "hash_factors": Operation(
        subject="fast weights", group="audit", title="hash of the factors of a chunk", needs=_LANES,
        build=lambda s, h: traces.hash_state(h, "factors", s.hash_function),
    ),
    "log_record": Operation(
        subject="fast weights", group="audit", title="audit record of a chunk",
        build=lambda s, h: traces.log(h, "record"),
    ),
    "log_tokens": Operation(
        subject="fast weights", group="audit", title="token ids of a chunk to the log",
        build=lambda s, h: traces.log(h, "tokens"),
    ),
    "log_factors": Operation(
        subject="fast weights", group="audit", title="factors of a chunk to the log",
        build=lambda s, h: traces.log(h, "factors"),
    ),
    "swap_out": Operation(
        subject="fast weights", group="swap", title="state out of the chip", exact="yes", why=_COPIED, needs=_OUTSIDE,
        build=lambda s, h: traces.swap_out(h),
    ),
    "swap_in": Operation(
        subject="fast weights", group="swap", title="state back into the chip", exact="yes", why=_COPIED,
        needs=f"{_OUTSIDE}; {_WRITES}", build=lambda s, h: traces.swap_in(h),
    ),
    "fork": Operation(
        subject="fast weights", group="fork", title="fork into beams, copied at once", exact="yes", why=_COPIED,
        needs=_WRITES, build=lambda s, h: traces.fork(h, s.beams),
    ),
    "fork_shared": Operation(
        subject="fast weights", group="fork", title="fork into beams, copied on write", exact="yes",
        why="beams read one weight until their next updates, which write one for each", needs="",
        build=lambda s, h: traces.fork_shared(h, s.beams),
    ),
    "reject": Operation(
        subject="fast weights", group="draft", title="reject a draft that completed a chunk", exact="yes", why=_COPIED,
        needs=_WRITES, build=lambda s, h: traces.reject(h, s.draft), chunks=1,
    ),
    "reset": Operation(
        subject="fast weights", group="reset", title="document boundary, merged form", exact="yes", why=_COPIED,
        needs=_WRITES, build=lambda s, h: traces.reset(h),
    ),
    "reset_split": Operation(
        subject="fast weights", group="reset", title="document boundary, split or kernel form", exact="yes",
        why="the change, or its factors, are dropped", build=_nothing,
    ),
    "share_prefix": Operation(
        subject="fast weights", group="prefix", title="shared prefix, copied for every sequence", exact="yes",
        why="only at the end of a chunk", needs=_WRITES, build=lambda s, h: traces.share_prefix(h), chunks=1,
    ),
    "share_prefix_shared": Operation(
        subject="fast weights", group="prefix", title="shared prefix, copied on write", exact="yes",
        why="only at the end of a chunk; sequences read one weight until their next updates",
        build=lambda s, h: traces.share_blocks(h), chunks=1,
    ),
    "kv_snapshot": Operation(
        subject="KV cache", group="checkpoint", title="copy of the cache", exact="yes", why=_COPIED,
        build=lambda s, h: traces.snapshot(h),
    ),
    "kv_restore": Operation(
        subject="KV cache", group="rollback", title="back to an earlier token: truncate", exact="yes",
        why="rows are only ever added", build=_nothing,
    ),
    "kv_hash": Operation(
        subject="KV cache", group="audit", title="hash of the rows of a chunk", needs=_LANES,
        build=lambda s, h: traces.hash_kv(h, min(s.ttt.chunk_tokens, s.context), s.hash_function),
    ),
    "kv_swap_out": Operation(
        subject="KV cache", group="swap", title="cache out of the chip", exact="yes", why=_COPIED, needs=_OUTSIDE,
        build=lambda s, h: traces.swap_out(h),
    ),
    "kv_swap_in": Operation(
        subject="KV cache", group="swap", title="cache back into the chip", exact="yes", why=_COPIED, needs=_OUTSIDE,
        build=lambda s, h: traces.swap_in(h),
    ),
    "kv_fork": Operation(
        subject="KV cache", group="fork", title="fork into beams, blocks shared", exact="yes", why="blocks are shared",
        build=lambda s, h: traces.fork_shared(h, s.beams),
    ),
    "kv_reject": Operation(
        subject="KV cache", group="draft", title="reject a draft: truncate", exact="yes",
        why="rows are only ever added", build=_nothing,
    ),
    "kv_reset": Operation(
        subject="KV cache", group="reset", title="document boundary: drop the blocks", exact="yes",
        why="nothing is kept", build=_nothing,
    ),
    "kv_share_prefix": Operation(
        subject="KV cache", group="prefix", title="shared prefix, blocks shared", exact="yes", why="blocks are shared",
        build=lambda s, h: traces.share_blocks(h),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What alike chips hold: ``stages`` pipeline stages of ``tp`` chips each. ``held_bytes`` of weights and state on
    the fullest of them."""

    held: Held
    stages: int
    tp: int
    held_bytes: int

    @property
    def chips(self) -> int:
        return self.stages * self.tp


def _parts(settings: Lifecycle, method: str) -> list[_Part]:
    """The chips of the system, alike ones together.

    Raises:
        WorkloadError, UnsupportedError: the chips cannot share the model.
    """
    chosen, parallel = settings.settings(method), settings.system(method)
    model = shard(settings.model, parallel.tp)
    starts = stage_starts(model, parallel.pp)
    scenario = Scenario.decode(
        (settings.context - 1,), batch=settings.batch, dtype=settings.dtype, parallel=Parallel(tp=parallel.tp)
    )
    trace = build_trace(settings.model, chosen, scenario)
    needed = holdings(trace, model.n_layers, pipelined=bool(starts)).by_stage(starts)
    edges = [0, *starts, model.n_layers]
    found: dict[tuple[int, int], _Part] = {}
    for stage, nbytes in enumerate(needed):
        held = Held(
            model=model, settings=chosen, batch=settings.batch, dtype=settings.dtype, context_tokens=settings.context,
            layers=tuple(range(edges[stage], edges[stage + 1])),
        )  # fmt: skip
        key = (len(held.ttt_layers), len(held.kv_layers))
        known = found.get(key)
        found[key] = _Part(
            held=held if known is None else known.held,
            stages=1 if known is None else known.stages + 1,
            tp=parallel.tp,
            held_bytes=nbytes if known is None else max(known.held_bytes, nbytes),
        )
    return list(found.values())


class _DoesNotFit(Exception):
    """With the reason."""


def _simulate(chip: Chip, trace: Trace, part: _Part, *, replaced_bytes: int = 0) -> Result:
    """The trace on a chip that holds the model too; ``replaced_bytes`` of its state are not there.

    Raises:
        UnsupportedError: the chip lacks what it needs.
        _DoesNotFit: it does not fit beside weights and state.
    """
    needed, room = part.held_bytes - replaced_bytes + _beside(trace), chip.capacity_bytes
    result = None
    if needed <= room:
        try:
            result = simulate_trace(chip, trace, held_bytes=() if chip.backing is None else (needed,))
        except CapacityError as error:
            raise _DoesNotFit(str(error)) from None
        needed += result.peak_temporary_bytes()
    if result is None or needed > room:
        raise _too_much(needed, room)
    return result


#: How a reason begins that is lack of room on a chip.
NO_ROOM = "weights, state and what is held beside need "


def _too_much(needed: int, room: int) -> _DoesNotFit:
    return _DoesNotFit(f"{NO_ROOM}{format_bytes(needed)} of {format_bytes(room)}")


#: Prefixes of what an operation keeps beside the state.
_BESIDE = ("saved_", "kept_", "logged_", "log", "beam_", "digest_", "history_")


def _beside(trace: Trace) -> int:
    """Bytes on the chip that an operation needs beside the state of the sequences."""
    names = ((tensor, tensor.name.rpartition(".")[2]) for tensor in trace.tensors)
    return sum(t.nbytes for t, name in names if t.role not in TEMPORARY_ROLES and name.startswith(_BESIDE))


def _outside(trace: Trace) -> dict[str, int]:
    """Bytes that come from outside the chip (``read``) and go there (``write``)."""
    far = set(far_names(trace))
    moved = {"read": (trace.read_tensor, trace.read_bytes), "write": (trace.write_tensor, trace.write_bytes)}
    return {
        direction: sum(
            nbytes for i, nbytes in zip(tensor.tolist(), size.tolist(), strict=True) if trace.tensors[i].name in far
        )
        for direction, (tensor, size) in moved.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """``seconds`` on one chip, at its power limit; the rest too; energy without idling."""

    seconds: float
    dynamic_j: float
    read_bytes: int
    write_bytes: int
    outside_bytes: int
    held_bytes: int
    flops: int
    lane_ops: int
    bound_by: str


def _cost(result: Result) -> _Cost:
    outside = _outside(result.trace)
    moved = {direction: -nbytes for direction, nbytes in outside.items()}
    for (direction, _), values in result.main_bytes().items():
        moved[direction] += int(values.sum())
    dynamic = sum(float(values.sum()) for values in result.dynamic_energy_j().values())
    by_unit: dict[str, int] = {}
    for unit, cycles in zip(result.bound_by(), result.kernel_advance().tolist(), strict=True):
        by_unit[unit] = by_unit.get(unit, 0) + cycles
    return _Cost(
        seconds=throttled_seconds(result.chip, result.seconds, dynamic), dynamic_j=dynamic, read_bytes=moved["read"],
        write_bytes=moved["write"], outside_bytes=sum(outside.values()), held_bytes=_beside(result.trace),
        flops=int(result.trace.flops.sum()), lane_ops=int(result.trace.vector_ops.sum()),
        bound_by=max(sorted(by_unit), key=lambda name: by_unit[name]),
    )  # fmt: skip


_SUMS = ("read_bytes", "write_bytes", "outside_bytes", "held_bytes", "flops", "lane_ops")


def operation(settings: Lifecycle, name: str) -> dict[str, object]:
    """The record of one operation, without its share of a chunk."""
    op = OPERATIONS[name]
    row: dict[str, object] = dict.fromkeys(COLUMNS) | {
        "operation": name, "subject": op.subject, "group": op.group, "title": op.title, "fits": False, "missing": "",
        "reason": "", "exact": _exact(settings, op), "why": op.why, "needs": op.needs,
    }  # fmt: skip
    if settings.chunks < op.chunks:
        return row | {"reason": f"no chunk of {settings.ttt.chunk_tokens} tokens is complete"}
    try:
        if op.build is None:
            return row | _replayed(settings)
        method = settings.method if op.subject == "fast weights" else "kv"
        costs: list[tuple[_Part, _Cost]] = []
        chips = 0
        for part in _parts(settings, method):
            trace = op.build(settings, part.held)
            chips += part.chips
            if trace is not None:
                costs.append((part, _cost(_simulate(settings.chip, trace, part))))
            elif part.held_bytes > settings.chip.capacity_bytes:
                raise _too_much(part.held_bytes, settings.chip.capacity_bytes)
    except UnsupportedError as error:
        return row | {"missing": str(error)}
    except _DoesNotFit as error:
        return row | {"reason": str(error)}
    seconds = max((cost.seconds for _, cost in costs), default=0.0)
    energy = sum(part.chips * cost.dynamic_j for part, cost in costs)
    slowest = max(costs, key=lambda pair: pair[1].seconds, default=None)
    return row | {
        "fits": True, "seconds": seconds, "energy_j": energy + chips * settings.chip.power.idle_w * seconds,
        "bound_by": "" if slowest is None else slowest[1].bound_by,
        **{column: sum(part.chips * getattr(cost, column) for part, cost in costs) for column in _SUMS},
    }  # fmt: skip


def _exact(settings: Lifecycle, op: Operation) -> str:
    if op.exact != "integers":
        return op.exact
    ttt = settings.settings(settings.method).ttt
    return "yes" if ttt is not None and ttt.fast_dtype.startswith("int") and ttt.weight_write != "master" else "no"


def _replayed(settings: Lifecycle) -> dict[str, object]:
    """Rollback 4 is the prefill of the prompt."""
    record = simulate_point(settings.replay_point()).record
    if not record["fits"]:
        return {"missing": record["missing"], "reason": record["reason"]}
    return {
        "fits": True, "seconds": record["seconds"], "energy_j": record["energy_j"], "bound_by": record["bound_by"],
        "read_bytes": record["main_read_bytes"], "write_bytes": record["main_write_bytes"], "outside_bytes": 0,
        "held_bytes": settings.batch * settings.chunks * settings.ttt.chunk_tokens * traces.TOKEN_BYTES,
        "flops": record["flops"], "lane_ops": record["vector_ops"],
    }  # fmt: skip


# --- forms of applying ------------------------------------------------------------------------------------------------


class _Forms:
    """Steps by form and history, each simulated once. ``parts`` with TTT layers."""

    def __init__(self, settings: Lifecycle, parts: Sequence[_Part]) -> None:
        self._settings = settings
        self._parts = [part for part in parts if part.held.ttt_layers]
        self._known: dict[tuple[Form, int], tuple[dict[str, object], int]] = {}

    @property
    def sharded(self) -> Model:
        return self._parts[0].held.model

    def step(self, form: Form, history: int) -> tuple[dict[str, object], int]:
        """The row of a step, and the bytes of weights and history that it reads on one chip.

        Raises:
            UnsupportedError, _DoesNotFit: the chip cannot.
        """
        key = (form, history if form == "kernel" else 0)
        if key not in self._known:
            self._known[key] = self._simulated(*key)
        row, nbytes = self._known[key]
        return row | {"history_tokens": history}, nbytes

    def _simulated(self, form: Form, history: int) -> tuple[dict[str, object], int]:
        row = {"form": form, "missing": "", "state_bytes": 0, "read_bytes": 0, "flops": 0}
        seconds = dynamic = 0.0
        chips = first_bytes = 0
        for i, part in enumerate(self._parts):
            trace = traces.apply_step(part.held, form, history)
            merged = sum(len(part.held.ttt_layers) * weight.nbytes for weight in traces.weight_buffers(part.held))
            result = _simulate(self._settings.chip, trace, part, replaced_bytes=merged if form == "kernel" else 0)
            cost = _cost(result)
            state = sum(
                tensor.nbytes for tensor in trace.tensors if tensor.role in (Role.FAST_WEIGHT, Role.KV)
            )  # fmt: skip
            row["state_bytes"] = cast(int, row["state_bytes"]) + part.chips * state // part.held.batch
            row["read_bytes"] = cast(int, row["read_bytes"]) + part.chips * cost.read_bytes
            row["flops"] = cast(int, row["flops"]) + part.chips * cost.flops
            seconds += part.stages * cost.seconds  # a token passes the stages one after the other
            dynamic += part.chips * cost.dynamic_j
            chips += part.chips
            if i == 0:
                read = result.main_bytes()
                first_bytes = sum(int(read["read", name].sum()) for name in ("weights", "fast_weights", "kv"))
        idle = chips * self._settings.chip.power.idle_w * seconds
        return row | {"seconds": seconds, "energy_j": dynamic + idle}, first_bytes

    def reads_no_more(self, history: int, nbytes: int) -> bool:
        """The kernel form fits, and reads at most ``nbytes``."""
        try:
            return self.step("kernel", history)[1] <= nbytes
        except _DoesNotFit:
            return False

    def takes_no_longer(self, history: int, seconds: float) -> bool:
        """The kernel form fits, and takes at most ``seconds``."""
        try:
            return cast(float, self.step("kernel", history)[0]["seconds"]) <= seconds
        except _DoesNotFit:
            return False

    def last(self, holds: Callable[[int], bool]) -> int:
        """The longest history of which ``holds`` is true, where it is true up to there; 0 for none."""
        high = 1
        while high <= LONGEST_HISTORY and holds(high):
            high *= 2
        low = high // 2
        while high - low > 1 and high <= LONGEST_HISTORY:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low


def histories(model: Model, update_rows: int | None = None) -> tuple[int, ...]:
    """Histories of the table: powers of two around the break-even."""
    middle = int(form_breakeven_tokens(model, update_rows=update_rows))
    return tuple(1 << e for e in range(max(middle.bit_length() - 6, 0), middle.bit_length() + 3))


def _form_rows(settings: Lifecycle) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows of :data:`FORM_COLUMNS` and of :data:`BREAKEVEN_COLUMNS`."""
    try:
        forms = _Forms(settings, _parts(settings, settings.method))
    except UnsupportedError as error:
        return [{"form": form, "missing": str(error)} for form in FORMS], []
    ttt = settings.settings(settings.method).ttt
    assert ttt is not None
    rows: list[dict[str, object]] = []
    for form in FORMS:
        for history in (0, *histories(forms.sharded, ttt.update_rows)):
            try:
                rows.append(forms.step(form, history)[0])
            except (UnsupportedError, _DoesNotFit) as error:
                rows.append({"form": form, "history_tokens": history, "missing": str(error)})
    breakevens: list[dict[str, object]] = []
    against: tuple[Form, ...] = ("merged", "split")
    for form in against:
        closed = form_breakeven_tokens(
            forms.sharded, settings.batch if form == "merged" else None, dtype=settings.dtype,
            fast_dtype=ttt.fast_dtype, update_rows=ttt.update_rows,
        )  # fmt: skip
        row: dict[str, object] = {"against": form, "by": "bytes", "closed_form_tokens": max(float(closed), 0.0)}
        try:
            other, nbytes = forms.step(form, 0)
            # bytes that do not travel, as where memory computes, tell nothing
            by_bytes = forms.last(partial(forms.reads_no_more, nbytes=nbytes)) if nbytes else None
            by_time = forms.last(partial(forms.takes_no_longer, seconds=cast(float, other["seconds"])))
        except (UnsupportedError, _DoesNotFit):
            continue
        breakevens.append(row | {"simulated_tokens": by_bytes})
        breakevens.append(row | {"by": "time", "closed_form_tokens": None, "simulated_tokens": by_time})
    return rows, breakevens


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LifecycleData:
    """``operations``, ``forms`` and ``breakevens`` have the columns above. ``step_seconds``: mean decode step, None
    where ``step_why`` says that there is none. ``chips`` that work together."""

    settings: Lifecycle
    operations: pd.DataFrame
    forms: pd.DataFrame
    breakevens: pd.DataFrame
    step_seconds: float | None
    step_why: str
    chips: int


def _job(name: str, *, settings: Lifecycle) -> object:
    if name == "step":
        return dict(simulate_point(settings.decode_point()).record)
    return _form_rows(settings) if name == "forms" else operation(settings, name)


def run_lifecycle(settings: Lifecycle, *, progress: Progress | None = None) -> LifecycleData:
    """Simulate every operation and form. What the chip cannot do is a row that says why.

    Raises:
        ConfigError, WorkloadError: the chip cannot run the method at all, or the chips cannot share the model.
        ConservationError: a simulation broke a law.
    """
    prepare("compiled")
    names = ["replay_tokens", "step", "forms", *(name for name in OPERATIONS if name != "replay_tokens")]
    done = dict(
        zip(
            names, run_all(partial(_job, settings=settings), names, workers=settings.workers, progress=progress),
            strict=True,
        )
    )  # fmt: skip
    step = cast("dict[str, object]", done["step"])
    seconds = cast(float, step["seconds"]) if step["fits"] else None
    rows = [cast("dict[str, object]", done[name]) for name in OPERATIONS]
    if seconds is not None:
        chunk = settings.ttt.chunk_tokens * seconds
        rows = [row | {"chunk_share": cast(float, row["seconds"]) / chunk} if row["fits"] else row for row in rows]
    forms, breakevens = cast("tuple[list[dict[str, object]], list[dict[str, object]]]", done["forms"])
    return LifecycleData(
        settings=settings,
        operations=_frame(rows, COLUMNS),
        forms=_frame(forms, FORM_COLUMNS),
        breakevens=_frame(breakevens, BREAKEVEN_COLUMNS),
        step_seconds=seconds,
        step_why=str(step["missing"] or step["reason"]),
        chips=settings.system(settings.method).chips,
    )


#: Columns of whole numbers.
_WHOLE = (*_SUMS, "history_tokens", "state_bytes", "simulated_tokens")


def _frame(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    """``rows`` as a frame, whole numbers as integers also where some are missing."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(columns))
    whole = [column for column in _WHOLE if column in frame]
    return frame.assign(**{column: pd.to_numeric(frame[column]).round().astype("Int64") for column in whole})
