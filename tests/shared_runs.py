"""Runs that many tests read, each trained once for all workers of a session: fixtures, for tests/conftest.py.

Nobody writes into them. A test that goes on with a run, or damages it, copies it first.
"""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import RECIPE, lay_out_tuning, write_text
from typer.testing import CliRunner


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this session, which all workers share."""
    # SESSION, or SESSION/popen-gw0 of a worker. Its variables tell nothing: a pytest that a test starts has them too.
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` has filled, in this process or in another worker of the session."""
    folder = session_folder(factory) / name
    made = Path(f"{folder}.made")
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def switchcli(*words: object) -> None:
    """Run `switchcli WORDS` in this process, quietly."""
    from switchcli.cli import app

    CliRunner().invoke(app, [*map(str, words), "--quiet"], catch_exceptions=False, standalone_mode=False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 300 lines: what it is prepared into is cached by its path and content.

    Which of its lines are held out differs from session to session, as the file's path does: a tenth of them, so that
    no draw leaves too few.
    """
    return made_once(tmp_path_factory, "text", lambda folder: write_text(folder / "text.txt")) / "text.txt"


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained run of two steps. Its recipe lies beside it: `tiny.yaml`."""

    def train(folder: Path) -> None:
        (folder / "tiny.yaml").write_text(RECIPE.replace("text.txt", str(text)))
        switchcli("pretrain", folder / "tiny.yaml", "--out", folder / "run")

    return made_once(tmp_path_factory, "trained", train) / "run"


@pytest.fixture(scope="session")
def dense(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model of `trained`, from the same text."""

    def train(folder: Path) -> None:
        switchcli("pretrain", trained / "recipe.yaml", "model.num_experts=1", "--out", folder / "run")

    return made_once(tmp_path_factory, "dense", train) / "run"


@pytest.fixture(scope="session")
def converted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `trained` in the Hugging Face layout."""

    def convert(folder: Path) -> None:
        switchcli("convert", trained, folder / "theirs", "--to", "huggingface")

    return made_once(tmp_path_factory, "converted", convert) / "theirs"


@pytest.fixture(scope="session")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trained`, fine-tuned for two steps and scored after each, on tasks whose files lie beside it."""

    def tune(folder: Path) -> None:
        recipe = folder / lay_out_tuning(folder)
        text = recipe.read_text()
        for task in ("colour", "last"):
            text = text.replace(f"[{task}.", f"[{folder}/{task}.")
        recipe.write_text(text)
        keys = ("train.steps=2", "eval.every_steps=1", "checkpoint.save_every_steps=1")
        switchcli("finetune", recipe, *keys, "--model", trained, "--out", folder / "tuned")

    return made_once(tmp_path_factory, "finetuned", tune) / "tuned"


@pytest.fixture(scope="session")
def distilled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense student of `trained`, distilled for two steps."""

    def distil(folder: Path) -> None:
        switchcli("distill", "--teacher", trained, "--out", folder / "run")

    return made_once(tmp_path_factory, "distilled", distil) / "run"
