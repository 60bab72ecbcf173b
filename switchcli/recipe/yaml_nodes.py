"""Parse YAML text to nodes that know their line, and write plain data as YAML text.

Scalars follow the core schema of YAML 1.2: `1e-4` is a number, `no` and `12:30` are text, `012` is 12. Refused are
duplicate keys, keys that are not text, and tags, which construct objects. As reading must not take long, so are nesting
beyond 32 and more than 1 MiB or 10,000 values, where an alias counts as what it stands for.

This module knows nothing about recipes: `resolve` and the schema give keys their meaning.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from switchcli.errors import RecipeError
from switchcli.system.user_files import open_regular, to_utf8

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 10_000

Scalar = str | int | float | bool | None


class Node(NamedTuple):
    """A value and its source, as messages name it: `file:line` of its key, or the override that set it."""

    value: "Scalar | list[Node] | dict[str, Node]"
    where: str
    below: "Node | None" = None
    """What a lower layer of a recipe has for the same key: the value if this one is left out."""

    def find(self, dotted: str) -> "Node | None":
        """Return the node at a dotted key, or None if there is none."""
        node: Node | None = self
        for key in dotted.split("."):
            node = node.value.get(key) if node and isinstance(node.value, dict) else None
        return node

    def stated(self, dotted: str) -> Any:
        """Return the plain value at a dotted key, or None if there is none."""
        node = self.find(dotted)
        return node and plain(node)


def _integer(text: str) -> int:
    bases = {"0x": 16, "0o": 8}
    return int(text, bases.get(text[:2], 10))


# Tag, pattern, first characters and parser of each kind of plain scalar that is not text (YAML 1.2.2, section 10.3.2).
_PLAIN_SCALARS: tuple[tuple[str, re.Pattern[str], str, Callable[[str], Scalar]], ...] = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~", lambda text: None),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text[0] in "tT"),
    # More digits are a float, infinity, which no key accepts: Python refuses to convert integers of 5,000 digits.
    ("int", re.compile(r"(?:[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400})\Z"), "-+0123456789", _integer),
    (
        "float",
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
        "-+.0123456789",
        float,
    ),
    (
        "float",
        re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
        "-+.",
        lambda text: float(text.replace(".", "")),
    ),
)


_FIXES = {
    "mapping values are not allowed here": "put a value that contains ': ' in quotes, or begin this line in the column "
    "of its neighbors",
    r"'\t'": "indent by spaces, not by tabs",
    **dict.fromkeys(
        ("expected <block end>", "expected '<document start>'"),
        "lines of one mapping or list must begin in the same column",
    ),
    "but found another document": "a recipe is one document: remove the line '---'",
    "could not find expected ':'": "a key is followed by a colon and a space",
    "undefined alias": "write an anchor (&NAME) before its alias, or put text that begins with * in quotes",
}
"""Fixes for problems that the YAML parser reports, by a part of its message."""


def plain(node: Node) -> Any:
    """Return the value of `node` as dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def nest(path: Sequence[str], value: Node) -> Node:
    """Return the tree that has `value` at `path` and nothing else."""
    for key in reversed(path):
        value = Node({key: value}, value.where)
    return value


def display_path(path: Path) -> str:
    """Return `path` as messages show it: relative to the current folder if it is inside."""
    resolved, current = path.resolve(), Path.cwd()
    return display_key(str(resolved.relative_to(current) if resolved.is_relative_to(current) else path))


