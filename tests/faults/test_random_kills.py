"""Kills at random moments, one and several in a row, of a run of one process and of one of two ranks: the run ends as
if there had been none."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import pytest
from drill import fingerprint, leftovers, ranks_of
from faults.harness import KILLED, at_home_in, run

COMMAND = "pretrain tiny.yaml train.steps=8 checkpoint.save_every_steps=1 eval.every_steps=2 log.every_steps=1 --quiet"
DEAD_RANK = 6


class Row(NamedTuple):
    """How often a run is killed before it may end, and in how many runs."""

    ranks: int
    kills: int
    trials: int


ROWS = [
    pytest.param(Row(1, 4, 2), marks=pytest.mark.integration, id="one process, 4 kills in a row"),
    pytest.param(Row(1, 10, 50), marks=[pytest.mark.nightly, pytest.mark.timeout(7200)], id="10 kills in a row"),
    pytest.param(Row(2, 1, 30), marks=[pytest.mark.nightly, pytest.mark.timeout(7200)], id="one of 2 ranks"),
    pytest.param(Row(2, 5, 10), marks=[pytest.mark.nightly, pytest.mark.timeout(7200)], id="5 ranks in a row"),
]


def kill_after(seconds: float, ranks: int, out: Path, choose: Callable[[list[int]], int]) -> Callable[[], None]:
    """Return what a fork does to be killed after some seconds, or to lose one of its ranks, if any has started."""

    def strike() -> None:
        if found := [os.getpid()] if ranks == 1 else ranks_of(str(out)):
            os.kill(choose(found), signal.SIGKILL)

    def within() -> None:
        timer = Timer(seconds, strike)
        timer.daemon = True
        timer.start()

    return within


@pytest.mark.parametrize("row", ROWS)
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    row: Row, sound: Path, draw: random.Random, tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    record_property("trials", row.trials)
    words = (*COMMAND.split(), "--processes", str(row.ranks), f"train.batch_tokens={256 * row.ranks}", "--out")
    with at_home_in(sound):
        run(*words, tmp_path / "first")  # what it imports and prepares takes no time later
        began = time.monotonic()
        done = run(*words, straight := tmp_path / "straight")
        seconds = time.monotonic() - began
        assert done.code == 0, done.said
        folders = itertools.count()
        trials = 0
        while trials < row.trials:  # only a run that was struck counts: a busy machine may have been slower at first
            out, struck = tmp_path / str(next(folders)), 0
            for _ in range(row.kills):
                done = run(*words, out, within=kill_after(draw.uniform(0, seconds), row.ranks, out, draw.choice))
                assert done.code in (0, KILLED if row.ranks == 1 else DEAD_RANK), done.said
                struck += done.code != 0
                assert not ranks_of(str(out))
            done = run(*words, out)
            assert done.code == 0, done.said
            assert fingerprint(out) == fingerprint(straight)
            assert not leftovers(out)
            trials += struck > 0
