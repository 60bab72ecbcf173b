"""Every signal that can be caught does what is documented: the short form of the part `signals`."""

import pytest
from short import lost


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_every_signal_saves_or_loses_no_more_than_the_steps_since_the_last_save() -> None:
    assert lost("signals") == {
        "saves": "0 of 6",
        "goes on": "0 of 2",
        "is suspended": "0 of 1",
        "ends at once": "0 of 2",
        "a soft limit of CPU time": "0 of 1",
        "SIGHUP under nohup: goes on": "0 of 1",
        "the terminal is closed: saves": "0 of 1",
        "2 ranks, sent to all or one: saves": "0 of 2",
        "to the launcher of 2 ranks": "0 of 2",
        "the launcher's terminal is closed: saves": "0 of 1",
    }
