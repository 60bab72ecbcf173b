"""Part g, in its short form: 30 runs of one rank, and six of two."""

import pytest
from short import lost


@pytest.mark.integration
def test_no_number_that_is_none_is_saved_and_all_are_told_of() -> None:
    found = lost("g")
    policies = {
        policy: [figure for what, figure in found.items() if what.startswith(policy)]
        for policy in ("stop", "skip", "roll_back")
    }
    assert policies == {
        "stop": ["0 of 3", "0 of 3", "0 of 4", "0 of 3", "0 of 4", "0 of 3"],
        "skip": ["0 of 1"] * 6,
        "roll_back": ["0 of 1", "0 of 1", "0 of 2", "0 of 1", "0 of 4", "0 of 1"],
    }
