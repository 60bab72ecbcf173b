"""Part links: links, and folders with names much like ours, where a command writes or cleans up.

A stranger's run folder may hold a link under any name that a command writes to. Each trial puts one link into a copy of
sound files, runs a command, and compares everything outside of that copy with what was there before. A command may
refuse the link, or write its output without it; it never writes or removes anything through it.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from forked import Done, command, faults
from table import Row
from tiny_run import RECIPE as TINY
from tiny_run import write_text

OUTSIDE = Path("outside")
"""What the links name. No command may change anything in it."""
NEW = OUTSIDE / "new"
"""A name at which there is nothing."""
RESUME = ("pretrain", "run/recipe.yaml", "train.steps=3", "--out", "run", "--quiet")
BEGIN_ANEW = ("pretrain", "tiny.yaml", "train.steps=1", "--out", "new-run", "--quiet")
EVAL = ("eval", "run", "--out", "ev", "--quiet")
PLAN = ("plan", "tiny.yaml", "--devices", "2", "--html", "page.html")
REPORT = ("report", "run", "--html", "page.html")
FIGURES = ("report", "run", "--figures", "figures")
ROUTING = ("report", "run", "--routing", "--html", "page.html", "--figures", "figures")
COPY = ("recipes", "copy", "quickstart/switch", "mine.yaml")
VOCABULARY = ("data", "tokenizer", "train", "tiny.yaml", "--out", "tok.json", "--force")
DISTILL = ("distill", "--teacher", "run", "--out", "student", "distill.cache.folder=answers", "--quiet")
CHECKPOINTS = "run/checkpoints"


class Trial(NamedTuple):
    """One link, and the command that meets it."""

    link: str
    names: Path
    """What the link names."""
    arguments: tuple[str, ...]
    hard: bool = False


def rows(folder: Path, long: bool) -> Iterator[Row]:
    """Make the same trials in the short and the long form: there is nothing to repeat."""
    lay_out(folder / "sound")
    for what, trials in TRIALS.items():
        found = [met(folder, trial, trial.arguments) for trial in trials]
        yield row(what, found)
    yield row("real folders with names that are not ours", [left_alone(folder, one) for one in NOT_OURS])


def row(what: str, found: list[str]) -> Row:
    wrong = [fault for fault in found if fault]
    return Row("links", what, len(found), len(wrong), wrong[0] if wrong else "")


def lay_out(sound: Path) -> None:
    """A text, a recipe, a run, an evaluation, and the folder that links name."""
    sound.mkdir()
    with contextlib.chdir(sound):
        write_text(Path("text.txt"))
        Path("tiny.yaml").write_text(TINY)
        for name in (".tmp-mine", ".del-x", ".old-photos", ".tmp-00000001-0123abcd", "predictions"):
            (OUTSIDE / name).mkdir(parents=True)
            (OUTSIDE / name / "picture").write_text("mine")
        (OUTSIDE / "file").write_text('{"step": 1}\n')
        made = [("pretrain", "tiny.yaml", "--out", "run", "--quiet"), EVAL, DISTILL]
        assert not faults(len(made), lambda number: command(*made[number]).fault([0]))
        shutil.rmtree("student")


def met(folder: Path, trial: Trial, arguments: tuple[str, ...]) -> str:
    """What is wrong with how a command met a link."""

    def prepare() -> None:
        link = Path(trial.link)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        if trial.hard:
            os.link(trial.names, link)
        else:
            link.symlink_to(trial.names.absolute())

    return tried(folder, f"{trial.link} -> {trial.names}", prepare, arguments, OUTSIDE)


def left_alone(folder: Path, one: tuple[str, tuple[str, ...]]) -> str:
    """What is wrong where a folder of the user's has a name that is nearly one of ours."""
    name, arguments = one

    def prepare() -> None:
        Path(name).mkdir(parents=True)
        (Path(name) / "picture").write_text("mine")

    return tried(folder, name, prepare, arguments, Path(name))


def tried(folder: Path, what: str, prepare: Callable[[], None], arguments: tuple[str, ...], kept: Path) -> str:
    """What a command changed of `kept`, or how else it ended badly, in a copy of the sound files."""
    place = folder / "tried"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "sound", place, symlinks=True)
    with contextlib.chdir(place):
        prepare()
        before = contents(kept)
        (said,) = faults(1, lambda number: judged(arguments, kept, before)) or [""]
    return said and f"{what}: {said.removeprefix('trial 0: ')}"


