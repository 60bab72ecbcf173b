"""What is known of the processor, from what Linux tells."""

import sys
from pathlib import Path

import pytest

from switchcli.processor import is_amd_with_avx512

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "fpu avx2", False),
        ("GenuineIntel", "fpu avx2 avx512f", False),
    ],
)
def test_the_vendor_and_the_width_count(
    vendor: str, flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\n"
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **named: told)
    assert is_amd_with_avx512.__wrapped__() is expected


def test_a_machine_that_tells_nothing_is_no_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **named: "processor : 0\nBogoMIPS : 48\n")
    assert not is_amd_with_avx512.__wrapped__()
