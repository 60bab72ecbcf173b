"""Turn pydantic's errors into messages for users: location, dotted key, rule, value and fix.

A spec's own rule is the ValueError of its validator. If its message starts with a key of that spec, as in
"steps (0) must be ...", the location is that of a key in the message which the recipe states: one that an override
sets, else one in the file itself, else one in a file that it extends, and among these the first. A dotted word is a
key, and so is one before a value in parentheses. A ValueError with several arguments holds several rules.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from switchcli.recipe import foreign_words
from switchcli.recipe.foreign_words import PRECISIONS
from switchcli.recipe.yaml_nodes import Node, display_key
from switchcli.system import credentials

Keys = tuple[str | int, ...]
"""The path of a value in a recipe: keys of mappings and positions in lists."""
Models = tuple[type[BaseModel], ...]

_RULES: Mapping[str, str] = MappingProxyType(
    {
        "missing": "missing",
        "int_type": "must be an integer",
        "int_from_float": "must be an integer",
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
        "dict_type": "must be a mapping of keys",
        "model_type": "must be a mapping of keys",
        "model_attributes_type": "must be a mapping of keys",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "too_short": "must have at least {min_length} items",
    }
)
"""Our text for the rule of each error type of pydantic."""
_VERY_SIMILAR = 0.8
"""Similarity, of difflib, from which an unknown key is taken for a misspelling of another one."""
_MAX_ERRORS = 100
"""Maximum number of errors of one recipe that are reported."""
_PLAIN = re.compile(r"[\w./*, -]{1,60}", re.ASCII)
"""Values that a message repeats as they are."""
_BOOLEANS: Mapping[str, str] = MappingProxyType(
    {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
)
"""Booleans of YAML 1.1, which YAML 1.2 reads as text."""


class UnknownKey(str):
    """The line of an error about a key that the schema does not have."""

    __slots__ = ()


class _SchemaNode(NamedTuple):
    """A position in the schema: the specs allowed there (several for a choice by `kind`), its annotation and path."""

    models: Models
    annotation: Any
    path: Keys


def error_lines(error: ValidationError, tree: Node, schema: type[BaseModel]) -> list[str]:
    """Return one line for each error of `tree` as a value of `schema`, in the order of the schema."""
    lines: dict[tuple[str, str], str] = {}
    errors = error.errors(include_url=False)
    misspelt = {key for details in errors if (key := _meant_key(details, schema))}
    for details in errors[:_MAX_ERRORS]:
        if details["type"] == "missing" and _schema_node(schema, details["loc"]).path in misspelt:
            continue  # the line of the misspelt key suggests it
        if details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]:
            continue  # pydantic counts only the valid items of a list, and each invalid one has a line of its own
        for path, line in _explain(details, tree, schema):
            # pydantic reports every member of a union without kinds; the first rule of a key is enough.
            lines.setdefault((dotted(path), "" if details["type"] != "value_error" else line), line)
    omitted = len(errors) - _MAX_ERRORS
    return [*lines.values(), *([f"and {omitted:,} more"] if omitted > 0 else [])]


def plain_lines(error: ValidationError) -> list[str]:
    """Return one line for each error of values that are no recipe, such as the arguments of a function."""
    return [_plain_line(details) for details in error.errors(include_url=False)]


def _plain_line(details: ErrorDetails) -> str:
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    return f"{dotted(details['loc'])}: {_rule(details)} (got {display_value(details['input'])})"


def _rule(details: ErrorDetails) -> str:
    """Return the rule that a value of the wrong type or range breaks."""
    if details["type"] in _RULES:
        return _RULES[details["type"]].format(**details.get("ctx", {}))
    return re.sub(r"^\w+ should", "must", details["msg"])


def dotted(path: Sequence[str | int]) -> str:
    """Return `path` as users write it in an override: `data.corpora.0.path`."""
    return ".".join(display_key(key) for key in path)


def display_value(value: Any) -> str:
    """Return `value` as it looks in YAML, shortened. Credentials are hidden."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and credentials.find_credentials(value):
        return credentials.HIDDEN
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(details: ErrorDetails, tree: Node, schema: type[BaseModel]) -> Iterator[tuple[Keys, str]]:
    """Yield the path and the line of each rule that an error of pydantic reports."""
    node = _schema_node(schema, details["loc"])
    path, error_type = node.path, details["type"]
    if error_type == "value_error":
        yield from _explain_own_rules(details["ctx"]["error"].args, node, tree)
        return
    if error_type == "extra_forbidden":
        rule = _unknown_key(_schema_node(schema, details["loc"][:-1]), str(path[-1]), details["input"], schema)
    elif error_type in ("union_tag_invalid", "union_tag_not_found"):
        rule = _kind_rule(node.models, details)
        path = (*path, "kind")
    else:
        rule = _value_rule(details, node, schema, is_override=_where(tree, path).startswith("override "))
    line = f"{_where(tree, path)}: {dotted(path)}: {rule}"
    yield path, UnknownKey(line) if error_type == "extra_forbidden" else line


