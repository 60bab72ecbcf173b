"""The five file operations on a real disk."""

from pathlib import Path

import pytest

from switchcli.checkpoint.fsops import DISK


def test_a_file_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    DISK.make_dir(path.parent)
    DISK.make_dir(path.parent)
    DISK.write(path, b"one")
    DISK.sync(path)
    DISK.sync(path.parent)
    assert path.read_bytes() == b"one"
    with pytest.raises(FileExistsError):
        DISK.write(path, b"two")


def test_rename_takes_no_place_that_is_filled(tmp_path: Path) -> None:
    for name in ("a", "b"):
        DISK.make_dir(tmp_path / name)
        DISK.write(tmp_path / name / "file", name.encode())
    with pytest.raises(OSError, match="not empty"):
        DISK.rename(tmp_path / "a", tmp_path / "b")
    DISK.rename(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "file").read_bytes() == b"a"


def test_a_tree_goes_and_a_link_is_not_followed(tmp_path: Path) -> None:
    DISK.make_dir(tmp_path / "tree" / "branch")
    DISK.write(tmp_path / "tree" / "branch" / "leaf", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    DISK.remove_tree(tmp_path / "link")
    assert (tmp_path / "tree" / "branch" / "leaf").exists()
    DISK.remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []
