"""Facts about the processors, from what Linux tells, and the number of threads that follows."""

import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.cpu_settings import limit_threads
from switchcli.system import processor
from switchcli.system.processor import (
    available_processors,
    has_full_width_avx512,
    is_amd_with_avx512,
    processor_limit,
    processor_name,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


def _forget() -> None:
    processor._cpuinfo.cache_clear()
    processor.has_full_width_avx512.cache_clear()


@pytest.fixture(autouse=True)
def facts() -> Iterator[None]:
    """Facts that a test replaced are forgotten."""
    yield
    _forget()


@linux
@pytest.mark.parametrize(
    ("told", "has_avx512", "has_full_width"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True, True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True, False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx2\n", False, False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26\nflags\t\t: fpu avx2 avx512f\n", False, False),
        ("BogoMIPS : 48\n", False, False),  # a machine that tells nothing
    ],
)
def test_the_vendor_the_family_and_the_width_count(
    told: str, has_avx512: bool, has_full_width: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{told}\n", encoding="utf-8")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    _forget()
    assert is_amd_with_avx512() is has_avx512
    assert has_full_width_avx512() is has_full_width


@linux
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n", "AMD EPYC (family 26, model 2)"),
        ("BogoMIPS : 48\n", platform.machine()),  # a machine that tells nothing
    ],
)
def test_processors_of_one_name_are_told_apart_by_family_and_model(
    told: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(told, encoding="utf-8")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    _forget()
    assert processor_name() == expected


@pytest.mark.parametrize(("count", "processors"), [(3, 3), (None, 1)])
def test_processors_where_a_system_does_not_say_which_may_be_used(
    count: int | None, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(processor, "OWN_CGROUPS", Path("/missing"))
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert available_processors() == processors


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eight threads of torch, which OMP_NUM_THREADS did not ask for, on eight processors."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def control_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, **files: str) -> None:
    """Stand in for the control groups: the lines of /proc/self/cgroup, and files under /sys/fs/cgroup."""
    (folder / "own").write_text(own, encoding="utf-8")
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(processor, "OWN_CGROUPS", folder / "own")
    monkeypatch.setattr(processor, "CGROUPS", folder / "groups")


VERSION_1 = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n3:cpuset:/docker/a\n0::/system\n"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),  # the machine itself
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),  # systemd: around it
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3),  # a process from outside of the container
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (
            VERSION_1,
            {"cpu,cpuacct/docker/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/docker/a/cpu.cfs_period_us": "25000"},
            2,
        ),
        (VERSION_1, {"unified/system/cpu.max": "100000 100000\n"}, 1),
        ("nonsense\n0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/a\n", {"cpu.max": "100000 100000\n", "a/cpu.max": "100000 0\n"}, 1),
        ("0::/a\n", {"cpu.max": "100000 100000\n", "a/cpu.max": "nonsense\n"}, 1),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "0\n"}, math.inf),
    ],
)
def test_the_lowest_limit_of_the_groups_around_a_process_counts(
    own: str, files: dict[str, str], limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(monkeypatch, tmp_path, own, **files)
    assert processor_limit() == limit


@pytest.mark.parametrize(("limit", "expected"), [("max", 8), ("900000", 8), ("150000", 2), ("20000", 1)])
def test_a_run_uses_as_many_threads_as_its_container_may(
    threads: None, limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(monkeypatch, tmp_path, "0::/\n", **{"cpu.max": f"{limit} 100000\n"})
    DistributedContext("cpu", "float32")
    assert torch.get_num_threads() == available_processors() == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("8", 8), ("2,1", 8), ("", 2), ("0", 2), ("-3", 2), ("abc", 2), (" ", 2)]
)
def test_the_number_that_the_environment_sets_is_kept_where_openmp_reads_it(
    text: str, expected: int, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(monkeypatch, tmp_path, "0::/\n", **{"cpu.max": "200000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    limit_threads()
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("ranks", "expected"), [("2", 3), ("16", 1), ("x", 6), ("0", 6)])
def test_the_ranks_of_a_machine_share_its_processors(
    ranks: str, expected: int, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(monkeypatch, tmp_path, "0::/\n", **{"cpu.max": "600000 100000\n"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    limit_threads()
    assert torch.get_num_threads() == expected
