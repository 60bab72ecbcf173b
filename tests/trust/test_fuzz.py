"""The short form of part f; and that what it would count can be counted."""

import json
import os
import signal
import time
from pathlib import Path

import forked
import fuzz
import mutated
import pytest
import torch
from forked import Done, faults, refused

from switchcli.checkpoint.checkpoint import save
from switchcli.checkpoint.saved_state import SavedState
from switchcli.errors import DataError
from switchcli.recipe import messages
from switchcli.training.state import TrainState


@pytest.mark.integration
def test_nothing_is_lost(tmp_path: Path) -> None:
    for row in fuzz.rows(tmp_path, long=False):
        assert not row.lost, row


@pytest.mark.integration
def test_what_ends_a_trial_is_counted_and_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "CPU_SECONDS", 0.2)

    def busy() -> str:
        began = time.process_time()
        while time.process_time() < began + 0.3:
            pass
        return ""

    ends = [
        lambda: "",
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: os._exit(0),
        lambda: [].pop(),  # noqa: PLW0108  # a function of Python, so that its error has a place
        busy,
        lambda: time.sleep(30),
        lambda: "found",
        lambda: "",
    ]
    said = faults(len(ends), lambda number: ends[number](), patience=3)
    assert [int(one.split()[1].strip(":")) for one in said] == [1, 2, 3, 4, 5, 6]
    assert [
        word in one for word, one in zip(("-9", "code 0", "IndexError", "takes", "waiting", "found"), said, strict=True)
    ]


def test_what_a_user_should_not_see_is_a_fault() -> None:
    def refuse() -> None:
        raise DataError("words")

    assert refused(refuse) == refused(list) == ""
    assert "ZeroDivisionError" in refused(lambda: 1 / 0)
    assert Done(2, "", "error: words\n").fault([2]) == ""
    assert Done(0, "", "").fault([2])
    assert Done(2, "", "Traceback (most recent call last):\nKeyError: 'a'\n").fault([2])
    assert Done(2, "", "error: \x1b[2J\n").fault([2])
    assert Done(0, "\u202e", "").fault([0])


def test_keys_that_are_not_named_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_did_you_mean", lambda *arguments, **words: "")
    monkeypatch.setattr(messages.difflib, "get_close_matches", lambda *arguments, **words: [])
    assert fuzz.misspelt_keys(tmp_path, 20).lost > 10


def test_a_state_that_is_taken_as_it_comes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SavedState, "read", lambda text: SavedState.model_construct(**json.loads(text)))
    state = TrainState(step=8)
    state.record_evaluation({"score": -1.0})
    documents = {"state.json": state.to_json({})}
    path = save(tmp_path / "run/checkpoints", 8, model={"a": torch.ones(1)}, optimizer={}, documents=documents)
    base = mutated.Base(tmp_path / "run", path, b"", b"")
    work = tmp_path / "work"
    work.mkdir()
    assert mutated.tried("state.json", base, work, 20)
