"""Runs killed, and cut off from power, end as one that never was: the short form of part a."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_no_death_changes_how_a_run_ends() -> None:
    found = lost("a")
    assert all(figure.startswith("0 of ") for figure in found.values())
    points = [figure for what, figure in found.items() if what.startswith("pretrain: ") and " before one " in what]
    assert len(points) == 2
    assert all(int(figure.split()[-1]) >= 5 for figure in points)
    assert found["pretrain: SIGKILL at random, several in a row"] == "0 of 12"
