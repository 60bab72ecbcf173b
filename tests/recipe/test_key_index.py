"""The index of recipe keys: that it is complete and true."""

import pytest

from switchcli.errors import RecipeError
from switchcli.recipe import foreign_words, key_index, resolve
from switchcli.recipe.key_info import KeyInfo
from switchcli.recipe.schema import PretrainRecipe

NAMES = {info.key for info in key_index.all_keys()}
MINIMAL = ("train.steps=100000", "train.batch_tokens=1048576")


def test_every_meaning_of_a_key_is_complete() -> None:
    for info in key_index.all_keys():
        assert info.verbs, info
        assert info.type, info
        assert info.description.endswith((".", "?", "`")), f"{info.key}: its field needs a docstring of sentences"
        assert info.default != "", info
        assert not info.key.endswith(".kind") or info.choices, info


def test_a_verb_has_its_keys() -> None:
    assert {info.key for info in key_index.keys("eval")} > {"verb", "tasks", "text.corpora[].kind", "eval.capacity"}
    distill = {info.key for info in key_index.keys("distill")}
    assert distill > {"distill.teacher", "data.corpora[].path", "data.folder"}
    assert "distill.teacher" not in {info.key for info in key_index.keys("pretrain")}


def pretrain_keys() -> list[KeyInfo]:
    infos = [info for info in key_index.keys("pretrain") if "[]" not in info.key and info.default is not None]
    return [info for info in infos if info.key not in ("extends", "verb")]


@pytest.mark.parametrize("info", pretrain_keys(), ids=lambda info: "-".join([info.key, *key_index.kinds(info)]))
def test_a_recipe_may_state_the_default(info: KeyInfo) -> None:
    """The key exists under each condition, and its default has the right form. Other keys of the kind may be needed."""
    for condition in info.when or ("description=x",):
        errors = errors_of([*MINIMAL, condition, f"{info.key}={info.default}"])
        assert [line for line in errors if "missing" not in line] == []


def errors_of(overrides: list[str]) -> tuple[str, ...]:
    try:
        resolve.validate(resolve.load(None, overrides), PretrainRecipe)
    except RecipeError as error:
        return error.lines
    return ()


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("data.corpora.0.path", "data.corpora[].path"),
        ("data.corpora.path", "data.corpora[].path"),
        ("data.corpora[3].path", "data.corpora[].path"),
        ("train.steps", "train.steps"),
    ],
)
def test_a_key_is_found_as_it_is_written(written: str, key: str) -> None:
    assert key_index.normalize(written) == key
    assert key_index.meanings(key)


def test_nothing_is_near_to_nonsense() -> None:
    assert foreign_words.nearest("xyzzy", NAMES) is None
