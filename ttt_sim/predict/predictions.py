"""Rows to predictions: the chip and variant of each row, its harness, its time, what bounds it and what is in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ttt_sim.chip import Chip
from ttt_sim.config import chip_names, load_chip
from ttt_sim.config.chip_file import read_chip_file
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError, TTTSimError, WorkloadError
from ttt_sim.intervals import Interval, interval
from ttt_sim.lower.tiles import product_rate
from ttt_sim.predict.harness import GROUP_OF_OP, HARNESSES, Harness, harness_of
from ttt_sim.predict.models import Part, parts_of
from ttt_sim.predict.predictor import StepTime, simulate_steps
from ttt_sim.predict.rows import ROW_DTYPES, WHOLE_MODEL, Row
from ttt_sim.predict.workloads import step_of

#: Columns that a prediction adds to those of its row.
OUTPUT_COLUMNS = ("chip", "predicted_us", "low_us", "high_us", "bound_by", "included")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """``low_us, high_us``: the 80 % interval; ``included``: what the time holds besides the op, in words."""

    row: Row
    chip: str
    predicted_us: float
    low_us: float
    high_us: float
    bound_by: str
    included: str

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None without a measurement."""
        return None if self.row.latency_us is None else self.predicted_us / self.row.latency_us


class Devices:
    """Chips by device name: one chip for every row, or (``auto``) the built-in file with a variant of that name."""

    def __init__(self, chip: Chip | None = None, *, chips: Mapping[str, Chip] | None = None) -> None:
        self._fixed = chip
        self._chips: dict[str, Chip] = dict(chips or {})
        self._files: dict[str, str] | None = None

    def chip(self, device: str) -> Chip:
        """The chip of a device name.

        Raises:
            ConfigError: no built-in chip has a variant of this name.
        """
        if self._fixed is not None:
            return self._fixed
        if device not in self._chips:
            files = self._variants()
            known = {name.lower(): name for name in files}
            name = known.get(device.lower())
            if name is None:
                raise ConfigError(
                    f"device: no built-in chip has the variant {device!r}{did_you_mean(device, tuple(files))}; "
                    f"variants: {', '.join(sorted(files))}"
                )
            file = files[name]
            self._chips[device] = load_chip(file, variant=None if name == file else name)
        return self._chips[device]

    def _variants(self) -> dict[str, str]:
        """Chip file by device name: its variants, and the name of the file itself."""
        if self._files is None:
            self._files = {variant: name for name in chip_names() for variant in (*read_chip_file(name).variants, name)}
        return self._files


@dataclass(frozen=True, slots=True)
class _Work:
    """Steps of a row with their counts, and time beside them."""

    parts: tuple[Part, ...]
    extra_us: float
    included: str


def predict_rows(
    rows: Sequence[Row], devices: Devices, *, harness: str | None = None, engine: str = "compiled"
) -> tuple[list[Prediction | None], list[str]]:
    """Predict all rows at once; ``harness`` names one for all of them, else each row's source decides.

    Returns the predictions (None for rows that no chip can run) and what is wrong with those rows, each with its line.
    """
    problems: dict[int, str] = {}
    work: list[tuple[Chip, _Work] | None] = []
    for index, row in enumerate(rows):
        try:
            chip = devices.chip(row.device)
            _check(row, chip)
            chosen = HARNESSES[harness or harness_of(row.source)]
            work.append((chip, _work(row, chip, chosen)))
        except TTTSimError as error:
            problems[index] = str(error)
            work.append(None)
    times, refused = _simulate(work, engine)
    problems |= {index: str(error) for index, error in refused.items()}
    predictions = [
        None if item is None or not found else _prediction(row, item[0], item[1], found)
        for row, item, found in zip(rows, work, times, strict=True)
    ]
    return predictions, [f"line {rows[index].line}: {problems[index]}" for index in sorted(problems)]


def _check(row: Row, chip: Chip) -> None:
    """Raise what makes a row impossible on a chip."""
    dtype = ROW_DTYPES[row.dtype]
    if GROUP_OF_OP[row.op] in ("product", "attention", "recurrent", "model"):
        if not chip.has_unit("matrix"):
            raise ConfigError(f"{chip.name}: has no matrix unit")
        product_rate(chip, dtype)
    if (row.op == "allreduce" or row.tp > 1) and not any(link.scope == "chip" for link in chip.links):
        raise ConfigError(f"{chip.name}: has no link to other chips, which tp {row.tp} needs")


