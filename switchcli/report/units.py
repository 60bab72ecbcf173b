"""Numbers as people read and write them: SI prefixes, bytes, h:mm:ss, thousands. Exact values are elsewhere."""

import math
import re

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_BYTES = {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def si(value: float) -> str:
    """Three significant digits and an SI prefix: 12345 is `12.3k`; what is below 1 keeps its decimals."""
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.2e}".split("e")  # rounded first, so that 999.9 is 1.00k
    group = min(int(exponent) // 3, len(_PREFIXES) - 1)
    if group < 0:
        return f"{value:.3g}"
    shift = int(exponent) - 3 * group
    return f"{float(mantissa) * 10**shift:.{max(2 - shift, 0)}f}{_PREFIXES[group]}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss; `-` when nobody knows (NaN, infinity, negative)."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def number(value: float) -> str:
    """A count with thousands separated, or a measurement with five significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def gib(num_bytes: float) -> str:
    """Bytes as GiB, in three significant digits: `0.0123`, `3.46`, `1,234`."""
    value = num_bytes / 2**30
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def binary(num_bytes: float) -> str:
    """Bytes in three significant digits with their unit: `512 B`, `3.46 MiB`."""
    power = min(max(0, math.frexp(num_bytes)[1] - 1) // 10, 4)
    value = num_bytes / 1024**power
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}B"


def parse_bytes(text: str) -> int | None:
    """Bytes that a size as `80GiB`, `40 GB` or `1e9` says; None when it says none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?) *([a-z]*)", text.strip(), re.IGNORECASE)
    units = {"": 1, "b": 1, **{unit.lower(): size for unit, size in _BYTES.items()}}
    if not found or found[2].lower() not in units:
        return None
    return round(float(found[1]) * units[found[2].lower()]) or None
