"""StopRequest: a flag at the first signal, an interrupt at the second SIGINT, the old handlers afterwards."""

import signal
from threading import Event, current_thread, main_thread

import pytest

from switchcli.commands._exit import interruptible
from switchcli.data.prepare import shards
from switchcli.system.signals import STOPPING, StopRequest


def test_the_signals_are_those_of_users_and_schedulers() -> None:
    names = "SIGTERM SIGINT SIGUSR1 SIGUSR2 SIGHUP SIGXCPU"
    assert {one.name for one in STOPPING} == {*names.split()} == {one.name for one in shards.STOPPING}


def test_an_ignored_sighup_stays_ignored_as_nohup_asks() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, interruptible():
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_asks_to_stop_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOPPING]
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert [signal.getsignal(one) for one in STOPPING] == before


@pytest.mark.parametrize("first", STOPPING)
def test_a_sigint_after_any_of_them_interrupts_at_once(first: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOPPING]
    with StopRequest():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(one) for one in STOPPING] == before


def test_a_ctrl_c_is_acknowledged_once_and_from_another_thread() -> None:
    """So also while the main thread computes and no handler of Python runs."""
    acknowledged, calls = Event(), []

    def acknowledge() -> None:
        calls.append(current_thread())
        acknowledged.set()

    before = signal.set_wakeup_fd(-1)
    with StopRequest(acknowledge) as stop:
        signal.raise_signal(signal.SIGINT)
        assert acknowledged.wait(10)
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert len(calls) == 1
    assert calls[0] is not main_thread()
    assert signal.set_wakeup_fd(-1) == before == -1


def test_a_second_sigterm_is_patient() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