def _explain_own_rules(rules: Sequence[str], node: _SchemaNode, tree: Node) -> Iterator[tuple[Keys, str]]:
    """Yield the path and the line of each rule of a spec's validator."""
    fields = set(_keys_of(node.models))
    for rule in rules:
        # A key at the start of the message, dotted or not, and dotted keys and keys with a value anywhere.
        matches = re.findall(r"^[a-z_]\w*(?:\.\w+)*|\b[a-z_]\w*+(?:\.\w+)+|\b[a-z_]\w*+(?= \()", rule)
        candidates = [tuple(match.split(".")) for match in matches]
        mentioned = [keys for keys in candidates if keys[0] in fields]
        path, prefix = node.path, f"{dotted(node.path)}: "
        if mentioned and rule.startswith(dotted(mentioned[0])):
            paths = [(*node.path, *keys) for keys in mentioned]
            stated = [path for path in paths if _lookup(tree, path)[1]]
            path = max(stated, key=lambda path: _nearness(tree, path), default=paths[0])
            prefix = f"{dotted(node.path)}."
        yield path, f"{_where(tree, path)}: {prefix if node.path else ''}{rule}"


def _value_rule(details: ErrorDetails, node: _SchemaNode, schema: type[BaseModel], is_override: bool) -> str:
    """Return the rule for a value of the wrong type or range, with the value and a fix."""
    error_type = details["type"]
    rule = _rule(details)
    if error_type == "missing":
        return f"{rule}: add it, as {dotted(node.path)}=VALUE on the command line or in the recipe"
    value = details["input"]
    if error_type == "literal_error":
        choices = [str(choice) for choice in _choices(node.annotation)]
        meant = PRECISIONS.get(display_value(value).strip("'").lower())
        fix = f". Did you mean {meant}?" if meant in choices else _did_you_mean(str(value), choices)
    else:
        key = f"{dotted(node.path)}=" if is_override else ""
        needs_list = error_type in ("tuple_type", "list_type")
        hint = _list_hint(node.annotation, value, key) if needs_list else _rewrite_hint(error_type, value)
        fix = hint or _default_hint(schema, details["loc"])
    return f"{rule} (got {display_value(value)}){fix}"


def _rewrite_hint(error_type: str, value: Any) -> str | None:
    """Return how to write the value that `value`, which has the wrong type, seems to mean, or None."""
    if error_type == "bool_type" and isinstance(value, str) and value.lower() in _BOOLEANS:
        return f"; YAML 1.2 reads {value} as text: write {_BOOLEANS[value.lower()]}"
    if error_type in ("int_type", "float_type", "float_parsing") and isinstance(value, str):
        number = _plain_number(value)
        return f"; write {number}" if number else None
    if error_type in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if error_type == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; put it in quotes: '{value}'"
    return None


