"""Whatever a disk does at whatever operation of whatever verb: what was there stays, and the same command goes on."""

from collections.abc import Callable

import pytest
from faults.harness import FAULTS, VERBS, Prepared

PER_TIER = [
    pytest.param(verb, fault, few, marks=marks, id=f"{verb}, {fault}, {'few' if few else 'all'}")
    for few, *marks in ((True, pytest.mark.integration), (False, pytest.mark.nightly, pytest.mark.timeout(7200)))
    for verb in VERBS
    for fault in FAULTS
]
"""In integration the operations that matter most; each one by night."""


@pytest.mark.parametrize(("verb", "fault", "few"), PER_TIER)
def test_a_disk_that_fails_loses_nothing(
    verb: str, fault: str, few: bool, prepare: Callable[[str], Prepared], record_property: Callable[[str, int], None]
) -> None:
    prepared = prepare(verb)
    operations = prepared.operations(fault, few)
    record_property("trials", len(operations))
    wrong = [found for at in operations if (found := prepared.trial(fault, at))]
    assert not wrong, f"{len(wrong)} of {len(operations)}:\n" + "\n".join(wrong)
