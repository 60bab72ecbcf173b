"""What pydantic found wrong, in a user's words: where it was said, the dotted key, the rule, the value, the way out.

A spec's own rule is the ValueError of its validator. When its message starts with a key of that spec, as in
"steps (0) must be ...", the line is that key's; when the recipe leaves that key out, the line is that of the first
dotted key in the message which it states. An error of several arguments is several rules.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from switchcli import credentials
from switchcli.recipe.yaml_nodes import Node, display_key

Keys = tuple[str | int, ...]
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
_MOST = 100  # things wrong of one recipe that are told
_WORDS: Mapping[str, str] = MappingProxyType(
    {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
)


class _Place(NamedTuple):
    """A place of the schema: the specs that may stand there (several are told apart by `kind`), and the path to it."""

    models: Models
    annotation: Any
    path: Keys


def error_lines(error: ValidationError, tree: Node, schema: type[BaseModel]) -> list[str]:
    """One line for each thing wrong with `tree` as a value of `schema`, in the order of the schema."""
    found: dict[tuple[str, str], str] = {}
    errors = error.errors(include_url=False)
    for details in errors[:_MOST]:
        if details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]:
            continue  # pydantic counts the items that are right, and each that is wrong has a line of its own
        for path, line in _explained(details, tree, schema):
            # Of a union without kinds pydantic reports each member; the first rule is enough.
            found.setdefault((dotted(path), "" if details["type"] != "value_error" else line), line)
    more = len(errors) - _MOST
    return [*found.values(), *([f"and {more:,} more"] if more > 0 else [])]


def dotted(path: Sequence[str | int]) -> str:
    """`path` as a recipe's user writes it: `data.corpora.0.path`."""
    return ".".join(display_key(key) for key in path)


