"""Commands that write one output, killed before each operation on their files: the next start leaves it whole.

After a kill the same command is started again. Then the output is that of a command that was never killed, and no
temporary file is left. An output that was being replaced is there, or comes back, at any moment.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from drill import ended, start
from faulty_files import kill
from forked import command, faults
from table import Row, every
from tiny_run import RECIPE as TINY
from tiny_run import write_text

from switchcli.runs import pruning, text_preparation, tokenizer_tools, upcycling  # noqa: F401  # so that a fork has them

PATIENCE = 240.0
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
THERE_ALREADY = (2, 4)
"""The exit codes of a command whose output is there already: it was killed after that."""
TOKENIZER = "data.tokenizer={kind: file, path: run/tokenizer.json}"
"""What two preparations share: of equally frequent words a trained vocabulary takes any."""


class Output(NamedTuple):
    """A command and the file or folder that it writes."""

    arguments: tuple[str, ...]
    path: str
    replaces: bool = False
    """Whether the output is there before the command starts."""


OUTPUTS = {
    "convert --to huggingface": Output(("convert", "run", "out", "--to", "huggingface"), "out"),
    "convert --to switchcli": Output(("convert", "theirs", "out", "--to", "switchcli"), "out"),
    "upcycle": Output(("upcycle", "dense", "out", "--experts", "4"), "out"),
    "prune": Output(("prune", "run", "out", "--experts", "2"), "out"),
    "eval": Output(("eval", "run", "--out", "out"), "out", replaces=True),
    "data prepare": Output(("data", "prepare", "tiny.yaml", TOKENIZER), "cache"),
    "data tokenizer train": Output(
        ("data", "tokenizer", "train", "tiny.yaml", "--out", "tokenizer.json", "--force"),
        "tokenizer.json",
        replaces=True,
    ),
    "distill --cache-only": Output(
        ("distill", "--teacher", "run", "--out", "student", "distill.cache.folder=out", "--cache-only"), "out"
    ),
    "plan --html": Output(("plan", "tiny.yaml", "--devices", "2", "--html", "out"), "out", replaces=True),
    "recipes copy": Output(("recipes", "copy", "quickstart/switch", "out"), "out"),
}


def rows(folder: Path, stride: int) -> Iterator[Row]:
    """Kill each command before every `stride`-th of its operations, from a first one that differs from verb to verb."""
    sound = folder.absolute() / "sound"
    cache = os.environ.get("SWITCHCLI_CACHE")
    os.environ["SWITCHCLI_CACHE"] = "cache"  # each trial's own
    try:
        lay_out(sound)
        for number, (verb, output) in enumerate(OUTPUTS.items()):
            yield killed_everywhere(folder.absolute(), verb, output, number % stride, stride)
    finally:
        os.environ.pop("SWITCHCLI_CACHE")
        if cache is not None:
            os.environ["SWITCHCLI_CACHE"] = cache


def lay_out(sound: Path) -> None:
    sound.mkdir()
    with contextlib.chdir(sound):
        write_text(Path("text.txt"))
        Path("tiny.yaml").write_text(TINY)
        made = [
            ("pretrain", "tiny.yaml", "--out", "run", "--quiet"),
            ("pretrain", "tiny.yaml", "model.num_experts=1", "train.steps=1", "--out", "dense", "--quiet"),
            ("convert", "run", "theirs", "--to", "huggingface"),
        ]
        assert not faults(len(made), lambda number: command(*made[number]).fault([0]))


def killed_everywhere(folder: Path, verb: str, output: Output, first: int, stride: int) -> Row:
    place, wrong, kills = folder / "tried", list[str](), 0
    with fresh(folder / "sound", place, output):
        assert (code := run(output)) == 0, code
        wanted = contents(Path(output.path))
    for at in count(first, stride):
        with fresh(folder / "sound", place, output):
            if (code := run(output, partial(killed_at, at, place))) == 0:
                break
            kills += 1
            if fault := after_a_kill(output, wanted, code):
                wrong.append(f"operation {at}: {fault}")
    what = f"{verb}: SIGKILL before {every(stride, 'file operation')}"
    return Row("a", what, kills, len(wrong), wrong[0] if wrong else "")


@contextlib.contextmanager
def fresh(sound: Path, place: Path, output: Output) -> Iterator[None]:
    """Make the current folder a copy of the sound files, with an output to replace if there is to be one."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    with contextlib.chdir(place):
        if output.path == "cache":
            shutil.rmtree("cache")
        if output.replaces:
            assert (code := run(output)) == 0, code
        yield


def run(output: Output, within: Callable[[], None] = lambda: None) -> int | None:
    return ended(start(output.arguments, Path("log"), within), PATIENCE)


def after_a_kill(output: Output, wanted: Mapping[str, str], code: int | None) -> str:
    """What is wrong after a kill, or once the same command has run again."""
    if code != -9:
        return f"exit code {code}: {said()}"
    path = Path(output.path)
    kept = [path, *Path().glob(".tmp-*/old")]
    if output.replaces and not any(contents(one) == wanted for one in kept):
        return "what was to be replaced is gone"
    again = run(output)
    if again not in (0, *THERE_ALREADY):
        return f"then exit code {again}: {said()}"
    if contents(path) != wanted:
        return f"then another output (exit code {again}): {said()}"
    if left := [str(one) for one in Path().rglob(".*")]:
        return f"then {', '.join(left)} was left"
    return ""


def said() -> str:
    lines = Path("log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def contents(path: Path) -> dict[str, str]:
    """A digest of every file of an output, by its place in it.

    Without locks, and without what differs between two commands: measured seconds, and ties among words.
    """
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    timed = ("run.lock", "teacher.json")
    # The record of content digests holds inodes and times of the sources, which each copy has anew.
    files = [one for one in files if one.name not in timed and one.parent.name != "sources"]
    return {str(one.relative_to(path)): _digest(one) for one in files}


def _digest(path: Path) -> str:
    if path.name == "tokenizer.json":
        return str(len(json.loads(path.read_text())["model"]["vocab"]))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed_at(at: int, folder: Path) -> None:
    """Die, in a fork, before operation `at` that changes files below the folder, or syncs one."""
    left = at

    def operation() -> None:
        nonlocal left
        if left == 0:
            kill()
        left -= 1

    def strike(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or isinstance(arguments[0], int):  # of an open file
            return
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not reads and Path(os.fsdecode(arguments[0])).absolute().is_relative_to(folder):
            operation()

    sync = os.fsync

    def synced(descriptor: int) -> None:
        operation()
        sync(descriptor)

    os.fsync = synced
    sys.addaudithook(strike)
