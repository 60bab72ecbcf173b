"""Names that recipe keys and values had in earlier versions: they are still read, under their names of today.

A recipe file or an override that uses an old name gets a warning with the new one. The recipe that a run saved gets
none: its user did not write it.
"""

import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from switchcli.errors import RecipeError, RenamedWarning
from switchcli.recipe.yaml_nodes import Node

Path = tuple[str, ...]

KEYS: Mapping[str, str] = MappingProxyType(
    {
        "data.span_corruption": "data.objective",
        "data.lanes": "data.stream_shards",
        "parallel.wire": "parallel.comm_dtype",
        "distill.answers": "distill.cache",
        "student.unfit": "student.on_shape_mismatch",
    }
)
"""Dotted keys of two parts, each with its name of today."""

VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "student.kind": {"fresh": "random_init"},
        "student.experts": {"fresh": "random_init"},
        "student.on_shape_mismatch": {"refuse": "error", "fresh": "random_init"},
    }
)
"""Values of a key, each with its name of today. Applied after `KEYS`."""


def upgrade(recipe: Node, warn: bool) -> Node:
    """Return one layer of a recipe under the names of today. `recipe` is changed in place.

    Raises:
        RecipeError: a key is given under its old name and under its new one.
    """
    for old, new in KEYS.items():
        part, key = old.split(".")
        keys = _mapping(recipe, part)
        if key not in keys:
            continue
        renamed = new.removeprefix(f"{part}.")
        if renamed in keys:
            raise RecipeError(f"{keys[key].where}: {old}: the old name of {new}, which is given too: leave {old} out")
        keys[renamed] = keys.pop(key)
        if warn:
            _warn(keys[renamed], old, new)
    for dotted, values in VALUES.items():
        part, key = dotted.split(".")
        node = _mapping(recipe, part).get(key)
        if node is not None and isinstance(node.value, str) and node.value in values:
            _mapping(recipe, part)[key] = node._replace(value=values[node.value])
            if warn:
                _warn(node, f"{dotted}: {node.value}", values[node.value])
    if not warn:
        for corpus in _corpora(recipe):
            corpus.pop("streaming", None)  # it said how a corpus of the hub was read, and never changed the text
    return recipe


def upgrade_override(path: Path, value: Node) -> tuple[Path, Node]:
    """Return the path and the value of an override KEY=VALUE under the names of today."""
    new = KEYS.get(".".join(path[:2]))
    if new is not None:
        _warn(value, ".".join(path[:2]), new)
        path = (*new.split("."), *path[2:])
    nested = value
    for key in reversed(path):
        nested = Node({key: nested}, value.where)
    nested = upgrade(nested, warn=True)
    for key in path:
        assert isinstance(nested.value, dict)
        nested = nested.value[key]
    return path, nested


def _mapping(recipe: Node, part: str) -> dict[str, Node]:
    """Return the keys of one part of a recipe; an empty mapping if it has none."""
    node = recipe.value.get(part) if isinstance(recipe.value, dict) else None
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _corpora(recipe: Node) -> Iterator[dict[str, Node]]:
    corpora = _mapping(recipe, "data").get("corpora")
    if corpora is not None and isinstance(corpora.value, list):
        yield from (corpus.value for corpus in corpora.value if isinstance(corpus.value, dict))


def _warn(node: Node, old: str, new: str) -> None:
    warnings.warn(f"{node.where}: {old} is now called {new}; the old name still works", RenamedWarning, stacklevel=2)
