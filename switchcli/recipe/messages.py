"""Turn pydantic's errors into messages for users: location, dotted key, rule, value and fix.

A spec's own rule is the ValueError of its validator. If its message starts with a key of that spec, as in
"steps (0) must be ...", the location is that of a key in the message which the recipe states: one that an override
sets, else one in the file itself, else one in a file that it extends, and among these the first. A dotted word is a
key, and so is one before a value in parentheses. A ValueError with several arguments holds several rules.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from switchcli.recipe import foreign_words
from switchcli.recipe.foreign_words import SIMILAR
from switchcli.recipe.schema_walk import Path, SchemaNode, key_names
from switchcli.recipe.yaml_nodes import Node, display_key
from switchcli.system import credentials

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


def error_lines(error: ValidationError, tree: Node, schema: type[BaseModel]) -> list[str]:
    """Return one line for each error of `tree` as a value of `schema`, in the order of the schema."""
    lines: dict[tuple[str, str], str] = {}
    errors, root = error.errors(include_url=False), SchemaNode.root(schema)
    misspelt = {key for details in errors if (key := _meant_key(details, root))}
    for details in errors[:_MAX_ERRORS]:
        if details["type"] == "missing" and root.find(details["loc"]).path in misspelt:
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
        return "; ".join(details["ctx"]["error"].args)
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


def _explain(details: ErrorDetails, tree: Node, schema: type[BaseModel]) -> Iterator[tuple[Path, str]]:
    """Yield the path and the line of each rule that an error of pydantic reports."""
    node = SchemaNode.root(schema).find(details["loc"])
    path, error_type = node.path, details["type"]
    if error_type == "value_error":
        yield from _explain_own_rules(details["ctx"]["error"].args, node, tree)
        return
    if error_type == "extra_forbidden":
        rule = _unknown_key(details["loc"], schema)
    elif error_type in ("union_tag_invalid", "union_tag_not_found"):
        rule = _kind_rule(node.kinds, details)
        path = (*path, "kind")
    else:
        rule = _value_rule(details, node, tree)
    line = _located(tree, path, f"{dotted(path)}: {rule}")
    yield path, UnknownKey(line) if error_type == "extra_forbidden" else line


def _explain_own_rules(rules: Sequence[str], node: SchemaNode, tree: Node) -> Iterator[tuple[Path, str]]:
    """Yield the path and the line of each rule of a spec's validator."""
    fields = set(node.keys)
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
        yield path, _located(tree, path, f"{prefix if node.path else ''}{rule}")


def _value_rule(details: ErrorDetails, node: SchemaNode, tree: Node) -> str:
    """Return the rule for a value of the wrong type or range, with the value and a fix."""
    error_type = details["type"]
    rule = _rule(details)
    if error_type == "missing":
        return f"{rule}: add it, as {dotted(node.path)}=VALUE on the command line or in the recipe"
    value = details["input"]
    if error_type == "literal_error":
        choices = [str(choice) for choice in node.choices]
        word = foreign_words.translated(str(value), {dotted(node.path)})
        fix = f". Did you mean {word.partition('=')[2]}?" if word else _did_you_mean(str(value), choices)
    else:
        key = f"{dotted(node.path)}=" if _where(tree, node.path).startswith("override ") else ""
        needs_list = error_type in ("tuple_type", "list_type")
        hint = _list_hint(node.item, value, key) if needs_list else _rewrite_hint(error_type, value)
        fix = hint or _share_hint(error_type, node, value, tree) or _default_hint(node, details["loc"], tree)
    return f"{rule} (got {display_value(value)}){fix}"


def _rewrite_hint(error_type: str, value: Any) -> str | None:
    """Return how to write the value that `value`, which has the wrong type, seems to mean, or None."""
    if error_type == "bool_type" and isinstance(value, str) and value.lower() in _BOOLEANS:
        return f"; YAML 1.2 reads {value} as text: write {_BOOLEANS[value.lower()]}"
    if error_type in ("int_type", "float_type", "float_parsing") and isinstance(value, str):
        digits = value.replace("_", "").replace(",", "").strip()
        is_number = re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", digits)
        return f"; write {digits}" if is_number else None
    if error_type in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if error_type == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; put it in quotes: '{value}'"
    return None


def _list_hint(item: SchemaNode | None, value: Any, key: str) -> str | None:
    """Return the advice to put a value into brackets, or None if it cannot be an item of the list that is needed.

    `key` comes before the value on the command line: `tasks=`.
    """
    is_mapping = item is not None and bool(item.mappings)
    # A plain value may stand for a mapping, as the name of a task does.
    takes_plain = item is None or any("properties" not in part for part in item.parts)
    if isinstance(value, dict) and is_mapping:
        return f"; put it in brackets: {key}[{{...}}]"
    if isinstance(value, str) and item and "paths" in item.keys:
        return f"; for files: {key}[{{kind: files, paths: [{value if _PLAIN.fullmatch(value) else '...'}]}}]"
    if isinstance(value, str | int | float) and takes_plain:
        return f"; put it in brackets: {key}[{value if _PLAIN.fullmatch(str(value)) else '...'}]"
    return None


