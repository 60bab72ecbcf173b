"""Part g, in its short form: 18 runs of one rank, and one of two."""

import pytest
from short import lost


@pytest.mark.slow
def test_no_number_that_is_none_is_saved_and_all_are_told_of() -> None:
    found = lost("g")
    assert [*found.values()] == ["0 of 3", "0 of 3", "0 of 4", "0 of 3", "0 of 3", "0 of 3"]
