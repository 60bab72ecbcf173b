"""The index of recipe keys, made from the JSON Schemas of the recipes: the content of switchcli/recipe/keys.json."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from switchcli.recipe.key_index import VERBS, KeyInfo
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, EvalRecipe, FinetuneRecipe, PretrainRecipe
from switchcli.recipe.sizes import CUSTOM, SIZES
from switchcli.spec import Spec
from switchcli.tasks.registry import METRICS, SUITES, TASKS

Schema = Mapping[str, Any]

ON_TEXT, ON_TASKS = "distill on text", "distill on tasks"
RECIPES: Mapping[str, type[Spec]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    ON_TEXT: DistillTextRecipe,
    ON_TASKS: DistillTasksRecipe,
    "eval": EvalRecipe,
}
EXTENDS = KeyInfo(
    "extends",
    VERBS,
    "path or text",
    (),
    "null",
    "The recipe that this one changes: a file, relative to this one, or the name of a recipe that ships. Only in a "
    "file, not on the command line.",
)
"""The one key that no schema has: it is gone before a recipe is validated."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "verb": VERBS,
    "model.size": (CUSTOM, *SIZES),
    "tasks": (*TASKS, *SUITES),
    "tasks[].metrics": tuple(METRICS),
}
"""Choices that the type of a key does not say."""
DEFAULTS = {"verb": "the verb of the command", "model.decoder_router.kind": "switch"}
"""Defaults that the schema does not say."""
LARGEST_BOUND = 1000
"""Upper bounds beyond this one only stop typing errors (`spec.MAX_SIZE`): they are not part of a type in words."""


class Member(NamedTuple):
    """A mapping that a value may be, and the condition for it, such as `optimizer.kind=adamw`."""

    properties: Mapping[str, Schema]
    required: Sequence[str]
    condition: str | None = None


def key_index() -> tuple[KeyInfo, ...]:
    """Return every meaning of every recipe key of every verb, in the order of the recipes."""
    verbs: dict[KeyInfo, list[str]] = {}
    for verb, recipe in RECIPES.items():
        schema = recipe.model_json_schema()
        walk = _Walk(schema["$defs"])
        for info in walk.keys_of([walk.member(schema)], "", ()):
            verbs.setdefault(info, []).append(verb)
    infos = [EXTENDS, *(info._replace(verbs=_short(names)) for info, names in verbs.items())]
    first = {info.key: place for place, info in reversed([*enumerate(infos)])}
    top = {_top(info.key): place for place, info in reversed([*enumerate(infos)])}
    return tuple(sorted(infos, key=lambda info: (top[_top(info.key)], first[info.key])))


