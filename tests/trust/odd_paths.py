"""Part paths: odd paths in each option, argument and key of a recipe. Each ends in words, soon, on lines of its own.

Also runs in a folder whose name holds a line break: no output line may begin with what stands after it.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from command_line import KEYS, SOUND, lay_out, parameters, set_key
from forked import Done, command, faults
from table import Row

FORGED = "error: forged"
EVIL = f"new\n{FORGED}\x1b[31m\n{FORGED}"
"""A name that begins lines of its own, and colors them."""
PATHS: dict[str, str] = {
    "a name of 300 characters": "n" * 300,
    "a recipe's name of 300 characters": "n" * 300 + ".yaml",
    "a path of 6,000 characters": "d/" * 3000 + "x",
    "no such user": "~nosuchuser/x.txt",
    "a glob that is none": "a**/*.txt",
    "a loop of links": "loop",
    "in a loop of links": "loop/x.txt",
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
    "a device without content": "/dev/null",
    "a link to a pipe": "piped",
    "brackets": "[a",
    "a brace": "{a",
}
ONLY_READ = ("/dev/zero", "/dev/null")
"""Not written to."""
NO_FOLDER = (
    "n" * 300,
    "d/" * 3000 + "x",
    "loop",
    "loop/x.txt",
    "text.txt",
    "text.txt/x",
    "pipe",
    "pipe/x",
    "piped",
    "",
)
"""Where no folder can be. Where one can, the library that draws figures is started, which needs more memory than a
trial has."""
PATIENCE = 60
"""Seconds after which a trial that waits, as for the writer of a pipe, is a hang."""
CODES = (0, 2, 3, 4)


def rows(folder: Path, long: bool) -> Iterator[Row]:
    """Yield one row per class.

    In the short form each place meets the paths that have broken most, and a third of the others.
    """
    sound, work = folder.resolve() / "sound", folder.resolve() / "work"
    sound.mkdir()
    with contextlib.chdir(sound):
        lay_out(sound)

    def tried(cases: Sequence[tuple[str, Callable[[], list[str]]]], what: str) -> Row:
        def trial(number: int) -> str:
            os.environ["HF_HUB_OFFLINE"] = "1"  # what is not there is not asked for again and again
            name, arguments = cases[number]
            lay_out_odd(work)
            with contextlib.chdir(work):
                wrong = fault(command(*arguments()))
            return f"{name}: {wrong}" if wrong else ""

        wrong = faults(len(cases), trial, PATIENCE)
        return Row("paths", what, len(cases), len(wrong), " ".join(wrong) if long else wrong[0] if wrong else "")

    def is_tried(place: int, number: int) -> bool:
        return long or number < 5 or (place + number) % 3 == 0

    yield tried(
        [
            (f"{one}, {name}", lambda one=one, path=path: one.with_value(path, sound))
            for place, one in enumerate(parameters())
            for number, (name, path) in enumerate(PATHS.items())
            if is_tried(place, number) and not (one.writes and path in ONLY_READ)
            if one.name != "--figures" or path in NO_FOLDER
        ],
        "options and arguments",
    )
    yield tried(
        [
            (f"{key}, {name}", lambda key=key, path=path: set_key(key, in_yaml(path), sound))
            for place, key in enumerate(KEYS)
            for number, (name, path) in enumerate(PATHS.items())
            if is_tried(place, number) and not (key == "distill.cache.folder" and path in ONLY_READ)
        ],
        "keys of recipes",
    )
    yield tried([(name, lambda make=make: make(sound)) for name, make in OTHERS.items()], "other ways")
    yield forged_lines(sound, folder.resolve() / EVIL)


def lay_out_odd(work: Path) -> None:
    """Lay out what PATHS names in a new folder, which becomes the current one of a trial."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "folder").mkdir(parents=True)
    (work / "text.txt").write_text("red green\n")
    (work / "loop").symlink_to("loop")
    os.mkfifo(work / "pipe")
    (work / "piped").symlink_to("pipe")


def in_yaml(path: str) -> str:
    """A string of YAML, which spells what is not printable as an escape."""
    escaped = path.replace("\udcff", "\u00ff").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped.encode("unicode_escape").decode() if not escaped.isprintable() else escaped}"'


def fault(done: Done) -> str:
    """What is wrong with an end: a traceback, an exit code of a defect, a line that the path forged."""
    if FORGED in [line.strip()[: len(FORGED)] for line in done.said.splitlines()]:
        return "a line is forged"
    return done.fault(CODES)


def extending(what: str, name: str = "child.yaml") -> Callable[[Path], list[str]]:
    """A recipe that extends what is given."""

    def make(sound: Path) -> list[str]:
        Path(name).write_text(f"extends: {in_yaml(what)}\n")
        return ["recipes", "validate", name]

    return make


