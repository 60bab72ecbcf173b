"""RunFolder: its files are written whole or not at all, and an earlier run is set aside, never mixed with."""

from pathlib import Path

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.system import publish


def a_folder(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path, resume=False)


def test_what_a_killed_process_left_of_the_runs_own_files_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=True)
    folder.path.mkdir()
    for path in (folder.recipe, folder.tokenizer, folder.metrics, folder.result, folder.path / "page.html"):
        with publish.temporary_folder(path) as temporary:
            leftover = temporary.name
        (folder.path / leftover).write_text("half")
    folder.remove_leftovers()
    assert [path.name for path in folder.path.iterdir()] == [leftover], "the page may be in writing"


def test_checkpoints_without_a_recipe_are_a_run_too(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "run")
    folder.checkpoints.mkdir()
    assert folder.archive() == tmp_path / "run.before-1"