def _list_hint(annotation: Any, value: Any, key: str) -> str | None:
    """Return the advice to put a value into brackets, or None if it cannot be an item of the list that is needed.

    `key` comes before the value on the command line: `tasks=`.
    """
    item = next(iter(get_args(annotation)), None)
    is_mapping = bool(_annotated_node(item, ()).models)
    # A plain value stands for a mapping where a validator expands it.
    takes_plain = not is_mapping or any(isinstance(rule, BeforeValidator) for rule in get_args(item)[1:])
    if isinstance(value, dict) and is_mapping:
        return f"; put it in brackets: {key}[{{...}}]"
    if isinstance(value, str | int | float) and takes_plain:
        return f"; put it in brackets: {key}[{value if _PLAIN.fullmatch(str(value)) else '...'}]"
    return None


def _plain_number(value: str) -> str | None:
    """Return the number in a text without quotes, commas and underscores, or None if the text is not a number."""
    digits = value.replace("_", "").replace(",", "").strip()
    return digits if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", digits) else None


def _default_hint(schema: type[BaseModel], location: Keys) -> str:
    """Return the advice to leave out the key at `location`, with its default; "" if the key is required."""
    parent = _schema_node(schema, location[:-1])
    field = parent.models[0].model_fields.get(str(location[-1])) if parent.models else None
    if field is None or field.is_required():
        return ""
    default = f", {display_value(field.default)}" if isinstance(field.default, str | int | float | None) else ""
    return f"; leave it out for the default{default}"


def _unknown_key(node: _SchemaNode, key: str, value: Any, schema: type[BaseModel]) -> str:
    """Return the message for a key that `node` does not have.

    It suggests, in this order: a very similar key of `node`, another kind that has the key, the key for a word of
    another tool, a very similar key anywhere, a similar key of `node`.
    """
    siblings = _keys_of(node.models)
    if suggestion := _did_you_mean(key, siblings, cutoff=_VERY_SIMILAR):
        return f"no such key{suggestion}"
    all_kinds = _schema_node(schema, node.path).models
    if kinds := _kinds([model for model in all_kinds if key in model.model_fields]):
        return f"no such key for this kind; it belongs to kind: {' or '.join(kinds)}"
    all_paths = list(_all_keys(schema, ()))
    names = {dotted(path) for path in all_paths}
    path = dotted((*node.path, key))
    word = path if path in foreign_words.WORDS else key
    known = foreign_words.hint(word, display_value(value).strip("'"), names)
    if known and word in foreign_words.WORDS:
        return f"no such key: use {known}"
    if close := difflib.get_close_matches(key, [str(path[-1]) for path in all_paths], n=1, cutoff=_VERY_SIMILAR):
        shortest = min((path for path in all_paths if path[-1] == close[0]), key=len)
        return f"no such key. Did you mean {dotted(shortest)}?"
    if known:
        return f"no such key: use {known}"
    return f"no such key{_did_you_mean(key, siblings) or '; the keys are ' + ', '.join(siblings)}"


def _meant_key(details: ErrorDetails, schema: type[BaseModel]) -> Keys | None:
    """Return the path of the key for which an unknown key of the same mapping is a misspelling, or None."""
    if details["type"] != "extra_forbidden":
        return None
    node = _schema_node(schema, details["loc"][:-1])
    siblings = _keys_of(node.models)
    close = difflib.get_close_matches(str(details["loc"][-1]), siblings, n=1, cutoff=_VERY_SIMILAR)
    return (*node.path, close[0]) if close else None