def _share_hint(error_type: str, node: SchemaNode, value: Any, tree: Node) -> str | None:
    """Return the number for a value that is a share, such as 5% or 0.05 of the steps, or None if it is none."""
    percent = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]*)?) ?%", value) if isinstance(value, str) else None
    share = float(percent[1]) / 100 if percent else value if isinstance(value, float) and 0 < value < 1 else None
    if share is None:
        return None
    if error_type == "float_type":
        return f"; write {share:g}"
    steps = tree.stated("train.steps")
    if not isinstance(steps, int) or not str(node.path[-1]).endswith("steps") or node.path == ("train", "steps"):
        return None
    return f"; write {max(1, round(share * steps))} for {share:.4g} of train.steps ({steps})"


def _default_hint(node: SchemaNode, location: Path, tree: Node) -> str:
    """Return the advice to leave out the key at `location`, with the value that it then has.

    That is the value of a lower layer, else the default; "" if the key is required.
    """
    if node.path[-1:] != location[-1:]:
        return ""
    stated, is_stated = _lookup(tree, node.path)
    inherited = stated.below if is_stated else None
    if inherited is not None and inherited.value != {}:
        return f"; leave it out to inherit {display_value(inherited.value)} ({inherited.where})"
    if "default" not in node.schema:
        return ""
    default = node.schema["default"]
    text = f", {display_value(default)}" if isinstance(default, str | int | float | None) else ""
    return f"; leave it out for the default{text}"


def _unknown_key(location: Path, schema: type[BaseModel]) -> str:
    """Return the message for a key, the last one of `location`, that its mapping does not have.

    It suggests, in this order: the key for a word of another tool, a very similar key of the mapping, another kind that
    has the key, a very similar key anywhere, a similar key of the mapping.
    """
    root, key, names = SchemaNode.root(schema), str(location[-1]), key_names(schema)
    node = root.find(location[:-1])
    if word := foreign_words.translated(key, names):
        return f"no such key. Did you mean {word}?"
    if suggestion := _did_you_mean(key, node.keys, cutoff=SIMILAR):
        return f"no such key{suggestion}"
    if kinds := root.find(node.path).having(key).kinds:
        return f"no such key for this kind; it belongs to kind: {' or '.join(kinds)}"
    if name := foreign_words.nearest(key, names):
        return f"no such key. Did you mean {name}?"
    return f"no such key{_did_you_mean(key, node.keys) or '; the keys are ' + ', '.join(node.keys)}"


def _meant_key(details: ErrorDetails, root: SchemaNode) -> Path | None:
    """Return the path of the key for which an unknown key of the same mapping is a misspelling, or None."""
    if details["type"] != "extra_forbidden":
        return None
    node = root.find(details["loc"][:-1])
    close = difflib.get_close_matches(str(details["loc"][-1]), node.keys, n=1, cutoff=SIMILAR)
    return (*node.path, close[0]) if close else None


def _kind_rule(kinds: Sequence[str], details: ErrorDetails) -> str:
    """Return the message for a choice whose `kind` is missing or unknown."""
    value = details["input"].get("kind") if isinstance(details["input"], dict) else None
    allowed = f"one of {', '.join(kinds)}" if len(kinds) > 1 else kinds[0]
    if details["type"] == "union_tag_not_found":
        keys = [str(key) for key in details["input"]] if isinstance(details["input"], dict) else []
        close = difflib.get_close_matches("kind", keys, n=1)
        typo = f"; {close[0]}: no such key. Did you mean kind?" if close else ""
        return f"missing; it is {allowed}{typo}"
    return f"must be {allowed} (got {display_value(value)}){_did_you_mean(str(value), kinds)}"


def _did_you_mean(word: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f". Did you mean {close[0]}?" if close else ""


def _located(tree: Node, path: Path, rule: str) -> str:
    """Return a rule behind the file and the line of its key. The rule alone tells which override breaks it."""
    where = _where(tree, path)
    return rule if where.startswith("override ") else f"{where}: {rule}"


def _where(tree: Node, path: Path) -> str:
    return _lookup(tree, path)[0].where


def _nearness(tree: Node, path: Path) -> int:
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


def _lookup(tree: Node, path: Path) -> tuple[Node, bool]:
    """Return the node at `path` and True, or its nearest ancestor that the recipe states and False."""
    for key in path:
        if isinstance(tree.value, dict) and key in tree.value:
            tree = tree.value[str(key)]
        elif isinstance(tree.value, list) and isinstance(key, int) and key < len(tree.value):
            tree = tree.value[key]
        else:
            return tree, False
    return tree, True
