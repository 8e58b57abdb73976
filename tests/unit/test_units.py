import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_sim import units
from ttt_sim.errors import ConfigError
from ttt_sim.units import (
    BANDWIDTH,
    CAPACITY,
    COUNT,
    CYCLES,
    DIMENSIONS,
    ENERGY_PER_BYTE,
    ENERGY_PER_FLOP,
    FLOP_RATE,
    FRACTION,
    FREQUENCY,
    OP_RATE,
    TIME,
    ceil_div,
    format_bytes,
    format_seconds,
    format_si,
    parse_quantity,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("3.35 TB/s", BANDWIDTH, 3.35e12),
        ("400 Gbit/s", BANDWIDTH, 50e9),  # 400 / 8
        ("1 GiB/s", BANDWIDTH, 1073741824.0),  # 2^30
        ("50 MiB", CAPACITY, 52428800.0),  # 50 x 2^20
        ("50 MB", CAPACITY, 50e6),
        ("50MB", CAPACITY, 50e6),
        ("1.83 GHz", FREQUENCY, 1.83e9),
        ("989 TFLOP/s", FLOP_RATE, 989e12),
        ("3.9 Top/s", OP_RATE, 3.9e12),
        ("15 ns", TIME, 15e-9),
        ("61 ns", TIME, 61e-9),  # 61 x 1e-9 in floats is one digit off
        ("0.16 pJ/FLOP", ENERGY_PER_FLOP, 0.16e-12),
        ("31.2 pJ/byte", ENERGY_PER_BYTE, 31.2e-12),
        ("3.9 pJ/bit", ENERGY_PER_BYTE, 31.2e-12),  # x 8
        ("700 W", units.POWER, 700.0),
        ("2.95 USD/h", units.PRICE_RATE, 2.95),
        ("30000 USD", units.PRICE, 30000.0),
        ("814 mm2", units.AREA, 814.0),
        ("128 cycles", CYCLES, 128.0),
        ("1 cycle", CYCLES, 1.0),
        ("132", COUNT, 132.0),
        ("1e9", COUNT, 1e9),
        (" .5 ", FRACTION, 0.5),
        ("-3 TB/s", BANDWIDTH, -3e12),  # ranges are the field's business
    ],
)
def test_parse_quantity(text, dimension, value):
    quantity = parse_quantity(text, dimension)
    assert quantity.value == value
    assert quantity.dimension is dimension


def test_examples_of_all_dimensions_parse():
    for dimension in DIMENSIONS:
        assert parse_quantity(dimension.example, dimension).value > 0


def test_no_unit_belongs_to_two_dimensions():
    spellings = [unit for dimension in DIMENSIONS for unit in dimension.units]
    assert len(spellings) == len(set(spellings))


@given(st.decimals(min_value=Decimal("1e-6"), max_value=Decimal("1e6"), allow_nan=False, places=6))
def test_conversion_is_exact_and_rounded_once(number):
    # the decimal product, rounded to a float once, is the correctly rounded value
    assert parse_quantity(f"{number} us", TIME).value == float(number * Decimal("1e-6"))


def test_one_of_two_dimensions():
    assert parse_quantity("1979 Top/s", FLOP_RATE, OP_RATE).dimension is OP_RATE
    assert parse_quantity("1979 TFLOP/s", FLOP_RATE, OP_RATE).dimension is FLOP_RATE


def test_a_number_alone_is_no_bandwidth():
    with pytest.raises(ConfigError, match=r"has no unit, expected a bandwidth such as 3\.35 TB/s"):
        parse_quantity("3.35e12", BANDWIDTH)


