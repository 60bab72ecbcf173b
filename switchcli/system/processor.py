"""Facts about this machine's processors, and the number of them that this process may use."""

import functools
import math
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_processors() -> int:
    """Return how many processors this process may use.

    That is the number that it may run on, or the limit of its container if that is lower. A part of a processor counts
    as a whole one. macOS does not tell which ones may be used; there all processors of the machine count.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, processor_limit())))


def is_thread_count_set() -> bool:
    """Return whether OMP_NUM_THREADS sets the number of OpenMP's threads. libgomp ignores all but positive integers."""
    return re.match(r"\s*\+?0*[1-9]", os.environ.get("OMP_NUM_THREADS", "")) is not None


def processor_limit() -> float:
    """Return the number of processors whose time this process may take, or infinity without a limit.

    A container or a service has such a limit: `docker run --cpus`, `limits.cpu` of Kubernetes, `CPUQuota` of systemd.
    Its threads may run on all processors. Linux stops all of them for the rest of a period, mostly 100 ms, when
    together they have run for the limit. The lowest limit of the process's control group and of those around it counts.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return math.inf
    groups = set()
    for line in lines:
        controllers, colon, path = line.partition(":")[2].partition(":")
        if not colon or (controllers and "cpu" not in controllers.split(",")):
            continue
        # Version 1 of control groups names its controllers. Version 2 names none, and may be beside version 1.
        for root in (controllers, "cpu") if controllers else ("", "unified"):
            # In a container the path may be that of the host. The container's own group is then at the root.
            group = CGROUPS / root / path.strip("/")
            groups |= {each for each in (group, *group.parents) if each.is_relative_to(CGROUPS)}
    return min((_limit_of(group) for group in groups), default=math.inf)


def _limit_of(group: Path) -> float:
    """Return the limit of one control group, in processors."""
    with suppress(OSError):
        return _ratio(*(group / "cpu.max").read_text(encoding="utf-8", errors="replace").split()[:2])
    with suppress(OSError):  # version 1
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        return _ratio(*((group / name).read_text(encoding="utf-8", errors="replace") for name in names))
    return math.inf


def _ratio(quota: str = "", period: str = "") -> float:
    """Return quota / period, both in microseconds. Without a limit the quota is `max`, or -1 in version 1."""
    try:
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (ValueError, ZeroDivisionError):
        return math.inf


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return Linux's facts about the last processor; elsewhere {}."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Return the processor's name, and its family and model, which tell apart what shares a name: the bits of sums of
    floats may depend on it. Elsewhere than on Linux the architecture, as platform.processor() would start a subprocess.
    """
    facts = _cpuinfo()
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def has_avx512() -> bool:
    """Return whether the processor has AVX-512, as far as Linux tells; elsewhere False."""
    return "avx512f" in _cpuinfo().get("flags", "").split()


def is_amd_with_avx512() -> bool:
    """Return whether the processor is AMD's and has AVX-512, as far as Linux tells; elsewhere False."""
    return _cpuinfo().get("vendor_id") == "AuthenticAMD" and has_avx512()


@functools.cache
def has_full_width_avx512() -> bool:
    """Return whether the processor is AMD's and computes twice as much per cycle with AVX-512 as with AVX2.

    That is so from family 26 (Zen 5) on. Zen 4 computes each instruction of AVX-512 in two halves.
    """
    family = _cpuinfo().get("cpu family", "")
    return is_amd_with_avx512() and family.isdecimal() and int(family) >= 26
