"""Part i, in its short form."""

import pytest
from short import lost


@pytest.mark.integration
def test_one_run_wins_a_dead_one_holds_nothing_and_readers_see_whole_checkpoints() -> None:
    found = lost("i")
    assert [*found.values()] == ["0 of 5", "0 of 5", "0 of 50"]