def judged(arguments: tuple[str, ...], kept: Path, before: Mapping[str, str]) -> str:
    done = by_itself(*arguments) if "--figures" in arguments else command(*arguments)
    after = contents(kept)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        return f"exit code {done.code}, and {', '.join(changed)} was changed"
    if done.code and [line[:6] for line in done.err.splitlines()].count("error:") != 1:
        return f"says not one line of what is wrong: {done.err}"
    return done.fault([0, 2, 4])


def by_itself(*arguments: str) -> Done:
    """`switchcli ARGUMENTS` in a process of its own: what draws charts needs more addresses than a trial may have."""
    words = [sys.executable, "-c", "from switchcli.cli import main; main()", *arguments]
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every name below a folder, with the content of files."""
    return {str(path): path.read_text() if path.is_file() else "a folder" for path in sorted(folder.rglob("*"))}


def each(names: list[str], arguments: tuple[str, ...], *targets: Path) -> list[Trial]:
    """A link of each name to each target: a file that is there and one that is not, if none is given."""
    return [Trial(name, target, arguments) for name in names for target in targets or (OUTSIDE / "file", NEW)]


FILES = ["recipe.yaml", "tokenizer.json", "metrics.jsonl", "result.json"]
TRIALS: dict[str, list[Trial]] = {
    "links in a run folder": [
        *each([f"new-run/{name}" for name in [*FILES, "run.lock"]], BEGIN_ANEW),
        *each([f"run/{name}" for name in [*FILES[1:], "run.lock"]], RESUME),
        *each(["new-run/checkpoints"], BEGIN_ANEW, OUTSIDE, NEW),
        *each([CHECKPOINTS], RESUME, OUTSIDE, NEW),
        *each(["run/tensorboard"], (*RESUME, "log.trackers=[tensorboard]"), OUTSIDE, NEW),
    ],
    "links with the temporary names of earlier versions": [
        *each([f"run/{name}.tmp" for name in FILES], RESUME),
        *each(["tok.json.tmp"], VOCABULARY),
        *each(["answers/teacher.json.tmp"], DISTILL),
    ],
    "links among checkpoints": [
        *each([f"{CHECKPOINTS}/step-00000003"], RESUME, OUTSIDE, NEW),
        *each([f"{CHECKPOINTS}/.{name}-0123abcd" for name in ("tmp-00000003", "old-00000003")], RESUME, OUTSIDE),
        *each([f"{CHECKPOINTS}/.del-step-00000001-0123abcd", f"{CHECKPOINTS}/.tmp-mine"], RESUME, OUTSIDE),
    ],
    "hard links in a run folder": [
        *(Trial(f"run/{name}", OUTSIDE / "file", RESUME, hard=True) for name in ("metrics.jsonl", "run.lock")),
        *(Trial(f"new-run/{name}", OUTSIDE / "file", BEGIN_ANEW, hard=True) for name in ("recipe.yaml", "run.lock")),
    ],
    "links in an evaluation": [
        *each(["ev/result.json"], EVAL),
        *each(["ev", "ev/predictions"], EVAL, OUTSIDE),
    ],
    "links as outputs": [
        *each(["page.html"], PLAN),
        *each(["page.html"], REPORT),
        *each(["figures/runs.csv", "figures/training_steps.svg"], FIGURES),
        *each(["page.html", "figures/tokens_0.csv"], ROUTING, OUTSIDE / "file"),
        *each(["mine.yaml"], COPY),
        *each(["tok.json"], VOCABULARY),
        *each(["converted"], ("convert", "run", "converted", "--to", "huggingface"), OUTSIDE, OUTSIDE / "file"),
    ],
    "links in a folder of answers": [
        *each(["answers/answers.json", "answers/teacher.json"], DISTILL),
        *each(["answers/.tmp-0123abcd", "answers/.tmp-probe-0123abcd"], DISTILL, OUTSIDE),
    ],
}
NOT_OURS = [
    *((f"{CHECKPOINTS}/{name}", RESUME) for name in (".tmp-mine", ".del-x", ".old-photos", ".tmp-00000001-notours")),
    *((f"{CHECKPOINTS}/{name}", RESUME) for name in (".old-00000003-0123abcd-mine", ".del-step-mine-0123abcd")),
    ("answers/.tmp-photos", ("distill", "--teacher", "run", "--out", "s", "distill.cache.folder=answers", "-q")),
    ("other/.tmp-photos", ("distill", "--teacher", "run", "--out", "s", "distill.cache.folder=other", "-q")),
]
