"""One TTT MLP as the released inference code runs it, for checks from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ttt_sim.reference.checks import FloatArray, InputError, as_array, as_count
from ttt_sim.reference.formats import FORMATS, Format, find_format, is_in
from ttt_sim.reference.in_place_ttt import TAPS, MlpWeights, StreamingMlp, TTTOptions

_DTYPES = ("float64", "float32", "bfloat16")
_NAMES = ("gate_proj", "up_proj", "down_proj", "ttt_conv", "ttt_proj")


def official_mlp(
    params: Mapping[str, npt.ArrayLike | None],
    x: npt.ArrayLike,
    t: npt.ArrayLike,
    *,
    chunk: int,
    lr: float,
    pieces: Sequence[int],
    dtype: str,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """One sequence through one In-Place TTT MLP, call by call.

    Args:
        params: arrays in the layout that PyTorch keeps: ``gate_proj`` (f, d), ``up_proj`` (f, d), ``down_proj`` (d, f),
            ``ttt_conv`` (d, 1, 5), ``ttt_proj`` (d, d) or None.
        x, t: inputs and targets (n, d).
        chunk: tokens per update. lr: rate of the update.
        pieces: tokens of each call; they add up to n.
        dtype: ``float64``, ``float32`` or ``bfloat16``; for the last, all values must be bfloat16 numbers.

    Returns:
        y (n, d) and the final fast weight (d, f), float64 for ``float64``, else float32. Nothing passed in is changed.

    Raises:
        InputError: a wrong shape, a value that is not finite or not a number of ``dtype``, an unknown ``dtype``, pieces
            that do not add up to n, or a result beyond the range of ``dtype``.

    Source: github.com/ByteDance-Seed/In-Place-TTT, commit be2324829b0e.
    """
    fmt = find_format(dtype, allowed=_DTYPES)
    _check_names(params)
    gate = _values("params['gate_proj']", params["gate_proj"], (None, None), fmt)
    f, d = gate.shape
    projection = params["ttt_proj"]
    weights = MlpWeights(
        gate=gate,
        up=_values("params['up_proj']", params["up_proj"], (f, d), fmt),
        down=_values("params['down_proj']", params["down_proj"], (d, f), fmt),
        conv=_values("params['ttt_conv']", params["ttt_conv"], (d, 1, TAPS), fmt)[:, 0],
        projection=None if projection is None else _values("params['ttt_proj']", projection, (d, d), fmt),
    )
    inputs = _values("x", x, (None, d), fmt)
    targets = _values("t", t, (inputs.shape[0], d), fmt)
    n = inputs.shape[0]
    lengths = _lengths(pieces, n)
    rate = float(as_array("lr", lr, ()))
    options = TTTOptions(chunk=as_count("chunk", chunk), rate=rate, dtype=fmt, fast_dtype=fmt)
    mlp = StreamingMlp(weights, options)
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        outputs.append(mlp(inputs[None, part], targets[None, part])[0])
        start += length
    kind = np.float64 if fmt is FORMATS["float64"] else np.float32
    return np.concatenate(outputs).astype(kind), mlp.weight[0].astype(kind)


def _check_names(params: object) -> None:
    if not isinstance(params, Mapping) or sorted(map(str, params)) != sorted(_NAMES):
        got = ", ".join(sorted(map(str, params))) if isinstance(params, Mapping) else type(params).__name__
        raise InputError(f"params: got {got}, expected a mapping with {', '.join(_NAMES)}")


def _lengths(pieces: object, n: int) -> list[int]:
    listed = pieces.tolist() if isinstance(pieces, np.ndarray) else pieces
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, bytearray)):
        raise InputError(f"pieces: is {pieces!r}, expected a tuple of call lengths that add up to {n}")
    lengths = [as_count(f"pieces[{i}]", piece) for i, piece in enumerate(listed)]
    if sum(lengths) != n:
        raise InputError(f"pieces: {tuple(lengths)} add up to {sum(lengths)}, expected {n}, the rows of x")
    return lengths


def _values(name: str, value: object, shape: tuple[int | None, ...], fmt: Format) -> FloatArray:
    array = as_array(name, value, shape)
    if 0 in array.shape:
        raise InputError(f"{name}: shape is {array.shape}, expected no empty dimension")
    if not is_in(array, fmt):
        raise InputError(f"{name}: holds numbers that {fmt.name} cannot represent; round them first")
    return array
