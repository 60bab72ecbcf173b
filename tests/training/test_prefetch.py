"""Loader: microbatches in the order of the steps, two steps ahead at most, errors at their step."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest
import torch
from tiny_model import rows

from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError
from switchcli.training.microbatches import STEPS_AHEAD, Loader, Microbatch, Microbatches

STEPS = 12
make = Microbatches(rows, 8, 2, 0, 1)


def a_loader(made: Callable[[int], Iterable[Microbatch]] = make) -> Loader:
    return Loader(made, DistributedContext("cpu", "float32"))


class Noted:
    """Makes batches and notes of which steps; an event may hold it up."""

    def __init__(self, go: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.made: list[int] = []
        """The steps for which it was held up."""
        self._go = go

    def __call__(self, step: int) -> Iterator[Microbatch]:
        self.steps.append(step)
        if self._go is not None:
            assert self._go.wait(30)
            self.made.append(step)
        return make(step)


@pytest.mark.parametrize("first", [0, 7])
def test_microbatches_come_in_order_as_they_are_made(first: int) -> None:
    with a_loader() as loader:
        steps = []
        for step, micros in loader.from_step(first, STEPS):
            steps.append(step)
            for ours, theirs in zip(micros, make(step), strict=True):
                assert (ours.number, ours.real) == (theirs.number, theirs.real)
                assert all(torch.equal(*pair) for pair in zip(ours.batch, theirs.batch, strict=True))
        assert steps == list(range(first, STEPS))


def test_steps_are_made_in_order_two_ahead_and_no_further_than_the_last() -> None:
    noted = Noted()
    with a_loader(noted) as loader:
        next(loader.from_step(0, STEPS))
    assert noted.steps == [0, 1, 2][: len(noted.steps)]  # what was not begun when it was closed never is
    noted = Noted()
    with a_loader(noted) as loader:
        for step, _ in loader.from_step(0, STEPS):
            assert len(noted.steps) <= step + 1 + STEPS_AHEAD
    assert noted.steps == list(range(STEPS))


def test_an_error_comes_out_at_its_step_and_not_before() -> None:
    def failing(step: int) -> Iterator[Microbatch]:
        yield from make(step)
        if step >= 5:
            raise DataError(f"step {step}: the file was cut")

    with a_loader(failing) as loader:
        coming = loader.from_step(0, STEPS)
        for _ in range(5):
            assert len(next(coming)[1]) == 4
        with pytest.raises(DataError, match="step 5: the file was cut"):
            next(coming)


def test_closing_waits_for_what_is_under_way_and_begins_no_more() -> None:
    go = threading.Event()
    noted = Noted(go)
    loader = a_loader(noted)

    def ask() -> None:
        with suppress(RuntimeError):  # where the loader closes before this thread has asked for the step after
            next(loader.from_step(0, STEPS))

    asking = threading.Thread(target=ask)
    asking.start()
    while not noted.steps:
        time.sleep(0.001)
    threading.Timer(0.05, go.set).start()
    loader.__exit__(None, None, None)
    assert noted.made == [0]
    asking.join(30)
    assert noted.steps == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
