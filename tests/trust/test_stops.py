"""Runs stopped in each phase go on exactly: the short form of part b."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_stop_saves_and_the_run_ends_as_if_there_had_been_none() -> None:
    found = lost("b")
    assert found == {
        "stopped in each phase": "0 of 12",
        "stopped in each phase, 2 ranks": "0 of 4",
        "Ctrl-C twice, in each phase": "0 of 2",
        "stopped through the launcher": "0 of 1",
    }
