"""What a disk refuses, as a user reads it."""

import errno
import os
from pathlib import Path

import pytest
from messages import lacking

from switchcli.errors import CheckpointError, disk_errors
from switchcli.runs.inputs.new_folder import publish_new_folder


@pytest.mark.parametrize(
    ("files", "inodes", "free", "needed", "told"),
    [
        (100, 0, 2**20, None, True),
        (100, 63, 2**20, None, True),
        (100, 64, 2**20, None, False),
        (100, 0, 2**20 - 2**12, None, False),  # full by bytes too
        (100, 0, 2**30, 2**30, True),
        (100, 0, 2**30, 2**30 + 1, False),
        (0, 0, 2**30, None, False),  # btrfs
    ],
)
def test_a_disk_without_inodes_is_called_that(
    files: int, inodes: int, free: int, needed: int | None, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks = free // 2**12
    disk = os.statvfs_result((2**12, 2**12, 2**20, blocks, blocks, files, inodes, inodes, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with pytest.raises(CheckpointError) as raised, disk_errors(tmp_path / "new/run", bytes_needed=needed):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(raised.value)
    assert ("no inodes are left" in message) == ("remove some files" in message) == told
    assert ("free some space" in message) != told
    assert f"{free:,}" in message, "the free bytes are told in each case"


def test_another_refusal_says_nothing_of_inodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1, 9, 9, 9, 9, 0, 0, 0, 255)))
    with pytest.raises(CheckpointError, match="Read-only") as raised, disk_errors(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "no inodes" not in str(raised.value)


def test_a_command_that_comes_second_to_a_new_folder_speaks_of_the_other(tmp_path: Path) -> None:
    def write(temporary: Path) -> Path:
        built = temporary / "built"
        built.mkdir()
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").touch()
        return built

    with pytest.raises(CheckpointError) as raised:
        publish_new_folder(tmp_path / "new", 10, write)
    assert not lacking(str(raised.value), f"{tmp_path / 'new'} another command DESTINATION")
    assert "bytes" not in str(raised.value)
