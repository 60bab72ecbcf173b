"""Which runs a sweep has: a grid on the command line, or a list of grids in a file.

A grid is a command whose keys may have several values, separated by commas:

    pretrain quickstart/switch model.num_experts=2,4 train.seed=0,1

has four runs, named by the values that vary: 2-0, 2-1, 4-0 and 4-1. A line of a list is a name and a grid:

    dense    pretrain quickstart/dense train.seed=0,1,2
    teacher  pretrain quickstart/switch train.seed=0,1,2
    ---
    student  distill quickstart/distill --teacher {out}/teacher-{train.seed} train.seed=0,1,2

`{out}` is the folder of the sweep and `{KEY}` the value that the run has for a key. Runs below a line `---` start when
all runs above it have ended. Text after `#` is a comment.
"""

import itertools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from switchcli.errors import RecipeError
from switchcli.recipe import library, yaml_nodes
from switchcli.recipe.library import VERBS
from switchcli.system.user_files import read_regular

MAX_RUNS = 1_000
"""A sweep has at most this many runs: each is resolved before the first one starts."""
MAX_BYTES = 2**20
"""Bytes that a list may have."""

_OPTIONS_OF_THE_SWEEP: Mapping[str, str] = MappingProxyType(
    {
        "--no-resume": "would archive an interrupted run when the sweep goes on: start over in another folder by --out",
        "--out": "the sweep gives each run a folder: leave it out, and name the folder of them all by sweep --out",
        "--dry-run": "trains nothing: leave it out; sweep --print shows the commands",
    }
)
"""Options that no run of a sweep may have, and why."""


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """Name of its folder in the folder of the sweep."""
    arguments: tuple[str, ...]
    """Arguments of `switchcli`: verb, recipe, options and overrides, without `--out`."""
    stage: int = 0
    """Number of lines `---` above it."""


def parse_sweep(arguments: Sequence[str], out: Path) -> list[SweepRun]:
    """Return the runs that a command line names, in order.

    `arguments` are a list's file and overrides for each of its training runs, or a verb, a recipe, options and keys.

    Raises:
        RecipeError: the file cannot be read, a line is not a run, two runs have the same name, or there are too many.
    """
    path = library.list_file(arguments[0])
    if path.is_file():
        runs = parse_list(path, arguments[1:], out)
    elif len(arguments) > 1 and arguments[0] in VERBS:
        runs = list(expand_grid("", arguments, out))
    else:
        raise RecipeError(f"{arguments[0]}: must be a file that lists runs, or {', '.join(VERBS)} with a recipe")
    if not runs:
        raise RecipeError(f"{path}: has no run: write lines NAME VERB RECIPE [KEY=VALUE ...]")
    if repeated := sorted(name for name, count in Counter(run.name for run in runs).items() if count > 1):
        raise RecipeError(f"two runs have the same name: {', '.join(repeated)}: name each run differently")
    return runs


