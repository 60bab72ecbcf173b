"""A tiny recipe on a text of its own, and the command line as its user meets it: what goes in, code, stdout, stderr."""

import io
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_run import Done, SwitchCLI, lay_out, lay_out_tuning

from switchcli.cli import main


@pytest.fixture
def recipe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """tiny.yaml beside its text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lay_out(tmp_path, text)


@pytest.fixture
def begun(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipe of `trained` beside a copy of it to go on with, `a`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "a")
    shutil.copy(trained.with_name("tiny.yaml"), "tiny.yaml")
    return "tiny.yaml"


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
