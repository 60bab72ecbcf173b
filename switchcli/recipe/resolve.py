"""Resolve a recipe and its overrides into one frozen value: read, extend, override, fill the size, validate.

The layers of a recipe are the file that extends nothing, each file that extends it, and last the command line. A later
layer takes precedence:

- mappings merge key by key; lists and scalars replace;
- a mapping that states another `kind` keeps what the layers below set of the keys that its kind has too. It drops keys
  of other kinds, and defaults that mean something else to its own, which a run's recipe.yaml has;
- `model.size` fills the keys of that size in the layer that states it: above earlier layers, below the other keys of
  its own layer and later ones. A child with another size therefore gets that size, whatever keys its parent states.

The command line is one layer: the order of KEY=VALUE matters only if two set the same key, and then the last one wins.

Paths inside a recipe are not changed: they are relative to the current folder, as in a shell. Only the path after
`extends` is relative to the folder of its file, or is the name of a recipe that ships. The `description` of a recipe is
not inherited.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from switchcli.errors import RecipeError
from switchcli.recipe import library, messages, sizes, yaml_nodes
from switchcli.recipe.library import VERBS
from switchcli.recipe.yaml_nodes import Node
from switchcli.spec import AUTO, MAX_SIZE, VOCAB_SIZE, Spec, check_path_or_url

S = TypeVar("S", bound=Spec)

_VOCAB_MULTIPLE = 64
"""Embedding matrices get a multiple of this many rows, for fast matrix products and for the ranks of a model axis."""
SCHEMAS: list[type[Spec]] = []
"""The classes of recipes that are merged here. A module that defines some adds them."""


# Public functions


def resolve(name_or_path: str, overrides: Sequence[str], schema: type[S]) -> S:
    """Return the value of `schema` that a recipe and KEY=VALUE overrides define.

    Raises:
        RecipeError: one line for each error, each `file:line: key: rule (got value); fix`.
    """
    return validate(load(name_or_path, overrides), schema)


class Source(NamedTuple):
    """A recipe that has been read, and is neither merged nor validated: its files, and KEY=VALUE overrides."""

    layers: tuple[Node, ...]
    """The contents of its files. Each extends the one before."""
    overrides: tuple[str, ...]

    def overridden(self, *overrides: str) -> "Source":
        """Return the recipe with more overrides. Where two set the same key, the last one wins."""
        return self._replace(overrides=(*self.overrides, *overrides))

    def merge(self, below: Node | None = None) -> Node:
        """Return the merged recipe, not yet validated. Each node knows its source.

        `below` is a layer below all others: what a checkpoint defines for keys that the recipe leaves out.

        Raises:
            RecipeError: an override cannot be applied.
        """
        tree = _merge_layers(self.layers, below or self.layers[0]._replace(value={}))
        parsed = [_parse_override(override) for override in self.overrides]
        for path, value in parsed:
            tree = _fill_size(tree, yaml_nodes.nest(path, value))
        # Shorter paths first, and `kind` before the other keys: a mapping or a kind that comes later would replace the
        # keys that another override sets in it.
        for path, value in sorted(parsed, key=lambda item: (len(item[0]), item[0][-1] != "kind")):
            tree = _set(tree, path, value)
        return tree


def read(name_or_path: str | None, overrides: Sequence[str] = ()) -> Source:
    """Read the files of a recipe. Without a name, only overrides count.

    Raises:
        RecipeError: a file is missing or is not YAML, or its `extends` cannot be followed.
    """
    layers = (
        [layer({}, "the command line")] if name_or_path is None else library.read_layers(library.locate(name_or_path))
    )
    return Source(tuple(layers), tuple(overrides))


def load(name_or_path: str | None, overrides: Sequence[str] = (), below: Node | None = None) -> Node:
    """Return `read(name_or_path, overrides).merge(below)`."""
    return read(name_or_path, overrides).merge(below)


def parse_saved(document: bytes, where: str) -> Node:
    """Return the recipe in a checkpoint, not yet validated. No other file is read. Raises RecipeError."""
    root = yaml_nodes.read_bytes(document, where)
    if not isinstance(root.value, dict) or "extends" in root.value:
        raise RecipeError(f"{root.where}: not the recipe of a run, which is a mapping of keys and extends nothing")
    return _merge_layers([root], root._replace(value={}))


def validate(tree: Node, schema: type[S], vocab_size: int | None = None) -> S:
    """Return `tree` as a value of `schema`. Lists become tuples, and integers serve as floats; nothing else converts.

    `vocab_size` is the number for `model.vocab_size: auto`. By default it is that of the tokenizer to be trained, or
    T5's for a tokenizer in a file, which is not opened here.

    Raises:
        RecipeError: one line for each error.
    """
    check_verb(tree, schema)
    tree = _fill_vocab_size(_add_default_kinds(tree, schema), schema, vocab_size)
    size = tree.find("model.size")
    problem = sizes.size_problem(size.value) if size and isinstance(size.value, str) else None
    problems = [f"{size.where}: model.size: {problem}"] if size and problem else []
    try:
        # As JSON, because only there pydantic's strict mode accepts a list as a tuple and an integer as a float.
        value = schema.model_validate_json(json.dumps(yaml_nodes.plain(tree)))
    except ValidationError as error:
        problems += messages.error_lines(error, tree, schema)
    if problems:
        raise RecipeError(*messages.in_line_order(problems))
    return value


def unknown_keys(tree: Node, schema: type[Spec]) -> tuple[str, ...]:
    """Return one line for each key of `tree` that `schema` does not have."""
    try:
        validate(tree, schema)
    except RecipeError as error:
        return tuple(line for line in error.args if isinstance(line, messages.UnknownKey))
    return ()


def dump(spec: Spec) -> str:
    """Return YAML text of a resolved recipe with every key, in the schema's order. It resolves to an equal value.

    Raises RecipeError if the text is too large to be read again.
    """
    text = yaml_nodes.write(spec.model_dump(mode="json"))
    yaml_nodes.read(text, lambda line: f"the resolved recipe, line {line}")
    return text


def check_verb(tree: Node, schema: type[Spec]) -> None:
    """Raise RecipeError if a recipe is of another verb than `schema`: one message instead of one per unknown key."""
    verb = library.verb_of(tree)
    expected = schema.model_fields["verb"].default if "verb" in schema.model_fields else None
    if expected and verb and verb != expected and verb in VERBS:
        file, _, line = tree.where.rpartition(":")
        name = library.shipped_name(file) or file
        assert isinstance(tree.value, dict), "it tells its verb"
        foreign = (key for key in tree.value if key not in schema.model_fields)
        key = "verb" if "verb" in tree.value else next(foreign, "verb")
        where = tree.value.get(key, tree).where
        if not line.isdecimal() or where.startswith("override "):
            raise RecipeError(f"{where}: {key}: of a recipe of `switchcli {verb}`, where one of {expected} is needed")
        if expected == "eval":  # the command of that recipe would start training
            raise RecipeError(
                f"{name} is a recipe of {verb}, and one of eval has `verb: eval`: leave it out for what the checkpoint "
                "was trained on, or name other text (text.corpora=[...]) or tasks (tasks=[...])"
                + ("; a file of `verb: eval` with the tasks of this one scores them" if "tasks" in tree.value else "")
            )
        out = " --out FOLDER" if Path(name).name == "recipe.yaml" else ""  # its folder is that of another run
        raise RecipeError(
            f"{name} is a recipe of {verb}, not of {expected}: run `switchcli {verb} {shlex.quote(name)}{out}`"
        )


def stated_path(tree: Node, dotted: str) -> Any:
    """Return the path that `tree` states for a key, with `~` expanded, or None. For keys read before `validate`.

    Raises:
        RecipeError: the path breaks a rule of `switchcli.spec.PathOrUrl`, or its home folder is not known.
    """
    path = tree.stated(dotted)
    if isinstance(path, str):
        try:
            return check_path_or_url(path)
        except ValueError as error:
            raise RecipeError(f"{dotted}: {error}") from error
    return path


def override(key: str, value: Any) -> str:
    """Return the KEY=VALUE with which `load` sets a dotted key to a plain value: text, a number, a list or a mapping.

    Raises:
        TypeError: the value holds something that is no plain value.
        ValueError: the value holds a number that is not finite.
    """
    # JSON is YAML. Non-ASCII characters stay: YAML refuses the surrogate pairs of JSON's escapes.
    return f"{key}={json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)}"


def _plain(value: Any) -> int | float | str:
    """Return a scalar of NumPy, or a path, as a value of JSON. Raises TypeError for anything else."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else os.fspath(value)


