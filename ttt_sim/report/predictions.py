"""What the commands ``predict``, ``validate``, ``explain`` and ``calibrate`` print and write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from ttt_sim.chip import Chip
from ttt_sim.config import load_chip
from ttt_sim.config.chip_file import read_chip_file, split_variant
from ttt_sim.data_files import did_you_mean, write_whole
from ttt_sim.errors import ConfigError
from ttt_sim.intervals import ANY_OP
from ttt_sim.predict.calibrate import calibrate, data_hash, updated_file, with_values
from ttt_sim.predict.explain import explain
from ttt_sim.predict.harness import DEFAULT_HARNESS, GROUP_OF_OP, HARNESSES
from ttt_sim.predict.models import MODELS
from ttt_sim.predict.nearest import TTT_OPS, nearest
from ttt_sim.predict.predictions import Devices, Prediction, predict_rows, raise_problems, to_csv
from ttt_sim.predict.published import read_cases
from ttt_sim.predict.rows import OPERATORS, ROW_DTYPES, Row, RowFile, parse_rows, read_rows
from ttt_sim.predict.serving import predict_case
from ttt_sim.predict.tolerances import MEASURED, Tolerance
from ttt_sim.predict.validation import Line, Validation, apart, held_out_coverage, read_folder, validate
from ttt_sim.report.figures import save_figure, write_table
from ttt_sim.report.figures_published import published_figure
from ttt_sim.report.figures_validation import validation_figures
from ttt_sim.report.folder import check_out, replaced_folder, write_summary
from ttt_sim.report.published import judged, published_frame, published_lines, published_page, real_chips
from ttt_sim.report.style import RC

EXIT_FAILED = 1
#: Ops of one new token per sequence.
ONE_TOKEN = ("attention_decode", "gdn_recurrent_decode")
#: Worst rows that are explained.
N_WORST = 8


def check_harness(name: str | None) -> None:
    """Raise :class:`ConfigError` unless ``name`` is a harness or None."""
    if name is not None and name not in HARNESSES:
        raise ConfigError(
            f"--harness: {name!r} is unknown{did_you_mean(name, tuple(HARNESSES))}; harnesses: {', '.join(HARNESSES)}"
        )


def read_for(path: Path) -> RowFile:
    """Read a file of rows; raises :class:`ConfigError` or :class:`WorkloadError` if it has none that can be used."""
    found = read_rows(path, models=tuple(MODELS))
    if not found.rows:
        raise_problems(found.problems)
        raise ConfigError(f"{path}: has no rows")
    return found


def _placed(path: Path, problems: Sequence[str]) -> list[str]:
    """What is wrong with rows that were read from ``path``, with the file before the line."""
    return [f"{path}:{text.removeprefix('line ')}" for text in problems]


def predict_file(chip: Chip | None, path: Path, out: Path, *, harness: str | None, keep_going: bool) -> int:
    """Predict the rows of ``path`` into ``out``; None for ``chip`` chooses it by each row's device.

    Raises:
        WorkloadError: rows that cannot be read or run, all of them, unless ``keep_going``.
    """
    check_harness(harness)
    found = read_for(path)
    predictions, impossible = predict_rows(found.rows, Devices(chip), harness=harness)
    problems = [*found.problems, *_placed(path, impossible)]
    if not keep_going:
        raise_problems(problems)
    done = [prediction for prediction in predictions if prediction is not None]
    if not done:
        raise_problems(problems)
    write_whole(out, to_csv(found.header, done).encode())
    for text in problems:
        print(f"left out: {text}")
    print(f"{out}: {len(done)} predictions")
    measured = [p for p in done if p.ratio is not None]
    if measured:
        mape = 100 * float(np.mean([abs((p.ratio or 1.0) - 1) for p in measured]))
        print(f"against the {len(measured)} measured rows: mean absolute error {mape:.1f} %")
    return 0


# --- validate ---------------------------------------------------------------------------------------------------------


def validate_command(data: Path | None, out: Path | None, *, refit: bool) -> int:
    """Compare with measurements of a folder, or with published figures; 1 if a tolerance is exceeded."""
    devices = Devices()
    if out is not None:
        check_out(out)
    if data is None:
        if refit:
            raise ConfigError("--refit needs measured rows, give their folder with --data")
        return _validate_published(out)
    rows, problems = read_folder(data)
    result = validate(rows, devices, problems)
    if not result.predictions:
        raise_problems(result.left_out)
        raise ConfigError(f"{data}: has no rows with a latency_us")
    _print_lines(result.lines)
    coverage = held_out_coverage(result.predictions)
    print("\nShare of held-out rows inside their 80 % interval:")
    print("  " + ", ".join(f"{op} {share:.0f} %" for op, share in sorted(coverage.items())))
    if refit:
        _print_refits(result, devices)
    _print_worst(result)
    _print_left_out(result.left_out)
    if out is not None:
        _write(result, out)
    return _judge(result.predictions, MEASURED)


def _validate_published(out: Path | None) -> int:
    published, chips = read_cases(), real_chips()
    outcomes = [predict_case(case) for case in published.cases]
    print("Published figures of chips (no --data given), rules in docs/validation.md:\n")
    print("\n".join(published_lines(published, outcomes, chips)))
    if out is not None:
        with replaced_folder(out) as folder:
            write_table(published_frame(outcomes), folder / "published.csv")
            (folder / "published.md").write_text(published_page(published, outcomes, chips), encoding="utf-8")
            loaded = [load_chip(name) for name in chips]
            kinds, titles = ({c.name: getattr(c, key) for c in loaded} for key in ("kind", "title"))
            with matplotlib.rc_context(dict(RC)):
                save_figure(published_figure(outcomes, kinds, titles), folder / "validate_published")
            write_summary(folder, {"cases": len(outcomes)})
        print(f"\nTable and figure: {out}")
    print("\nTolerances (mean absolute percentage error of counted figures):")
    found = judged(outcomes)
    print("\n".join(text for text, _ in found))
    return 0 if all(kept for _, kept in found) else EXIT_FAILED


#: What ``validate --refit`` fits anew: title, ops, number formats, the source of the rows.
REFITS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("16-bit gemm", ("gemm",), ("bf16", "fp16")),
    ("attention prefill", ("attention_prefill",), ("bf16",)),
    ("attention decode", ("attention_decode",), ("bf16",)),
    ("recurrent, chunks", ("gdn_chunk_prefill",), ("bf16",)),
)
REFIT_SOURCE = "aiconfigurator"


def _print_refits(result: Validation, devices: Devices) -> None:
    """Constants fitted anew for each device: error on shapes that were held out, and on the other devices' rows."""
    print("\nFitted anew for each device (shipped constants, held-out shapes, constants of this device on the others):")
    for title, ops, dtypes in REFITS:
        by_device: dict[str, list[Row]] = {}
        for p in result.predictions:
            row = p.row
            if row.op in ops and row.dtype in dtypes and row.source == REFIT_SOURCE and not apart(row):
                by_device.setdefault(row.device, []).append(row)
        for device, rows in sorted(by_device.items()):
            fit = calibrate({device: devices.chip(device)}, rows)
            moved = []
            for other, others in sorted(by_device.items()):
                if other != device:
                    found, _ = predict_rows(others, Devices(with_values(devices.chip(other), fit.values)))
                    errors = [abs((p.ratio or 1.0) - 1) for p in found if p is not None]
                    moved.append(f"{other} {100 * float(np.mean(errors)):.1f} %")
            print(
                f"  {title}, {device} ({len(rows)} rows): {fit.before:.1f} %, held out {fit.held_out:.1f} %"
                f"{', on ' + ', '.join(moved) if moved else ''}"
            )


