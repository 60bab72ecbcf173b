"""Odd paths in each option, argument and key of a recipe: each ends in words, soon, and on lines of its own."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from faults.command_line import KEYS, SOUND, Parameter, parameters, set_key
from faults.harness import Done, Prepared, at_home_in, run

FORGED = "error: forged"
EVIL = f"new\n{FORGED}\x1b[31m\n{FORGED}"
"""A name that begins lines of its own, and colors them."""
PATHS: dict[str, str] = {
    "a name of 300 characters": "n" * 300,
    "a path of 6,000 characters": "d/" * 3000 + "x",
    "no such user": "~nosuchuser/x.txt",
    "a glob that is none": "a**/*.txt",
    "a loop of links": "loop",
    "below a file": "text.txt/x",
    "a file": "text.txt",
    "a folder": "folder",
    "nothing": "",
    "a dash": "-",
    "the current folder": ".",
    "not there": "none/none",
    "not UTF-8": "bad\udcff",
    "a line break": EVIL,
    "a pipe": "pipe",
    "in a pipe": "pipe/x",
    "a device without end": "/dev/zero",
    "a link to a pipe": "piped",
    "brackets": "[a",
}
FIRST = ("a line break", "a pipe", "a path of 6,000 characters", "not UTF-8")
"""The paths that have broken most: of the few cases each place of a command meets one of these and one other."""
NO_FOLDER = ("n" * 300, "d/" * 3000 + "x", "loop", "text.txt", "text.txt/x", "pipe", "pipe/x", "piped", "")
"""Where no folder can be, and no chart is drawn, which takes seconds."""
CODES = (0, 2, 3, 4)
MEMORY_BYTES = 2**34
"""More is a traceback: something has read a device without end."""
Case = tuple[str, Callable[[], list[str]]]


def in_yaml(path: str) -> str:
    """A string of YAML, which spells what is not printable as an escape."""
    escaped = path.replace("\udcff", "\u00ff").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped.encode("unicode_escape").decode() if not escaped.isprintable() else escaped}"'


def suits(place: Parameter | str, path: str) -> bool:
    """Whether a place may be given a path: nothing writes to a device, and no charts are drawn."""
    if not isinstance(place, Parameter):
        return True
    return not (place.writes and path == "/dev/zero") and (place.name != "--figures" or path in NO_FOLDER)


def cases(few: bool) -> Iterator[Case]:
    others = [name for name in PATHS if name not in FIRST]
    for number, place in enumerate([*parameters(), *KEYS]):
        chosen = (FIRST[number % len(FIRST)], others[number % len(others)]) if few else PATHS
        for path in (PATHS[name] for name in chosen):
            if suits(place, path) and isinstance(place, Parameter):
                yield f"{place}: {path[:40]!r}", lambda place=place, path=path: place.with_value(path)
            elif suits(place, path):
                yield f"{place}: {path[:40]!r}", lambda place=place, path=path: set_key(place, in_yaml(path))


def pipe_in(folder: str, name: str, *arguments: str) -> Case:
    """A folder of which a file is a pipe."""

    def make() -> list[str]:
        file = Path(folder, name)
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        return [*arguments]

    return f"{folder}/{name} is a pipe: {arguments[0]}", make


def extending(path: str) -> Case:
    def make() -> list[str]:
        Path("child.yaml").write_text(f"extends: {in_yaml(path)}\n")
        return ["recipes", "validate", "child.yaml"]

    return f"extends: {path[:40]!r}", make


TRAIN = ("pretrain", "tiny.yaml", "--out", "made")
OTHERS: list[Case] = [
    *map(extending, PATHS.values()),
    *(pipe_in("run", name, "report", "run") for name in ("recipe.yaml", "metrics.jsonl", "result.json", "run.lock")),
    pipe_in("run", "tokenizer.json", "data", "tokenizer", "show", "run"),
    *(
        pipe_in("theirs", name, "convert", "theirs", "made", "--to", "switchcli")
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    ),
    ("a number of steps with 400 digits", lambda: [*TRAIN, f"train.steps={'9' * 400}"]),
    ("text of a folder with a pipe", lambda: [*TRAIN, 'data.corpora=[{kind: files, paths: ["*"]}]']),
    (
        "text of a pipe by URL",
        lambda: [*TRAIN, f"data.corpora=[{{kind: files, paths: ['file://{Path.cwd()}/pipe']}}]"],
    ),
    ("a verb", lambda: [EVIL]),
    ("an option", lambda: [f"--{EVIL}"]),
    ("a device to compute on", lambda: ["generate", "run", "red", "--device", EVIL]),
]


def wrong(done: Done) -> str:
    """What is wrong with an end: a traceback, an exit code of a defect, a line that the path forged."""
    if FORGED in [line.strip()[: len(FORGED)] for line in done.said.splitlines()]:
        return "a line is forged"
    return "" if done.code in CODES and "Traceback" not in done.said else f"{done.code}: {done.said[-300:]}"


def limit_memory() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is not there is not asked for again and again
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def found_wrong(verb: Prepared, tried: Sequence[Case]) -> list[str]:
    found = []
    for name, arguments in tried:
        with verb.tried():
            Path("folder").mkdir()
            Path("loop").symlink_to("loop")
            os.mkfifo("pipe")
            Path("piped").symlink_to("pipe")
            if fault := wrong(run(*arguments(), within=limit_memory)):
                found.append(f"{name}: {fault}")
    return found


@pytest.mark.parametrize(
    ("few", "every"),
    [
        pytest.param(True, 50, marks=pytest.mark.integration, id="some of the few"),
        pytest.param(True, 1, marks=pytest.mark.nightly, id="few"),
        pytest.param(False, 1, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)], id="all"),
    ],
)
def test_every_odd_path_ends_in_one_line(
    few: bool, every: int, prepare: Callable[[str], Prepared], record_property: Callable[[str, int], None]
) -> None:
    tried = [*cases(few), *(OTHERS[few::2] if few else OTHERS)][::every]
    record_property("trials", len(tried))
    assert not found_wrong(prepare("eval"), tried)


@pytest.mark.integration
def test_no_verb_prints_lines_that_the_name_of_a_folder_forges(sound: Path, tmp_path: Path) -> None:
    evil = tmp_path / EVIL
    shutil.copytree(sound, evil)
    commands = [[*verb.split(), *words.split()] for verb, words in SOUND.items()]
    commands += [[verb, str(evil / "none")] for verb in ("report", "generate", "eval", "doctor", "plan")]
    commands += [["pretrain", str(evil / "tiny.yaml"), "--out", str(evil / "made"), "--no-resume"]]
    with at_home_in(evil):
        for command in commands:
            absolute = [str(evil / word) if (evil / word).exists() or word == "made" else word for word in command]
            assert not (fault := wrong(run(*absolute))), f"{command}: {fault}"


@pytest.mark.integration
def test_the_home_folder_in_every_place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --out=~/a and of key=~/a to the program."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(sound, tmp_path / "tried")
    with at_home_in(tmp_path / "tried"):
        for place in (*parameters(), *KEYS):
            words = place.with_value("~/none") if isinstance(place, Parameter) else set_key(place, "~/none")
            assert "~/none" not in run(*words, within=limit_memory).said, words
            assert not Path("~").exists(), words
