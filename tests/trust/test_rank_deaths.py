"""Part h, in its short form."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(900)  # five runs of four ranks
def test_the_others_end_in_time_say_who_and_go_on_to_the_same_weights() -> None:
    assert [*lost("h").values()] == ["0 of 2", "0 of 1"]
