"""Old names of recipe keys and values, which are still read and replaced by the current names.

A recipe file or an override that uses an old name causes a warning with the new one. The recipe that a run saved causes
none: its user did not write it.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from switchcli.errors import RecipeError, RenamedWarning
from switchcli.recipe.yaml_nodes import Node, nest

KeyPath = tuple[str, ...]

KEYS: Mapping[str, str] = MappingProxyType(
    {
        "data.span_corruption": "data.objective",
        "data.lanes": "data.stream_shards",
        "parallel.wire": "parallel.comm_dtype",
        "distill.answers": "distill.cache",
        "student.unfit": "student.on_shape_mismatch",
        "model.router.renormalise": "model.router.renormalize",
        "model.decoder_router.renormalise": "model.decoder_router.renormalize",
    }
)
"""Old dotted keys, and their current names, which differ in the last part only."""

VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "student.kind": {"fresh": "random_init"},
        "student.experts": {"fresh": "random_init"},
        "student.on_shape_mismatch": {"refuse": "error", "fresh": "random_init"},
    }
)
"""For each current key, old values and their current names. Applied after `KEYS`."""


def upgrade(recipe: Node, warn: bool) -> Node:
    """Replace old names in one layer of a recipe, in place, and return it.

    Raises:
        RecipeError: a key is given under both its old and its new name.
    """
    for old, new in KEYS.items():
        *parents, key = old.split(".")
        keys = _mapping(recipe, parents)
        if key not in keys:
            continue
        renamed = new.rpartition(".")[2]
        if renamed in keys:
            raise RecipeError(f"{keys[key].where}: {old}: the old name of {new}, which is given too: leave {old} out")
        keys[renamed] = keys.pop(key)
        if warn:
            _warn(keys[renamed], old, new)
    for dotted, values in VALUES.items():
        *parents, key = dotted.split(".")
        keys = _mapping(recipe, parents)
        node = keys.get(key)
        if node is not None and isinstance(node.value, str) and node.value in values:
            keys[key] = node._replace(value=values[node.value])
            if warn:
                _warn(node, f"{dotted}: {node.value}", values[node.value])
    if not warn:
        for corpus in _corpora(recipe):
            corpus.pop("streaming", None)  # a removed key: how a hub corpus was read, which never changed the text
    return recipe


def upgrade_override(path: KeyPath, value: Node) -> tuple[KeyPath, Node]:
    """Return the path and the value of an override KEY=VALUE with old names replaced."""
    for old, new in KEYS.items():
        depth = old.count(".") + 1
        if ".".join(path[:depth]) == old:
            _warn(value, old, new)
            path = (*new.split("."), *path[depth:])
    node = upgrade(nest(path, value), warn=True)
    for key in path:
        assert isinstance(node.value, dict)
        node = node.value[key]
    return path, node


def _mapping(recipe: Node, path: Sequence[str]) -> dict[str, Node]:
    """Return the keys of the mapping at `path`, such as `model.router`, or an empty mapping if the recipe has none."""
    node: Node | None = recipe
    for key in path:
        node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _corpora(recipe: Node) -> Iterator[dict[str, Node]]:
    corpora = _mapping(recipe, ["data"]).get("corpora")
    if corpora is not None and isinstance(corpora.value, list):
        yield from (corpus.value for corpus in corpora.value if isinstance(corpus.value, dict))


def _warn(node: Node, old: str, new: str) -> None:
    warnings.warn(f"{node.where}: {old} is now called {new}; the old name still works", RenamedWarning, stacklevel=2)
