"""Part k, in its short form."""

import pytest
from short import lost


@pytest.mark.integration
def test_tokens_are_counted_answers_are_a_sequences_own_and_collapse_is_told_of() -> None:
    found = lost("k")
    assert [*found.values()] == ["0 of 6", "0 of 150", *["0 of 512"] * 6, "0 of 2", "0 of 2"]
