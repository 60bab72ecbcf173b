"""RunFolder: its files are written whole or not at all, and an earlier run is set aside, never mixed with."""

import errno
import os
from pathlib import Path

import pytest

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.errors import CheckpointError
from switchcli.report.sinks import publish_file
from switchcli.system import publish


def a_folder(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path, resume=False)


def test_files_are_written_whole(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "run")
    publish_file(folder.recipe, "verb: pretrain\n")
    publish_file(folder.tokenizer, "{}")
    publish_file(folder.result, "{}")
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "result.json", "tokenizer.json"]
    assert folder.recipe.read_text() == "verb: pretrain\n"


def test_what_a_killed_process_left_of_the_runs_own_files_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=True)
    folder.path.mkdir()
    for path in (folder.recipe, folder.tokenizer, folder.metrics, folder.result, folder.path / "page.html"):
        with publish.temporary_folder(path) as temporary:
            leftover = temporary.name
        (folder.path / leftover).write_text("half")
    folder.remove_leftovers()
    assert [path.name for path in folder.path.iterdir()] == [leftover], "the page may be in writing"


def test_runs_are_set_aside_one_after_another(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = a_folder(tmp_path / "run")
        publish_file(folder.recipe, "")
        assert folder.archive() == tmp_path / f"run.before-{number}"
    assert not folder.path.exists()
    assert (tmp_path / "run.before-2" / "recipe.yaml").exists()


def test_checkpoints_without_a_recipe_are_a_run_too(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "run")
    folder.checkpoints.mkdir()
    assert folder.archive() == tmp_path / "run.before-1"


def test_a_folder_without_a_run_stays(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "run")
    (folder.path / "notes.txt").write_text("mine")
    assert folder.archive() is None
    assert RunFolder(tmp_path / "absent", resume=False).archive() is None


def test_what_the_disk_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent/recipe\.yaml: .*No such file.*--out") as caught:
        publish_file(RunFolder(tmp_path / "absent").recipe, "")
    assert "\n" not in str(caught.value)


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path / "run")
    publish_file(folder.tokenizer, "old")

    def refuse(descriptor: int) -> None:
        (temporary,) = set(folder.path.iterdir()) - {folder.tokenizer}
        assert temporary.read_text() == "new"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*No space left .*\d bytes.*--out"):
        publish_file(folder.tokenizer, "new")
    assert [path.name for path in folder.path.iterdir()] == ["tokenizer.json"]
    assert folder.tokenizer.read_text() == "old"
