"""What the training verbs share: where a run goes when nobody says, and how the program is called again."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.checkpoint.checkpoint import Checkpoint
from switchcli.commands._options import default_out
from switchcli.runs.inputs import loading
from switchcli.terminal.safe_text import program_name


@pytest.mark.parametrize(
    ("recipe", "out"),
    [
        ("quickstart/switch", "quickstart/switch"),
        ("mine.yaml", "mine"),
        ("../sub/mine.yml", "mine"),
        ("/somewhere/else/mine.yaml", "mine"),
        ("./v1.5", "v1.5"),
        ("sub/v1.5.yaml", "v1.5"),
        ("sub/e1.5/recipe.yaml", "e1.5"),
        ("recipe.yaml", "here"),
    ],
)
def test_a_run_goes_below_runs(recipe: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_out(recipe) == Path("runs") / out


@pytest.mark.parametrize(
    ("on_path", "beside", "called"),
    [
        ("{bin}/switchcli", True, "switchcli"),
        (None, True, "'my env/bin/switchcli'"),
        ("{other}/switchcli", True, "'my env/bin/switchcli'"),
        ("{other}/switchcli", False, "switchcli"),
        (None, False, "'{bin}/python' -m switchcli"),
    ],
)
def test_the_program_is_called_as_it_can_be(
    on_path: str | None, beside: bool, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"bin": tmp_path / "my env/bin", "other": tmp_path / "other"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "switchcli").touch()
    if not beside:
        (folders["bin"] / "switchcli").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folders["bin"] / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: on_path and on_path.format(**folders))
    assert program_name() == called.format(**folders)


def test_memory_is_asked_for_before_text_is_read(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.runs.inputs.text_sets.prepare", None)
    done = switchcli("pretrain", recipe, "model.d_ff=1048576", "model.d_model=131072", "--out", "a")
    assert (done.code, done.out) == (1, "")
    assert re.match(r"error: out of memory: cpu .*\b[\d.]+ GiB\b.*\b[\d.]+ TiB\b", done.err)
    assert not lacking(done.err, "fit switchcli plan")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("verb", [["eval"], ["convert", "--to", "huggingface"]])
def test_a_reader_takes_a_newer_checkpoint_where_the_run_has_just_removed_the_one_that_it_found(
    verb: list[str], trained: Path, tmp_path: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, aside, find = tmp_path / "run", tmp_path / "aside", loading.open_checkpoint
    shutil.copytree(trained, run)
    monkeypatch.chdir(tmp_path)

    def found(*place: Any) -> Checkpoint:
        """The first time it is gone as soon as it was found; then there is one again."""
        if aside.exists():
            shutil.move(aside, run / "checkpoints" / "step-00000002")
            return find(*place)
        gone = find(*place)
        shutil.move(gone.path, aside)
        return gone

    monkeypatch.setattr(loading, "open_checkpoint", found)
    done = switchcli(verb[0], run, *(["export"] if verb[0] == "convert" else []), *verb[1:])
    assert done.code == 0, done.err
    assert not aside.exists()
