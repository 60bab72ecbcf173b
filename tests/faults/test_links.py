"""Links, and folders with names much like ours, where a command writes or cleans up: nothing goes through them.

A stranger's run folder may hold a link under any name that a command writes to. A command may refuse the link, or write
its output without it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.harness import Prepared, run

from switchcli.system.publish import temporary_path

OUTSIDE = Path("outside")
"""What the links name. No command may change anything in it."""
FILE, NEW = OUTSIDE / "file", OUTSIDE / "new"
"""A name at which there is a file, and one at which there is nothing."""
CODES = (0, 2, 4)
RESUME = "pretrain run/recipe.yaml train.steps=3 --out run --quiet"
BEGIN_ANEW = "pretrain tiny.yaml train.steps=1 --out new-run --quiet"
EVAL = "eval run --out ev --quiet"
REPORT = "report run --html page.html"
FIGURES = "report run --figures figures"
ROUTING = "report run --routing --html page.html"
COPY = "recipes copy quickstart/switch mine.yaml"
VOCABULARY = "data tokenizer train tiny.yaml --out tok.json --force"
SWEEP = "sweep pretrain tiny.yaml train.seed=0 --jobs 1 --out swept"
CHECKPOINTS = "run/checkpoints"


class Link(NamedTuple):
    """A link, and the command that meets it."""

    link: str
    names: Path
    command: str
    is_hard: bool = False


def each(command: str, names: str, *targets: Path) -> Iterator[Link]:
    """A link of each name to each target; to a file that is there and one that is not, in turn, if none is given."""
    for number, name in enumerate(names.split()):
        yield from (Link(name, target, command) for target in targets or ((FILE, NEW)[number % 2],))


LINKS = [
    *each(BEGIN_ANEW, "new-run/recipe.yaml new-run/tokenizer.json new-run/metrics.jsonl new-run/run.lock"),
    *each(BEGIN_ANEW, "new-run/checkpoints", OUTSIDE, NEW),
    *each(RESUME, "run/result.json run/tokenizer.json run/metrics.jsonl run/run.lock run/recipe.yaml.tmp"),
    *each(RESUME, CHECKPOINTS, OUTSIDE, NEW),
    *each(f"{RESUME} log.trackers=[tensorboard]", "run/tensorboard", OUTSIDE, NEW),
    *each(RESUME, f"{CHECKPOINTS}/step-00000003", OUTSIDE, NEW),
    *each(RESUME, f"{CHECKPOINTS}/{temporary_path(Path('step-00000003'), '0' * 16)} {CHECKPOINTS}/.tmp-mine", OUTSIDE),
    *(Link(f"run/{name}", FILE, RESUME, is_hard=True) for name in ("metrics.jsonl", "run.lock")),
    *(Link(f"new-run/{name}", FILE, BEGIN_ANEW, is_hard=True) for name in ("recipe.yaml", "run.lock")),
    *each(EVAL, "ev/result.json", FILE, NEW),
    *each(EVAL, "ev ev/predictions", OUTSIDE),
    *each(REPORT, "page.html", FILE, NEW),
    *each(ROUTING, "page.html", FILE),
    *each(FIGURES, "figures/runs.csv"),
    *each(COPY, "mine.yaml", FILE, NEW),
    *each(VOCABULARY, "tok.json", FILE, NEW),
    *each("convert run converted --to huggingface", "converted", OUTSIDE, FILE),
    *each(SWEEP, "swept/0.log swept/run.lock", FILE, NEW),
]
"""Links in a run folder, among checkpoints, with temporary names of earlier versions, and as outputs."""
NOT_OURS = [
    *(
        Link(f"{CHECKPOINTS}/{name}", OUTSIDE, RESUME)
        for name in (".tmp-x", ".tmp-photos", f"{temporary_path(Path('step-00000003'), '0' * 16)}-mine")
    ),
]
"""Names that are nearly ours, each of a folder of the user's."""


def contents(folder: Path) -> dict[str, str]:
    """Every name below a folder, with the content of files."""
    return {str(path): path.read_text() if path.is_file() else "a folder" for path in sorted(folder.rglob("*"))}


@pytest.fixture
def place(prepare: Callable[[str], Prepared]) -> Iterator[Path]:
    """The current folder: a run, texts and recipes, and the folder that links name."""
    verb = prepare("eval")
    with verb.tried():
        for name in (".tmp-mine", ".tmp-x", ".tmp-photos", "predictions"):
            (OUTSIDE / name).mkdir(parents=True)
            (OUTSIDE / name / "picture").write_text("mine")
        FILE.write_text('{"step": 1}\n')
        yield Path.cwd()


def assert_untouched(kept: Path, command: str) -> None:
    before = contents(kept)
    done = run(*command.split())
    assert contents(kept) == before
    assert done.code in (*CODES, *([1] if command == SWEEP else [])), done.said  # a run of a sweep may fail
    assert "Traceback" not in done.said
    assert done.code == 0 or done.errors, done.said


@pytest.mark.integration
@pytest.mark.parametrize("link", LINKS, ids=lambda one: f"{one.link} to {one.names.name}")
def test_nothing_is_written_or_removed_through_a_link(link: Link, place: Path) -> None:
    path = Path(link.link)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if link.is_hard:
        os.link(link.names, path)
    else:
        path.symlink_to(link.names.absolute())
    assert_untouched(OUTSIDE, link.command)


@pytest.mark.integration
@pytest.mark.parametrize("folder", NOT_OURS, ids=lambda one: f"{one.link} to {one.names.name}")
def test_folders_with_names_of_the_users_stay(folder: Link, place: Path) -> None:
    path = Path(folder.link)
    path.mkdir(parents=True)
    (path / "picture").write_text("mine")
    assert_untouched(path, folder.command)
