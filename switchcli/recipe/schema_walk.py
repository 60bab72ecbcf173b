"""The walk through the schema of a recipe: its keys with type, choices, default and meaning, and the node at a path.

It reads the JSON Schema that pydantic makes of a spec. Error messages walk when there is an error, and the index of all
keys (`key_index`) when it is asked for.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, Self

from pydantic import BaseModel

from switchcli.recipe.key_info import KeyInfo

Schema = Mapping[str, Any]
"""A JSON Schema, or a part of one."""
Path = tuple[str | int, ...]
"""The path of a value in a recipe: keys of mappings and positions in lists."""

_LARGEST_BOUND = 1000
"""Upper bounds beyond this one only stop typing errors (`spec.MAX_SIZE`): they are not part of a type in words."""


class SchemaNode(NamedTuple):
    """A value of a recipe: what it may be, by the schema.

    Example: the node of `optimizer` has two parts, the mappings of the kinds adafactor and adamw. In the location of an
    error, ("optimizer", "adamw", "beta1"), pydantic names the kind. `find` takes that part, and returns a node with the
    path ("optimizer", "beta1").
    """

    schema: Schema
    """What its mapping says of it, with `default` and `description` where it has these; {} for an unknown key."""
    parts: tuple[Schema, ...]
    """What it may be: one for a number, three for a choice among three kinds."""
    definitions: Mapping[str, Schema]
    """The `$defs` of the root."""
    path: Path = ()
    is_chosen: bool = False
    """Whether `parts` are those of one kind."""

    @classmethod
    def root(cls, spec: type[BaseModel]) -> Self:
        schema = _json_schema(spec)
        return cls(schema, (schema,), schema.get("$defs", {}))

    def _node(self, schema: Schema, path: Path) -> "SchemaNode":
        return SchemaNode(schema, tuple(_parts(schema, self.definitions)), self.definitions, path)

    @property
    def mappings(self) -> tuple[Schema, ...]:
        """The mappings with known keys that the value may be."""
        return tuple(part for part in self.parts if "properties" in part)

    @property
    def keys(self) -> list[str]:
        return [name for mapping in self.mappings for name in mapping["properties"]]

    @property
    def kinds(self) -> list[str]:
        """The kinds of the mappings that the value may be."""
        return [kind for mapping in self.mappings for kind in _kinds(mapping)]

    @property
    def is_choice(self) -> bool:
        """Whether pydantic names a kind next, as it does for a union by `kind`."""
        alternatives = [part for part in self.parts if part.get("type") != "null"]
        return bool(self.kinds) and len(alternatives) > 1 and not self.is_chosen

    @property
    def choices(self) -> list[str]:
        """The words that the value may be."""
        return [word for part in self.parts for word in _words(part)]

    @property
    def item(self) -> "SchemaNode | None":
        """The first item, if the value may be a list."""
        lists = [part["items"] for part in self.parts if "items" in part]
        return self._node(lists[0], (*self.path, 0)) if lists else None

    def of_kind(self, kind: str | int) -> "SchemaNode":
        """Return the node with the mapping of one kind.

        The name of a task stands for a mapping of a kind that no user writes and the schema hides: all mappings remain.
        """
        found = tuple(mapping for mapping in self.mappings if kind in _kinds(mapping))
        return self._replace(parts=found or self.mappings, is_chosen=True)

    def having(self, key: str) -> "SchemaNode":
        """Return the node with those mappings only that have a key."""
        return self._replace(parts=tuple(mapping for mapping in self.mappings if key in mapping["properties"]))

    def child(self, key: str | int) -> "SchemaNode":
        """Return the node of a key of the value, which may be unknown."""
        schemas = [mapping["properties"][key] for mapping in self.mappings if key in mapping["properties"]]
        path = (*self.path, key)
        return self._node(schemas[0], path) if schemas else SchemaNode({}, (), self.definitions, path)

    def find(self, location: Path) -> "SchemaNode":
        """Return the node at pydantic's `location`, which also names the kind of each choice, or at its own path."""
        node = self
        for key in location:
            if node.is_choice and (key in node.kinds or key not in node.keys):
                node = node.of_kind(key)
            elif node.mappings:
                node = node.child(key)
            elif isinstance(key, int) and node.item is not None:
                node = node.item._replace(path=(*node.path, key))
            # Otherwise pydantic names a type that was tried, or a key that users choose: the node stays.
        return node

    def infos(self) -> Iterator[KeyInfo]:
        """Yield the meanings of every key below this node, without their verbs."""
        yield from self._infos([(mapping, "") for mapping in self.mappings], "", ())

    def _infos(self, members: list[tuple[Schema, str]], prefix: str, when: tuple[str, ...]) -> Iterator[KeyInfo]:
        """Yield the keys of the mappings that a value may be. What several of them agree in is yielded once.

        A member is a mapping with the condition for it: `optimizer.kind=adamw`.
        """
        for name in dict.fromkeys(name for mapping, _ in members for name in mapping["properties"]):
            if name == "kind" and len(members) > 1:
                continue  # `_infos_below` yields it
            owners: dict[KeyInfo, list[tuple[Schema, str]]] = {}
            for mapping, condition in members:
                if name in mapping["properties"]:
                    is_required = name in mapping.get("required", ())
                    info = self._info(f"{prefix}{name}", mapping["properties"][name], is_required)
                    owners.setdefault(info, []).append((mapping, condition))
            for info, group in owners.items():
                conditions = when if len(group) == len(members) else tuple(condition for _, condition in group)
                yield info._replace(when=conditions)
                yield from self._infos_below(info.key, group[0][0]["properties"][name], conditions)

    def _infos_below(self, key: str, schema: Schema, when: tuple[str, ...]) -> Iterator[KeyInfo]:
        """Yield the keys below one. Of a choice by `kind` that key comes first, with the meaning of each kind."""
        if "same_as" in schema:
            return  # the keys of another one, which are described there
        node = self._node(schema, ())
        below, path = (node.item, f"{key}[]") if node.item else (node, key)
        members = [(mapping, "") for mapping in below.mappings]
        if len(members) > 1:
            meanings = [_description(mapping["properties"]["kind"]) for mapping, _ in members]
            default = (schema.get("default") or {}).get("kind") if below is node else None
            yield KeyInfo(f"{path}.kind", (), "choice", tuple(below.kinds), default, " ".join(meanings), when)
            members = [(mapping, f"{path}.kind={_kinds(mapping)[0]}") for mapping in below.mappings]
        yield from self._infos(members, f"{path}.", when)

    def _info(self, key: str, schema: Schema, is_required: bool) -> KeyInfo:
        node = self._node(schema, ())
        choices = tuple(dict.fromkeys([*node.choices, *(node.item.choices if node.item else ())]))
        # The kind of an item of a list selects its schema: there is no default to take.
        default = None if is_required or "[].kind" in key else _yaml(schema["default"], node)
        return KeyInfo(key, (), _type(node), choices, default, _description(schema))


