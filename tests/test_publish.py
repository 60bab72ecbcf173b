"""Publishing: complete or not at all, never through a link, and only dead leftovers of the exact form are removed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from faults.disk import Crash, Disk, crash, refuse, strike_at

from switchcli.system import publish


def publish_a_folder(target: Path, content: str = "new") -> None:
    with publish.temporary_folder(target) as folder:
        (folder / "new" / "inner").mkdir(parents=True)
        (folder / "new" / "file").write_text(content)
        (folder / "new" / "inner" / "file").write_text(content)
        publish.publish_folder(folder / "new", target, replace=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_behind(target: Path, act: Callable[[Path], object] = lambda folder: None) -> None:
    """What a process leaves that is killed while it publishes a folder, after `act` with its temporary folder."""
    disk = Disk(target.parent)
    with suppress(Crash), disk, publish.temporary_folder(target) as folder:
        act(folder)
        disk.die()


def pass_a_day(folder: Path) -> None:
    """Make all that is in the folder older than a day."""
    for path in folder.rglob("*"):
        os.utime(path, times=(0, 0), follow_symlinks=False)


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


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    publish.write_files(tmp_path, dict.fromkeys("abc", "old"))
    with pytest.raises(OSError, match="No space"), Disk(tmp_path, strike_at(4, refuse(errno.ENOSPC, "sync"))):
        publish.write_files(tmp_path, dict.fromkeys("abc", "new"))
    assert [(tmp_path / name).read_text() for name in "abc"] == ["old"] * 3
    assert names(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_at_the_target_is_refused(tmp_path: Path, there: bool) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    if there:
        victim.write_text("mine")
    link.symlink_to(victim)
    acts: list[Callable[[], object]] = [
        lambda: publish.write_file(link, "x"),
        lambda: publish.write_files(tmp_path, {"other": "x", "link": "x"}),
        lambda: publish.open_append(link),
        lambda: publish_a_folder(link),
    ]
    for act in acts:
        with pytest.raises(OSError, match="symbolic"):
            act()
    assert not (tmp_path / "other").exists()
    assert victim.exists() == there
    assert link.is_symlink()


def test_a_name_of_the_longest_kind_can_be_published(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    publish.write_file(path, "x")
    assert path.read_text() == "x"


def test_what_is_being_written_stays_and_what_a_kill_left_goes(tmp_path: Path) -> None:
    target, disk = tmp_path / "target", Disk(tmp_path)

    def chunks() -> Iterator[bytes]:
        """The content of a file whose process is killed after half of it."""
        yield b"half"
        look_while_it_is_written()
        disk.die()

    def look_while_it_is_written(folder: Path | None = None) -> None:
        (temporary,) = names(tmp_path)
        assert publish.TEMPORARY.fullmatch(temporary)
        for other in (target, tmp_path / "other"):
            publish.remove_stale(other)
        assert names(tmp_path) == [temporary]

    def write_a_file() -> None:
        with suppress(Crash), disk:
            publish.write_file(target, chunks())

    for leave in (write_a_file, lambda: leave_behind(target, look_while_it_is_written)):
        leave()
        (temporary,) = names(tmp_path)
        publish.remove_stale(target)
        assert names(tmp_path) == [temporary], "another process may be writing it"
        pass_a_day(tmp_path)
        publish.remove_stale(tmp_path / "other")
        assert names(tmp_path) == [temporary]
        publish.remove_stale(target)
        assert names(tmp_path) == []


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
    before = names(target.parent)
    (target.parent / f"{prefix}{'4' * 16}").mkdir()  # of a process that died
    pass_a_day(target.parent)
    publish.remove_stale(target)
    assert names(target.parent) == before
    assert names(outside) == ["file", "lock"]


def test_a_link_within_a_leftover_is_removed_and_not_followed(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")

    def plant(folder: Path) -> None:
        for name in ("a", "old"):
            (folder / name).symlink_to(outside)

    leave_behind(target, plant)
    pass_a_day(tmp_path)
    publish.remove_stale(target)
    assert names(tmp_path) == ["outside"]
    assert names(outside) == ["file"]


def test_a_file_is_replaced_on_a_file_system_without_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "fchmod", refuse)
    for text in ("old", "new"):
        publish.write_file(tmp_path / "page", text)
    assert (tmp_path / "page").read_text() == "new"


def write_a_file(target: Path) -> None:
    publish.write_file(target / "file", "new")


def write_two_files(target: Path) -> None:
    publish.write_files(target, {"file": "new", "other": "new"})


def restore_the_old(target: Path) -> None:
    publish.remove_stale(target)


def set_aside(target: Path) -> Callable[[Path], None]:
    """Move a folder into a temporary one, as a process does that replaces it."""

    def act(folder: Path) -> None:
        (folder / "old").mkdir()
        target.rename(folder / "old" / target.name)

    return act


@pytest.mark.parametrize("loses_power", [False, True])
@pytest.mark.parametrize("change", [publish_a_folder, write_a_file, write_two_files, restore_the_old])
def test_an_output_is_the_old_or_the_new_one_wherever_its_process_dies(
    change: Callable[[Path], None], loses_power: bool, tmp_path: Path
) -> None:
    """After a power cut, too, and once it is done it stays."""
    for at in count():
        target = tmp_path / str(at) / "target"
        target.parent.mkdir()
        publish_a_folder(target, "old")
        if change is restore_the_old:
            leave_behind(target, set_aside(target))
        disk, is_done = Disk(target.parent, strike_at(at, crash)), False
        with suppress(Crash), disk:
            change(target)
            is_done = True
        if loses_power:
            disk.lose_power()
        publish.remove_stale(target)
        publish.write_files(target, {})
        found = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("file")}
        ends = {"old"} if change is restore_the_old else {"new"}
        assert found["file"] in (ends if is_done else {"old", "new"})
        assert found["inner/file"] == (found["file"] if change is publish_a_folder else "old")
        if is_done:
            break
    assert at >= 2