def display_value(value: Any) -> str:
    """`value` as YAML shows it, shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and credentials.find_credentials(value):
        return credentials.HIDDEN
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _explained(details: ErrorDetails, tree: Node, schema: type[BaseModel]) -> Iterator[tuple[Keys, str]]:
    place = _find(schema, details["loc"])
    path, kind = place.path, details["type"]
    if kind == "value_error":
        yield from _own_rules(details["ctx"]["error"].args, place, tree)
        return
    if kind == "extra_forbidden":
        rule = _unknown_key(_find(schema, details["loc"][:-1]), str(path[-1]), schema)
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        rule = _kind_rule(place.models, details)
        path = (*path, "kind")
    else:
        rule = _value_rule(details, place, schema)
    yield path, f"{_where(tree, path)}: {dotted(path)}: {rule}"


def _own_rules(rules: Sequence[str], place: _Place, tree: Node) -> Iterator[tuple[Keys, str]]:
    fields = {name for model in place.models for name in model.model_fields}
    for rule in rules:
        named = [tuple(keys.split(".")) for keys in re.findall(r"^[a-z_]\w*(?:\.\w+)*|\b[a-z_]\w*+(?:\.\w+)+", rule)]
        about = [(*place.path, *keys) for keys in named if keys[0] in fields]
        starts_with_key = bool(about) and rule.startswith(dotted(about[0][len(place.path) :]))
        path = next((path for path in about if _said(tree, path)[1]), about[0]) if starts_with_key else place.path
        prefix = dotted(place.path) + ("." if starts_with_key else ": ") if place.path else ""
        yield path, f"{_where(tree, path)}: {prefix}{rule}"


def _value_rule(details: ErrorDetails, place: _Place, schema: type[BaseModel]) -> str:
    kind = details["type"]
    ours = _RULES[kind].format(**details.get("ctx", {})) if kind in _RULES else None
    rule = ours or re.sub(r"^\w+ should", "must", details["msg"])
    if kind == "missing":
        return f"{rule}: add it, as {dotted(place.path)}=VALUE on the command line or in the recipe"
    value = details["input"]
    if kind == "literal_error":
        way_out = _did_you_mean(str(value), [str(choice) for choice in _choices(place.annotation)])
    else:
        way_out = _rewritten(kind, value) or _leave_out(schema, details["loc"])
    return f"{rule} (got {display_value(value)}){way_out}"


def _rewritten(kind: str, value: Any) -> str | None:
    """How to write what `value`, which is of the wrong type, seems to mean."""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in _WORDS:
        return f"; YAML 1.2 reads {value} as text: write {_WORDS[value.lower()]}"
    if kind in ("int_type", "float_type", "float_parsing") and isinstance(value, str) and _bare(value):
        return f"; write {_bare(value)}"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; put it in quotes: '{value}'"
    return None


def _bare(value: str) -> str | None:
    """The number that quoted or grouped digits mean, if they do."""
    digits = value.replace("_", "").replace(",", "").strip()
    return digits if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", digits) else None


def _leave_out(schema: type[BaseModel], location: Keys) -> str:
    """The way out by the default of the key at `location`, if it has one."""
    parent = _find(schema, location[:-1])
    field = parent.models[0].model_fields.get(str(location[-1])) if parent.models else None
    if field is None or field.is_required():
        return ""
    shown = f", {display_value(field.default)}" if isinstance(field.default, str | int | float | None) else ""
    return f"; leave it out for the default{shown}"


def _unknown_key(place: _Place, key: str, schema: type[BaseModel]) -> str:
    here = [name for model in place.models for name in model.model_fields]
    if near := _did_you_mean(key, here, cutoff=0.8):
        return f"no such key{near}"
    if kinds := _kinds([model for model in _find(schema, place.path).models if key in model.model_fields]):
        return f"no such key for this kind; it belongs to kind: {' or '.join(kinds)}"
    elsewhere = list(_keys(schema, ()))
    if close := difflib.get_close_matches(key, [str(path[-1]) for path in elsewhere], n=1, cutoff=0.8):
        least_deep = min((path for path in elsewhere if path[-1] == close[0]), key=len)
        return f"no such key. Did you mean {dotted(least_deep)}?"
    return f"no such key{_did_you_mean(key, here) or '; the keys are ' + ', '.join(here)}"


def _kind_rule(models: Models, details: ErrorDetails) -> str:
    kinds = _kinds(models)
    value = details["input"].get("kind") if isinstance(details["input"], dict) else None
    if details["type"] == "union_tag_not_found":
        given = [str(key) for key in details["input"]] if isinstance(details["input"], dict) else []
        near = difflib.get_close_matches("kind", given, n=1)
        slip = f"; {near[0]}: no such key. Did you mean kind?" if near else ""
        return f"missing; it is one of {', '.join(kinds)}{slip}"
    return f"must be one of {', '.join(kinds)} (got {display_value(value)}){_did_you_mean(str(value), kinds)}"


def _did_you_mean(word: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f". Did you mean {near[0]}?" if near else ""


def _where(tree: Node, path: Keys) -> str:
    return _said(tree, path)[0].where


def _said(tree: Node, path: Keys) -> tuple[Node, bool]:
    """The node at `path`, or the nearest one above it that the recipe states; and whether it is the one at `path`."""
    for key in path:
        if isinstance(tree.value, dict) and key in tree.value:
            tree = tree.value[str(key)]
        elif isinstance(tree.value, list) and isinstance(key, int) and key < len(tree.value):
            tree = tree.value[key]
        else:
            return tree, False
    return tree, True


def _find(schema: type[BaseModel], location: Keys) -> _Place:
    """The place at pydantic's `location`, which names the kind wherever it chose by one; the path leaves it out."""
    place = _Place((schema,), schema, ())
    for key in location:
        if len(place.models) > 1 and key in _kinds(place.models):
            place = place._replace(models=tuple(model for model in place.models if key in _kinds([model])))
        elif place.models:
            field = place.models[0].model_fields.get(str(key))
            place = _at(field.annotation if field else None, (*place.path, key))
        elif get_origin(place.annotation) is tuple:
            place = _at(get_args(place.annotation)[0], (*place.path, key))
    return place


def _at(annotation: Any, path: Keys) -> _Place:
    """The place of a value of type `annotation`: through Annotated, and through None in a union."""
    if get_origin(annotation) is Annotated:
        return _at(get_args(annotation)[0], path)
    members: tuple[Any, ...] = (annotation,)
    if get_origin(annotation) in (Union, UnionType):
        members = tuple(member for member in get_args(annotation) if member is not type(None))
    models = tuple(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return _Place(models, members[0], path)


def _keys(model: type[BaseModel], path: Keys) -> Iterator[Keys]:
    """The path of every key of `model`, through every kind; the first item stands for those of a list."""
    for name, field in model.model_fields.items():
        place = _at(field.annotation, (*path, name))
        yield place.path
        if get_origin(place.annotation) is tuple:
            place = _at(get_args(place.annotation)[0], (*place.path, 0))
        for member in place.models:
            yield from _keys(member, place.path)


def _kinds(models: Sequence[type[BaseModel]]) -> list[str]:
    return [kind for model in models for kind in _choices(model.model_fields["kind"].annotation)]


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()
