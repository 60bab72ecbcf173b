"""Publishing: complete or not at all, never through a link, and only dead leftovers of the exact form are removed."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from switchcli import publish

HOLD = """
import sys
from pathlib import Path
from switchcli import publish
target = Path(sys.argv[1])
with publish.temporary_folder(target) as folder:
    (folder / "new").mkdir()
    (folder / "new" / "file").write_text("new")
    exec(sys.argv[2])
    print("held", flush=True)
    sys.stdin.readline()
"""
HOLD_A_FILE = """
import os, sys
from pathlib import Path
from switchcli import publish
def stop(descriptor):
    print("held", flush=True)
    sys.stdin.readline()
os.fsync = stop
publish.write_file(Path(sys.argv[1]), "new")
"""


@contextmanager
def held(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that is in the middle of a publication."""
    command = [sys.executable, "-c", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def publish_a_folder(target: Path) -> None:
    with publish.temporary_folder(target) as folder:
        (folder / "new").mkdir()
        publish.publish_folder(folder / "new", target, replace=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    publish.write_file(path, "old")
    path.chmod(0o640)
    publish.write_file(path, b"new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    with pytest.raises(FileExistsError):
        publish.write_file(path, "newer", replace=False)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["page.html"]


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in "abc"]
    publish.write_files(tmp_path, dict.fromkeys("abc", "old"))
    synced, sync = [], os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish.write_files(tmp_path, dict.fromkeys("abc", "new"))
    assert [path.read_text() for path in paths] == ["old"] * 3
    assert names(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_at_the_target_is_refused(tmp_path: Path, there: bool) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    if there:
        victim.write_text("mine")
    link.symlink_to(victim)
    for act in (lambda: publish.write_file(link, "x"), lambda: publish.open_append(link)):
        with pytest.raises(OSError, match="symbolic"):
            act()
    with pytest.raises(OSError, match="symbolic"):
        publish_a_folder(link)
    assert victim.exists() == there
    assert link.is_symlink()


def test_a_name_of_the_longest_kind_can_be_published(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    publish.write_file(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("words", [HOLD_A_FILE, HOLD])
def test_what_is_being_written_stays_and_what_a_kill_left_goes(tmp_path: Path, words: str) -> None:
    target = tmp_path / "target"
    with held(words, str(target), "") as process:
        (temporary,) = names(tmp_path)
        assert publish.TEMPORARY.fullmatch(temporary)
        publish.remove_stale(target)
        publish.remove_stale(tmp_path / "other")
        assert names(tmp_path) == [temporary]
        process.kill()
    publish.remove_stale(tmp_path / "other")
    assert names(tmp_path) == [temporary]
    publish.remove_stale(target)
    assert names(tmp_path) == []


def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    with held(HOLD, str(target), "target.rename(folder / 'old')"):
        assert not target.exists()
    publish.remove_stale(target)
    assert names(tmp_path) == ["target"]
    assert (target / "file").read_text() == "old"


def test_a_folder_comes_back_when_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.rename

    def refuse(self: Path, other: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        publish_a_folder(target)
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_only_dead_leftovers_of_the_exact_form_are_removed(tmp_path: Path) -> None:
    target, outside = tmp_path / "here" / "target", tmp_path / "outside"
    target.parent.mkdir()
    outside.mkdir()
    (outside / "file").write_text("mine")
    (outside / "lock").write_text("mine")
    with suppress(KeyError), publish.temporary_folder(target) as folder:
        form = folder.name
        raise KeyError
    prefix = form[:-16]
    (target.parent / f"{prefix}{'0' * 16}").symlink_to(outside)  # a link of the exact form
    (target.parent / f"{prefix}{'1' * 16}").symlink_to(outside / "file")
    (target.parent / f"{prefix}{'2' * 16}-mine").mkdir()
    (target.parent / f"{prefix}{'G' * 16}").write_text("mine")
    (target.parent / ".tmp-mine").mkdir()
    taken = target.parent / f"{prefix}{'3' * 16}"  # not one of ours: it is not empty, and has no lock
    taken.mkdir()
    (taken / "picture").write_text("mine")
    before = names(target.parent)
    (target.parent / f"{prefix}{'4' * 16}").mkdir()  # of a process that died before it had a lock
    publish.remove_stale(target)
    assert names(target.parent) == before
    assert names(outside) == ["file", "lock"]


def test_a_link_within_a_leftover_is_removed_and_not_followed(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    planted = f"(folder / 'a').symlink_to({str(outside)!r}); (folder / 'old').symlink_to({str(outside)!r})"
    with held(HOLD, str(target), planted):
        pass
    publish.remove_stale(target)
    assert names(tmp_path) == ["outside"]
    assert names(outside) == ["file"]


def test_nothing_is_left_where_an_open_file_keeps_a_name_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS gives a file that is removed while it is open a name in the same folder, until it is closed."""
    unlink, close = Path.unlink, os.close
    kept: list[Path] = []

    def unlink_as_nfs(self: Path, missing_ok: bool = False) -> None:
        if self.name == "lock":
            kept.append(self.rename(self.with_name(".nfs0000")))
        else:
            unlink(self, missing_ok=missing_ok)

    def close_as_nfs(descriptor: int) -> None:
        close(descriptor)
        while kept:
            unlink(kept.pop())

    monkeypatch.setattr(Path, "unlink", unlink_as_nfs)
    monkeypatch.setattr(os, "close", close_as_nfs)
    target = tmp_path / "target"
    publish_a_folder(target)
    publish_a_folder(target)
    publish.write_files(tmp_path, {"page": "text"})
    assert names(tmp_path) == ["page", "target"]


def test_a_file_is_replaced_on_a_file_system_without_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "fchmod", refuse)
    for text in ("old", "new"):
        publish.write_file(tmp_path / "page", text)
    assert (tmp_path / "page").read_text() == "new"


def restore_after_a_kill(target: Path) -> None:
    with held(HOLD, str(target), "target.rename(folder / 'old')"):
        pass
    publish.remove_stale(target)


def restore_after_a_failure(target: Path) -> None:
    with suppress(ZeroDivisionError), publish.temporary_folder(target) as folder:
        target.rename(folder / "old")
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "change",
    [
        publish_a_folder,
        restore_after_a_kill,
        restore_after_a_failure,
        lambda target: publish.write_file(target / "file", "new"),
        lambda target: publish.write_files(target, {"file": "new", "other": "new"}),
    ],
)
def test_a_power_cut_loses_no_name(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not synced may be lost, and what is removed later may be gone all the same."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    unsynced: set[Path] = set()
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        unsynced.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115 - may name a removed file

    def record_rename(self: Path, other: Path) -> Path:
        if other == target or target in other.parents:
            unsynced.add(other.parent)
        return rename(self, other)

    def check_before(remove: Callable[..., None]) -> Callable[..., None]:
        def checked(path: Path, *args: Any, **options: Any) -> None:
            assert not unsynced or not os.path.lexists(path), f"{path} goes before {unsynced} is synced"
            remove(path, *args, **options)

        return checked

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(Path, "unlink", check_before(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", check_before(Path.rmdir))
    change(target)
    assert not unsynced
    assert target.exists()
