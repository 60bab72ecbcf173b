"""A tiny recipe on a text of its own, and the command line as its user meets it: what goes in, code, stdout, stderr."""

import io
import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_run import RECIPE, Done, SwitchCLI, lay_out, lay_out_tuning, write_text
from typer.testing import CliRunner

from switchcli.cli import app, main


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all tests of the session: what it is prepared into is cached by its path and time.

    Which of its lines `trained` holds out differs from session to session, as the file's path does: a tenth of them, so
    that no draw leaves too few.
    """
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(path)
    return path


@pytest.fixture
def recipe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """tiny.yaml beside its text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lay_out(tmp_path, text)


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained run of two steps. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE.replace("text.txt", str(text)))
    out = folder / "run"
    done = CliRunner().invoke(app, ["pretrain", str(folder / "tiny.yaml"), "--out", str(out), "--quiet"])
    assert done.exit_code == 0
    return out


@pytest.fixture(scope="session")
def dense(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model of `trained`, from the same text. Nobody writes into it."""
    out = tmp_path_factory.mktemp("dense") / "run"
    arguments = ["pretrain", str(trained / "recipe.yaml"), "model.num_experts=1", "--out", str(out), "--quiet"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return out


@pytest.fixture(scope="session")
def converted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `trained` in the Hugging Face layout. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("converted") / "theirs"
    assert CliRunner().invoke(app, ["convert", str(trained), str(folder), "--to", "huggingface"]).exit_code == 0
    return folder


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """tune.yaml beside the rows of its two tasks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lay_out_tuning(tmp_path)


@pytest.fixture
def switchcli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> SwitchCLI:
    """`switchcli ARGUMENTS` in this process, by the entry point that a shell calls."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    def run(*arguments: object, stdin: str = "") -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["switchcli", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr(os, "_exit", leave)
            try:
                main()
            except SystemExit as end:
                code = end.code
            else:
                code = 0
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    return run
