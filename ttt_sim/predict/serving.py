"""Cases to predictions: a static batch, a decode step, a first token, a saturated server, pipelines of chips, one op.

Every time comes from the lowering and engine of ``run``; what is added here is arithmetic on them (docs/validation.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.errors import CapacityError, TTTSimError, WorkloadError
from ttt_sim.lower.levels import stage_link, transfer_seconds
from ttt_sim.lower.tiles import product_rate
from ttt_sim.model import Parallel
from ttt_sim.ops import OP_KINDS, OpClass, op_cost
from ttt_sim.predict.harness import GROUP_OF_OP, HARNESSES
from ttt_sim.predict.models import MODELS, Formats, ModelShape, Part, call_parts, split_by, weight_bytes
from ttt_sim.predict.predictor import simulate_steps
from ttt_sim.predict.published import OP_METRICS, Case
from ttt_sim.predict.rows import ROW_DTYPES, Row
from ttt_sim.predict.workloads import Operand, OpSpec, Step, product_step, size, step_of, trace_of
from ttt_sim.simulation import simulate_trace
from ttt_sim.system import microbatches_of
from ttt_sim.units import ceil_div, format_bytes

#: Metrics that grow with speed; the others are times and powers.
RATES = ("tokens_per_s", "tokens_per_s_user", "prefill_tokens_per_s", "op_tops", "op_tops_per_w")
#: Ratios beyond this are listed with their reason.
FAR = 2.0
_OP_CLASS = {kind.name: kind.op_class for kind in OP_KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A case and its prediction in the unit of its metric, None with a ``problem`` where the chip cannot run it.

    ``bound``: the best figure at data-sheet peaks, where operations and compulsory bytes give one; ``batch``:
    sequences of a saturated server.
    """

    case: Case
    predicted: float | None
    bound: float | None = None
    batch: int = 0
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        """Predicted over published; of a range over its nearer end, 1 inside it."""
        if self.predicted is None:
            return None
        case = self.case
        return self.predicted / min(max(self.predicted, case.value), case.value_to)

    @property
    def error(self) -> float | None:
        """Per cent of the published figure."""
        return None if self.ratio is None else 100 * abs(self.ratio - 1)

    @property
    def far(self) -> bool:
        """Off by more than a factor of two."""
        return self.ratio is not None and not 1 / FAR <= self.ratio <= FAR

    @property
    def beats_bound(self) -> bool:
        """Whether the published figure is better than peaks allow without speculation."""
        if self.bound is None:
            return False
        return self.case.value > self.bound if self.case.metric in RATES else self.case.value < self.bound


# --- memory of a saturated server -------------------------------------------------------------------------------------


def kv_bytes_per_token(model: ModelShape, formats: Formats, tp: int) -> int:
    """Bytes of keys and values of one token on one of ``tp`` chips."""
    return model.n_layers * size(2 * ceil_div(model.n_kv_heads, tp) * model.head_dim, formats.kv)


