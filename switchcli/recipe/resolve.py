"""A recipe and its overrides into one frozen value: read, extend, override, fill the size, validate.

The layers of a recipe are the file that extends nothing, each file that extends it, and last the command line. A later
layer wins:

- mappings merge key by key; lists and scalars replace;
- a mapping with another `kind` than the one beneath replaces it, for the keys of one kind mean nothing to another;
- `model.size` fills the keys of that size where it is written: over what earlier layers say, beneath what its own layer
  and later ones say. So a child that names another size gets that size, whatever its parent spelt out.

The command line is one layer: the order of KEY=VALUE matters only when two set the same key, and then the last wins.

Paths inside a recipe are left as they are: they hold from the current folder, as a shell's do. `extends` alone is read
from the folder of the file that says it, or names a recipe that ships.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from switchcli import credentials
from switchcli.errors import RecipeError
from switchcli.recipe import library, messages, renames, sizes, yaml_nodes
from switchcli.recipe.yaml_nodes import Node
from switchcli.spec import Spec, check_place

S = TypeVar("S", bound=Spec)

SAVED = "recipe.yaml"
"""The name of those that runs save: one of an earlier version goes on being read."""


def resolve(name_or_path: str, overrides: Sequence[str], schema: type[S]) -> S:
    """The value that the recipe `name_or_path` and the KEY=VALUE `overrides` make of `schema`.

    Raises:
        RecipeError: one line for each thing that is wrong, each `file:line: key: rule (got value); way out`.
    """
    return validate(load(name_or_path, overrides), schema)


def load(name_or_path: str | None, overrides: Sequence[str] = (), below: Node | None = None) -> Node:
    """The merged recipe, not yet validated; each node knows where it was said. Without a name: the overrides alone.

    `below` is a layer beneath all others: what a checkpoint says of the keys that the recipe leaves out.

    Raises:
        RecipeError: a file is missing or is not YAML, an `extends` or an override cannot be followed.
    """
    layers = [layer({}, "the command line")] if name_or_path is None else _files(library.locate(name_or_path))
    return _overridden(_layered(layers, below or layers[0]._replace(value={})), overrides)


def parse_saved(document: bytes, where: str) -> Node:
    """The recipe that lies in a checkpoint, not yet validated: no other file is read for it. Raises RecipeError."""
    root = yaml_nodes.read_bytes(document, where)
    if not isinstance(root.value, dict) or "extends" in root.value:
        raise RecipeError(f"{root.where}: not the recipe of a run, which is a mapping of keys and extends nothing")
    return _layered([renames.upgrade(root, warn=False)], root._replace(value={}))


def _layered(layers: Sequence[Node], below: Node) -> Node:
    tree = _merge(layers[0]._replace(value={}), below)
    for above in layers:
        tree = _merge(_with_size(tree, _size(above)), above)
    return tree


def validate(tree: Node, schema: type[S]) -> S:
    """`tree` as a value of `schema`. Lists become tuples and integers serve as floats; nothing else is converted.

    Raises:
        RecipeError: one line for each thing that is wrong.
    """
    check_verb(tree, schema)
    tree = _with_kinds(tree, schema)
    size = _size(tree)
    problem = sizes.size_problem(size.value) if size and isinstance(size.value, str) else None
    problems = [f"{size.where}: model.size: {problem}"] if size and problem else []
    try:
        # As JSON, for there alone pydantic's strict mode takes a list as a tuple and an integer as a float.
        value = schema.model_validate_json(json.dumps(yaml_nodes.plain(tree)))
    except ValidationError as error:
        problems += messages.error_lines(error, tree, schema)
    if problems:
        raise RecipeError(*problems)
    return value


def dump(spec: Spec) -> str:
    """YAML text of a resolved recipe: every key, in the schema's order. Resolving it again gives an equal value.

    Raises RecipeError for one too large to be read again.
    """
    written = yaml_nodes.write(spec.model_dump(mode="json"))
    yaml_nodes.read(written, lambda line: f"the whole recipe, line {line}")
    return written


def verb_of(tree: Node) -> str | None:
    """The verb that a recipe is of: the one that it states, else the one whose keys it has; None if it may be any."""
    if (said := stated(tree, "verb")) is not None:
        return str(said)
    if stated(tree, "distill") is not None or stated(tree, "student") is not None:
        return "distill"
    if stated(tree, "train") is None:
        return None
    return "pretrain" if stated(tree, "tasks") is None else "finetune"


def check_verb(tree: Node, schema: type[Spec]) -> None:
    """Raise RecipeError for a recipe of another verb, rather than a list of keys that this one does not have."""
    verb, own = verb_of(tree), schema.model_fields["verb"].default if "verb" in schema.model_fields else None
    if own and verb and verb != own and verb in _verbs(Spec):
        place = tree.value["verb"] if isinstance(tree.value, dict) and "verb" in tree.value else tree
        raise RecipeError(f"{place.where}: verb: a recipe of `switchcli {verb}`, where one of {own} is needed")


def _verbs(spec: type[Spec]) -> Iterator[str]:
    """Yield the verbs that take a recipe: the values that the subclasses of `spec` have for the key `verb`."""
    for schema in spec.__subclasses__():
        if "verb" in schema.model_fields:
            yield schema.model_fields["verb"].default
        yield from _verbs(schema)


def _with_kinds(tree: Node, schema: type[Spec]) -> Node:
    """`tree` with the default's `kind` wherever a choice is set without one: `data.objective.inputs_length=128`."""
    for name, field in schema.model_fields.items():
        said = tree.value.get(name) if isinstance(tree.value, dict) else None
        if said and isinstance(said.value, dict) and isinstance(field.default, Spec):
            kind = getattr(field.default, "kind", None)
            if kind is None:
                said = _with_kinds(said, type(field.default))
            elif "kind" not in said.value:
                said = said._replace(value={**said.value, "kind": Node(kind, said.where)})
            tree = _merge(tree, Node({name: said}, tree.where))
    return tree


