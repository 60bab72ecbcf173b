"""How a command ends by a signal, wherever that comes in between."""

import os
import signal

import pytest

from switchcli.commands.ending import stoppable
from switchcli.errors import Interrupted, InterruptedByForce, SwitchError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("saves_nothing", "kind"), [(False, Interrupted), (True, InterruptedByForce)])
def test_a_signal_ends_it(number: signal.Signals, saves_nothing: bool, kind: type[SwitchError]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind, match=number.name), stoppable(saves_nothing):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_clean_up_makes_of_it_is_the_signals_doing() -> None:
    """Between closing a file and noting that, a signal makes many a library close it twice."""

    def tidy() -> None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        try:
            os.close(descriptor)
            signal.raise_signal(signal.SIGTERM)
        finally:
            os.close(descriptor)

    with pytest.raises(Interrupted, match="SIGTERM"), stoppable():
        tidy()


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), stoppable():
        raise ValueError("mine")
    with pytest.raises(InterruptedByForce, match="without saving"), stoppable():
        raise KeyboardInterrupt