def _description(schema: Schema) -> str:
    """Return what a schema says of itself, in one line."""
    return " ".join(schema.get("description", "").split())


@cache
def key_names(spec: type[BaseModel]) -> tuple[str, ...]:
    """Return every dotted key of a spec, in all kinds. The item of a list has the position 0."""
    return tuple(info.key.replace("[]", ".0") for info in SchemaNode.root(spec).infos())


@cache
def _json_schema(spec: type[BaseModel]) -> Schema:
    return spec.model_json_schema()  # takes as long as reading three recipes


def _parts(schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[Schema]:
    """Yield the alternatives of a value, in their order, without `$ref`."""
    if "$ref" in schema:
        yield definitions[schema["$ref"].rpartition("/")[2]]
    elif alternatives := schema.get("anyOf") or schema.get("oneOf"):
        for alternative in alternatives:
            yield from _parts(alternative, definitions)
    else:
        yield schema


def _words(part: Schema) -> list[Any]:
    return part.get("enum") or ([part["const"]] if "const" in part else [])


def _kinds(mapping: Schema) -> list[str]:
    return _words(mapping["properties"].get("kind", {}))


# In words


def _type(node: SchemaNode, plural: bool = False) -> str:
    """Return a type in words, such as `integer (at least 1)` or `list of numbers`."""
    return " or ".join(dict.fromkeys(_type_of_part(part, node, plural) for part in node.parts))


def _type_of_part(part: Schema, node: SchemaNode, plural: bool) -> str:
    if _words(part):
        return "choices" if plural else "choice"
    if part.get("format") == "path-or-url":
        return "paths" if plural else "path"
    if part["type"] == "array" and node.item is not None:
        return f"list of {_type(node.item, plural=True)}"
    kind: str = part["type"]
    name = {"boolean": "true or false", "object": "mapping", "string": "text"}.get(kind, kind)
    return (f"{name}s" if plural and name in ("integer", "number", "mapping") else name) + _bounds(part)


def _bounds(part: Schema) -> str:
    """Return the bounds of a number, in parentheses, as they follow its type."""
    words = []
    if "minimum" in part:
        words.append(f"at least {part['minimum']:g}")
    if "exclusiveMinimum" in part:
        words.append(f"above {part['exclusiveMinimum']:g}")
    if part.get("maximum", _LARGEST_BOUND) < _LARGEST_BOUND:
        words.append(f"at most {part['maximum']:g}")
    if part.get("exclusiveMaximum", _LARGEST_BOUND) < _LARGEST_BOUND:
        words.append(f"below {part['exclusiveMaximum']:g}")
    if "multipleOf" in part:
        words.append(f"a multiple of {part['multipleOf']}")
    return f" ({' and '.join(words)})" if words else ""


def _yaml(value: Any, node: SchemaNode) -> str:
    """Return a default as a recipe states it. Of a mapping, only its kind and what differs from its defaults."""
    if isinstance(value, Mapping):
        mappings = (node.of_kind(value["kind"]) if "kind" in value else node).mappings
        fields = mappings[0]["properties"] if mappings else {}
        changed = {
            name: item
            for name, item in value.items()
            # A number in place of `auto` was filled in by the schema.
            if name == "kind" or fields[name].get("default") not in (item, "auto")
        }
        rest = sorted(changed, key=lambda name: name != "kind")
        return "{" + ", ".join(f"{name}: {_yaml(changed[name], node._node(fields[name], ()))}" for name in rest) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item, node.item or node) for item in value) + "]"
    if isinstance(value, float):
        return re.sub(r"e([-+])0*", r"e\1", f"{value:g}").replace("e+", "e")
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        return value
    return json.dumps(value)