def layer(values: Mapping[str, Any], where: str) -> Node:
    """Return a layer of plain values with the source `where`."""
    return Node({key: _node(value, where) for key, value in values.items()}, where)


def _node(value: Any, where: str) -> Node:
    if isinstance(value, Mapping):
        return layer(value, where)
    return Node([_node(item, where) for item in value] if isinstance(value, list) else value, where)


def has_auto_vocab_size(tree: Node) -> bool:
    """Return whether a recipe leaves `model.vocab_size` to its tokenizer."""
    model, vocab_size = tree.find("model"), tree.find("model.vocab_size")
    if vocab_size is not None:
        return vocab_size.value == AUTO
    return model is None or isinstance(model.value, dict)


def padded_vocab_size(num_pieces: int) -> int:
    """Return the rows of the embedding matrix for a tokenizer of so many pieces, by `model.vocab_size: auto`."""
    return -(-num_pieces // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _fill_vocab_size(tree: Node, schema: type[Spec], vocab_size: int | None) -> Node:
    """Return `tree` with a number in place of `model.vocab_size: auto`, if the schema has that key."""
    defaults = {name: field.default for name, field in schema.model_fields.items()}
    if getattr(defaults.get("model"), "vocab_size", None) is None or not has_auto_vocab_size(tree):
        return tree
    if vocab_size is None:
        tokenizer = getattr(defaults.get("data"), "tokenizer", None)
        num_pieces = None
        if tokenizer is not None and tree.stated("data.tokenizer.kind") in (None, tokenizer.kind):
            num_pieces = tree.stated("data.tokenizer.vocab_size") or tokenizer.vocab_size
        vocab_size = VOCAB_SIZE
        if isinstance(num_pieces, int) and 1 <= num_pieces <= MAX_SIZE:
            vocab_size = padded_vocab_size(num_pieces)
    # The model and the root keep their places, which messages name.
    return _set(tree, ("model", "vocab_size"), Node(vocab_size, "model.vocab_size: auto"))


class Difference(NamedTuple):
    """A dotted key with its values in two recipes."""

    key: str
    before: Any
    after: Any


def differences(before: Spec, after: Spec) -> list[Difference]:
    """Return the keys whose values differ, in the order of `before`. Lists of different lengths are one value."""
    return list(_differences("", before.model_dump(mode="json"), after.model_dump(mode="json")))


def _differences(path: str, before: Any, after: Any) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(f"{path}.{key}" if path else key, before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (item_before, item_after) in enumerate(zip(before, after, strict=True)):
            yield from _differences(f"{path}.{index}", item_before, item_after)
    elif before != after:
        yield Difference(path, before, after)


# Kinds


def _add_default_kinds(tree: Node, schema: type[Spec]) -> Node:
    """Return `tree` with the default's `kind` in each choice without one, as in `data.objective.inputs_length=128`."""
    for name, field in schema.model_fields.items():
        child = tree.value.get(name) if isinstance(tree.value, dict) else None
        if child and isinstance(child.value, dict) and isinstance(field.default, Spec):
            kind = getattr(field.default, "kind", None)
            if kind is None:
                child = _add_default_kinds(child, type(field.default))
            elif "kind" not in child.value:
                child = child._replace(value={**child.value, "kind": Node(kind, child.where)})
            tree = _merge(tree, Node({name: child}, tree.where))
    return tree


# Layers


def _merge_layers(layers: Sequence[Node], below: Node) -> Node:
    """Merge layers, the lowest first, over `below`."""
    tree = _merge(layers[0]._replace(value={}), below)
    for above in layers:
        tree = _merge(_fill_size(tree, above), above)
    return tree


def _merge(below: Node, above: Node, path: tuple[str, ...] = ()) -> Node:
    """Return `below` with the values of `above` over it; both are at `path`."""
    if above is below:
        return above
    if not isinstance(above.value, dict):
        return above._replace(below=below)
    below = _expand_auto(below)
    merged = dict(below.value) if isinstance(below.value, dict) else {}
    if (kind := above.stated("kind")) is not None and kind != (old := below.stated("kind")):
        merged = {key: node for key, node in merged.items() if _carries_over(node, (*path, key), old, kind)}
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node, (*path, key)) if key in merged else node
    return Node(merged, above.where)


def _carries_over(node: Node, path: tuple[str, ...], old: Any, kind: Any) -> bool:
    """Return whether a key at `path` of a mapping of the kind `old`, None for the default one, stays in one of `kind`.

    A key that no kind has stays too: `validate` names it.
    """
    *parent, key = path
    if key == "kind":
        return False
    old_kinds = [getattr(field.default, "kind", None) for _, field in _fields_at(parent)] if old is None else [old]
    fields = dict(_fields_at(path))
    after = fields.get(str(kind))  # a recipe may state anything as a kind, also a mapping
    if after is None:
        return not fields
    before = [fields[one] for one in map(str, old_kinds) if one in fields]
    if any(repr(field) == repr(after) for field in before):
        return True  # it means the same to both
    value = yaml_nodes.plain(node)
    return all(not field.is_required() and value != to_jsonable_python(field.default) for field in before)


def _fields_at(path: Sequence[str]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield each field that a path in a recipe may mean, with the kind of its mapping; "" where that has none."""
    specs: list[type[BaseModel]] = [*SCHEMAS]
    *parents, key = (part for part in path if not part.isdecimal())
    for parent in parents:
        fields = [spec.model_fields[parent] for spec in specs if parent in spec.model_fields]
        specs = [inner for field in fields for inner in _specs_in(field.annotation)]
    for spec in specs:
        if key in spec.model_fields:
            kinds = get_args(spec.model_fields["kind"].annotation) if "kind" in spec.model_fields else ("",)
            yield from ((kind, spec.model_fields[key]) for kind in kinds)


def _specs_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the specs that a value of a type, or an item of it, may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _specs_in(part)


def _expand_auto(node: Node) -> Node:
    """Return the mapping that the word `auto` stands for, over which further keys can be set; else the node."""
    return Node({AUTO: Node(True, node.where)}, node.where) if node.value == AUTO else node


def _fill_size(tree: Node, above: Node) -> Node:
    """Return `tree` with the keys of the size that `above` states over its model. `validate` reports an unknown one."""
    size = above.find("model.size")
    if size is None or not isinstance(size.value, str) or size.value not in sizes.SIZES:
        return tree
    keys: dict[str, Node] = {key: Node(value, size.where) for key, value in sizes.SIZES[size.value]._asdict().items()}
    return _merge(tree, Node({"model": Node(keys, size.where)}, tree.where))


# Overrides


def _parse_override(override: str) -> tuple[tuple[str, ...], Node]:
    """Return the path and the value of KEY=VALUE. The source names the key alone: a value may hold a secret."""
    dotted, separator, value = override.partition("=")
    where = f"override {yaml_nodes.display_key(dotted)}"
    path = tuple(dotted.split("."))
    if not separator or not all(path):
        raise RecipeError(f"{where}: must be KEY=VALUE with a dotted key, such as train.steps=1000")
    if len(path) > yaml_nodes.MAX_DEPTH:
        raise RecipeError(f"{where}: nested more than {yaml_nodes.MAX_DEPTH} deep")
    if path[0] == "extends":
        raise RecipeError(f"{where}: extends belongs in a file: name that recipe on the command line instead")
    try:
        node = yaml_nodes.read(value, lambda line: where)
    except RecipeError as error:
        if value.count("{") > value.count("}") or value.count("[") > value.count("]"):
            raise RecipeError(f"{error}. A bracket is not closed: put KEY=VALUE in quotes in the shell") from error
        raise
    return path, node


def _set(below: Node, path: Sequence[str], value: Node, parent: tuple[str, ...] = ()) -> Node:
    """Return `below`, which is at the path `parent`, with `value` merged at `path` in it."""
    if not path:
        return _merge(below, value, parent)
    key, rest = path[0], path[1:]
    if isinstance(below.value, list):
        if not (key.isascii() and key.isdecimal()) or int(key) >= len(below.value):
            rule = f"the list has {len(below.value)} items, counted from 0"
            raise RecipeError(f"{value.where}: {messages.dotted(parent)}: no item {messages.dotted((key,))}: {rule}")
        items = list(below.value)
        items[int(key)] = _set(items[int(key)], rest, value, (*parent, key))
        return below._replace(value=items)
    below = _expand_auto(below)
    if not isinstance(below.value, dict):
        below = Node({}, value.where)
    assert isinstance(below.value, dict)
    child = below.value.get(key, Node({}, value.where))
    return _merge(below, Node({key: _set(child, rest, value, (*parent, key))}, below.where), parent)
