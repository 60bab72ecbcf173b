"""Part i, in its short form."""

import pytest
from short import rows_of


@pytest.mark.slow
def test_one_run_wins_a_dead_one_holds_nothing_and_readers_see_whole_checkpoints() -> None:
    rows = rows_of("i")
    assert [row[2] for row in rows] == ["0 of 5", "0 of 5", "0 of 50"], rows
