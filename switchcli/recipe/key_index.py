"""The index of all recipe keys, read from keys.json without torch: for `recipes explain`, completion and the docs.

`scripts/docs --reference` writes keys.json from the specs. A test compares the two.
"""

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("keys.json")
VERBS = ("pretrain", "finetune", "distill", "eval")
"""The verbs that have recipes. Each writes a result.json."""


class KeyInfo(NamedTuple):
    """One meaning of a recipe key. A key that differs between kinds or verbs has several."""

    key: str
    """The dotted key, such as `train.steps`. `[]` stands for the position in a list: `data.corpora[].weight`."""
    verbs: tuple[str, ...]
    """The verbs whose recipes have the key: `pretrain`, `finetune`, `distill`, `eval`. A key that only one form of
    distillation has is of the verb `distill on text` or `distill on tasks`."""
    type: str
    """The type in words, with the bounds of a number: `integer (at least 1)`."""
    choices: tuple[str, ...]
    """All values that are words, if these are limited; a number or null may be possible beside them (see `type`)."""
    default: str | None
    """The default as YAML. None: the key is required."""
    description: str
    """The meaning of the key, in one line."""
    when: tuple[str, ...] = ()
    """Values of a `kind`, such as `optimizer.kind=adamw`: the key exists with any one of these. Empty: always."""


@cache
def all_keys() -> tuple[KeyInfo, ...]:
    """Return every meaning of every key, grouped by top-level key, in the order of the recipes.

    `extends` is among them, which a file may have and the command line may not.
    """
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    for row in rows:
        row.update({name: tuple(row[name]) for name in ("verbs", "choices", "when")})  # a NamedTuple that has a hash
    return tuple(KeyInfo(**row) for row in rows)


def keys(verb: str | None = None) -> tuple[KeyInfo, ...]:
    """Return the keys of one verb (`distill`: of both its forms), or of all verbs."""
    return tuple(info for info in all_keys() if verb is None or any(name.split(" ")[0] == verb for name in info.verbs))


def normalize(key: str) -> str:
    """Return a key as the index has it: `data.corpora.0.path` and `data.corpora.path` become `data.corpora[].path`."""
    plain = _without_positions(key)
    return next((info.key for info in all_keys() if _without_positions(info.key) == plain), plain)


def _without_positions(key: str) -> str:
    return re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", key)


def meanings(key: str) -> tuple[KeyInfo, ...]:
    """Return all meanings of a normalized key, none if there is no such key."""
    return tuple(info for info in all_keys() if info.key == key)


def below(key: str) -> tuple[KeyInfo, ...]:
    """Return the keys below a normalized one, at any depth."""
    return tuple(info for info in all_keys() if info.key.startswith((f"{key}.", f"{key}[].")))


def nearest(key: str) -> tuple[str, ...]:
    """Return up to five keys that `key` may be meant for.

    In this order: up to three with the same last part, or else of a similar spelling; and for a `key` without dots two
    with a last part that begins with it, as `capacity_factor` with `capacity`.
    """
    names = list(dict.fromkeys(info.key for info in all_keys()))
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    longer = [name for name in names if name.rpartition(".")[2].startswith(f"{key}_")][:2]
    if same:
        return (*difflib.get_close_matches(key, same, n=3, cutoff=0.0), *longer)
    similar = difflib.get_close_matches(key, names, n=3, cutoff=0.75)
    similar += [name for name in longer if name not in similar]
    if not similar:
        parts = {name.rpartition(".")[2] for name in names}
        close = difflib.get_close_matches(last, sorted(parts), n=1, cutoff=0.75)
        similar = [name for name in names if name.rpartition(".")[2] in close][:3]
    return tuple(similar)


def kinds(info: KeyInfo) -> tuple[str, ...]:
    """Return the kinds with which the key has this meaning, empty if it always has."""
    return tuple(condition.partition("=")[2] for condition in info.when)


EXAMPLES = {
    "extends": "quickstart/switch",
    "model.size": "switch-base-8",
    "train.batch_tokens": "4096",
    "train.precision": "selective",
    "precision": "selective",
    "data.corpora": "[{kind: files, paths: [text/*.txt]}]",
    "data.corpora[].where": "{lang: [de, fr]}",
    "tasks": "[glue]",
    "tasks[].input": "classify: {text}",
    "tasks[].labels": "[negative, positive]",
}
"""Values for examples, where one made from the type would say little."""


def example(info: KeyInfo) -> str:
    """Return overrides that set the key, with the kind that it needs: `optimizer.kind=adamw optimizer.beta1=0.9`.

    A mapping has keys of its own to set: the example is then "", and so is that of `verb`, which no user sets. That of
    `extends` is a line of a file.
    """
    if info.key == "verb" or (info.key not in EXAMPLES and info.type.startswith(("mapping", "list of mapping"))):
        return ""
    if info.key == "extends":
        return f"extends: {EXAMPLES[info.key]}"
    path = info.key.replace("[]", ".0")
    kind = f"{info.when[0].replace('[]', '.0')} " if info.when else ""
    return f"{kind}{path}={_quoted(EXAMPLES.get(info.key) or _example_value(info))}"


def _example_value(info: KeyInfo) -> str:
    """Return a value that the key can have: another choice than the default, the default, or a placeholder."""
    value = next((choice for choice in info.choices if choice != info.default), None)
    if value is None and info.default not in (None, "null", '""', "[]"):
        return {"true": "false", "false": "true"}.get(str(info.default), str(info.default))
    types = {"integer": "100", "number": "0.5", "path": "PATH", "list of paths": "PATH", "list of integers": "0, 2"}
    value = value or next((example for start, example in types.items() if info.type.startswith(start)), "TEXT")
    return f"[{value}]" if info.type.startswith("list") else value


def _quoted(value: str) -> str:
    """Return a value, in quotes if a shell would read it as something else."""
    return f"'{value}'" if re.search(r"""[][{}()*?<>|&;$`"\s#~!]""", value) else value
