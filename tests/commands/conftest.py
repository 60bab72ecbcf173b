"""A tiny recipe on a text of its own, and the command line as its user meets it: what goes in, code, stdout, stderr."""

import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from tiny_run import RECIPE, WORDS, write_text
from typer.testing import CliRunner

from switchcli.cli import app, main

TUNING = """\
model: {dropout: 0.1, expert_dropout: 0.3}
tasks:
  - {kind: files, name: colour, train: [colour.train.jsonl], validation: [colour.validation.jsonl],
     input: "which colour: {text}", target: label, labels: [red, green, blue], metrics: [accuracy, macro_f1]}
  - {kind: files, name: last, train: [last.train.jsonl], validation: [last.validation.jsonl],
     input: "last word: {text}", target: word, metrics: [exact_match]}
data: {inputs_length: 64, targets_length: 32, mixture: {kind: equal}}
train: {steps: 4, batch_tokens: 256, microbatch_tokens: 128, device: cpu}
schedule: {kind: constant, learning_rate: 0.01}
log: {every_steps: 3}
eval: {every_steps: 4, sequences: 8}
scoring: {batch_examples: 4, draws: 20, decoding: {max_tokens: 6}}
checkpoint: {save_every_steps: 2}
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


SwitchCLI = Callable[..., Done]


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


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """tune.yaml beside the rows of its two tasks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return lay_out_tuning(tmp_path)


def lay_out_tuning(folder: Path) -> str:
    """Rows that a model can learn to answer, and a recipe that reads them from the current folder."""
    draw = random.Random(1)
    for split, count in (("train", 60), ("validation", 14)):
        rows = [draw.choices(WORDS, k=draw.randint(2, 12)) for _ in range(count)]
        colours = [draw.randrange(3) for _ in rows]
        lines = [
            {"text": " ".join([*row, ["red", "green", "blue"][colour]]), "label": colour, "word": row[-1]}
            for row, colour in zip(rows, colours, strict=True)
        ]
        for task in ("colour", "last"):
            (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tune.yaml").write_text(TUNING)
    return "tune.yaml"


def lay_out(folder: Path, text: Path) -> str:
    """The text and a recipe that reads it from the current folder: the path as written says what is held out."""
    (folder / "text.txt").symlink_to(text)
    (folder / "tiny.yaml").write_text(RECIPE)
    return "tiny.yaml"


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