def read_file(path: Path) -> Node:
    """Return the root node of the YAML file at `path`.

    Raises:
        RecipeError: `file:line: ...` if it cannot be read or is not valid YAML for a recipe.
    """
    name = display_path(path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    return read_bytes(data, name)


def read_bytes(data: bytes, name: str) -> Node:
    """Return the root node of the YAML in `data`, which messages call `name`. Raises RecipeError like `read_file`."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{name}: more than the {MAX_BYTES} bytes that a recipe may have: is it a recipe?")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fix = f"save the file as UTF-8, for example with {to_utf8(data)}"
        raise RecipeError(f"{name}:{line}: byte {error.start} is not UTF-8: {fix}") from error
    return read(text, lambda line: f"{name}:{line}")


def read(text: str, where: Callable[[int], str]) -> Node:
    """Return the root node of YAML `text`. `where` returns the source of a line, counted from 1, for messages.

    Raises:
        RecipeError: `where(line): ...` if the text is not YAML or uses a feature that is refused.
    """
    try:
        _refuse(text, where)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return _node(root, where, itertools.count(1)) if root else Node(None, where(1))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{where(line)}: the character {chr(error.character)!r} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem).split())
        fix = next((fix for start, fix in _FIXES.items() if start in problem), "")
        problem += f": {fix}" if fix else ""
        raise RecipeError(f"{where(mark.line + 1 if mark else 1)}: not YAML: {problem}") from error
    except (ValueError, OverflowError) as error:  # PyYAML passes "\U00110000" to chr
        raise RecipeError(f"{where(1)}: not YAML: an escape names no character ({error})") from error


def _refuse(text: str, where: Callable[[int], str]) -> None:
    """Raise RecipeError for a tag, and for text beyond the bounds, before it is composed: that would take long."""
    depth = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        source = where(_line(event))
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            depth += isinstance(event, yaml.CollectionStartEvent)
            values += 1
            if event.tag is not None:
                raise RecipeError(f"{source}: tags ({event.tag}) are not allowed: remove it")
        _check_bounds(depth, values, source)


def _check_bounds(depth: int, values: int, source: str) -> None:
    if depth > MAX_DEPTH:
        raise RecipeError(f"{source}: nested more than {MAX_DEPTH} deep")
    if values > MAX_VALUES:
        raise RecipeError(
            f"{source}: more than the {MAX_VALUES} keys and values that a recipe may have: is it a recipe?"
        )


def _node(node: yaml.Node, where: Callable[[int], str], values: Iterator[int], depth: int = 0) -> Node:
    """Return a node with its aliases expanded. `values` counts keys and values."""
    source = where(_line(node))
    depth += not isinstance(node, yaml.ScalarNode)
    _check_bounds(depth, next(values), source)
    if isinstance(node, yaml.MappingNode):
        return Node(_mapping(node, where, values, depth), source)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(child, where, values, depth) for child in node.value], source)
    assert isinstance(node, yaml.ScalarNode)
    return Node(_scalar(node, source), source)


def _mapping(node: yaml.MappingNode, where: Callable[[int], str], values: Iterator[int], depth: int) -> dict[str, Node]:
    children: dict[str, Node] = {}
    for name, child in node.value:
        source = where(_line(name))
        key = _scalar(name, source) if isinstance(name, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise RecipeError(f"{source}: a key must be text: put it in quotes")
        if key in children:
            first = children[key].where
            raise RecipeError(f"{source}: {display_key(key)}: given twice, first at {first}: remove one")
        next(values)
        children[key] = _node(child, where, values, depth)._replace(where=source)
    return children


def _scalar(node: yaml.ScalarNode, source: str) -> Scalar:
    text = str(node.value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecipeError(f"{source}: half a surrogate pair is not a character: write the character itself")
    if node.style is not None:  # quoted or block: text
        return text
    for _, pattern, _, parse in _PLAIN_SCALARS:
        if pattern.match(text):
            return parse(text)
    return text


def _line(item: yaml.Event | yaml.Node) -> int:
    assert item.start_mark is not None
    return item.start_mark.line + 1


def display_key(key: str | int) -> str:
    """Return `key` as messages show it: on one line, without control characters."""
    text = str(key)
    return text if text and text.isprintable() else repr(text)


class _Dumper(yaml.SafeDumper):
    """A dumper whose output `read` parses to an equal value: it quotes text that would be read as a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML looks up patterns by the first character of a scalar. That of an empty scalar, which is null, is "".
for _tag, _pattern, _first_characters, _ in _PLAIN_SCALARS:
    _keys = [*_first_characters, *([""] if _tag == "null" else [])]
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _keys)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # By default PyYAML writes U+0085 and U+2028 as line breaks, which are read back as other characters.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)


def write(data: Any, in_one_line: bool = False) -> str:
    """Return YAML text of dicts, lists and scalars, in order. `read` gives an equal value, floats bit for bit."""
    style: dict[str, Any] = {"default_flow_style": True, "width": math.inf} if in_one_line else {"width": 100}
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
