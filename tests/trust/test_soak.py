"""Part l, in its short form: half a minute."""

import pytest
from short import lost


@pytest.mark.integration
def test_a_run_stays_as_it_is_and_one_that_is_killed_ends_as_it() -> None:
    found = lost("l")
    assert len(found) == 4
    assert [figure for figure in found.values() if not figure.startswith("0 of ")] == []
