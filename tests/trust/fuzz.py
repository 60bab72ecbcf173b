"""Part f: what users get wrong and what chance damages: recipes, slips of the finger, fixed bad inputs, files.

Nothing of it may end in a traceback, a hang, or be accepted and fail later.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mutated
from bad_inputs import CASES, FILES, RECIPE, lay_out_bad
from forked import command, faults, refused
from hypothesis import HealthCheck, Phase, given, seed, settings
from made_up import recipes, slips, write
from table import Row
from tiny_run import RECIPE as TINY
from tiny_run import write_text

from switchcli.errors import RecipeError
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.schema import PretrainRecipe, resolve_standalone
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.runs import planning

A_TIME = 50
"""Recipes of one trial."""
MAKING = settings(database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with contextlib.chdir(folder):
        write_text(Path("text.txt"))
        Path("tiny.yaml").write_text(TINY)
        lay_out_bad(Path())
        yield recipes_made_up(folder, 10_000 if long else 150)
        yield recipes_run(folder, 200 if long else 4)
        yield misspelt_keys(folder, 200)
        yield fixed_inputs()
        yield from mutated.rows(base(folder), folder, long)


def base(folder: Path) -> mutated.Base:
    """A run of two steps, in both layouts. Made in a fork, which leaves this process as it was."""
    made = [["pretrain", "tiny.yaml", "--out", "run"], ["convert", "run", "theirs", "--to", "huggingface"]]
    assert not faults(2, lambda number: command(*made[number]).fault([0]))
    lines = (folder / "text.txt").read_bytes().splitlines(keepends=True)
    return mutated.Base(folder / "run", folder / "theirs", b"".join(lines[:60]), TINY.encode())


def recipes_made_up(folder: Path, count: int) -> Row:
    """Each is refused in words, or comes to a value whose text comes to it again, and which a dry run describes."""
    accepted = folder / "accepted"

    def trial(number: int) -> str:
        wrong: list[str] = []

        @seed(number)
        @settings(MAKING, max_examples=A_TIME)
        @given(recipes())
        def one(tree: dict[str, Any]) -> None:
            wrong.append(refused(partial(_resolved, folder, tree, accepted)))

        one()
        assert len(wrong) >= A_TIME, len(wrong)
        return next(filter(None, wrong), "")

    wrong = faults(count // A_TIME, trial)
    taken = len(accepted.read_bytes()) if accepted.exists() else 0
    return Row("f", "recipes made up", count, len(wrong), wrong[0] if wrong else f"{taken:,} of them sound")


def _resolved(folder: Path, tree: dict[str, Any], accepted: Path) -> None:
    recipe = resolve_standalone(str(write(folder, yaml_nodes.write(tree))))
    again = write(folder, resolve.dump(recipe))
    assert resolve.resolve(str(again), [], type(recipe)) == recipe, "what is written is not what is read"
    assert resolve.dump(resolve.resolve(str(again), [], type(recipe))) == resolve.dump(recipe)
    if isinstance(recipe, TrainingRecipe):
        planning.describe_as_yaml(recipe)
    with accepted.open("a") as file:
        file.write(".")


def recipes_run(folder: Path, count: int) -> Row:
    """Sound ones, made small, are pre-trained: none that is accepted ends in anything but words."""

    def trial(number: int) -> str:
        found: list[PretrainRecipe] = []

        @seed(number)
        @settings(MAKING, max_examples=30)
        @given(recipes(PretrainRecipe))
        def one(tree: dict[str, Any]) -> None:
            with contextlib.suppress(RecipeError):
                if not found:
                    found.append(
                        resolve.resolve(str(write(folder, yaml_nodes.write(_small(tree)))), [], PretrainRecipe)
                    )

        one()
        write(folder, resolve.dump(found[0]))
        return command("pretrain", "made_up.yaml", "--out", "made-up", "--no-resume", "--quiet").fault([0, 2, 3, 5])

    wrong = faults(count, trial)
    return Row("f", "sound recipes made up, run for two steps", count, len(wrong), wrong[0] if wrong else "")


SMALL_MODEL = {"size": "custom", "vocab_size": 512, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4}
SMALL_MODEL |= {"num_layers": 2, "num_decoder_layers": 2}
SMALL_RUN = {"steps": 2, "batch_tokens": 256, "device": "cpu", "compile": False, "workers": 0}


def _small(tree: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with what `tree` says of some of its parts, but for what would make it take long."""
    parts = {key: tree[key] for key in ("model", "optimizer", "schedule", "train") if isinstance(tree.get(key), dict)}
    model = {"num_experts": 4, **parts.get("model", {}), **SMALL_MODEL}
    if isinstance(model["num_experts"], int):
        model["num_experts"] = min(model["num_experts"], 8)
    return {
        **yaml_nodes.plain(yaml_nodes.read(TINY, str)),
        **parts,
        "model": model,
        "train": {**parts.get("train", {}), **SMALL_RUN},
    }


def misspelt_keys(folder: Path, count: int) -> Row:
    """All are refused; the key that was meant is named for all but one in twenty."""
    right = folder / "right"
    tried = slips(count)

    def trial(number: int) -> str:
        schema, tree, wrong, meant = tried[number]
        try:
            resolve.resolve(str(write(folder, yaml_nodes.write(tree))), [], schema)
        except RecipeError as error:
            line = next((one for one in str(error).splitlines() if re.search(rf"\b{wrong}: .*\bkey\b", one)), "")
            named = re.search(r"Did you mean ([\w.]+)\?", line)
            with right.open("a") as file:
                file.write("." * bool(named and named[1].split(".")[-1] == meant))
            return "" if line else f"{wrong} for {meant}: {error}"
        return f"{wrong} for {meant}: accepted"

    wrong = faults(count, trial)
    named = len(right.read_bytes())
    short = max(0, round(0.95 * count) - named)
    said = wrong[0] if wrong else f"the right key named for {named / count:.1%}"
    return Row("f", "keys misspelt", count, len(wrong) + short, said)


def fixed_inputs() -> Row:
    """The tests look at each one's words: here it is that they end, how, and by the exit code of their kind."""
    tried = [(["tiny.yaml", *arguments], code) for arguments, code, _ in CASES.values()]
    tried += [([file], RECIPE) for file in FILES]
    wrong = faults(len(tried), lambda number: command("pretrain", *tried[number][0]).fault([tried[number][1]]))
    return Row("f", "bad inputs, fixed", len(tried), len(wrong), wrong[0] if wrong else "")
