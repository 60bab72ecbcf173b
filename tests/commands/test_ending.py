"""How a command ends by a signal, wherever that comes in between."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from switchcli.commands.ending import AGAIN_SECONDS, stoppable
from switchcli.errors import Interrupted, InterruptedByForce, SwitchError
from switchcli.parallel.signals import StopRequest


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


def unraisable(action: Callable[[], None]) -> None:
    """As a caller in C has it that cannot fail."""

    class Dying:
        def __del__(self) -> None:
            action()

    Dying()


def refused(action: Callable[[], None]) -> None:
    """As a library has it that tries something."""
    with suppress(Exception):
        action()


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), stoppable():
        raise ValueError("mine")
    with pytest.raises(InterruptedByForce, match="without saving"), stoppable():
        raise KeyboardInterrupt


@pytest.mark.parametrize("swallow", [unraisable, refused])
def test_a_library_that_swallows_it_does_not_keep_the_command_going(
    swallow: Callable[[Callable[[], None]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Long enough for the signal to be given again; nor does the user see a traceback of it."""

    def going_on() -> None:
        swallow(lambda: signal.raise_signal(signal.SIGTERM))
        time.sleep(3 * AGAIN_SECONDS)

    with pytest.raises(Interrupted, match="SIGTERM"), stoppable():
        going_on()
    assert capfd.readouterr().err == ""


def test_one_that_was_swallowed_before_training_stops_it() -> None:
    with stoppable():
        refused(lambda: signal.raise_signal(signal.SIGTERM))
        with StopRequest() as stop:
            time.sleep(2 * AGAIN_SECONDS)
            assert stop.requested
