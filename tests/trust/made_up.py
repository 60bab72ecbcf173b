"""Recipes that hypothesis makes up: a sound one with some keys set to what they may be, nearly may be, or may not."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from mutations import ESCAPES, NASTY
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from switchcli.recipe import resolve
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, EvalRecipe, FinetuneRecipe, PretrainRecipe
from switchcli.spec import Spec

Path_ = tuple[str | int, ...]
TASK = {"kind": "files", "name": "colour", "train": ["a.jsonl"], "input": "{text}", "target": "label"}
TEACHER = {"teacher": "runs/teacher"}
BASES: dict[type[Spec], dict[str, Any]] = {
    PretrainRecipe: {"verb": "pretrain", "train": {"steps": 4, "batch_tokens": 4096}},
    FinetuneRecipe: {
        "verb": "finetune",
        "tasks": [TASK, "rte"],
        "eval": {"every_steps": 500},
        "train": {"steps": 4, "batch_tokens": 4096},
        "start": {"checkpoint": "runs/a"},
    },
    DistillTextRecipe: {"verb": "distill", "distill": TEACHER, "train": {"steps": 400, "batch_tokens": 4096}},
    DistillTasksRecipe: {
        "verb": "distill",
        "tasks": [TASK],
        "eval": {"every_steps": 500},
        "distill": TEACHER,
        "train": {"steps": 400, "batch_tokens": 4096},
    },
    EvalRecipe: {"verb": "eval", "tasks": [TASK], "text": {"held_out_fraction": 0.1}},
}
"""Of each verb a sound recipe, whose keys of a list have an item to be set in."""


def recipes(*schemas: type[Spec]) -> st.SearchStrategy[dict[str, Any]]:
    """Trees, sound and not, of these schemas, or of all."""
    return st.sampled_from(schemas or [*BASES]).flatmap(
        lambda schema: st.lists(st.sampled_from(PLACES[schema]).flatmap(_said), max_size=5).map(
            lambda said: _with(BASES[schema], said)
        )
    )


def _said(place: tuple[Path_, FieldInfo]) -> st.SearchStrategy[tuple[Path_, Any]]:
    path, field = place
    wild = st.sampled_from(NASTY) | st.text(max_size=20) | st.lists(st.integers(), max_size=3)
    return st.tuples(st.just(path), st.one_of(*[value(field.annotation, field.metadata)] * 5, wild))


def value(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:  # noqa: PLR0911  # a line for each type
    """What a key of this type may be, and its bounds and what lies just beyond."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        return st.one_of(*(value(one, metadata) for one in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(value(arguments[0], []), max_size=3)
    if annotation is type(None):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return st.just({"kind": get_args(kind.annotation)[0]} if kind else {})
    bounds = [getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)]
    near = [edge + step for edge in bounds for step in (-1, 0, 1)]
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.sampled_from([*near, 1, 2, 3, 4, 8, 16, 32, 100, 512, 1024, 4096, 2**20]) | st.integers(0, 64)
    if annotation is float:
        return st.sampled_from([*near, 0.0, 0.1, 0.5, 1.0, 1.25, 1e-4, 5e-324, 1e300]) | st.floats(0, 10)
    return st.sampled_from(["a", "tiny", "switch-base-8", "text.txt", "/dev/null", "rte", ESCAPES, ""])


def places(model: Any, path: Path_ = ()) -> Iterator[tuple[Path_, FieldInfo]]:
    """Every key, through every kind; the first item stands for those of a list."""
    for name, field in model.model_fields.items():
        yield (*path, name), field
        yield from _below(field.annotation, (*path, name))


def _below(annotation: Any, path: Path_) -> Iterator[tuple[Path_, FieldInfo]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from places(annotation, path)
    elif get_origin(annotation) is tuple:
        yield from _below(get_args(annotation)[0], (*path, 0))
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for one in get_args(annotation):
            yield from _below(one, path)


PLACES = {schema: list(places(schema)) for schema in BASES}


def _with(base: dict[str, Any], said: list[tuple[Path_, Any]]) -> dict[str, Any]:
    tree = _copied(base)
    for path, what in said:
        _set(tree, path, _copied(what))  # which a later one may be set in
    return tree


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(one) for key, one in tree.items()}
    return [_copied(one) for one in tree] if isinstance(tree, list) else tree


def _set(tree: dict[str, Any], path: Path_, what: Any) -> None:
    here: Any = tree
    for key, following in pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(here, list):
            here[:] = here or [{}]
            here[0] = here[0] if isinstance(here[0], dict) else {}
            here = here[0]
        elif isinstance(here.get(key), type(empty)):
            here = here[key]
        else:
            here[key] = empty
            here = empty
    if isinstance(here, list):
        here[:] = [what, *here[1:]]
    else:
        here[path[-1]] = what


# Slips of the finger


def slips(count: int) -> list[tuple[type[Spec], dict[str, Any], str, str]]:
    """Return `count` times: the verb's schema, a sound recipe with one key misspelt, that key as it is there, and as it
    should be."""
    draw = random.Random(0)
    keys = [
        (schema, path)
        for schema, base in BASES.items()
        for path in _stated(resolve.validate(resolve.layer(base, "base"), schema).model_dump(mode="json"))
        if len(str(path[-1])) >= 4
    ]
    known = {str(path[-1]) for _, path in keys}
    found = []
    while len(found) < count:
        schema, path = draw.choice(keys)
        wrong = _slip(str(path[-1]), draw)
        if wrong not in known:
            found.append((schema, _with(BASES[schema], [((*path[:-1], wrong), 1)]), wrong, str(path[-1])))
    return found


def _stated(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    if isinstance(tree, dict):
        for key, one in tree.items():
            yield (*path, key)
            yield from _stated(one, (*path, key))


def _slip(word: str, draw: random.Random) -> str:
    place = draw.randrange(len(word) - 1)
    match draw.randrange(4):
        case 0:
            return word[:place] + word[place + 1 :]
        case 1:
            return word[:place] + word[place] + word[place:]
        case 2:
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        case _:
            return word[:place] + draw.choice("abcdefghijklmnopqrstuvwxyz_") + word[place + 1 :]


def write(folder: Path, text: str) -> Path:
    file = folder / "made_up.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return file
