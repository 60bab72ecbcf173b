"""Numbers as people read and write them: SI prefixes, bytes, h:mm:ss, thousands."""

import math
import re

_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_BINARY_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti")


def si(value: float) -> str:
    """Return three significant digits and an SI prefix: 12345 is `12.3k`. A value below 1 keeps its decimals."""
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.2e}".split("e")  # rounded first, so that 999.9 is 1.00k
    thousands = min(int(exponent) // 3, len(_SI_PREFIXES) - 1)
    if thousands < 0:
        return f"{value:.3g}"
    shift = int(exponent) - 3 * thousands  # digits before the decimal point, less one
    return f"{float(mantissa) * 10**shift:.{max(2 - shift, 0)}f}{_SI_PREFIXES[thousands]}"


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss, or `-` where they are not known: NaN, infinite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def number(value: float) -> str:
    """Return an integer with thousands separated, or a float with five significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal."""
    return f"{fraction:.1%}"


def gib(num_bytes: float) -> str:
    """Return bytes as GiB in three significant digits, without the unit: `0.0123`, `3.46`, `1,234`."""
    value = num_bytes / 2**30
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def binary(num_bytes: float) -> str:
    """Return bytes in three significant digits with their unit: `512 B`, `3.46 MiB`."""
    exponent = max(0, math.frexp(num_bytes)[1] - 1)  # 2**exponent <= num_bytes, from 1 byte on
    power = min(exponent // 10, len(_BINARY_PREFIXES) - 1)
    value = num_bytes / 1024**power
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {_BINARY_PREFIXES[power]}B"


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size with a unit, such as `80GiB` or `40 GB`, or None where the text is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt])(i?)b", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    power = " kmgt".index(match[2].lower())
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power) or None
