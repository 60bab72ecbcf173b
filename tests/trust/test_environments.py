"""Odd environments: the short form of the part `environments`."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_a_command_works_in_an_odd_environment_or_says_why_not() -> None:
    assert lost("environments") == {
        "home and user": "0 of 7",
        "folders": "0 of 12",
        "ranks": "0 of 14",
        "machine": "0 of 9",
        "terminal, streams and start": "0 of 22",
    }