def stated(tree: Node, dotted: str) -> Any:
    """The value that `tree` states for a key, None where it states none."""
    for key in dotted.split("."):
        value = tree.value.get(key) if isinstance(tree.value, dict) else None
        if value is None:
            return None
        tree = value
    return yaml_nodes.plain(tree)


def stated_place(tree: Node, dotted: str) -> Any:
    """The path that `tree` states for a key, None where it states none; for keys that are read before `validate`.

    Raises:
        RecipeError: it is none, as `switchcli.spec.Place` says.
    """
    place = stated(tree, dotted)
    if isinstance(place, str):
        try:
            check_place(place)
        except ValueError as error:
            raise RecipeError(f"{dotted}: {error}") from error
    return place


def layer(values: Mapping[str, Any], where: str) -> Node:
    """A layer of plain values, said at `where`."""
    return Node({key: _node(value, where) for key, value in values.items()}, where)


def _node(value: Any, where: str) -> Node:
    if isinstance(value, Mapping):
        return layer(value, where)
    return Node([_node(item, where) for item in value] if isinstance(value, list) else value, where)


def _files(path: Path) -> list[Node]:
    """The file at `path` behind those it extends, the oldest first, without their `extends`."""
    layers: list[Node] = []
    seen = {path.resolve()}
    while True:
        root = yaml_nodes.read_file(path)
        if not isinstance(root.value, dict):
            raise RecipeError(f"{root.where}: a recipe is a mapping of keys, such as `model: {{size: tiny}}`")
        layers.insert(0, renames.upgrade(root, warn=path.name != SAVED))
        extends = root.value.pop("extends", None)
        if extends is None:
            return layers
        if not isinstance(extends.value, str):
            raise RecipeError(f"{extends.where}: extends: must be the path of one recipe; there can be only one")
        try:
            path = library.locate(extends.value, beside=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{extends.where}: extends: {error}") from error
        if path.resolve() in seen:
            raise RecipeError(f"{extends.where}: extends: a circle: {yaml_nodes.display_path(path)} extends this file")
        seen.add(path.resolve())


def _overridden(tree: Node, overrides: Sequence[str]) -> Node:
    """`tree` with the KEY=VALUE `overrides` over it."""
    parsed = [_override(override) for override in overrides]
    for path, value in parsed:
        tree = _with_size(tree, _size(_nested(path, value)))
    # The whole before its parts and `kind` before its other keys, so that neither wipes out what was said of a part.
    for path, value in sorted(parsed, key=lambda item: (len(item[0]), item[0][-1] != "kind")):
        tree = _set(tree, path, value)
    return tree


def _override(override: str) -> tuple[tuple[str, ...], Node]:
    dotted, separator, value = override.partition("=")
    said = f"{dotted}={credentials.HIDDEN}" if credentials.find_credentials(value) else credentials.redact(override)
    where = f"override {said!r}"
    path = tuple(dotted.split("."))
    if not separator or not all(path):
        raise RecipeError(f"{where}: must be KEY=VALUE with a dotted key, such as train.steps=1000")
    if len(path) > yaml_nodes.MAX_DEPTH:
        raise RecipeError(f"{where}: nested more than {yaml_nodes.MAX_DEPTH} deep")
    if path[0] == "extends":
        raise RecipeError(f"{where}: extends belongs in a file: name that recipe on the command line instead")
    return renames.upgrade_override(path, yaml_nodes.read(value, lambda line: where))


def _nested(path: Sequence[str], value: Node) -> Node:
    for key in reversed(path):
        value = Node({key: value}, value.where)
    return value


def _set(below: Node, path: Sequence[str], value: Node, done: tuple[str, ...] = ()) -> Node:
    """`below` with `value` at `path`; `done` is the path to `below`. A mapping as the value merges."""
    if not path:
        return _merge(below, value)
    key, rest = path[0], path[1:]
    if isinstance(below.value, list):
        if not (key.isascii() and key.isdecimal()) or int(key) >= len(below.value):
            rule = f"the list has {len(below.value)} items, counted from 0"
            raise RecipeError(f"{value.where}: {messages.dotted(done)}: no item {messages.dotted((key,))}: {rule}")
        items = list(below.value)
        items[int(key)] = _set(items[int(key)], rest, value, (*done, key))
        return below._replace(value=items)
    if not isinstance(below.value, dict):
        below = Node({}, value.where)
    assert isinstance(below.value, dict)
    child = below.value.get(key, Node(None, value.where))
    return _merge(below, Node({key: _set(child, rest, value, (*done, key))}, below.where))


def _with_size(tree: Node, size: Node | None) -> Node:
    """`tree` with the keys of `size` over its model. An unknown size is left for `validate`."""
    if size is None or not isinstance(size.value, str) or size.value not in sizes.SIZES:
        return tree
    keys: dict[str, Node] = {key: Node(value, size.where) for key, value in sizes.SIZES[size.value]._asdict().items()}
    return _merge(tree, Node({"model": Node(keys, size.where)}, tree.where))


def _size(tree: Node) -> Node | None:
    model = tree.value.get("model") if isinstance(tree.value, dict) else None
    return model.value.get("size") if model and isinstance(model.value, dict) else None


def _merge(below: Node, above: Node) -> Node:
    if not isinstance(above.value, dict):
        return above
    under = below.value if isinstance(below.value, dict) else {}
    if "kind" in under and "kind" in above.value and under["kind"].value != above.value["kind"].value:
        under = {}
    merged = dict(under)
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, above.where)
