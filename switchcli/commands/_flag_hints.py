"""Options and verbs of other training tools, and what a user of switchcli types instead."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import typer

from switchcli.recipe import key_index, library
from switchcli.recipe.foreign_words import hint

VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train": "pretrain (from text) or finetune (on tasks)",
        "sft": "finetune",
        "evaluate": "eval",
        "predict": "generate",
        "export": "convert",
        "tokenize": "data prepare",
    }
)
"""The command of switchcli for a verb of another tool."""
_RECIPE_VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{verb: verb for verb in library.VERBS},
        **dict.fromkeys(("doctor", "plan", "prepare", "train", "upcycle", "validate"), "pretrain"),
        **dict.fromkeys(("prune", "report"), "eval"),
    }
)
"""For each command that takes KEY=VALUE, the verb whose recipe has these keys."""


def recipe_keys(command: str) -> set[str]:
    """Return the keys that a command takes as KEY=VALUE, none for a command without."""
    infos = key_index.keys(_RECIPE_VERBS[command]) if command in _RECIPE_VERBS else ()
    return {info.key for info in infos if "[]" not in info.key and info.key not in ("extends", "verb")}


def flag_hint(context: typer.Context, flag: str, arguments: Sequence[str]) -> str | None:
    """Return what to type instead of an option, one of the `arguments`, that the command does not have, if known."""
    return hint(flag, _typed_value(flag, arguments), accepted_names(context), verb_of(context))


def verb_of(context: typer.Context) -> str:
    """Return the command without its arguments: `switchcli data prepare`."""
    root = context.find_root()
    if context is root:  # a command that was parsed by itself
        return context.command_path
    return f"switchcli{context.command_path.removeprefix(root.command_path)}"


def accepted_names(context: typer.Context) -> set[str]:
    """Return the options, the arguments and the recipe keys that a command takes: `--out`, `RECIPE`, `train.steps`."""
    command: Any = context.command
    names = recipe_keys(command.name)
    for parameter in command.get_params(context):
        if parameter.param_type_name == "option":
            names.update(parameter.opts, parameter.secondary_opts)
        else:
            names.update(re.findall("[A-Z]+", parameter.metavar))
    return names


def _typed_value(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of an option as typed in `arguments`, `--steps 10` or `--steps=10`; None if there is none."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag:
            following = arguments[position + 1 : position + 2]
            return following[0] if following and not re.match(r"-[^\d.]|-$", following[0]) else None
    return None
