"""Checks of what callers pass in. Every message names the argument and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class InputError(ValueError):
    """An argument has the wrong shape or type, is not finite, or leaves the range of a number format."""


def as_array(name: str, value: object, shape: Sequence[int | None]) -> FloatArray:
    """``value`` as a float64 array of ``shape`` (None: any length), a copy. Never changes ``value``.

    Raises:
        InputError: not an array of numbers, another shape, or an element that is not finite.
    """
    try:
        given = np.asarray(value)
        if given.dtype.kind not in "biufOV":  # V: the formats of ml_dtypes; O is decided by the conversion
            raise TypeError
        if given.dtype.kind == "O" and any(isinstance(item, (str, bytes)) for item in given.flat):
            raise TypeError
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: expected an array of numbers, got {_kind(value)}") from None
    expected = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
    if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        raise InputError(f"{name}: shape is {array.shape}, expected {expected}")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name}: element {where} is {array[where]}, expected finite numbers")
    return array


def _kind(value: object) -> str:
    """What ``value`` is, with the type of its elements if it is an array."""
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def as_count(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int of at least ``least``; raises :class:`InputError`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or int(value) < least:
        raise InputError(f"{name}: is {value!r}, expected a whole number of at least {least}")
    return int(value)