@pytest.mark.parametrize(
    ("text", "dimension", "part"),
    [
        ("50 MB/s", CAPACITY, "MB/s is the unit of a bandwidth, expected a capacity"),
        ("50 MB", BANDWIDTH, "MB is the unit of a capacity, expected a bandwidth"),
        ("5 pJ/op", ENERGY_PER_FLOP, "pJ/op is the unit of an energy per operation, expected an energy per FLOP"),
        ("5 W", COUNT, "expected a count without a unit"),
        ("3 TB/sec", BANDWIDTH, "unknown unit 'TB/sec', did you mean TB/s"),
        ("3 tb/s", BANDWIDTH, "did you mean TB/s"),
        ("1 Ghz", FREQUENCY, "did you mean GHz"),
        ("8 KB", CAPACITY, "did you mean kB or KiB"),
        ("8 Gb/s", BANDWIDTH, "did you mean Gbit/s or GB/s"),
        ("9 TOP/s", OP_RATE, "did you mean Top/s"),
        ("9 TFLOPS", FLOP_RATE, "did you mean TFLOP/s"),
        ("9 xyzzy", TIME, "unknown unit 'xyzzy', expected a time in s, ms, us, ns, ps"),
        ("80 %", FRACTION, "write the fraction 0.8 instead of a percentage"),
        ("nan", TIME, "nan: must be a finite number"),
        ("-inf", TIME, "must be a finite number"),
        ("Infinity", TIME, "must be a finite number"),
        ("1e400 s", TIME, "must be between 1e-60 and 1e60"),
        ("1e-400 s", TIME, "must be between 1e-60 and 1e60"),
        ("1e99999999999999999999 s", TIME, "must be between 1e-60 and 1e60"),
        ("", TIME, "an empty value is not a time"),
        ("ns 15", TIME, "'ns 15' is not a time"),
        ("1_000", COUNT, "expected a count without a unit"),
        ("0x10", COUNT, "expected a count without a unit"),
        ("\N{ARABIC-INDIC DIGIT THREE} s", TIME, "is not a time"),
        ("True", COUNT, "'True' is not a count"),
    ],
)
def test_malformed_quantities(text, dimension, part):
    with pytest.raises(ConfigError) as caught:
        parse_quantity(text, dimension)
    assert part in str(caught.value)


def test_ceil_div():
    # 7/3 = 2.33 up to 3; exact stays; beyond 2^53 where floats would round
    assert [ceil_div(7, 3), ceil_div(6, 3), ceil_div(0, 3), ceil_div(2**60 + 1, 2)] == [3, 2, 0, 2**59 + 1]


@pytest.mark.parametrize(("text", "tokens"), [("131072", 131072), ("128k", 131072), ("1M", 1048576), (" 8K ", 8192)])
def test_parse_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1k", "1.5k", "128kb", "1e3", "1G", "k", "1m", "9" * 16])
def test_malformed_tokens(text):
    with pytest.raises(ConfigError, match=r"k = 1024"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1536, "1.5 KiB"),
        (50 * 2**20, "50 MiB"),
        (80e9, "74.51 GiB"),  # 80e9 / 2^30 = 74.5058
        (1023.97, "1 KiB"),
        (2**50, "1 PiB"),
    ],
)
def test_format_bytes(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.35e12, "3.35 TB/s"),
        (999.97, "1 kB/s"),
        (0, "0 B/s"),
        (-2e9, "-2 GB/s"),
        (1.2345678e-9, "1.235 nB/s"),
        (math.inf, "inf B/s"),
        (123456e18, "123456 EB/s"),
    ],
)
def test_format_si(value, text):
    assert format_si(value, "B/s") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (262e-9, "262 ns"),
        (1.5, "1.5 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (9000, "2.5 h"),
        (432000, "5 days"),
        (0, "0 s"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@given(st.floats(min_value=1e-14, max_value=1e20))
def test_formatted_values_keep_four_digits(value):
    number, unit = format_si(value, "B/s").split(" ")
    prefix = unit.removesuffix("B/s")
    exponent = {"f": -15, "p": -12, "n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
    # four digits: half a unit in the fourth place of the smallest mantissa, 0.0005 / 1
    assert float(number) * 10.0 ** exponent[prefix] == pytest.approx(value, rel=5.01e-4)
