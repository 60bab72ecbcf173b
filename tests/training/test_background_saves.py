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
from faulty_files import FaultyFiles
from tiny_model import NOISY

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.fsops import DISK, FileOperations
from switchcli.errors import CheckpointError, DistributedError, NumericsError
from switchcli.report.console import Console
from switchcli.training import checkpointer
from switchcli.training.callback import Callback
from switchcli.training.optimizer_specs import AdamW
from switchcli.training.state import TrainState

STEPS = 4


class Watched(FileOperations):
    """A disk that writes down what it is told, and before each operation waits until it is `open`."""

    def __init__(self, disk: FileOperations = DISK) -> None:
        self.open = Event()
        self.open.set()
        self.log: list[str] = []
        self._disk = disk

    def _next(self, what: str, path: Path) -> None:
        assert self.open.wait(60)
        self.log.append(f"{what} {path.name.rpartition('-')[0] if path.name[0] == '.' else path.name}")

    def make_dir(self, path: Path) -> None:
        self._next("make", path)
        self._disk.make_dir(path)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        self._next("write", path)
        self._disk.write(path, content)

    def sync(self, path: Path) -> None:
        self._next("sync", path)
        self._disk.sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._next("rename", source)
        self._disk.rename(source, target)

    def remove_tree(self, path: Path) -> None:
        self._next("remove", path)
        self._disk.remove_tree(path)


def parts_of(folder: Path, files: FileOperations, background: bool = True) -> Parts:
    return Parts(folder, NOISY, AdamW(), seed=0, background=background, files=files)


def run(parts: Parts, *others: Callback, steps: int = STEPS) -> None:
    """Train as a verb does: a save after every step, and one more after a stop."""
    with parts.saver.background_saves(parts.stop, NoWarnings()):
        if not parts.train(steps, [SaveEvery(1, parts.saver), *others]):
            parts.saver.save(parts.state)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.training.loop.time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.usefixtures("no_clock")
def test_the_same_operations_leave_the_same_bytes(tmp_path: Path) -> None:
    disks = [Watched(), Watched()]
    for disk, background in zip(disks, (False, True), strict=True):
        run(parts_of(tmp_path / str(background), disk, background))
    assert disks[0].log == [line.replace("True", "False") for line in disks[1].log]
    assert content(tmp_path / "False") == content(tmp_path / "True") != {}


@pytest.mark.usefixtures("no_clock")
def test_what_is_written_is_of_its_step_however_far_training_has_gone_on(tmp_path: Path) -> None:
    disk = Watched()
    late = parts_of(tmp_path / "late", disk)
    late.train(2)
    disk.open.clear()
    late.saver.save(late.state)
    late.train(STEPS)
    assert disk.log == []
    assert not (tmp_path / "late").exists()
    disk.open.set()
    late.saver.wait()
    soon = parts_of(tmp_path / "soon", DISK, background=False)
    soon.train(2)
    soon.saver.save(soon.state)
    assert content(tmp_path / "late") == content(tmp_path / "soon")
    again = Parts(tmp_path / "late", NOISY, AdamW(), seed=1)
    assert again.saver.restore(again.state, NoWarnings())
    assert_equal(again, soon)
    again.train(STEPS)
    assert_equal(again, late)


def test_the_next_save_waits_for_the_last(tmp_path: Path) -> None:
    disk = Watched()
    disk.open.clear()
    parts = parts_of(tmp_path, disk)
    parts.train(1)
    parts.saver.save(parts.state)
    parts.train(2)
    assert not list(tmp_path.iterdir())
    timer = Timer(0.2, disk.open.set)
    timer.start()
    parts.saver.save(parts.state)
    assert (tmp_path / "step-00000001").is_dir()
    parts.saver.wait()
    timer.join()
    assert (tmp_path / "step-00000002").is_dir()


def test_training_that_is_stopped_or_done_has_saved(tmp_path: Path) -> None:
    for name, at in (("stopped", 3), ("done", STEPS)):
        parts = parts_of(tmp_path / name, DISK)
        run(parts, Do(1, lambda state, at=at, parts=parts: parts.stop.request() if state.step == at else None))
        found = checkpoint.latest(tmp_path / name, pytest.fail)
        assert found is not None
        assert found.step == at


def test_a_failure_stops_training_at_the_step(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, FaultyFiles(0, full))

    def until_it_failed(state: TrainState) -> None:
        deadline = time.monotonic() + 60
        while state.step == 2 and not parts.stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)

    with parts.saver.background_saves(parts.stop, NoWarnings()):
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


def test_a_save_under_way_is_done_when_training_fails(tmp_path: Path) -> None:
    disk = Watched()
    disk.open.clear()
    Timer(0.2, disk.open.set).start()
    with pytest.raises(NumericsError, match="NaN"):
        failing(parts_of(tmp_path, disk), NumericsError("step 2: NaN", "mend it"), NoWarnings())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_save_that_fails_as_training_does_is_told_of(tmp_path: Path) -> None:
    console = KeepingConsole()
    with pytest.raises(NumericsError, match="NaN"):
        failing(parts_of(tmp_path, FaultyFiles(4, full)), NumericsError("step 2: NaN", "mend it"), console)
    (warning,) = console.warnings
    assert re.search(r"\bsave\b", warning)
    assert "No space left on device" in warning


@pytest.mark.parametrize("error", [DistributedError("a rank is gone"), KeyboardInterrupt()], ids=["lost", "forced"])
def test_nobody_waits_long_for_a_save_that_cannot_be_done(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointer, "_LOST_RANK_SECONDS", 0.1)
    disk = Watched()
    disk.open.clear()
    began = time.monotonic()
    parts = parts_of(tmp_path, disk)
    with pytest.raises(type(error)):
        failing(parts, error, NoWarnings())
    assert time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())
    disk.open.set()