def _kind_rule(models: Models, details: ErrorDetails) -> str:
    """Return the message for a choice whose `kind` is missing or unknown."""
    kinds = _kinds(models)
    value = details["input"].get("kind") if isinstance(details["input"], dict) else None
    if details["type"] == "union_tag_not_found":
        keys = [str(key) for key in details["input"]] if isinstance(details["input"], dict) else []
        close = difflib.get_close_matches("kind", keys, n=1)
        typo = f"; {close[0]}: no such key. Did you mean kind?" if close else ""
        return f"missing; it is one of {', '.join(kinds)}{typo}"
    return f"must be one of {', '.join(kinds)} (got {display_value(value)}){_did_you_mean(str(value), kinds)}"


def _did_you_mean(word: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f". Did you mean {close[0]}?" if close else ""


def _where(tree: Node, path: Keys) -> str:
    return _lookup(tree, path)[0].where


def _nearness(tree: Node, path: Keys) -> int:
    """Return how near to the user a key is set: 2 by an override, 1 in the file itself, 0 in one that it extends."""
    where = _where(tree, path)
    if where.startswith("override "):
        return 2
    return int(where.rpartition(":")[0] == tree.where.rpartition(":")[0])


def in_line_order(lines: Sequence[str]) -> list[str]:
    """Return error lines by the line of their file; those of files in the order of the files, then all others."""
    places = [re.match(r"(?!override )(.+?):([0-9]+): ", line) for line in lines]
    files = list(dict.fromkeys(place[1] for place in places if place))
    keys = [(files.index(place[1]), int(place[2])) if place else (len(files), 0) for place in places]
    return [line for _, line in sorted(zip(keys, lines, strict=True), key=lambda item: item[0])]


def _lookup(tree: Node, path: Keys) -> tuple[Node, bool]:
    """Return the node at `path` and True, or its nearest ancestor that the recipe states and False."""
    for key in path:
        if isinstance(tree.value, dict) and key in tree.value:
            tree = tree.value[str(key)]
        elif isinstance(tree.value, list) and isinstance(key, int) and key < len(tree.value):
            tree = tree.value[key]
        else:
            return tree, False
    return tree, True


def _schema_node(schema: type[BaseModel], location: Keys) -> _SchemaNode:
    """Return the schema node at pydantic's `location`, which, unlike the node's path, also names each chosen kind."""
    node = _SchemaNode((schema,), schema, ())
    for key in location:
        if len(node.models) > 1 and key in _kinds(node.models):
            node = node._replace(models=tuple(model for model in node.models if key in _kinds([model])))
        elif node.models:
            field = node.models[0].model_fields.get(str(key))
            node = _annotated_node(field.annotation if field else None, (*node.path, key))
        elif get_origin(node.annotation) is tuple:
            node = _annotated_node(get_args(node.annotation)[0], (*node.path, key))
    return node


def _annotated_node(annotation: Any, path: Keys) -> _SchemaNode:
    """Return the schema node of a value with this annotation. Annotated and a union with None are unwrapped."""
    if get_origin(annotation) is Annotated:
        return _annotated_node(get_args(annotation)[0], path)
    members: tuple[Any, ...] = (annotation,)
    if get_origin(annotation) in (Union, UnionType):
        members = tuple(member for member in get_args(annotation) if member is not type(None))
        if len(members) == 1:
            return _annotated_node(members[0], path)
    models = tuple(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return _SchemaNode(models, members[0], path)


def _all_keys(model: type[BaseModel], path: Keys) -> Iterator[Keys]:
    """Yield the path of every key of `model`, in all kinds. Keys of list items have the position 0."""
    for name, field in model.model_fields.items():
        node = _annotated_node(field.annotation, (*path, name))
        yield node.path
        if get_origin(node.annotation) is tuple:
            node = _annotated_node(get_args(node.annotation)[0], (*node.path, 0))
        for member in node.models:
            yield from _all_keys(member, node.path)


def _keys_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in model.model_fields]


def _kinds(models: Sequence[type[BaseModel]]) -> list[str]:
    return [kind for model in models for kind in _choices(model.model_fields["kind"].annotation)]


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()
