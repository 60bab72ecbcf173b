"""What is known of this machine's processor."""

import functools
import sys
from pathlib import Path


@functools.cache
def is_amd_with_avx512() -> bool:
    """Return whether the processor is AMD's and has AVX-512, as far as Linux tells; elsewhere False."""
    if sys.platform != "linux":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    values = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in lines)}
    return values.get("vendor_id") == ["AuthenticAMD"] and "avx512f" in values.get("flags", [])