def _print_lines(lines: Sequence[Line]) -> None:
    print(
        f"{'device':17} {'op':21} {'n':>4} {'MAPE':>6} {'median':>6} {'ratio':>5} {'rank':>5} {'<10%':>5} {'<20%':>5} "
        f"{'<50%':>5} {'in80%':>5} | {'roofline':>8} {'two-number':>10}"
    )
    for x in sorted(lines, key=lambda x: bool(x.apart)):
        print(
            f"{x.device:17} {x.op:21} {x.n:4} {x.mape:6.1f} {x.median:6.1f} {x.mean_ratio:5.2f} {x.rank:5.2f} "
            f"{x.within_10:5.0f} {x.within_20:5.0f} {x.within_50:5.0f} {x.coverage:5.0f} | {x.roofline_mape:8.1f} "
            f"{x.two_number_mape:10.1f}{f'  ({x.apart})' if x.apart else ''}"
        )
    print(
        "MAPE, median: absolute percentage error. ratio: geometric mean of predicted over measured. rank: Spearman. "
        "two-number: a floor\nand an efficiency per source, dtype and op, fitted to other folds of shapes. Lines in "
        "brackets do not count."
    )


def _print_worst(result: Validation) -> None:
    print("\nRows that are farthest off:")
    counted = [p for p in result.predictions if not apart(p.row)]
    for p in sorted(counted, key=lambda p: -abs(np.log(p.ratio or 1.0)))[:N_WORST]:
        row = p.row
        names = ("m", "n", "k", "batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim", "tp", "context")
        shape = " ".join(f"{name}={getattr(row, name)}" for name in names if getattr(row, name))
        side = "slower" if (p.ratio or 1.0) < 1 else "faster"
        print(
            f"  {row.device} {row.op} {row.dtype} {shape} {row.model}: measured {row.latency_us:.1f} us "
            f"({row.source}), predicted {p.predicted_us:.1f} us\n    bound by {p.bound_by}, holds {p.included}; "
            f"the measured kernel is {max(p.ratio or 1.0, 1 / (p.ratio or 1.0)):.1f} times {side}"
        )


