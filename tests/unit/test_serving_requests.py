"""Requests from files and from seeds."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from ttt_sim.errors import ConfigError
from ttt_sim.serving.requests import (
    COLUMNS,
    LONGEST_TOKENS,
    MOST_REQUESTS,
    Request,
    offered_per_s,
    parse_requests,
    poisson_requests,
    read_requests,
)

HEAD = "arrival_s,prompt_tokens,output_tokens\n"
#: The stream of seed 1: arrivals in ps, prompts, outputs.
PINNED = [(596074763924, 2588, 117), (678094365196, 16, 103), (1606612206654, 54, 330)]


def test_file_is_read_to_the_picosecond(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(
        "\ufeffoutput_tokens, arrival_s ,prompt_tokens\n\n3,0,10\n 1 ,0.1000000000004,7\n2,1e2,1\n", "utf-8"
    )
    assert read_requests(path) == (
        Request(arrival_ps=0, prompt_tokens=10, output_tokens=3),
        Request(arrival_ps=100_000_000_000, prompt_tokens=7, output_tokens=1),
        Request(arrival_ps=10**14, prompt_tokens=1, output_tokens=2),
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("-1,5,5", "arrival_s: '-1' is not a number of seconds from 0 to 1000000"),
        ("1e7,5,5", "arrival_s: '1e7' is not a number of seconds from 0 to 1000000"),
        ("nan,5,5", "arrival_s: 'nan' is not a number of seconds"),
        ("0x1,5,5", "arrival_s: '0x1' is not a number of seconds"),
        (",5,5", "arrival_s: '' is not a number of seconds"),
        ("0.5,5,5", "arrival_s: 0.5 is before 1 of an earlier row"),
        ("2,0,5", f"prompt_tokens: '0' is not a whole number from 1 to {LONGEST_TOKENS}"),
        ("2,1.5,5", "prompt_tokens: '1.5' is not a whole number"),
        ("2,5,-3", "output_tokens: '-3' is not a whole number"),
        ("2,5,1e3", "output_tokens: '1e3' is not a whole number"),
        ("2,5,9999999999", "output_tokens: '9999999999' is not a whole number"),
        ("2,200000,100000", f"prompt_tokens + output_tokens: 300000 is more than {LONGEST_TOKENS}"),
        ("2,5", "has 2 cells, expected 3"),
        ("2,5,5,5", "has 4 cells, expected 3"),
    ],
)
def test_bad_row_is_named_with_line_field_value_and_range(row: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_requests(f"{HEAD}1,10,10\n{row}\n", "r.csv")
    assert str(caught.value).startswith(f"r.csv:3: {words}")


def test_all_bad_rows_are_told_in_one_message() -> None:
    rows = "".join(f"{i},0,0\n" for i in range(15))
    with pytest.raises(ConfigError) as caught:
        parse_requests(HEAD + rows, "r.csv")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("r.csv:2: prompt_tokens: '0'")
    assert lines[1].startswith("r.csv:2: output_tokens: '0'")
    assert lines[20:] == ["and 10 more"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "r.csv: is empty, expected a header with arrival_s"),
        (HEAD, "r.csv: has no requests"),
        ("arrival,prompt_tokens,output_tokens\n", "r.csv:1: unknown column 'arrival', did you mean arrival_s?"),
        ("arrival_s,prompt_tokens\n1,2\n", "r.csv:1: the column 'output_tokens' is missing"),
        (HEAD.strip() + ",arrival_s\n", "r.csv:1: the column 'arrival_s' is given twice"),
        (HEAD + '1,"2,3\n', "r.csv:2: unexpected end of data"),
    ],
)
def test_bad_file_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_requests(text, "r.csv")
    assert str(caught.value).startswith(words)


def test_missing_file_and_too_many_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv: no such file"):
        read_requests(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=f"are more than {MOST_REQUESTS}"):
        parse_requests(HEAD + "1,1,1\n" * (MOST_REQUESTS + 1), "r.csv")


def test_random_requests_are_the_same_everywhere() -> None:
    """Written down once; another machine or version must not change them."""
    first = poisson_requests(count=3, rate_per_s=2.0, prompt=1000, output=100, seed=1)
    assert [(r.arrival_ps, r.prompt_tokens, r.output_tokens) for r in first] == PINNED
    assert poisson_requests(count=9, rate_per_s=2.0, prompt=1000, output=100, seed=1)[:3] == first
    assert poisson_requests(count=3, rate_per_s=2.0, prompt=1000, output=100, seed=2) != first


def test_arrivals_are_poisson() -> None:
    """Gaps of an exponential distribution: mean 1/rate, as large a deviation, no memory from gap to gap."""
    rate, n = 5.0, 20_000
    requests = poisson_requests(count=n, rate_per_s=rate, prompt=10, output=10, lengths="fixed", seed=3)
    gaps = np.diff([0, *(r.arrival_ps for r in requests)]) * 1e-12
    standard_error = 1 / rate / np.sqrt(n)
    assert abs(gaps.mean() - 1 / rate) < 4 * standard_error
    assert abs(gaps.std() - 1 / rate) < 4 * 1.5 * standard_error  # kurtosis 9: sqrt((9 - 1) / 4) of it
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / np.sqrt(n)
    assert offered_per_s(requests) == pytest.approx((n - 1) / (gaps.sum() - gaps[0]))


def test_rate_stretches_the_same_stream() -> None:
    slow, fast = (poisson_requests(count=50, rate_per_s=rate, prompt=100, output=9, seed=4) for rate in (1.0, 4.0))
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    for a, b in zip(slow, fast, strict=True):
        assert abs(a.arrival_ps - 4 * b.arrival_ps) <= 4 * 50


def test_lengths_have_their_means() -> None:
    n = 10_000
    for lengths, deviation, low, high in (
        ("fixed", 0.0, 400, 400),
        ("uniform", 400 / np.sqrt(12), 200, 600),
        ("exponential", 400.0, 1, 3200),
    ):
        requests = poisson_requests(count=n, rate_per_s=1, prompt=400, output=400, lengths=lengths)  # type: ignore[arg-type]
        for values in ([r.prompt_tokens for r in requests], [r.output_tokens for r in requests]):
            assert abs(np.mean(values) - 400) <= 4 * deviation / np.sqrt(n) + 0.5
            assert low <= min(values)
            assert max(values) <= high


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "count: 0 must be from 1 to 100000"),
        ({"seed": -1}, "seed: -1 must be from 0 to"),
        ({"rate_per_s": 0.0}, "rate: 0 must be at least"),
        ({"rate_per_s": float("nan")}, "rate: nan must be at least"),
        ({"rate_per_s": 1e-9}, "rate: 1e-09 must be at least 2e-05 requests/s for a stream of 10 requests"),
        ({"prompt": 0}, "prompt: 0 must be at least 1 token"),
        ({"output": 1 << 18}, "are more than 262144"),
        ({"lengths": "expo"}, "lengths: 'expo' is not one of fixed, uniform, exponential"),
    ],
)
def test_streams_that_cannot_be(change: dict[str, object], words: str) -> None:
    values: dict[str, object] = {"count": 10, "rate_per_s": 1.0, "prompt": 10, "output": 10, **change}
    with pytest.raises(ConfigError) as caught:
        poisson_requests(**values)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_columns_are_those_of_a_request() -> None:
    assert COLUMNS == ("arrival_s", "prompt_tokens", "output_tokens")
    assert Request(arrival_ps=0, prompt_tokens=5, output_tokens=3).tokens == 7
    assert offered_per_s(parse_requests(HEAD + "1,1,1\n1,1,1\n", "r.csv")) is None
    assert Decimal(offered_per_s(parse_requests(HEAD + "1,1,1\n3,1,1\n3,1,1\n", "r.csv")) or 0) == 1
