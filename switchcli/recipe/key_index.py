"""The index of all recipe keys: for `recipes explain`, hints and the documentation.

It is made from the schemas of the recipes when it is first asked for: commands import this module before they know
whether they need it.
"""

import re
from functools import cache

from switchcli.recipe.key_info import KeyInfo
from switchcli.recipe.library import VERBS
from switchcli.recipe.sizes import CUSTOM, SIZES

_ON_TEXT, _ON_TASKS = "distill on text", "distill on tasks"


_OF_ALL_VERBS = (
    KeyInfo(
        "extends",
        VERBS,
        "path or text",
        (),
        "null",
        "The recipe that this one changes: a file, relative to this one, or the name of a recipe that ships. Only in a "
        "file, not on the command line.",
    ),
    KeyInfo("verb", VERBS, "choice", VERBS, "the verb of the command", "The command that runs this recipe."),
)
"""The keys that no schema has, as it is gone before a recipe is validated, or that each has with its own verb."""


@cache
def all_keys() -> tuple[KeyInfo, ...]:
    """Return every meaning of every key, grouped by top-level key, in the order of the recipes.

    `extends` is among them, which a file may have and the command line may not.
    """
    from switchcli.recipe import schema
    from switchcli.recipe.schema_walk import SchemaNode
    from switchcli.spec import Spec
    from switchcli.tasks.registry import METRICS, SUITES, TASKS

    recipes: dict[str, type[Spec]] = {
        "pretrain": schema.PretrainRecipe,
        "finetune": schema.FinetuneRecipe,
        _ON_TEXT: schema.DistillTextRecipe,
        _ON_TASKS: schema.DistillTasksRecipe,
        "eval": schema.EvalRecipe,
    }
    choices = {  # those that the type of a key does not say
        "model.size": (CUSTOM, *SIZES),
        "tasks": (*TASKS, *SUITES),
        "tasks[].metrics": tuple(METRICS),
    }
    verbs: dict[KeyInfo, list[str]] = {}
    for verb, recipe in recipes.items():
        for info in SchemaNode.root(recipe).infos():
            if info.key != "verb":
                verbs.setdefault(info._replace(choices=choices.get(info.key, info.choices)), []).append(verb)
    infos = [*_OF_ALL_VERBS, *(info._replace(verbs=_short(names)) for info, names in verbs.items())]
    first = {info.key: place for place, info in reversed([*enumerate(infos)])}
    top = {_top(info.key): place for place, info in reversed([*enumerate(infos)])}
    return tuple(sorted(infos, key=lambda info: (top[_top(info.key)], first[info.key])))


def _top(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


def _short(verbs: list[str]) -> tuple[str, ...]:
    """Return verbs with one name for distillation where both of its forms are meant."""
    if _ON_TEXT in verbs and _ON_TASKS in verbs:
        verbs = ["distill" if verb == _ON_TEXT else verb for verb in verbs if verb != _ON_TASKS]
    return tuple(verbs)


def keys(verb: str | None = None) -> tuple[KeyInfo, ...]:
    """Return the keys of one verb (`distill`: of both its forms), or of all verbs."""
    return tuple(info for info in all_keys() if verb is None or any(name.split(" ")[0] == verb for name in info.verbs))


def normalize(key: str) -> str:
    """Return a key as the index has it: `data.corpora.0.path` and `data.corpora.path` become `data.corpora[].path`."""
    plain = _without_positions(key).replace("model.decoder_router.", "model.router.")  # which has the same keys
    return next((info.key for info in all_keys() if _without_positions(info.key) == plain), plain)


def _without_positions(key: str) -> str:
    return re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", key)


def meanings(key: str) -> tuple[KeyInfo, ...]:
    """Return all meanings of a normalized key, none if there is no such key."""
    return tuple(info for info in all_keys() if info.key == key)


def below(key: str) -> tuple[KeyInfo, ...]:
    """Return the keys below a normalized one, at any depth."""
    return tuple(info for info in all_keys() if info.key.startswith((f"{key}.", f"{key}[].")))


def kinds(info: KeyInfo) -> tuple[str, ...]:
    """Return the kinds with which the key has this meaning, empty if it always has."""
    return tuple(condition.partition("=")[2] for condition in info.when)


_EXAMPLES = {
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
    if info.key == "verb" or (info.key not in _EXAMPLES and info.type.startswith(("mapping", "list of mapping"))):
        return ""
    if info.key == "extends":
        return f"extends: {_EXAMPLES[info.key]}"
    path = info.key.replace("[]", ".0")
    kind = f"{info.when[0].replace('[]', '.0')} " if info.when else ""
    value = _EXAMPLES.get(info.key) or _example_value(info)
    if re.search(r"""[][{}()*?<>|&;$`"\s#~!]""", value):  # a shell would read it as something else
        value = f"'{value}'"
    return f"{kind}{path}={value}"


def _example_value(info: KeyInfo) -> str:
    """Return a value that the key can have: another choice than the default, the default, or a placeholder."""
    value = next((choice for choice in info.choices if choice != info.default), None)
    if value is None and info.default not in (None, "null", '""', "[]"):
        return {"true": "false", "false": "true"}.get(str(info.default), str(info.default))
    types = {"integer": "100", "number": "0.5", "path": "PATH", "list of paths": "PATH", "list of integers": "0, 2"}
    value = value or next((example for start, example in types.items() if info.type.startswith(start)), "TEXT")
    return f"[{value}]" if info.type.startswith("list") else value