def _work(row: Row, chip: Chip, harness: Harness) -> _Work:
    if row.op in WHOLE_MODEL:
        parts, extra = parts_of(row)
        words = ["serving software"] if extra else []
        words += [f"{row.tp} chips"] if row.tp > 1 else []
        words += ["prefills between decode steps"] if row.op == "e2e_decode_step" and "closed-loop" in row.note else []
        return _Work(tuple(parts), extra, ", ".join(["kernels of all layers", *words]))
    cache = chip.cache.capacity_bytes if chip.cache is not None else 0
    extra = harness.extra_us.get(GROUP_OF_OP[row.op], 0.0)
    step = step_of(row, harness, cache)
    words = [f"{len(step)} kernels" if len(step) > 1 else "1 kernel"]
    if step[0].kind == "quantise":
        words.append("quantisation of activations")
    if step[0].kind == "kv_append":
        words.append("KV write")
    if GROUP_OF_OP[row.op] == "product":
        words.append(f"{harness.weights} weights")
    if extra:
        words.append(f"{extra:+g} us {'of launch' if extra > 0 else 'without gaps'}")
    return _Work((Part(step, 1),), extra, ", ".join(words))


def _simulate(
    work: Sequence[tuple[Chip, _Work] | None], engine: str
) -> tuple[list[list[StepTime]], dict[int, TTTSimError]]:
    """Times of the steps of each item, simulated chip by chip, and by index why a chip cannot run an item."""
    by_chip: dict[int, tuple[Chip, list[int]]] = {}
    for index, item in enumerate(work):
        if item is not None:
            by_chip.setdefault(id(item[0]), (item[0], []))[1].append(index)
    times: list[list[StepTime]] = [[] for _ in work]
    refused: dict[int, TTTSimError] = {}

    def simulate(chip: Chip, members: Sequence[int]) -> None:
        parts = [item[1].parts for i in members if (item := work[i]) is not None]
        try:
            found = iter(simulate_steps(chip, [part.step for part in chain.from_iterable(parts)], engine=engine))
        except TTTSimError as error:  # halve until the items that cannot run are alone
            if len(members) == 1:
                refused[members[0]] = error
                return
            middle = len(members) // 2
            simulate(chip, members[:middle])
            simulate(chip, members[middle:])
            return
        for i, mine in zip(members, parts, strict=True):
            times[i] = [next(found) for _ in mine]

    for chip, members in by_chip.values():
        simulate(chip, members)
    return times, refused


def _prediction(row: Row, chip: Chip, work: _Work, times: Sequence[StepTime]) -> Prediction:
    weighted = [(time.microseconds * part.count, time.bound_by) for time, part in zip(times, work.parts, strict=True)]
    total = sum(us for us, _ in weighted) + work.extra_us
    shares: dict[str, float] = {}
    for us, bound in weighted:
        shares[bound] = shares.get(bound, 0.0) + us
    if work.extra_us > 0:
        shares["host"] = work.extra_us
    floor = min(us for us, _ in weighted) / 2  # a profiler's correction may not leave nothing
    predicted = max(total, floor)
    band: Interval = interval(row.op, predicted, chip)
    return Prediction(
        row=row,
        chip=chip.name if not chip.variant else f"{chip.name}:{chip.variant}",
        predicted_us=predicted,
        low_us=predicted * band.low,
        high_us=predicted * band.high,
        bound_by=max(sorted(shares), key=lambda name: shares[name]),
        included=work.included,
    )


def to_csv(header: Sequence[str], predictions: Iterable[Prediction]) -> str:
    """Rows as they were, with the columns of their predictions; a column of that name in the input is replaced."""
    kept = [name for name in header if name not in OUTPUT_COLUMNS]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*kept, *OUTPUT_COLUMNS])
    for p in predictions:
        cells = [p.row.cells.get(name, "") for name in kept]
        numbers = [f"{value:.4f}" for value in (p.predicted_us, p.low_us, p.high_us)]
        writer.writerow([*cells, p.chip, *numbers, p.bound_by, p.included])
    return out.getvalue()


def raise_problems(problems: Sequence[str]) -> None:
    """Raise :class:`WorkloadError` with every problem, one a line."""
    if problems:
        raise WorkloadError("\n".join(problems))
