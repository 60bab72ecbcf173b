import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchcli.terminal.units import binary, clock, gib, number, parse_bytes, si


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (1, "1.00"),
        (999.4, "999"),
        (999.9, "1.00k"),
        (1.2e12, "1.20T"),
        (0.0123, "0.0123"),
        (1e25, "10000Z"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@given(st.floats(min_value=1, max_value=9.99e23))
def test_si_is_short_and_true_to_three_digits(value: float) -> None:
    text = si(value)
    powers = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}
    digits, power = (text[:-1], powers[text[-1]]) if text[-1] in powers else (text, 1)
    assert len(text) <= 5
    assert float(digits) * power == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.6, "0:01:00"),
        (3599.9, "1:00:00"),
        (90061, "25:01:01"),
        (-1, "-"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_number() -> None:
    assert number(12345678) == "12,345,678"
    assert number(-4.321987) == "-4.322"
    assert number(math.nan) == "nan"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        *(("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5gib", 3 * 2**29), ("512MiB", 2**29)),
        *(
            ("2TiB", 2**41),
            ("7", None),
            ("0", None),
            ("-1GiB", None),
            ("", None),
        ),
        *(("nan", None), ("1e9GiB", None), ("80 Gi B", None)),
    ],
)
def test_a_size_of_memory_is_read(text: str, num_bytes: int | None) -> None:
    assert parse_bytes(text) == num_bytes


def test_bytes_are_written_in_three_digits() -> None:
    assert [gib(value) for value in (2**30, 3.456 * 2**30, 123456 * 2**30, 2**20)] == [
        "1",
        "3.46",
        "123,456",
        "0.000977",
    ]
    assert [binary(value) for value in (0, 7, 1023, 1024, 3.456 * 2**20, 2**40, 2**52)] == [
        *("0 B", "7 B", "1023 B", "1 KiB", "3.46 MiB", "1 TiB", "4096 TiB"),
    ]
