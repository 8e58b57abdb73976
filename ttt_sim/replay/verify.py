"""Does a simulated trace compute what the method is? The trace executed on the simulated schedule, and the reference.

Compared bit for bit: every tensor that leaves a layer, logits, every version of every fast weight, and what caches and
open chunks hold in the end. Counted: FLOPs, operations and bytes that the reference was seen to do, op by op, against
the columns of the trace. Checked without executing: that the order of the kernels implies every data dependency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ttt_sim.chip import Chip
from ttt_sim.errors import ConfigError, WorkloadError
from ttt_sim.lower import DEFAULT_DETAIL
from ttt_sim.model import Call, MethodSettings, Model, Scenario
from ttt_sim.ops import OP_KINDS, Role, Trace, owners, total_by
from ttt_sim.reference.checks import FloatArray, InputError
from ttt_sim.reference.decoder import Decoder, DecoderShape, random_parameters, random_tokens
from ttt_sim.reference.exact import IntArray
from ttt_sim.reference.formats import FLOAT32, Format, packed
from ttt_sim.reference.in_place_ttt import StreamingMlp
from ttt_sim.reference.meter import Meter, OpCount
from ttt_sim.reference.randomness import LARGEST_SEED
from ttt_sim.replay.errors import ExecutionError
from ttt_sim.replay.execute import op_label, run_ops
from ttt_sim.replay.memory import Memory
from ttt_sim.replay.order import schedule_order, unordered_pairs
from ttt_sim.replay.products import ACCUMULATE, Accumulate
from ttt_sim.replay.settings import decoder_shape
from ttt_sim.replay.tiling import Tiling, tiling_of
from ttt_sim.simulation import simulate_trace
from ttt_sim.workload import CONTEXT_METHODS, build_trace

#: Executing with correct rounding runs at the order of 1e10 FLOP/s, and parameters are held in float64.
MOST_FLOPS, MOST_PARAMETERS = 10**12, 300 * 10**6

#: Content of tensors by (name, version).
Contents = Mapping[tuple[str, int], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to execute: a prompt in calls, then single tokens."""

    chip: Chip
    model: Model
    method: MethodSettings
    prefill_tokens: int = 150
    call_tokens: int = 64
    decode_tokens: int = 40
    batch: int = 2
    dtype: str = "bf16"
    seed: int = 0
    accumulate: Accumulate = "exact"
    engine: str = "compiled"
    detail: int = DEFAULT_DETAIL
    overlap: bool = True

    def scenario(self) -> Scenario:
        prompt = Scenario.prefill(
            self.prefill_tokens, batch=self.batch, dtype=self.dtype, call_tokens=self.call_tokens
        ).calls
        end = self.prefill_tokens
        steps = tuple(Call(position=p, tokens=1, logits=True) for p in range(end, end + self.decode_tokens))
        return Scenario(batch=self.batch, dtype=self.dtype, calls=prompt + steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the reference computed. ``written`` must be written by ops; ``left`` by tensor name: the last rows of what
    caches and open chunks hold in the end. ``counts`` of its ops."""

    written: Contents
    left: Mapping[str, FloatArray]
    formats: Mapping[str, Format]
    counts: Sequence[OpCount]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``failure``: what is wrong first, None if nothing is. ``digests`` of what was compared, by kind.

    ``n_different`` of ``n_elements`` elements differ, by at most ``largest_error`` of the largest element of their
    tensor; all 0 for exact accumulation that passed.
    """

    method: str
    n_ops: int
    n_kernels: int
    cycles: int
    failure: str | None
    digests: Mapping[str, str] = field(default_factory=dict)
    n_tensors: int = 0
    n_elements: int = 0
    n_different: int = 0
    largest_error: float = 0.0

    @property
    def passed(self) -> bool:
        return self.failure is None


def reference_run(
    shape: DecoderShape, scenario: Scenario, parameters: Mapping[str, FloatArray], tokens: IntArray
) -> Expected:
    """The reference's own run of ``scenario``."""
    meter = Meter()
    decoder = Decoder(shape, parameters, scenario.batch, meter)
    written: dict[tuple[str, int], FloatArray] = {}
    n_logits = 0
    for step, call in enumerate(scenario.calls):
        out = decoder(tokens[:, call.position : call.position + call.tokens], logits=call.logits)
        for layer, values in enumerate([out.embedded, *out.outputs]):
            written[f"residual.{layer}", step] = values
        if out.logits is not None:
            written["logits", n_logits] = out.logits[:, None]
            n_logits += 1
    left: dict[str, FloatArray] = {}
    formats: dict[str, Format] = {}
    for layer, cache in enumerate(decoder.caches):
        left[f"layers.{layer}.kv"] = np.stack([cache.keys, cache.values], axis=2)
    for layer, mlp in decoder.fast.items():
        assert shape.ttt is not None
        for version, weight in enumerate(mlp.versions):
            written[f"layers.{layer}.fast_weight", version] = weight.applied
            formats[f"layers.{layer}.fast_weight"] = shape.ttt.fast_dtype
            if weight.master is not None:
                written[f"layers.{layer}.fast_master", version] = weight.master
                formats[f"layers.{layer}.fast_master"] = FLOAT32
        left |= _open_chunk(shape, layer, mlp)
    return Expected(written=written, left=left, formats=formats, counts=meter.counts)


def _open_chunk(shape: DecoderShape, layer: int, mlp: StreamingMlp) -> dict[str, FloatArray]:
    """Rows of the unfinished chunk by the name of the buffer that holds them."""
    assert shape.ttt is not None
    rows = {"carry_inputs": mlp.open.inputs, "carry_targets": mlp.open.targets, "carry_hidden": mlp.open.hidden}
    if shape.ttt.carry == "online":
        rows["accumulator"] = mlp.open.accumulator
    own = {f"layers.{layer}.{name}": values for name, values in rows.items()}
    return own | {"carry_targets": mlp.open.targets}  # of all layers, where they are the embeddings


def verify(plan: Plan) -> Verdict:
    """Simulate, execute, compare.

    Raises:
        ConfigError, WorkloadError, CapacityError: the plan cannot be simulated or executed.
    """
    if plan.accumulate not in ACCUMULATE:
        raise ConfigError(f"accumulation {plan.accumulate!r} is not one of {', '.join(ACCUMULATE)}")
    if not 0 <= plan.seed <= LARGEST_SEED:
        raise ConfigError(f"seed {plan.seed} is not between 0 and {LARGEST_SEED}")
    if plan.method.name not in CONTEXT_METHODS:
        raise ConfigError(
            f"method {plan.method.name} can be simulated but not executed op by op; "
            f"methods: {', '.join(CONTEXT_METHODS)}"
        )
    try:
        shape = decoder_shape(plan.model, plan.method, plan.dtype)
    except InputError as error:
        raise ConfigError(f"{plan.model.name} can be simulated but not executed: {error}") from None
    scenario = plan.scenario()
    trace = build_trace(plan.model, plan.method, scenario)
    _check_size(plan, int(trace.flops.sum()))
    parameters = random_parameters(shape, plan.seed)
    tokens = random_tokens(shape, plan.seed, plan.batch, scenario.context_tokens)
    result = simulate_trace(plan.chip, trace, engine=plan.engine, detail=plan.detail, overlap=plan.overlap)
    lowered = result.lowered
    try:
        expected = reference_run(shape, scenario, parameters, tokens)
    except InputError as error:
        raise WorkloadError(f"{plan.method.name} cannot be executed in {plan.dtype}: {error}") from None
    if plan.chip.writability.shadow_bank:
        trace = _with_shadow_banks(trace)
    comparison = Comparison(trace, expected)

    def verdict(failure: str | None) -> Verdict:
        return Verdict(
            method=plan.method.name, n_ops=trace.n_ops, n_kernels=lowered.kernels.n, cycles=result.cycles,
            failure=failure, digests=comparison.digests(shape.dtype), n_tensors=comparison.n_tensors,
            n_elements=comparison.n_elements, n_different=comparison.n_different,
            largest_error=comparison.largest_error,
        )  # fmt: skip

    unordered = unordered_pairs(trace, lowered, serial=plan.chip.mapping.serial_kernels)
    if unordered:
        op, earlier = unordered[0]
        return verdict(f"nothing makes {op_label(trace, op)} wait for {op_label(trace, earlier)}, whose data it needs")
    miscount = first_miscount(trace, expected.counts)
    if miscount:
        return verdict(miscount)

    def tiling(op: int) -> Tiling:
        return tiling_of(trace, lowered.work.op_tiles, op)

    try:
        memory = run_ops(
            trace, schedule_order(lowered, result.timeline).tolist(), parameters=parameters, tokens=tokens,
            tiling=tiling, mode=plan.accumulate, observers=(comparison.see,),
        )  # fmt: skip
    except ExecutionError as error:
        return verdict(str(error))
    comparison.finish(memory)
    return verdict(comparison.failure(allow_differences=plan.accumulate == "hardware"))


def _check_size(plan: Plan, flops: int) -> None:
    for what, amount, most in (
        ("parameters", plan.model.parameters, MOST_PARAMETERS),
        ("FLOPs", flops, MOST_FLOPS),
    ):
        if amount > most:
            raise WorkloadError(
                f"{plan.method.name} on {plan.model.name}: {amount:.3g} {what}, at most {most:.3g} can be executed in "
                "reasonable time and memory; take a smaller model or fewer tokens"
            )


def _with_shadow_banks(trace: Trace) -> Trace:
    """On a chip with shadow banks a new version of a fast weight is written beside the one that is being read."""
    tensors = (replace(t, in_place=t.in_place and t.role != Role.FAST_WEIGHT) for t in trace.tensors)
    return replace(trace, tensors=tuple(tensors))


# --- comparing values -------------------------------------------------------------------------------------------------


class Comparison:
    """Holds what ops write against the reference, as it is written."""

    def __init__(self, trace: Trace, expected: Expected) -> None:
        self._trace, self._expected = trace, expected
        writes = zip(trace.write_tensor.tolist(), trace.write_version.tolist(), strict=True)
        self._writer = dict(zip(writes, owners(trace.write_ptr).tolist(), strict=True))
        self._seen: set[tuple[str, int]] = set()
        self._found: list[tuple[int, str]] = []  # (op, what differs)
        self.n_tensors = self.n_elements = self.n_different = 0
        self.largest_error = 0.0

    def see(self, tensor: int, version: int, content: FloatArray) -> None:
        """Observer of a :class:`Memory`."""
        name = self._trace.tensors[tensor].name
        if (name, version) in self._expected.written:
            self._seen.add((name, version))
            op = self._writer[tensor, version]
            self._compare(op, f"{name} version {version}", content, self._expected.written[name, version])

    def finish(self, memory: Memory) -> None:
        """Compare what caches and open chunks hold in the end."""
        number = {tensor.name: i for i, tensor in enumerate(self._trace.tensors)}
        for name, values in self._expected.left.items():
            if name in number and values.shape[1]:
                content = memory.left(number[name])
                last = content if name.endswith("accumulator") else content[:, -values.shape[1] :]
                self._compare(self._trace.n_ops, f"{name} in the end", last, values)

    def _compare(self, op: int, what: str, got: FloatArray, wanted: FloatArray) -> None:
        self.n_tensors += 1
        self.n_elements += wanted.size
        if got.shape != wanted.shape:
            self._found.append((op, f"{what} has shape {got.shape}, the reference {wanted.shape}"))
            return
        differ = got != wanted
        n = int(np.count_nonzero(differ))
        if not n:
            return
        self.n_different += n
        scale = float(np.abs(wanted).max())
        self.largest_error = max(self.largest_error, float(np.abs(got - wanted).max()) / scale if scale else np.inf)
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        self._found.append(
            (
                op,
                f"{what} differs in {n} of {wanted.size} elements, first at {self._place(op, at)}: "
                f"{got[at]:.9g}, the reference has {wanted[at]:.9g}",
            )
        )

    def _place(self, op: int, at: tuple[int, ...]) -> str:
        """An element in words; the token where rows are tokens of a call."""
        if op < self._trace.n_ops and OP_KINDS[int(self._trace.kind[op])].name in ("embedding", "mlp_residual"):
            token = int(self._trace.position[op]) + at[1]
            chunk = self._chunk_of(token)
            return f"sequence {at[0]}, token {token}{chunk}, column {at[2]}"
        return f"element {at}"

    def _chunk_of(self, token: int) -> str:
        ttt = self._trace.meta.get("ttt")
        return f" (chunk {token // int(ttt['chunk_tokens'])})" if isinstance(ttt, Mapping) else ""

    def failure(self, *, allow_differences: bool) -> str | None:
        """The first difference in program order, or a tensor that no op wrote."""
        unseen = [key for key in self._expected.written if key not in self._seen]
        if unseen:
            name, version = unseen[0]
            return f"no op wrote {name} version {version}"
        if not self._found or allow_differences:
            return None
        op, what = min(self._found, key=lambda found: found[0])
        return f"{op_label(self._trace, op)}: {what}" if op < self._trace.n_ops else what

    def digests(self, dtype: Format) -> dict[str, str]:
        """SHA-256 of what the reference computed, by kind: outputs of layers, logits, fast weights."""
        hashes = {"outputs": hashlib.sha256(), "logits": hashlib.sha256(), "weights": hashlib.sha256()}
        for (name, version), values in self._expected.written.items():
            kind = "logits" if name == "logits" else "outputs" if name.startswith("residual.") else "weights"
            fmt = self._expected.formats.get(name, dtype)
            hashes[kind].update(f"{name} {version} {values.shape}".encode())
            hashes[kind].update(packed(values, fmt).tobytes())
        empty = hashlib.sha256().hexdigest()
        return {kind: h.hexdigest() for kind, h in hashes.items() if h.hexdigest() != empty}


# --- comparing counts -------------------------------------------------------------------------------------------------

_COLUMNS = (
    "FLOPs",
    "vector operations",
    "exponentials",
    "reciprocal roots",
    "divisions",
    "bytes read",
    "bytes written",
)


def first_miscount(trace: Trace, counts: Sequence[OpCount]) -> str | None:
    """The first op of which the reference was seen to do other work than the trace says; None if all agree.

    Ops are matched by kind, call, layer and chunk, in order.
    """
    observed: dict[tuple[str, int, int, int], list[tuple[int, ...]]] = {}
    for c in counts:
        work = (c.flops, c.lanes, c.exps, c.roots, c.divisions, c.bytes_read, c.bytes_written)
        observed.setdefault((c.kind, c.step, c.layer, c.chunk), []).append(work)
    read = total_by(owners(trace.read_ptr), trace.read_bytes, trace.n_ops)
    written = total_by(owners(trace.write_ptr), trace.write_bytes, trace.n_ops)
    columns = (trace.flops, trace.vector_ops, trace.exp_ops, trace.rsqrt_ops, trace.div_ops, read, written)
    rows = np.stack(columns, axis=1).tolist()
    keys = zip(trace.kind.tolist(), trace.step.tolist(), trace.layer.tolist(), trace.chunk.tolist(), strict=True)
    for op, ((kind, step, layer, chunk), row) in enumerate(zip(keys, rows, strict=True)):
        seen = observed.get((OP_KINDS[kind].name, step, layer, chunk))
        if not seen:
            return f"{op_label(trace, op)}: the reference has no such op"
        for name, stated, real in zip(_COLUMNS, row, seen.pop(0), strict=True):
            if stated != real:
                return f"{op_label(trace, op)}: the trace states {stated} {name}, the reference was seen to do {real}"
    for (name, step, layer, chunk), rest in observed.items():
        if rest:
            return f"the trace has no op {name} of call {step}, layer {layer}, chunk {chunk} that the reference has"
    return None
