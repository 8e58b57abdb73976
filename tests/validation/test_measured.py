"""Predictions against measurements of others; skipped without them (see tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ttt_sim.intervals import MEASURED_CHIPS, RESIDUALS, TRANSFER
from ttt_sim.predict.calibrate import fit_values, with_values
from ttt_sim.predict.predictions import Devices, Prediction, predict_rows
from ttt_sim.predict.rows import OPERATORS, Row
from ttt_sim.predict.tolerances import MEASURED, Tolerance
from ttt_sim.predict.validation import (
    Validation,
    apart,
    held_out_coverage,
    read_folder,
    residual_bands,
    transfer_bands,
    validate,
)

DEVICES = Devices()
A100, H100 = "A100-SXM4-80GB", "H100-SXM5-80GB"


@pytest.fixture(scope="module")
def measured(data_dir: Path) -> Validation:
    rows, problems = read_folder(data_dir)
    return validate(rows, DEVICES, problems)


def error(predictions: list[Prediction]) -> float:
    return 100 * float(np.mean([abs((p.ratio or 1.0) - 1) for p in predictions]))


@pytest.mark.parametrize("tolerance", MEASURED, ids=lambda tolerance: tolerance.title)
def test_sets_of_rows_are_within_their_tolerance(tolerance: Tolerance, measured: Validation) -> None:
    members = [p for p in measured.predictions if tolerance.rows(p.row)]
    assert len(members) >= 10
    assert error(members) <= tolerance.limit


def test_simulation_beats_simple_predictors(measured: Validation) -> None:
    """Less than three quarters of the error of a floor and an efficiency per source, dtype and op, fitted to the other
    folds of shapes; and that is less than the plain roofline's."""
    for tolerance in MEASURED[:2] + MEASURED[4:6]:
        members = [i for i, p in enumerate(measured.predictions) if tolerance.rows(p.row)]
        latency = np.array([measured.predictions[i].row.latency_us for i in members], dtype=np.float64)
        two = 100 * float(np.abs(measured.two_number_us[members] / latency - 1).mean())
        roof = 100 * float(np.abs(measured.roofline_us[members] / latency - 1).mean())
        assert error([measured.predictions[i] for i in members]) < 0.75 * two < roof


def test_only_known_kinds_of_rows_are_left_out(measured: Validation) -> None:
    for problem in measured.left_out:
        assert "op: 'e2e_" in problem or "model: '" in problem, problem


def test_intervals_hold_on_rows_they_were_not_made_from(measured: Validation) -> None:
    coverage = held_out_coverage(measured.predictions)
    assert len(coverage) >= 14
    for op, share in coverage.items():
        assert 70 <= share <= 90, op


def test_shipped_intervals_are_those_of_the_data(measured: Validation) -> None:
    mine = [p for p in measured.predictions if DEVICES.chip(p.row.device).name in MEASURED_CHIPS]
    bands = residual_bands(mine)
    assert set(bands) == set(RESIDUALS)
    for op, classes in bands.items():
        assert np.allclose(np.array(classes), np.array(RESIDUALS[op]), atol=0.03), op
    moved = transfer_bands([p.row for p in mine], DEVICES)
    for op, band in moved.items():
        assert np.allclose(band, TRANSFER[op], atol=0.03), op


def transfer(measured: Validation, source: str, target: str) -> float:
    """Error of 16-bit products of ``target`` with constants fitted on ``source`` alone."""

    def products(device: str) -> list[Row]:
        rows = [p.row for p in measured.predictions]
        return [r for r in rows if MEASURED[0].rows(r) and r.device == device and not apart(r)]

    values = fit_values({source: DEVICES.chip(source)}, products(source))
    moved = with_values(DEVICES.chip(target), values)
    found, _ = predict_rows(products(target), Devices(moved))
    return error([p for p in found if p is not None])


def test_constants_of_one_chip_predict_the_products_of_another(measured: Validation) -> None:
    assert transfer(measured, A100, H100) <= 10
    # The library of the A100 picks poor kernels for some shapes, which no other chip foretells (docs/validation.md).
    assert transfer(measured, H100, A100) <= 12


def test_every_simulation_of_a_row_agrees_between_engines(measured: Validation) -> None:
    rows = [p.row for p in measured.predictions if p.row.op in OPERATORS][::25]
    compiled, _ = predict_rows(rows, DEVICES)
    simpy, _ = predict_rows(rows, DEVICES, engine="simpy")
    assert [p and p.predicted_us for p in compiled] == [p and p.predicted_us for p in simpy]
