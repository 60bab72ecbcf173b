"""Recipes made up of any keys and values: each is refused in words, or means what it says and can be run."""

import json
import random
import re
from typing import Any

import pytest
import yaml
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from tiny_run import RECIPE as TINY
from tiny_run import write_text
from typer.testing import CliRunner

from switchcli.cli import app
from switchcli.errors import RecipeError, SwitchError
from switchcli.recipe import key_index, resolve
from switchcli.recipe.key_info import KeyInfo
from switchcli.recipe.schema import resolve_standalone
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices.costs import describe

TASK = {"kind": "files", "name": "color", "train": ["a.jsonl"], "input": "{text}", "target": "label"}
STEPS = {"train": {"steps": 400, "batch_tokens": 4096}}
BASES: dict[str, dict[str, Any]] = {
    "pretrain": STEPS,
    "finetune": {"tasks": [TASK], "eval": {"every_steps": 50}, "start": {"checkpoint": "runs/a"}, **STEPS},
    "distill": {"distill": {"teacher": "runs/teacher"}, **STEPS},
    "eval": {"tasks": [TASK], "text": {"held_out_fraction": 0.1}},
}
"""A sound recipe of each verb."""
NUMBERS = [0, -1, 1, 2, 3, 4, 8, 100, 4096, 2**20, 2**31, 2**63, 10**400, 0.1, 0.5, 1.25, 1e-4, 5e-324, 1e300]
WORDS = ["", "a", "tiny", "switch-base-8", "/dev/null", "rte", "x" * 100_000, "\x1b[2J\u202e", "\0", "../../x", ".nan"]
VALUES: list[Any] = [*NUMBERS, *WORDS, None, True, False, [], {}, [[]], [None], {"": None}, {"kind": "x"}, [0] * 1000]
SMALL = [
    *("model.vocab_size=512", "model.d_model=32", "model.d_ff=64", "model.d_kv=8", "model.num_heads=4"),
    *("model.num_layers=2", "model.num_decoder_layers=2", "model.num_experts=4", "train.steps=2"),
    *("train.batch_tokens=256", "train.device=cpu", "train.compile=false"),
]
"""What would make a run take long, if it were otherwise."""


def settings_of(info: KeyInfo) -> st.SearchStrategy[list[str]]:
    """Overrides that set a key to what it may be, or may not, with the kind that has it."""
    likely = [choice for choice in (*info.choices, info.default) if choice is not None]
    value = st.sampled_from([*likely, *map(json.dumps, NUMBERS[2:10])]) | st.sampled_from(VALUES).map(json.dumps)
    condition = st.sampled_from(info.when).map(lambda one: [one]) if info.when else st.just([])
    pairs = st.tuples(condition, value.map(lambda one: [f"{info.key}={one}"]))
    return pairs.map(lambda pair: [override.replace("[]", ".0") for part in pair for override in part])


def made_up(verb: str, *parts: str) -> st.SearchStrategy[list[str]]:
    """Overrides of up to five keys of a verb, or of these parts of its recipe."""
    infos = [info for info in key_index.keys(verb) if info.key not in ("verb", "extends")]
    chosen = [info for info in infos if not parts or info.key.split(".")[0] in parts]
    several = st.lists(st.sampled_from(chosen).flatmap(settings_of), max_size=5)
    return several.map(lambda lists: [override for one in lists for override in one])


@pytest.mark.parametrize("verb", BASES)
@given(data=st.data())
def test_any_recipe_is_refused_in_words_or_means_what_is_written(
    verb: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"{verb}.yaml"
    file.write_text(yaml.safe_dump({"verb": verb, **BASES[verb]}))
    try:
        recipe = resolve_standalone(str(file), data.draw(made_up(verb)))
    except RecipeError:
        return
    file.write_text(resolve.dump(recipe), encoding="utf-8")
    again = resolve_standalone(str(file))
    assert again == recipe
    assert resolve.dump(again) == resolve.dump(recipe)
    if isinstance(recipe, TrainingRecipe):
        describe(recipe)


@pytest.mark.nightly
@settings(max_examples=100, phases=[Phase.explicit, Phase.generate])  # without shrinking: a run takes too long
@given(overrides=made_up("pretrain", "model", "optimizer", "schedule", "train"))
@example(overrides=["schedule.learning_rate=1048576"])
def test_a_recipe_that_is_accepted_can_be_run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(TINY.replace("text.txt", str(folder / "text.txt")))
    arguments = [str(folder / "tiny.yaml"), *overrides, *SMALL]
    try:
        resolve_standalone(arguments[0], arguments[1:])
    except RecipeError:
        assume(False)
    done = CliRunner().invoke(app, ["pretrain", *arguments, "--out", str(folder / "run"), "--no-resume", "--quiet"])
    error = done.exception
    code = error.exit_code if isinstance(error, SwitchError) else done.exit_code  # as `switchcli.cli.main` ends it
    assert code in (0, 2, 3, 5), (overrides, code, error)


def slip(word: str, draw: random.Random) -> str:
    """A letter is left out, doubled, swapped with the next, or another."""
    place = draw.randrange(len(word) - 1)
    one, two = word[place : place + 2]
    slips = (two, one + one + two, two + one, draw.choice("abcdefghijklmnopqrstuvwxyz_") + two)
    return word[:place] + draw.choice(slips) + word[place + 2 :]


def test_a_misspelt_key_is_refused_and_the_right_one_is_named_19_times_of_20() -> None:
    draw, named, tried = random.Random(0), 0, 0
    infos = [info for info in key_index.keys("pretrain") if "[]" not in info.key and "." in info.key]
    known = {info.key.rpartition(".")[2] for info in infos}
    for info in draw.choices(infos, k=60):
        parent, _, last = info.key.rpartition(".")
        wrong = slip(last, draw) if len(last) >= 4 else last
        if wrong not in known:
            with pytest.raises(RecipeError, match=rf"\b{wrong}\b.*\bno such key\b") as refusal:
                resolve_standalone("quickstart/switch", [*info.when[:1], f"{parent}.{wrong}=1"])
            tried += 1
            named += re.search(rf"Did you mean ([\w.]+\.)?{last}\?", str(refusal.value)) is not None
    assert named >= 0.95 * tried, f"{named} of {tried}"