def _print_left_out(problems: Sequence[str]) -> None:
    if not problems:
        return
    kinds: dict[str, int] = {}
    for text in problems:
        kind = text.split(": ", 1)[1] if ": " in text else text
        kind = kind.split(" is unknown")[0].split("; ")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"\nLeft out, {len(problems)} rows or faults of rows:")
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:12]:
        print(f"  {count:4} {kind}")


def _judge(predictions: Sequence[Prediction], tolerances: Sequence[Tolerance]) -> int:
    print("\nTolerances (mean absolute percentage error):")
    failed = 0
    for tolerance in tolerances:
        errors = [abs((p.ratio or 1.0) - 1) * 100 for p in predictions if tolerance.rows(p.row)]
        if not errors:
            print(f"  {tolerance.title}: no rows")
            continue
        error = float(np.mean(errors))
        failed += error > tolerance.limit
        verdict = "ok" if error <= tolerance.limit else "EXCEEDED"
        print(f"  {tolerance.title}: {error:.1f} of {tolerance.limit:g} ({len(errors)} rows) {verdict}")
    return EXIT_FAILED if failed else 0


def _write(result: Validation, out: Path) -> None:
    with replaced_folder(out) as folder:
        write_table(pd.DataFrame([asdict(line) for line in result.lines]), folder / "validation.csv")
        with matplotlib.rc_context(dict(RC)):
            for group, figure in validation_figures(result.predictions).items():
                save_figure(figure, folder / f"validate_{group}")
        write_summary(folder, {"lines": len(result.lines), "rows": len(result.predictions)})
    print(f"\nTable and figures: {out}")


# --- explain ----------------------------------------------------------------------------------------------------------


def explain_command(chip: Chip, op: str, dtype: str, numbers: Mapping[str, int | None], harness: str | None) -> int:
    """Print the explanation of one op."""
    check_harness(harness)
    known = (*OPERATORS, *TTT_OPS)
    if op not in known:
        raise ConfigError(f"--op: {op!r} is unknown{did_you_mean(op, known)}; ops: {', '.join(known)}")
    own = TTT_OPS.get(op)
    row_op = op if own is None else own.row_op
    given = {name: value for name, value in numbers.items() if value is not None}
    needed = OPERATORS[op] if own is None else own.needs
    if row_op in ONE_TOKEN:
        given.setdefault("seq_q", 1)
    missing = [name for name in needed if name not in given and name != "causal"]
    if missing:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"--op {op}: {options} {'is' if len(missing) == 1 else 'are'} missing")
    if op == "attention_prefill":
        given.setdefault("causal", 1)
    if dtype not in ROW_DTYPES:
        dtypes = tuple(ROW_DTYPES)
        raise ConfigError(f"--dtype: {dtype!r} is unknown{did_you_mean(dtype, dtypes)}; dtypes: {', '.join(dtypes)}")
    text = (
        ",".join(["device", "dtype", "op", *given])
        + "\n"
        + ",".join([chip.name, dtype, row_op, *map(str, given.values())])
    )
    found = parse_rows(text, "row")
    raise_problems([problem.removeprefix("row:2: ") for problem in found.problems])
    if own is not None:
        print(f"{op}, as {own.row_op}: {own.title}")
    explanation = explain(found.rows[0], chip, harness=harness or DEFAULT_HARNESS)
    print("\n".join(explanation.lines))
    if own is not None:
        _print_nearest(op, found.rows[0], explanation.prediction)
    return 0


