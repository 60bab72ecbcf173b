"""Part c, in its short form."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_run_does_not_depend_on_the_number_of_its_ranks() -> None:
    assert [*lost("c").values()] == ["0 of 1", "0 of 1"]