def within_run(name: str, *arguments: str) -> Callable[[Path], list[str]]:
    """A run of which a file is a pipe."""

    def make(sound: Path) -> list[str]:
        shutil.copytree(sound / "run", "run")
        file = Path("run", name)
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        return [*arguments]

    return make


def huggingface(name: str) -> Callable[[Path], list[str]]:
    """A Hugging Face folder of which a file is a pipe."""

    def make(sound: Path) -> list[str]:
        Path("theirs").mkdir()
        for one in ("config.json", "tokenizer.json", "model.safetensors"):
            if one == name:
                os.mkfifo(f"theirs/{one}")
            elif one == "config.json":
                Path("theirs", one).write_text("{}")
            else:
                shutil.copy(sound / "run/tokenizer.json", f"theirs/{one}")
        return ["convert", "theirs", "made", "--to", "switchcli"]

    return make


def beginning_again(out: str) -> Callable[[Path], list[str]]:
    """`--no-resume` of a run that is the current folder."""

    def make(sound: Path) -> list[str]:
        for one in (sound / "run").iterdir():
            if one.name != "checkpoints":
                shutil.copy(one, one.name)
        return ["pretrain", f"{sound}/tiny.yaml", "--out", out, "--no-resume"]

    return make


OTHERS: dict[str, Callable[[Path], list[str]]] = {
    **{f"extends: {name}": extending(path) for name, path in PATHS.items()},
    **{
        f"{name} of a run that is a pipe, {arguments[0]}": within_run(name, *arguments)
        for name in ("recipe.yaml", "tokenizer.json", "metrics.jsonl", "result.json", "run.lock")
        for arguments in (
            ("report", "run"),
            ("data", "tokenizer", "show", "run"),
            ("recipes", "validate", "run/recipe.yaml"),
        )
    },
    **{
        f"{name} of a Hugging Face folder that is a pipe": huggingface(name)
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    },
    "--out . --no-resume": beginning_again("."),
    "--out ./ --no-resume": beginning_again("./"),
    "--out folder/.. --no-resume": beginning_again("folder/.."),
    "a number of steps with 400 digits": lambda sound: [
        *("pretrain", f"{sound}/tiny.yaml", f"train.steps={'9' * 400}", "--out", "made")
    ],
    "text of a folder with a pipe": lambda sound: [
        *("pretrain", f"{sound}/tiny.yaml", 'data.corpora=[{kind: files, paths: ["*"]}]', "--out", "made")
    ],
    "text of a pipe by URL": lambda sound: [
        *("pretrain", f"{sound}/tiny.yaml", f"data.corpora=[{{kind: files, paths: ['file://{Path.cwd()}/pipe']}}]"),
        *("--out", "made"),
    ],
}


def forged_lines(sound: Path, evil: Path) -> Row:
    """Every verb on runs in a folder whose name holds line breaks."""
    shutil.copytree(sound, evil, ignore=shutil.ignore_patterns("tiny.yaml", "tune.yaml"))
    for name in ("tiny.yaml", "tune.yaml"):
        shutil.copy(sound / name, evil / name)
    cases = []
    for verb, words in SOUND.items():
        for inside in (True, False):  # what is made lies within that folder, too
            filled = [word.replace("{sound}", str(evil)) for word in words]
            made = [f"{evil}-{word}" if word.startswith("made") and inside else word for word in filled]
            cases += [[*verb.split(), *made], [*verb.split(), *made, "--json"]]
            if verb in ("pretrain", "finetune", "distill"):
                cases += [[verb, *made, "--no-resume"], [verb, *made, "data.folder=1"], [verb, *made, "--dry-run"]]
    cases += [["report", str(evil / "run"), str(evil / "dense"), "--html", f"{evil}.html"]]
    cases += [["report", "--routing", str(evil / "run")], ["doctor", str(evil / "run"), "--checkpoint-files"]]
    cases += [[verb, str(evil / "none")] for verb in ("report", "generate", "eval", "doctor", "plan")]
    cases += [
        ["recipes", "validate", EVIL],
        ["recipes", "show", EVIL],
        ["recipes", "schema", EVIL],
        [EVIL],
        [f"--{EVIL}"],
    ]
    cases += [["generate", str(evil / "run"), "red", "--device", EVIL], ["report", str(evil / "run"), "--smooth", EVIL]]

    def trial(number: int) -> str:
        work = evil.with_name("work-forged")
        work.mkdir(exist_ok=True)
        with contextlib.chdir(work):
            wrong = fault(command(*cases[number]))
        return f"{cases[number][:3]}: {wrong}" if wrong else ""

    wrong = faults(len(cases), trial, PATIENCE)
    return Row("paths", "lines forged by a run's name", len(cases), len(wrong), " ".join(wrong[:9]))
