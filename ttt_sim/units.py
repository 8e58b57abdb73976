"""Quantities with units: parsing them strictly, and writing them for people.

A quantity is a number, a space and a unit: ``3.35 TB/s``, ``50 MiB``, ``15 ns``, ``0.16 pJ/FLOP``. Each unit is spelt
in one way, upper and lower case matter, and decimal and binary prefixes differ (1 MB = 10^6 bytes, 1 MiB = 2^20
bytes). Every dimension has one base unit, in which the value is returned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from ttt_sim.data_files import nearest
from ttt_sim.errors import ConfigError

_SI = {"f": -15, "p": -12, "n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def _si(unit: str, prefixes: str, scale: Fraction | int = 1) -> dict[str, Fraction]:
    """Prefixed spellings of ``unit``; a dot in ``prefixes`` stands for none. ``scale``: base units in one ``unit``."""
    return {p.strip(".") + unit: Fraction(10) ** _SI[p.strip(".")] * scale for p in prefixes}


def _binary(unit: str) -> dict[str, Fraction]:
    return {prefix + unit: Fraction(factor) for prefix, factor in _BINARY.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """What a quantity measures. ``units`` maps each spelling to its size in ``base``; empty: a plain number."""

    name: str
    base: str
    units: Mapping[str, Fraction]
    example: str


_PER_BIT = Fraction(8)

COUNT = Dimension(name="a count", base="", units={}, example="132")
FRACTION = Dimension(name="a fraction", base="", units={}, example="0.9")
CAPACITY = Dimension(name="a capacity", base="B", units=_si("B", ".kMGTP") | _binary("B"), example="50 MiB")
BANDWIDTH = Dimension(
    name="a bandwidth",
    base="B/s",
    units=_si("B/s", ".kMGTPE") | _binary("B/s") | _si("bit/s", ".kMGTP", Fraction(1, 8)),
    example="3.35 TB/s",
)
FREQUENCY = Dimension(name="a frequency", base="Hz", units=_si("Hz", ".kMG"), example="1.83 GHz")
FLOP_RATE = Dimension(name="a FLOP rate", base="FLOP/s", units=_si("FLOP/s", ".kMGTPE"), example="989 TFLOP/s")
OP_RATE = Dimension(name="an operation rate", base="op/s", units=_si("op/s", ".kMGTPE"), example="3.9 Top/s")
TIME = Dimension(name="a time", base="s", units=_si("s", ".munp"), example="15 ns")
CYCLES = Dimension(
    name="a number of cycles", base="cycles", units={"cycle": Fraction(1), "cycles": Fraction(1)}, example="128 cycles"
)
ENERGY_PER_FLOP = Dimension(
    name="an energy per FLOP", base="J/FLOP", units=_si("J/FLOP", ".munpf"), example="0.16 pJ/FLOP"
)
ENERGY_PER_OP = Dimension(
    name="an energy per operation", base="J/op", units=_si("J/op", ".munpf"), example="0.38 pJ/op"
)
ENERGY_PER_BYTE = Dimension(
    name="an energy per byte",
    base="J/byte",
    units=_si("J/byte", ".munpf") | _si("J/bit", ".munpf", _PER_BIT),
    example="31.2 pJ/byte",
)
POWER = Dimension(name="a power", base="W", units=_si("W", ".mk"), example="700 W")
PRICE_RATE = Dimension(name="a price per hour", base="USD/h", units={"USD/h": Fraction(1)}, example="2.95 USD/h")
PRICE = Dimension(name="a price", base="USD", units={"USD": Fraction(1)}, example="30000 USD")
AREA = Dimension(name="an area", base="mm2", units={"mm2": Fraction(1)}, example="814 mm2")
DENSITY = Dimension(
    name="a density",
    base="B/mm2",
    units={f"{unit}/mm2": factor for unit, factor in (_si("B", ".kMG") | _binary("B")).items()},
    example="2.5 MiB/mm2",
)

DIMENSIONS: tuple[Dimension, ...] = (
    COUNT, FRACTION, CAPACITY, BANDWIDTH, FREQUENCY, FLOP_RATE, OP_RATE, TIME, CYCLES,
    ENERGY_PER_FLOP, ENERGY_PER_OP, ENERGY_PER_BYTE, POWER, PRICE_RATE, PRICE, AREA, DENSITY,
)  # fmt: skip

#: A decimal number as YAML and people write it. No hexadecimal, underscores, nan or inf.
NUMBER_PATTERN = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_QUANTITY = re.compile(rf"\s*({NUMBER_PATTERN})\s*(\S.*?)?\s*")
#: Beyond this many powers of ten a number is a slip of the pen, and exact arithmetic on it could take for ever.
_LARGEST_EXPONENT = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """``value`` in base units of ``dimension``."""

    value: float
    dimension: Dimension


def parse_quantity(text: str, *dimensions: Dimension) -> Quantity:
    """Read ``text`` as a quantity of one of ``dimensions``.

    The conversion is exact and rounded once. Raises :class:`ConfigError` with what was expected: not a number, not
    finite, no unit, an unknown unit (nearest spelling), or the unit of another dimension.
    """
    wanted = " or ".join(dimension.name for dimension in dimensions)
    example = dimensions[0].example
    match = _QUANTITY.fullmatch(text)
    if match is None:
        if text.strip().lower().lstrip("+-.") in ("nan", "inf", "infinity"):
            raise ConfigError(f"{text.strip()}: must be a finite number, write for example {example}")
        shown = repr(shorten(text)) if text.strip() else "an empty value"
        raise ConfigError(f"{shown} is not {wanted}, write for example {example}")
    number, unit = match.group(1), match.group(2)
    exact = _exact(number)
    if unit is None:
        for dimension in dimensions:
            if not dimension.units:
                return Quantity(value=float(exact), dimension=dimension)
        raise ConfigError(f"{shorten(text)}: has no unit, expected {wanted} such as {example}")
    for dimension in dimensions:
        if unit in dimension.units:
            return Quantity(value=float(exact * dimension.units[unit]), dimension=dimension)
    raise ConfigError(f"{shorten(text)}: {_wrong_unit(number, unit, dimensions)}")


def _exact(number: str) -> Fraction:
    try:
        decimal = Decimal(number)
    except InvalidOperation:  # an exponent beyond what decimals can hold
        decimal = Decimal(10) ** (2 * _LARGEST_EXPONENT)
    if decimal and abs(decimal.adjusted()) > _LARGEST_EXPONENT:
        limits = f"between 1e-{_LARGEST_EXPONENT} and 1e{_LARGEST_EXPONENT}"
        raise ConfigError(f"{shorten(number)}: must be {limits} in size")
    return Fraction(decimal)


def _wrong_unit(number: str, unit: str, dimensions: tuple[Dimension, ...]) -> str:
    wanted = " or ".join(dimension.name for dimension in dimensions)
    example = dimensions[0].example
    spellings = [spelling for dimension in dimensions for spelling in dimension.units]
    if not spellings:
        if unit == "%" and FRACTION in dimensions:
            return f"write the fraction {float(_exact(number) / 100):g} instead of a percentage"
        return f"expected {wanted} without a unit, such as {example}"
    for other in DIMENSIONS:
        if unit in other.units:
            return f"{unit} is the unit of {other.name}, expected {wanted} such as {example}"
    in_bits = unit.replace("b/s", "bit/s")  # network data sheets write Gb/s for gigabits
    near = list(dict.fromkeys([s for s in spellings if s == in_bits] + nearest(unit, spellings)))
    if near:
        return f"unknown unit {shorten(unit)!r}, did you mean {' or '.join(near)}?"
    return f"unknown unit {shorten(unit)!r}, expected {wanted} in {', '.join(spellings)}"


def parse_tokens(text: str) -> int:
    """A number of tokens: ``131072``, ``128k`` (1024 each) or ``1M`` (1024 x 1024). Raises :class:`ConfigError`."""
    match = re.fullmatch(r"\s*(\d{1,15})\s*([kKM]?)\s*", text)
    if match is None or int(match.group(1)) == 0:
        raise ConfigError(f"{text!r} is not a number of tokens: write 131072, 128k (k = 1024) or 1M (M = 1024 x 1024)")
    return int(match.group(1)) * {"": 1, "k": 1024, "K": 1024, "M": 1024 * 1024}[match.group(2)]


def shorten(text: str, longest: int = 24) -> str:
    """Text of a file for a message, which may be of no file that is meant: one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def ceil_div(numerator: int, denominator: int) -> int:
    """``numerator / denominator`` rounded up, in integers."""
    return -(-numerator // denominator)


def format_bytes(n_bytes: float) -> str:
    """Bytes with a binary prefix and four significant digits: ``50 MiB``, ``1.5 KiB``, ``17 B``."""
    size, prefix = abs(n_bytes), ""
    for name, factor in _BINARY.items():
        # 1023.95 would print as 1024 with four digits: the next prefix reads better
        if size >= factor * 0.99995:
            prefix = name
    scaled = n_bytes / _BINARY[prefix] if prefix else n_bytes
    return f"{_digits(scaled)} {prefix}B"


def format_si(value: float, unit: str) -> str:
    """A value with the decimal prefix that leaves 1 to 999 before the point, four significant digits: ``3.35 TB/s``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    fitting = (prefix for prefix in reversed(_SI) if abs(value) >= 10.0 ** _SI[prefix] * 0.99995)
    prefix = next(fitting, "f")
    exponent = _SI[prefix]
    return f"{_digits(value / 10.0**exponent)} {prefix}{unit}"


def format_seconds(seconds: float) -> str:
    """Seconds with a decimal prefix below one, minutes, hours or days above: ``262 ns``, ``1.5 s``, ``3.2 min``."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s" if abs(seconds) >= 1 else format_si(seconds, "s")


def _digits(value: float) -> str:
    """At least four significant digits, whole numbers in full, no trailing zeros and no exponent."""
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
