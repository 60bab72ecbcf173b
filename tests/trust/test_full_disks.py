"""Full disks, errors and read-only folders lose nothing of a run: the short form of part d."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_no_disk_loses_what_was_saved() -> None:
    found = lost("d")
    assert all(figure.startswith("0 of ") for figure in found.values())
    assert len(found) in (2, 4)  # without mounts of our own where they are not allowed
