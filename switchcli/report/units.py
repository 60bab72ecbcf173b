"""Numbers as people read them: SI prefixes, h:mm:ss, thousands. Exact values are in the metrics file."""

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


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
