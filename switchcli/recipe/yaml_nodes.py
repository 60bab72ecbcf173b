"""YAML text to nodes that know their line, and plain data to YAML text.

Scalars are read by the core schema of YAML 1.2: `1e-4` is a number, `no` and `12:30` are text, `012` is 12. Refused,
because a recipe needs none of them and each has hidden a mistake or an attack: aliases, anchors, tags, merge keys, keys
that are not text, a key given twice, a second document, nesting beyond 32, more than 1 MiB or 10,000 values (reading
them would take long), bytes that are not UTF-8.

This file knows nothing of recipes: what the keys mean is for `resolve` and the schema.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from switchcli.errors import RecipeError
from switchcli.user_files import open_regular

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_DIGITS = 1000

Scalar = str | int | float | bool | None


class Node(NamedTuple):
    """A value, and the place that a message about it names: `file:line` of its key, or the override that set it."""

    value: "Scalar | list[Node] | dict[str, Node]"
    where: str


def _integer(text: str) -> int:
    bases = {"0x": 16, "0o": 8}
    return int(text, bases.get(text[:2], 10))


# Tag, pattern, first characters and reader of each plain scalar that is not text (YAML 1.2.2, section 10.3.2).
_PLAIN: tuple[tuple[str, re.Pattern[str], str, Callable[[str], Scalar]], ...] = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~", lambda text: None),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text[0] in "tT"),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789", _integer),
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


def plain(node: Node) -> Any:
    """The value of `node` as dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def display_path(path: Path) -> str:
    """`path` as a message names it: from the current folder when it lies within."""
    resolved, here = path.resolve(), Path.cwd()
    return display_key(str(resolved.relative_to(here) if resolved.is_relative_to(here) else path))


def read_file(path: Path) -> Node:
    """The YAML file at `path`.

    Raises:
        RecipeError: `file:line: ...` when it cannot be read, or is not the YAML of a recipe.
    """
    name = display_path(path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    return read_bytes(data, name)


def read_bytes(data: bytes, name: str) -> Node:
    """The YAML in the content of a file, which messages call `name`. Raises RecipeError as `read_file`."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{name}: more than the {MAX_BYTES} bytes that a recipe may have: is it a recipe?")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}:{line}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    return read(text, lambda line: f"{name}:{line}")


def read(text: str, where: Callable[[int], str]) -> Node:
    """The value of YAML `text`; `where` turns a line, counted from 1, into the place that messages name.

    Raises:
        RecipeError: `where(line): ...` for what the module refuses.
    """
    try:
        _refuse(text, where)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return _node(root, where) if root else Node(None, where(1))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{where(line)}: the character {chr(error.character)!r} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem).split())
        raise RecipeError(f"{where(mark.line + 1 if mark else 1)}: not YAML: {problem}") from error
    except (ValueError, OverflowError) as error:  # PyYAML passes "\U00110000" to chr
        raise RecipeError(f"{where(1)}: not YAML: an escape names no character ({error})") from error


def _refuse(text: str, where: Callable[[int], str]) -> None:
    """Raise RecipeError for what no recipe may hold. Events come one at a time: a bomb is refused before it unpacks."""
    depth = documents = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        rule = None
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                rule = "a second document: a recipe is one; remove the line '---' above"
        elif isinstance(event, yaml.AliasEvent):
            rule = f"aliases (*{event.anchor}) are not allowed: write the value out"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            depth += isinstance(event, yaml.CollectionStartEvent)
            values += 1
            if event.anchor is not None:
                rule = f"anchors (&{event.anchor}) are not allowed: remove it"
            elif event.tag is not None:
                rule = f"tags ({event.tag}) are not allowed: remove it"
            elif depth > MAX_DEPTH:
                rule = f"nested more than {MAX_DEPTH} deep"
            elif values > MAX_VALUES:
                rule = f"more than the {MAX_VALUES} keys and values that a recipe may have: is it a recipe?"
        if rule:
            raise RecipeError(f"{where(_line(event))}: {rule}")


def _node(node: yaml.Node, where: Callable[[int], str]) -> Node:
    here = where(_line(node))
    if isinstance(node, yaml.MappingNode):
        return Node(_mapping(node, where), here)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(child, where) for child in node.value], here)
    assert isinstance(node, yaml.ScalarNode)
    return Node(_scalar(node, here), here)


def _mapping(node: yaml.MappingNode, where: Callable[[int], str]) -> dict[str, Node]:
    children: dict[str, Node] = {}
    for name, child in node.value:
        here = where(_line(name))
        key = _scalar(name, here) if isinstance(name, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise RecipeError(f"{here}: a key must be text: put it in quotes")
        if key == "<<":
            raise RecipeError(f"{here}: merge keys (<<) are not allowed: write the keys out, or use extends")
        if key in children:
            first = children[key].where
            raise RecipeError(f"{here}: {display_key(key)}: given twice, first at {first}: remove one")
        children[key] = _node(child, where)._replace(where=here)
    return children


def _scalar(node: yaml.ScalarNode, here: str) -> Scalar:
    text = str(node.value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecipeError(f"{here}: half a surrogate pair is no character: write the character itself")
    if node.style is not None:  # quoted or block: text
        return text
    for tag, pattern, _, convert in _PLAIN:
        if pattern.match(text):
            if tag == "int" and len(text) > MAX_DIGITS:
                raise RecipeError(f"{here}: an integer of more than {MAX_DIGITS} digits: is a digit stuck?")
            return convert(text)
    return text


def _line(place: yaml.Event | yaml.Node) -> int:
    assert place.start_mark is not None
    return place.start_mark.line + 1


def display_key(key: str | int) -> str:
    """`key` as a message shows it: on one line, without control characters."""
    text = str(key)
    return text if text and text.isprintable() else repr(text)


class _Dumper(yaml.SafeDumper):
    """Writes so that `read` gives the same value again: text is quoted where the core schema would see a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first, _ in _PLAIN:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, [*_first] + [""] * (_tag == "null"))


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # Left to itself PyYAML writes U+0085 and U+2028 as line breaks, which read back as others.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)


def write(data: Any) -> str:
    """YAML text of dicts, lists and scalars in the order given; `read` gives it back equal, floats to the last bit."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