def as_json(infos: Sequence[KeyInfo]) -> str:
    """Return the text of keys.json, with one line for each meaning of a key."""
    rows = [json.dumps(info._asdict(), ensure_ascii=False) for info in infos]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _top(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


def _short(verbs: list[str]) -> tuple[str, ...]:
    """Return verbs with one name for distillation where both of its forms are meant."""
    if ON_TEXT in verbs and ON_TASKS in verbs:
        verbs = ["distill" if verb == ON_TEXT else verb for verb in verbs if verb != ON_TASKS]
    return tuple(verbs)


class _Walk:
    """A walk through one JSON Schema. `definitions` are its `$defs`."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def member(self, schema: Schema, condition: str | None = None) -> Member:
        return Member(schema["properties"], schema.get("required", ()), condition)

    def keys_of(self, members: Sequence[Member], prefix: str, when: tuple[str, ...]) -> Iterator[KeyInfo]:
        """Yield the keys of the mappings that a value may be. What several of them agree in is yielded once."""
        for name in dict.fromkeys(name for member in members for name in member.properties):
            if name == "kind" and len(members) > 1:
                continue  # `_keys_below` yields it
            owners: dict[KeyInfo, list[Member]] = {}
            for member in members:
                if name in member.properties:
                    info = self._info(f"{prefix}{name}", member.properties[name], name in member.required)
                    owners.setdefault(info, []).append(member)
            for info, group in owners.items():
                everywhere = len(group) == len(members)
                condition = when if everywhere else tuple(str(member.condition) for member in group)
                yield info._replace(when=condition)
                yield from self._keys_below(info.key, group[0].properties[name], condition)

    def _keys_below(self, key: str, schema: Schema, when: tuple[str, ...]) -> Iterator[KeyInfo]:
        """Yield the keys below one. Of a choice by `kind` that key comes first, with the meaning of each kind."""
        mappings, is_list = self._mappings(schema)
        path = f"{key}[]" if is_list else key
        members = [self.member(mapping) for mapping in mappings]
        if len(members) > 1:
            kinds = [member.properties["kind"]["const"] for member in members]
            meaning = " ".join(member.properties["kind"]["description"] for member in members)
            name = f"{path}.kind"
            default = DEFAULTS.get(name) or (None if is_list else schema["default"]["kind"])
            yield KeyInfo(name, (), "choice", tuple(kinds), default, meaning, when)
            members = [member._replace(condition=f"{name}={kind}") for member, kind in zip(members, kinds, strict=True)]
        yield from self.keys_of(members, f"{path}.", when)

    def _info(self, key: str, schema: Schema, required: bool) -> KeyInfo:
        choices = CHOICES.get(key) or tuple(dict.fromkeys(self._choices(schema)))
        is_required = required or "[].kind" in key  # the kind of an item of a list selects its schema
        default = DEFAULTS.get(key) or (None if is_required else self._yaml(schema["default"], schema))
        return KeyInfo(key, (), self._type(schema), choices, default, " ".join(schema.get("description", "").split()))

    def _parts(self, schema: Schema) -> list[Schema]:
        """Return the alternatives of a value, in their order, without `$ref`."""
        if "$ref" in schema:
            return [self._definitions[schema["$ref"].rpartition("/")[2]]]
        if alternatives := schema.get("anyOf") or schema.get("oneOf"):
            return [part for alternative in alternatives for part in self._parts(alternative)]
        return [schema]

    def _mappings(self, schema: Schema) -> tuple[list[Schema], bool]:
        """Return the mappings with known keys that a value, or an item of a list, may be, and whether it is a list."""
        parts = self._parts(schema)
        items = [part for outer in parts if "items" in outer for part in self._parts(outer["items"])]
        return [part for part in [*parts, *items] if "properties" in part], bool(items)

    def _choices(self, schema: Schema) -> Iterator[str]:
        """Yield the words that a value, or an item of a list, may be."""
        for part in self._parts(schema):
            if "items" in part:
                yield from self._choices(part["items"])
            yield from part.get("enum", [part["const"]] if "const" in part else [])

    def _type(self, schema: Schema, plural: bool = False) -> str:
        """Return a type in words, such as `integer (at least 1)` or `list of numbers`."""
        return " or ".join(dict.fromkeys(self._type_of_part(part, plural) for part in self._parts(schema)))

    def _type_of_part(self, part: Schema, plural: bool) -> str:
        if "enum" in part or "const" in part:
            return "choices" if plural else "choice"
        if part.get("format") == "path-or-url":
            return "paths" if plural else "path"
        if part["type"] == "array":
            return f"list of {self._type(part['items'], plural=True)}"
        name = {"boolean": "true or false", "object": "mapping", "string": "text"}.get(part["type"], part["type"])
        return (f"{name}s" if plural and name in ("integer", "number", "mapping") else name) + _bounds(part)

    def _yaml(self, value: Any, schema: Schema) -> str:
        """Return a default as a recipe states it. Of a mapping, only its kind and what differs from its defaults."""
        if isinstance(value, Mapping):
            parts, _ = self._mappings(schema)
            kinds = [part for part in parts if part["properties"].get("kind", {}).get("const") == value.get("kind")]
            fields = kinds[0]["properties"] if kinds else {}
            changed = {
                name: item
                for name, item in value.items()
                # A number in place of `auto` was filled in by the schema.
                if name == "kind" or fields[name].get("default") not in (item, "auto")
            }
            rest = sorted(changed, key=lambda name: name != "kind")
            return "{" + ", ".join(f"{name}: {self._yaml(changed[name], fields[name])}" for name in rest) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(self._yaml(item, schema) for item in value) + "]"
        if isinstance(value, float):
            return re.sub(r"e([-+])0*", r"e\1", f"{value:g}").replace("e+", "e")
        if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
            return value
        return json.dumps(value)


def _bounds(part: Schema) -> str:
    """Return the bounds of a number, in parentheses, as they follow its type."""
    words = []
    if "minimum" in part:
        words.append(f"at least {part['minimum']:g}")
    if "exclusiveMinimum" in part:
        words.append(f"above {part['exclusiveMinimum']:g}")
    if part.get("maximum", LARGEST_BOUND) < LARGEST_BOUND:
        words.append(f"at most {part['maximum']:g}")
    if part.get("exclusiveMaximum", LARGEST_BOUND) < LARGEST_BOUND:
        words.append(f"below {part['exclusiveMaximum']:g}")
    if "multipleOf" in part:
        words.append(f"a multiple of {part['multipleOf']}")
    return f" ({' and '.join(words)})" if words else ""