def _print_nearest(op: str, row: Row, prediction: Prediction) -> None:
    """Say that nobody has measured an op of TTT, and what was measured nearest to it."""
    band = [factor * prediction.predicted_us for factor in ANY_OP]
    low, high = min(band[0], prediction.low_us), max(band[1], prediction.high_us)
    print(f"No measurement of a {op} is published; its 80 % interval is that of any op, {low:.2f} to {high:.2f} us.")
    print("Nearest measured shapes:")
    for near in nearest(op, row):
        r = near.row
        names = ("m", "n", "k", "batch", "seq_q", "n_heads", "head_dim")
        shape = " ".join(f"{name}={getattr(r, name)}" for name in names if getattr(r, name))
        print(
            f"  {r.op} {r.dtype} on {r.device}, {shape}: measured {r.latency_us:.1f} us ({r.source}), predicted "
            f"{near.predicted_us:.1f} us; its work differs by a factor of {near.factor:.2g}"
        )


# --- calibrate --------------------------------------------------------------------------------------------------------


def calibrate_command(chip_name: str, chip: Chip, path: Path, out: Path) -> int:
    """Fit the constants of a chip to the rows of ``path`` and write its file anew to ``out``.

    Raises:
        ConfigError: the new file would not be a chip file or would replace the rows, or nothing can be fitted.
        WorkloadError: rows that cannot be read or run, all of them.
    """
    file = read_chip_file(split_variant(chip_name)[0])
    old = file.path.read_text(encoding="utf-8-sig")
    if chip.overrides:
        raise ConfigError(
            f"--set: {', '.join(chip.overrides)}: the new file would not hold it; change the value in the chip file"
        )
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: a chip file ends in .yaml")
    if out.exists() and path.exists() and out.samefile(path):
        raise ConfigError(f"{out}: holds the rows to fit, name another file")
    read_chip_file(out, _renamed(old, out.stem))
    found = read_for(path)
    raise_problems(found.problems)
    rows = [row for row in found.rows if row.latency_us is not None and row.op in OPERATORS]
    if not rows:
        raise ConfigError(f"{path}: has no operator rows with a latency_us to fit")
    raise_problems(_placed(path, predict_rows(rows, Devices(chip))[1]))
    fit = calibrate(dict.fromkeys(dict.fromkeys(row.device for row in rows), chip), rows)
    data = f"{path.name} {data_hash(path.read_text(encoding='utf-8-sig'))}"
    date = datetime.now(tz=UTC).date().isoformat()
    content = _renamed(updated_file(old, chip, fit, data=data, date=date), out.stem)
    read_chip_file(out, content)  # before it takes the place of anything
    write_whole(out, content)
    devices = sorted({row.device for row in rows})
    if len(devices) > 1:
        print(f"the rows of {len(devices)} devices are taken for one chip: {', '.join(devices)}")
    ops = sorted({GROUP_OF_OP[row.op] for row in rows})
    print(f"{len(rows)} rows ({', '.join(ops)}): error {fit.before:.1f} % before, {fit.after:.1f} % after, "
          f"{fit.held_out:.1f} % on held-out shapes")  # fmt: skip
    names = list(fit.values)
    for i, name in enumerate(names):
        others = [(abs(fit.correlation[i, j]), names[j]) for j in range(len(names)) if j != i]
        tied = f", most correlated with {max(others)[1]} ({max(others)[0]:.2f})" if others else ""
        print(f"  {name}: {fit.values[name]:.4g}{tied}")
    for name, reason in fit.refused.items():
        print(f"  {name}: kept, {reason}")
    print(f"{out}: written")
    return 0


def _renamed(text: str, name: str) -> bytes:
    """A chip file with another name."""
    return re.sub(r"^name:.*$", f"name: {name}", text, count=1, flags=re.MULTILINE).encode()
