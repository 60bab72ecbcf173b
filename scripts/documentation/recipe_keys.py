"""The index of recipe keys: the content of switchcli/recipe/keys.json, by the walk through the recipes' schemas."""

import json
import re
from collections.abc import Mapping, Sequence

from switchcli.recipe.key_index import VERBS, KeyInfo
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, EvalRecipe, FinetuneRecipe, PretrainRecipe
from switchcli.recipe.schema_walk import SchemaNode
from switchcli.recipe.sizes import CUSTOM, SIZES
from switchcli.spec import Spec
from switchcli.tasks.registry import METRICS, SUITES, TASKS

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


def key_index() -> tuple[KeyInfo, ...]:
    """Return every meaning of every recipe key of every verb, in the order of the recipes."""
    verbs: dict[KeyInfo, list[str]] = {}
    for verb, recipe in RECIPES.items():
        for info in SchemaNode.root(recipe).infos():
            choices, default = CHOICES.get(info.key, info.choices), DEFAULTS.get(info.key, info.default)
            verbs.setdefault(info._replace(choices=choices, default=default), []).append(verb)
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