def model_bytes(model: ModelShape, formats: Formats, tp: int) -> int:
    """Bytes of weights on one of ``tp`` chips: layers, head, and an embedding as large as the head."""
    widths = model.d_model * (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    layer = widths + (3 if model.gated else 2) * model.d_model * model.d_ff
    vocabulary = size(2 * model.vocab * model.d_model, formats.act)
    return ceil_div(weight_bytes(model.n_layers * layer, formats.weights) + vocabulary, tp)


def saturated_batch(case: Case, capacity_bytes: int) -> int:
    """Sequences that a server keeps busy: as many as fit the memory at their mean length, or the software's most.

    Raises:
        CapacityError: not even one fits.
    """
    model = MODELS[case.model]
    free = int(capacity_bytes * (1 - case.reserved)) - model_bytes(model, case.formats, case.tp)
    held = case.prompt + case.answer // 2
    batch = max(free, 0) // (held * kv_bytes_per_token(model, case.formats, case.tp))
    if batch < 1:
        raise CapacityError(f"{case.model} with one sequence of {held} tokens does not fit {case.chip} x {case.tp}")
    return min(batch, case.most_sequences or batch)


def _check_room(case: Case, chip: Chip, batch: int) -> None:
    """Raise :class:`CapacityError` if weights and cache of ``batch`` sequences do not fit all chips together."""
    model = MODELS[case.model]
    held = case.prompt + case.answer // 2
    needed = model_bytes(model, case.formats, case.tp) + batch * held * kv_bytes_per_token(model, case.formats, case.tp)
    if needed > case.stages * chip.main_memory.capacity_bytes:
        raise CapacityError(
            f"{case.model} with {batch} sequences of {held} tokens needs {format_bytes(needed * case.tp)}, more than "
            f"{case.chips} x {chip.name} have"
        )


def steady_tokens_per_s(*, batch: int, step_s: float, prefill_s: float, answer: int) -> float:
    """Output tokens per second of ``batch`` sequences in a steady state, in which prefills and decode steps take turns:
    a token takes its share of a step and an ``answer``-th of the prefill of one prompt."""
    return 1 / (step_s / batch + prefill_s / answer)


# --- parts of a case --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a case simulates: parts of a decode step and of the prefill of ``prompts`` prompts, time between stages."""

    batch: int
    decode: tuple[Part, ...]
    prefill: tuple[Part, ...]
    prompts: int
    decode_send_s: float
    prefill_send_s: float


def _uneven(model: ModelShape, tp: int) -> bool:
    try:
        split_by(model, tp)
    except WorkloadError:
        return True
    return False


def _send_s(case: Case, chip: Chip, rows: int) -> float:
    """Activations of ``rows`` tokens from stage to stage, one link after the other."""
    nbytes = size(rows * MODELS[case.model].d_model, case.formats.act)
    links = [stage_link(chip, case.tp, stage) for stage in range(case.stages - 1)]
    return sum(transfer_seconds(link, "stage_send", nbytes, 2) for link in links)


def _plan(case: Case, chip: Chip) -> _Plan:
    model, padded = MODELS[case.model], _uneven(MODELS[case.model], case.tp)
    batch = case.batch or saturated_batch(case, chip.main_memory.capacity_bytes)
    _check_room(case, chip, batch)

    def call(batch: int, tokens: int, before: int) -> list[Part]:
        return call_parts(
            model, batch=batch, tokens=tokens, before=before, formats=case.formats, tp=case.tp, logits=batch,
            padded=padded,
        )  # fmt: skip

    at_once = ceil_div(batch, case.stages)  # sequences that move through the stages together
    decode = call(at_once, 1, case.prompt + case.answer // 2)
    longest = case.call_tokens or (case.prompt if case.batch == 0 else case.prompt * batch)
    prompts = max(min(longest // case.prompt, batch), 1)
    whole, rest = divmod(case.prompt, longest) if longest < case.prompt else (1, 0)
    prefill = call(prompts, min(longest, case.prompt), (whole - 1) * longest // 2 if whole > 1 else 0)
    prefill = [Part(part.step, part.count * whole) for part in prefill]
    if rest:
        prefill += call(prompts, rest, case.prompt - rest)
    return _Plan(
        batch=batch,
        decode=tuple(decode),
        prefill=tuple(prefill),
        prompts=prompts,
        decode_send_s=_send_s(case, chip, at_once),
        prefill_send_s=_send_s(case, chip, min(longest, case.prompt * prompts)),
    )


#: Layers in a row from which a layer takes as long as the one before it, where loads run ahead.
WARM, LONG = 2, 4


def _seconds(chip: Chip, parts: Sequence[Part]) -> float:
    """Time of ``parts``. Where loads of a kernel run ahead of it, layers are simulated in a row, and those after the
    first few take what the last of them took."""
    if chip.mapping.serial_kernels:
        alone = simulate_steps(chip, [part.step for part in parts])
        return sum(time.microseconds * part.count for time, part in zip(alone, parts, strict=True)) * 1e-6
    total = 0.0
    for part in parts:
        if part.count <= LONG:
            (whole,) = simulate_steps(chip, [in_a_row(part.step, round(part.count))])
            total += whole.microseconds
            continue
        short, long = simulate_steps(chip, [in_a_row(part.step, n) for n in (WARM, LONG)])
        layer = (long.microseconds - short.microseconds) / (LONG - WARM)
        total += long.microseconds + (part.count - LONG) * layer
    return total * 1e-6


def in_a_row(layer: Step, count: int) -> Step:
    """``count`` layers: each has tensors of its own and reads what the one before it wrote last."""

    def of(index: int, operand: Operand) -> Operand:
        if operand.name == "stream":
            return replace(operand, name=f"{index - 1}.next") if index else operand
        return replace(operand, name=f"{index}.{operand.name}")

    return tuple(
        replace(
            op, reads=tuple(of(index, operand) for operand in op.reads),
            writes=tuple(of(index, operand) for operand in op.writes),
        )
        for index in range(count)
        for op in layer
    )  # fmt: skip


def floor_seconds(parts: Iterable[Part], chip: Chip) -> float:
    """Least time of ``parts`` at data-sheet peaks: the larger of operations over peak, and of weights, keys and values
    over the bandwidth of the main memory."""
    flops_s = nbytes = 0.0
    for part in parts:
        for op in part.step:
            if _OP_CLASS[op.kind] in (OpClass.MATMUL, OpClass.ATTENTION):
                flops_s += part.count * _flops(op) / (product_rate(chip, op.dtype, sustained=False) * chip.clock_hz)
            nbytes += part.count * sum(o.nbytes for o in op.reads if o.role.name in ("WEIGHT", "KV"))
    return max(flops_s, nbytes / chip.main_memory.read_bytes_per_s)


def _flops(op: OpSpec) -> float:
    cost = op_cost(op.kind, batch=op.batch, m=op.m, n=op.n, k=op.k, heads=op.heads, pairs=op.pairs)
    return float(cost.flops)


def dynamic_j(chip: Chip, step: Step) -> float:
    """Dynamic energy of one step."""
    result = simulate_trace(chip, trace_of([step]))
    return sum(float(per_step[1]) for per_step in result.dynamic_energy_j().values())


# --- predictions ------------------------------------------------------------------------------------------------------


def metric_of(case: Case, *, batch: int, step_s: float, prefill_s: float) -> float:
    """The figure from the time of a decode step of ``batch`` sequences and that of the prefill of all of them (of a
    saturated server: of one prompt)."""
    if case.metric == "tokens_per_s":
        if case.batch == 0:
            return steady_tokens_per_s(batch=batch, step_s=step_s, prefill_s=prefill_s, answer=case.answer)
        return batch * case.answer / (prefill_s + case.answer * step_s)
    if case.metric == "total_s":
        return prefill_s + case.answer * step_s
    if case.metric == "tokens_per_s_user":
        return 1 / step_s
    if case.metric == "step_ms":
        return step_s * 1e3
    if case.metric == "ttft_ms":
        return prefill_s * 1e3
    return batch * case.prompt / prefill_s  # prefill_tokens_per_s


def predict_case(case: Case) -> Outcome:
    """Predict one case; what its chip cannot do is a ``problem`` of the outcome."""
    try:
        chip = load_chip(case.chip)
        if case.metric in OP_METRICS:
            return Outcome(case=case, predicted=_op_figure(case, chip))
        outcome = predict_on(case, chip)
        if not case.against or outcome.predicted is None:
            return outcome
        other = replace(case, chip=case.against, formats=Formats.of(case.against_weights), against="")
        base = predict_on(other, load_chip(case.against))
        assert base.predicted is not None
        return replace(outcome, predicted=outcome.predicted / base.predicted, bound=None)
    except TTTSimError as error:
        return Outcome(case=case, predicted=None, problem=str(error).splitlines()[0])


def predict_on(case: Case, chip: Chip) -> Outcome:
    """Predict a case of a model on ``chip``."""
    plan = _plan(case, chip)
    decodes = case.metric not in ("ttft_ms", "prefill_tokens_per_s")
    prefills = case.metric not in ("step_ms", "tokens_per_s_user", "power_w")
    step_s = _seconds(chip, plan.decode) + plan.decode_send_s if decodes else 0.0
    if case.metric == "power_w":
        joules = sum(part.count * dynamic_j(chip, part.step) for part in plan.decode) * case.tp
        joules *= microbatches_of(plan.batch, Parallel(pp=case.stages))  # groups of sequences under way together
        return Outcome(case=case, predicted=case.chips * chip.power.idle_w + joules / step_s)
    prefill_s = _seconds(chip, plan.prefill) + plan.prefill_send_s if prefills else 0.0
    rounds = 1 / plan.prompts if case.batch == 0 else plan.batch / plan.prompts
    least_step, least_prefill = (
        floor_seconds(parts, chip) if used else 0.0
        for parts, used in ((plan.decode, decodes), (plan.prefill, prefills))
    )
    return Outcome(
        case=case,
        predicted=metric_of(case, batch=plan.batch, step_s=step_s, prefill_s=prefill_s * rounds),
        bound=metric_of(case, batch=plan.batch, step_s=least_step, prefill_s=least_prefill * rounds),
        batch=plan.batch if case.batch == 0 else 0,
    )


def products_in_a_row(row: Row, count: int) -> Step:
    """``count`` products of an op row with one weight, each of what the one before it made."""
    harness = HARNESSES["bare_kernel"]
    (product,) = product_step(row.m, row.n, row.k, 1, ROW_DTYPES[row.dtype], harness, 0)

    def numbered(operand: Operand, index: int) -> Operand:
        return replace(operand, name=operand.name if operand.name == "b" else f"x{index}", distance=None)

    return tuple(
        replace(
            product, reads=tuple(numbered(operand, i) for operand in product.reads),
            writes=tuple(numbered(operand, i + 1) for operand in product.writes),
        )
        for i in range(count)
    )  # fmt: skip


def _op_figure(case: Case, chip: Chip) -> float:
    assert case.row is not None
    if case.metric == "op_us":
        harness = HARNESSES[case.harness]
        step = step_of(case.row, harness, chip.cache.capacity_bytes if chip.cache is not None else 0)
        (time,) = simulate_steps(chip, [step])
        return time.microseconds + harness.extra_us.get(GROUP_OF_OP[case.row.op], 0.0)
    short, long = (products_in_a_row(case.row, n) for n in (WARM, LONG))
    first, last = simulate_steps(chip, [short, long])
    seconds = (last.microseconds - first.microseconds) * 1e-6
    flops = sum(_flops(op) for op in long[WARM:])
    if case.metric == "op_tops":
        return flops / seconds * 1e-12
    joules = dynamic_j(chip, long) - dynamic_j(chip, short)
    return flops / (joules + chip.power.idle_w * seconds) * 1e-12


# --- summary ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Counted cases of a group: how many, median and mean error in per cent, and those off by more than two."""

    n: int
    median: float
    mean: float
    n_far: int


def summary_of(outcomes: Iterable[Outcome]) -> Summary | None:
    """Summary of the counted cases among ``outcomes``, None where there is none."""
    counted = [outcome for outcome in outcomes if outcome.case.use == "count"]
    errors = [outcome.error for outcome in counted if outcome.error is not None]
    if not errors:
        return None
    return Summary(
        n=len(errors),
        median=statistics.median(errors),
        mean=statistics.fmean(errors),
        n_far=sum(outcome.far for outcome in counted),
    )


def median_of_chips(outcomes: Sequence[Outcome]) -> float | None:
    """Median over chips of their median errors, so that a chip with many figures weighs no more than one with few."""
    chips = dict.fromkeys(outcome.case.file for outcome in outcomes)
    found = [summary_of(o for o in outcomes if o.case.file == chip) for chip in chips]
    medians = [summary.median for summary in found if summary is not None]
    return statistics.median(medians) if medians else None
