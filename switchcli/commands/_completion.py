"""Shell completion of recipes, sizes, keys and values. Nothing here imports torch, because each TAB starts a process.

A completer returns no candidate where the shell's own completion of paths serves: checkpoints, folders, files.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import typer

from switchcli.planner import devices
from switchcli.recipe import key_index, library, sizes

RECIPE_VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{verb: verb for verb in key_index.VERBS},
        **dict.fromkeys(("doctor", "plan", "prepare", "train", "upcycle", "validate"), "pretrain"),
        **dict.fromkeys(("prune", "report"), "eval"),
    }
)
"""For each command that takes KEY=VALUE, the verb whose recipe has these keys."""


def recipe_keys(command: str) -> tuple[str, ...]:
    """Return the keys that a command takes as KEY=VALUE, none for a command without."""
    names = dict.fromkeys(info.key for info in key_index.keys(RECIPE_VERBS.get(command, "")))
    return tuple(name for name in names if "[]" not in name and name not in ("extends", "verb"))


def recipes(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe, one part of it at a time: after a verb with recipes, of its own ones."""
    return _recipes(context.command.name or "", incomplete)


def _recipes(command: str, incomplete: str) -> list[str]:
    names = [name for name in library.recipe_names() if name.startswith(incomplete)]
    if command in key_index.VERBS:
        names = [name for name in names if library.verb(name) == command]
    return _next_parts(names, incomplete, "/")


def gpus(incomplete: str) -> list[str]:
    """Complete the name of a device that `plan` knows."""
    return _starting(devices.GPUS, incomplete)


def model_sizes(incomplete: str) -> list[str]:
    """Complete the name of a model size."""
    return _starting(sizes.SIZES, incomplete)


def recipe_verbs(incomplete: str) -> list[str]:
    """Complete a verb that has recipes."""
    return _starting(key_index.VERBS, incomplete)


def any_key(incomplete: str) -> list[str]:
    """Complete a recipe key of any verb, one part at a time."""
    return _next_parts((info.key for info in key_index.all_keys()), incomplete, ".")


def overrides(context: typer.Context, incomplete: str) -> list[str]:
    """Complete KEY=VALUE: a key one part at a time, then its value."""
    return _override(context.command.name or "", context.params.get("overrides") or (), incomplete)


def recipe_and_overrides(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `[RECIPE] [KEY=VALUE ...]`."""
    words = context.params.get("arguments") or context.params.get("files") or ()
    names = recipes(context, incomplete) if not words else []
    return [*names, *_override(context.command.name or "", words, incomplete)]


def checkpoints_and_overrides(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `CHECKPOINT [KEY=VALUE ...]` of `report --routing`, and nothing after another `report`."""
    words = context.params.get("runs") or ()
    return _override(context.command.name or "", words, incomplete) if words and context.params.get("routing") else []


def size_or_recipe_and_overrides(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `[RECIPE|SIZE] [KEY=VALUE ...]`."""
    names = model_sizes(incomplete) if not context.params.get("arguments") else []
    return [*names, *recipe_and_overrides(context, incomplete)]


def command_words(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the command that `sweep` runs: VERB RECIPE [KEY=VALUE ...]."""
    words = context.params.get("arguments") or ()
    if not words:
        return recipe_verbs(incomplete)
    return _recipes(words[0], incomplete) if len(words) == 1 else _override(words[0], words, incomplete)


def _override(command: str, words: Sequence[str], incomplete: str) -> list[str]:
    """Return the candidates for `incomplete` after `words`.

    Bash splits KEY=VALUE into three words, and the completer sees the last one. Other shells pass one word.
    """
    known = recipe_keys(command)
    key, separator, start = incomplete.partition("=")
    if separator:
        return [f"{key}={value}" for value in _starting(_values(command, key), start)]
    before = words[-2:] if words[-1:] == ["="] else words[-1:]
    if before and before[0] in known:
        return _starting(_values(command, before[0]), incomplete)
    mappings = {name.rpartition(".")[0] for name in known}
    found = _next_parts((name for name in known if name not in mappings), incomplete, ".")
    # Two candidates keep a shell from adding a space after the `=`, and show what the value may be.
    if len(found) == 1 and found[0] in known:
        return [f"{found[0]}={value}" for value in ("", *(_values(command, found[0]) or _default(command, found[0])))]
    return [f"{name}=" if name in known else name for name in found]


def _meanings(command: str, key: str) -> list[key_index.KeyInfo]:
    """Return the meanings of a key in the recipes of a command."""
    return [info for info in key_index.keys(RECIPE_VERBS.get(command, "")) if info.key == key]


def _values(command: str, key: str) -> list[str]:
    """Return all values that are words which a key can have, none for numbers and paths."""
    values: list[str] = []
    for info in _meanings(command, key):
        choices = ("true", "false") if info.type.startswith("true or false") else info.choices
        values += [f"[{choice}]" if info.type.startswith("list") else choice for choice in choices]
    return [*dict.fromkeys(values)]


def _default(command: str, key: str) -> list[str]:
    """Return the default of a key in a list, or `VALUE` if it has none."""
    defaults = (info.default for info in _meanings(command, key))
    return [next((default for default in defaults if default and " " not in default), "VALUE")]


def _next_parts(names: Iterable[str], incomplete: str, separator: str) -> list[str]:
    """Return the names that start with `incomplete`, each to the end of its next part.

    For `model.` these are `model.router.`, `model.size` and others. If all have the same next part, the one after it is
    added, until there are several candidates or a single name.
    """
    names = [name for name in names if name.startswith(incomplete)]
    start = len(incomplete)
    while True:
        ends = {name: name.find(separator, start) + len(separator) for name in names}
        parts = list(dict.fromkeys(name[: end or None] for name, end in ends.items()))
        if len(parts) != 1 or not parts[0].endswith(separator):
            return parts
        start = len(parts[0])


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
