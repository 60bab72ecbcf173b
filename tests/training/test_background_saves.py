"""Saves in the background: the bytes, the order and the failures of those that training waits for."""

import errno
import re
import time
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import pytest
from checkpointed_run import Parts, assert_equal
from doubles import Do, KeepingConsole, NoWarnings, SaveEvery
from faults.disk import Disk, refuse, strike_at
from tiny_model import NOISY

from switchcli.checkpoint import checkpoint
from switchcli.errors import CheckpointError, DistributedError, NumericsError
from switchcli.report.console import Console
from switchcli.system import publish
from switchcli.training import checkpointer
from switchcli.training.callback import Callback
from switchcli.training.optimizer_specs import AdamW
from switchcli.training.state import TrainState

STEPS = 4


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Return an event for which the first operation of each save waits. It is set."""
    opened, make_folder = Event(), publish.make_folder
    opened.set()

    def make_folder_when_opened(path: Path) -> None:
        assert opened.wait(60)
        make_folder(path)

    monkeypatch.setattr(publish, "make_folder", make_folder_when_opened)
    return opened


def parts_of(folder: Path, background: bool = True) -> Parts:
    return Parts(folder, NOISY, AdamW(), seed=0, background=background)


def run(parts: Parts, *others: Callback, steps: int = STEPS) -> None:
    """Train as a verb does: a save after every step, and one more after a stop."""
    with parts.saver.background_saves(parts.stop, NoWarnings()):
        if not parts.train(steps, [SaveEvery(1, parts.saver), *others]):
            parts.saver.save(parts.state)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def operations(disk: Disk, run_folder: Path) -> list[str]:
    """Return what was done in the folder of a run, without the random ends of hidden names.

    Files in a checkpoint that is removed are left out: the file system decides on their order.
    """
    return [
        re.sub(r"(/\..*)-[0-9a-f]{8}", r"\1", f"{kind} {path.relative_to(run_folder)}")
        for kind, path, _ in disk.operations
        if kind != "remove" or path.parent.name == "checkpoints"
    ]


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.training.loop.time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.usefixtures("no_clock")
def test_the_same_operations_leave_the_same_bytes(tmp_path: Path) -> None:
    done = []
    for background in (False, True):
        run_folder = tmp_path / str(background)
        run_folder.mkdir()
        with Disk(run_folder) as disk:
            run(parts_of(run_folder / "checkpoints", background))
        done.append(operations(disk, run_folder))
    assert done[0] == done[1]
    assert {line.split()[0] for line in done[0]} == {"make", "write", "sync", "rename", "remove"}
    assert content(tmp_path / "False") == content(tmp_path / "True") != {}


@pytest.mark.usefixtures("no_clock")
def test_what_is_written_is_of_its_step_however_far_training_has_gone_on(tmp_path: Path, door: Event) -> None:
    late = parts_of(tmp_path / "late")
    late.train(2)
    door.clear()
    late.saver.save(late.state)
    late.train(STEPS)
    assert not (tmp_path / "late").exists()
    door.set()
    late.saver.wait()
    soon = parts_of(tmp_path / "soon", background=False)
    soon.train(2)
    soon.saver.save(soon.state)
    assert content(tmp_path / "late") == content(tmp_path / "soon")
    again = Parts(tmp_path / "late", NOISY, AdamW(), seed=1)
    assert again.saver.restore(again.state, NoWarnings())
    assert_equal(again, soon)
    again.train(STEPS)
    assert_equal(again, late)


def test_the_next_save_waits_for_the_last(tmp_path: Path, door: Event) -> None:
    door.clear()
    parts = parts_of(tmp_path)
    parts.train(1)
    parts.saver.save(parts.state)
    parts.train(2)
    assert not list(tmp_path.iterdir())
    timer = Timer(0.2, door.set)
    timer.start()
    parts.saver.save(parts.state)
    assert (tmp_path / "step-00000001").is_dir()
    parts.saver.wait()
    timer.join()
    assert (tmp_path / "step-00000002").is_dir()


def test_training_that_is_stopped_or_done_has_saved(tmp_path: Path) -> None:
    for name, at in (("stopped", 3), ("done", STEPS)):
        parts = parts_of(tmp_path / name)
        run(parts, Do(1, lambda state, at=at, parts=parts: parts.stop.request() if state.step == at else None))
        found = checkpoint.latest(tmp_path / name, pytest.fail)
        assert found is not None
        assert found.step == at


def test_a_failure_stops_training_at_the_step(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)

    def until_it_failed(state: TrainState) -> None:
        deadline = time.monotonic() + 60
        while state.step == 2 and not parts.stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)

    disk = Disk(tmp_path, strike_at(0, refuse(errno.ENOSPC)))
    with disk, parts.saver.background_saves(parts.stop, NoWarnings()):
        assert parts.train(STEPS, [SaveEvery(2, parts.saver), Do(1, until_it_failed)]) is False
        assert parts.state.step == 2
        with pytest.raises(CheckpointError, match="No space left on device"):
            parts.saver.save(parts.state)
    assert not list(tmp_path.iterdir())


def failing(parts: Parts, error: BaseException, console: Console) -> None:
    """A save of the first step is under way when training fails."""
    with parts.saver.background_saves(parts.stop, console):
        parts.train(1, [SaveEvery(1, parts.saver)])
        raise error


def test_a_save_under_way_is_done_when_training_fails(tmp_path: Path, door: Event) -> None:
    door.clear()
    Timer(0.2, door.set).start()
    with pytest.raises(NumericsError, match="NaN"):
        failing(parts_of(tmp_path), NumericsError("step 2: NaN", "mend it"), NoWarnings())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_save_that_fails_as_training_does_is_told_of(tmp_path: Path) -> None:
    console = KeepingConsole()
    disk = Disk(tmp_path, strike_at(4, refuse(errno.ENOSPC)))
    with disk, pytest.raises(NumericsError, match="NaN"):
        failing(parts_of(tmp_path), NumericsError("step 2: NaN", "mend it"), console)
    assert disk.operations[4].kind == "sync"  # of the first file
    (warning,) = console.warnings
    assert re.search(r"\bsave\b", warning)
    assert "No space left on device" in warning


@pytest.mark.parametrize("error", [DistributedError("a rank is gone"), KeyboardInterrupt()], ids=["lost", "forced"])
def test_nobody_waits_long_for_a_save_that_cannot_be_done(
    error: BaseException, tmp_path: Path, door: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointer, "_LOST_RANK_SECONDS", 0.1)
    door.clear()
    began = time.monotonic()
    parts = parts_of(tmp_path)
    with pytest.raises(type(error)):
        failing(parts, error, NoWarnings())
    assert time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())
    door.set()
