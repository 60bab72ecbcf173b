"""A start that fails before training leaves nothing but the file of its lock, and a folder that was there as it was."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.errors import OutOfMemory
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs import text_sets
from switchcli.runs.train import trainer


def content(folder: Path) -> dict[str, bytes | None]:
    """The files below a folder by their names, and folders as None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


FAILURES = [
    (["data.corpora=[{kind: files, paths: [none.txt]}]"], 3),
    (["data.objective.inputs_length=100000", "train.batch_tokens=100000", "train.microbatch_tokens=null"], 3),
    (["start.checkpoint=nowhere"], 4),
    (["train.batch_tokens=100"], 2),
    (["model.vocab_size=100", "data.tokenizer={kind: file, path: small.json}"], 3),
]


@pytest.mark.parametrize(("overrides", "code"), FAILURES)
def test_nothing_but_the_lock_is_left(overrides: list[str], code: int, recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", recipe, *overrides, "--out", "runs/deep/run")
    assert done.code == code, done.err
    assert content(Path("runs/deep/run")).keys() <= {"run.lock"}


def out_of_memory(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("place", "name"), [(trainer, "preflight"), (TrainingRecipe, "microbatch_rows"), (trainer, "publish_file")]
)
def test_nothing_but_the_lock_is_left_when_memory_runs_out_before_training(
    place: Any, name: str, recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, out_of_memory)
    done = switchcli("pretrain", recipe, "log.trackers=[tensorboard]", "--out", "run")
    assert done.code == OutOfMemory.exit_code, done.err
    assert content(Path("run")) == {"run.lock": b""}


def test_after_a_failure_of_the_first_step_the_folder_takes_another_recipe(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(text_sets, "cross_entropy", out_of_memory)
        assert switchcli("pretrain", recipe, "--out", "run").code == OutOfMemory.exit_code
    assert Path("run/recipe.yaml").exists()
    done = switchcli("pretrain", recipe, "train.microbatch_tokens=64", "data.tokenizer.vocab_size=400", "--out", "run")
    assert done.code == 0, done.err
    assert "microbatch_tokens: 64" in Path("run/recipe.yaml").read_text()
    assert json.loads(Path("run/result.json").read_text())["step"] == 2


THEIRS = {
    "recipe.yaml": b"\xff",
    "tokenizer.json": b"\xff\xfe",
    "metrics.jsonl": b"",
    "result.json": b"{}",
    "run.lock/file": b"",
    "checkpoints/mine": b"",
    "tensorboard/mine": b"",
    "wandb/mine": b"",
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_with_files_of_somebody_else_is_refused(name: str, recipe: str, switchcli: SwitchCLI) -> None:
    file = Path("theirs", name)
    file.parent.mkdir(parents=True)
    file.write_bytes(THEIRS[name])
    before = content(Path())
    for arguments in (["--resume"], ["--no-resume", "data.corpora.0.paths=[none.txt]"]):
        done = switchcli("pretrain", recipe, *arguments, "--out", "theirs")
        assert done.code == 2, done.err
        assert not lacking(done.err, "theirs --out empty")
        assert done.err.count("\n") == 1
        assert content(Path()) == before


def test_a_run_begins_beside_files_of_other_names_and_leaves_them_alone(recipe: str, switchcli: SwitchCLI) -> None:
    for name in ("train.log", ".hidden", "lost+found/file"):
        file = Path("run", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    before = content(Path("run"))
    failed = switchcli("pretrain", recipe, "data.corpora.0.paths=[none.txt]", "--out", "run")
    assert failed.code == 3, failed.err
    assert content(Path("run")) == {**before, "run.lock": b""}
    for option in ("--no-resume", "--resume"):
        done = switchcli("pretrain", recipe, option, "--out", "run")
        assert done.code == 0, done.err
        assert content(Path("run")).items() >= before.items()
    assert not Path("run.before-1").exists()


@pytest.mark.parametrize("option", ["--resume", "--no-resume"])
def test_a_folder_that_was_there_stays_as_it_was(option: str, recipe: str, switchcli: SwitchCLI) -> None:
    """Its run, and what its user keeps there; the recipe of the failed start is not left in it."""
    assert switchcli("pretrain", recipe, "--out", "run", "--quiet").code == 0
    Path("run/notes.txt").write_text("mine")
    before = content(Path("run"))
    Path("text.txt").rename("moved.txt")
    done = switchcli("pretrain", recipe, "train.steps=9", option, "--out", "run")
    assert done.code == 3, done.err
    assert content(Path("run")) == before
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith("run")) == ["run"]


@pytest.mark.parametrize("name", ["login", "init"])
def test_a_run_that_wandb_does_not_let_in_is_refused_in_one_line(
    name: str, recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a login the earlier run stays where it is, although it is to be archived."""

    def refuse(**settings: Any) -> None:
        raise ValueError("no API key")

    wandb = SimpleNamespace(login=lambda: True, init=lambda **settings: None)
    setattr(wandb, name, refuse)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: True)
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("mine")
    Path("run/run.lock").touch()
    done = switchcli("pretrain", recipe, "log.trackers=[wandb]", "--out", "run", "--no-resume", "--quiet")
    assert done.code == 2, done.err
    assert not lacking(done.err.splitlines()[-1], "log.trackers wandb no API key WANDB_MODE=offline")
    assert (Path("run/recipe.yaml").read_text() == "mine") == (name == "login")


def test_a_failure_after_a_step_leaves_its_records(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = text_sets.cross_entropy, []

    def fail_later(model: Any, batch: Any) -> Any:
        calls.extend([0] * model.training)
        return out_of_memory() if len(calls) > 2 * 4 else loss(model, batch)

    monkeypatch.setattr(text_sets, "cross_entropy", fail_later)
    done = switchcli("pretrain", recipe, "train.steps=9", "checkpoint.save_every_steps=9", "--out", "run")
    assert done.code == OutOfMemory.exit_code, done.err
    assert '"step": 3' in Path("run/metrics.jsonl").read_text()