def parse_list(path: Path, overrides: Sequence[str], out: Path) -> list[SweepRun]:
    """Return the runs of a list. `overrides` replace the keys of every line, except of an `eval`.

    Raises:
        RecipeError: the file cannot be read, or a line is not a run.
    """
    try:
        lines = read_regular(path, MAX_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: cannot be read as a list of runs: {reason}") from error
    runs: list[SweepRun] = []
    stage = 0
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise RecipeError(f"{path}:{number}: {error}") from error
        if not words:
            continue
        if words == ["---"]:
            stage += 1
            continue
        if len(words) < 3 or words[1] not in VERBS:
            raise RecipeError(
                f"{path}:{number}: {line.strip()!r} is not a run: write NAME VERB RECIPE [KEY=VALUE ...], with one of "
                f"{', '.join(VERBS)} as VERB"
            )
        name, *command = words
        try:
            runs += expand_grid(name, command, out, stage, () if command[0] == "eval" else overrides)
        except RecipeError as error:
            raise RecipeError(f"{path}:{number}: {error}") from error
        _check_number(len(runs))
    return runs


class _Word(NamedTuple):
    """A word of a grid: a key with its values, or another argument, which is its own only value."""

    key: str | None
    values: list[str]
    is_in_name: bool
    """Whether the value that a run has is part of the run's name."""


def expand_grid(
    name: str, command: Sequence[str], out: Path, stage: int = 0, overrides: Sequence[str] = ()
) -> Iterator[SweepRun]:
    """Yield a run for each combination of the values of the keys of `command`. The last key varies fastest.

    An override replaces the values of its key. A key with several values in `command` is part of the names of the runs
    even when an override leaves one value. For example, the line

        student  distill r --teacher {out}/teacher-{train.seed} train.seed=0,1

    with the overrides train.seed=2 and train.steps=5,9 has these words, and two runs:

        key          values                             is_in_name
        None         distill                            no
        None         r                                  no
        None         --teacher                          no
        None         {out}/teacher-{train.seed}         no
        train.seed   2                                  yes: the line has two values
        train.steps  5, 9                               yes

        student-2-5  distill r --teacher OUT/teacher-2 train.seed=2 train.steps=5
        student-2-9  distill r --teacher OUT/teacher-2 train.seed=2 train.steps=9

    A run without a name is called after its recipe.

    Raises:
        RecipeError: a key is given twice, or has no value or equal values; an option is the sweep's; a run cannot have
            its name; a name in braces has no value; or there are too many combinations.
    """
    for argument in (*command, *overrides):
        if problem := _OPTIONS_OF_THE_SWEEP.get(argument.partition("=")[0]):
            raise RecipeError(f"{argument}: {problem}")
    _check_given_once(command)
    _check_given_once(overrides)
    words = _override([*map(_parse_word, command)], [*map(_parse_word, overrides)])
    _check_number(math.prod(len(word.values) for word in words))
    for chosen in itertools.product(*(word.values for word in words)):
        known = {"out": str(out)}
        arguments, name_parts = [], [name]
        for word, value in zip(words, chosen, strict=True):
            if word.key is None:
                arguments.append(value)
            else:
                known[word.key] = value
                arguments.append(f"{word.key}={value}")
            if word.is_in_name:
                name_parts.append(re.sub(r"[^\w.-]+", "_", value).strip("_"))
        run_name = "-".join(part for part in name_parts if part) or Path(arguments[1]).stem
        if "/" in run_name or run_name in ("", ".", "..", "run.lock") or run_name.endswith(".log"):
            raise RecipeError(
                f"{run_name!r} must be the name of a new folder in {out}, without a /: run.lock and names that end in "
                ".log are files of the sweep"
            )
        yield SweepRun(run_name, tuple(_substitute(argument, known) for argument in arguments), stage)


def _parse_word(argument: str) -> _Word:
    if not library.is_override(argument):
        return _Word(None, [argument], is_in_name=False)
    key, _, text = argument.partition("=")
    values = split_values(text)
    if "" in values:
        raise RecipeError(f"{key}=: has no value: remove the last comma, or write {key}=null")
    _check_number(len(values))
    meanings = [*map(_meaning, values)]
    if repeated := [value for value, meaning in zip(values, meanings, strict=True) if meanings.count(meaning) > 1]:
        raise RecipeError(f"{key}: {', '.join(repeated)} are equal: write each value once")
    return _Word(key, values, is_in_name=len(values) > 1)


def _meaning(value: str) -> str:
    """Return a text that is equal for values which a recipe reads as equal, such as 0.1 and 0.10."""
    try:
        return repr(yaml_nodes.plain(yaml_nodes.read(value, str)))
    except RecipeError:  # not YAML, such as {out}/dense
        return value


def _override(words: Sequence[_Word], overrides: Sequence[_Word]) -> list[_Word]:
    """Return the words with the values of the overrides, and after them the overrides of keys that no word has."""
    by_key = {word.key: word for word in overrides if word.key is not None}
    result = []
    for word in words:
        override = by_key.pop(word.key, word) if word.key is not None else word
        result.append(override._replace(is_in_name=word.is_in_name or override.is_in_name))
    return result + [word for word in overrides if word.key is None or word.key in by_key]


def _check_given_once(arguments: Sequence[str]) -> None:
    given: dict[str, list[str]] = {}
    for argument in filter(library.is_override, arguments):
        key, _, value = argument.partition("=")
        given.setdefault(key, []).append(value)
    for key, values in given.items():
        if len(values) > 1:
            raise RecipeError(
                f"{key}: given {len(values)} times: write {key}={','.join(values)} for a run of each value, or keep one"
            )


def _check_number(count: int) -> None:
    if count > MAX_RUNS:
        raise RecipeError(f"{count:,} runs are more than the {MAX_RUNS:,} that a sweep may have: make several sweeps")


def split_values(text: str) -> list[str]:
    """Split `2,4` into 2 and 4. A comma within brackets, braces or quotes does not separate values."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def missing_runs(runs: Sequence[SweepRun], out: Path) -> Iterator[str]:
    """Yield an error for each run that needs a folder in `out` which is not there, and which no earlier stage makes."""
    stages = {run.name: run.stage for run in runs}
    for run in runs:
        for needed in filter(None, (named_run(argument, out) for argument in run.arguments)):
            if stages.get(needed, run.stage) >= run.stage and not (out / needed).exists():
                folder = out / needed
                yield f"{run.name}: needs {folder}, which does not exist: run it first, or list it above a line of ---"


def needed_runs(run: SweepRun, out: Path) -> list[str]:
    """Return the names of the runs in `out` that the arguments of a run name, also within values of keys."""
    folders = "|".join(re.escape(f"{folder}/") for folder in (out, out.absolute()))
    within = re.compile(rf"(?<![\w./-])(?:{folders})([\w.-]+)")
    names = {name for argument in run.arguments for name in (named_run(argument, out), *within.findall(argument))}
    return sorted(name for name in names if name is not None)


def named_run(argument: str, out: Path) -> str | None:
    """Return the name of the run in `out` that PATH, PATH@STEP or OPTION=PATH lies in, or None for another argument."""
    text = re.sub("^-?-?[a-z_.-]+=|@[0-9]+$", "", argument)
    path = Path(os.path.expanduser(text)).absolute()  # noqa: PTH111 - it leaves the name of an unknown user
    folder = out.absolute()
    if Path.cwd().is_relative_to(folder) and not text.startswith((f"{out}/", f"{folder}/")):
        return None  # every relative path lies in the folder: a run of it is one that is named with the folder
    return path.relative_to(folder).parts[0] if folder in path.parents else None


def _substitute(argument: str, known: Mapping[str, str]) -> str:
    """Replace `{out}` and `{train.seed}` by their values.

    In the value of a key, `{text}` and other names without a dot stay: they are YAML, or fields of a task.

    Raises:
        RecipeError: a name in braces has no value and does not stay.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] in known:
            return known[match[1]]
        if library.is_override(argument) and "." not in match[1]:
            return match[0]
        names = ", ".join(f"{{{name}}}" for name in known)
        raise RecipeError(f"{argument}: {match[0]} has no value: write {names}, or set its key in the same command")

    return re.sub(r"\{([\w.]+)\}", value, argument)
