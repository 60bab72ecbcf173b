"""Part g, in its short form: 18 runs of one rank, and one of two."""

import pytest
from short import rows_of


@pytest.mark.slow
def test_no_number_that_is_none_is_saved_and_all_are_told_of() -> None:
    rows = rows_of("g")
    assert [row[2] for row in rows] == ["0 of 3", "0 of 3", "0 of 4", "0 of 3", "0 of 3", "0 of 3"], rows
