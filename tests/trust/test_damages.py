"""Damaged checkpoint files are noticed before they are used: the short form of part e."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_no_damage_is_used() -> None:
    found = lost("e")
    assert [*found.values()] == ["0 of 30", "0 of 2", "0 of 1"]
