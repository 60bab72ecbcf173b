"""How the command line parses the options and arguments of every verb: checks of values, and hints in its errors."""

import math
from typing import Any, Final, cast

import typer
from typer.core import TyperGroup

from switchcli.commands._options import simplify
from switchcli.errors import RecipeError
from switchcli.recipe import foreign_words, key_index, library
from switchcli.system import credentials
from switchcli.system.user_files import expand_home

_TEXTS: Final = "texts"
"""The parameter that holds a model's input, which is not checked. Any other parameter may name a path or a URL."""
_USAGE_ERROR: Final = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""click's UsageError, the base class of errors in the syntax of a command line, which typer does not export."""


class CheckedGroup(TyperGroup):
    """The root of the command line, which checks each value that is typed for any option or argument of any verb.

    Empty values and values with credentials are refused. A message about wrong usage is one line. An option of another
    tool is answered by what to type instead.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        extend_command(self)


def _explaining(parse: Any) -> Any:
    """Return `parse`, a method of click, that raises a usage error as a RecipeError in one line.

    It names the help, or what to type for an option that the command does not have.
    """

    def parse_or_explain(context: Any, arguments: list[str]) -> Any:
        try:
            return parse(context, arguments)
        except _USAGE_ERROR as error:
            name = type(error).__name__  # of classes that typer does not export
            if name == "NoArgsIsHelpError":  # which prints the help
                raise
            option, names = str(getattr(error, "option_name", "")), accepted_names(context)
            meant = foreign_words.translated(option, names) or foreign_words.nearest(option, names)
            if name == "NoSuchOption" and meant:
                value = "" if meant.startswith("--") or "=" in meant else "=VALUE"
                raise RecipeError(f"{option}: no such option of {context.info_name}: use {meant}{value}") from None
            message = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
            see = " See" if message.endswith("?") else ": see"
            raise RecipeError(f"{message}{see} `{context.command_path} -h`") from error

    return parse_or_explain


def extend_command(command: Any) -> None:
    """Add checks of values, hints about options and short help to a command and its subcommands.

    Only the parsing functions are wrapped. The function of the command then runs without additional stack frames.
    """
    command.parse_args = _explaining(command.parse_args)
    get_params = command.get_params
    command.get_params = lambda context: [simplify(parameter) for parameter in get_params(context)]
    is_group = isinstance(command, TyperGroup)  # a bool, because mypy refuses to assign to methods of a narrowed type
    if is_group:
        command.resolve_command = _explaining(command.resolve_command)
        for subcommand in command.commands.values():
            extend_command(subcommand)
    for parameter in command.params:
        if parameter.name != _TEXTS:
            parameter.process_value = _with_check(parameter, parameter.process_value)


def accepted_names(context: typer.Context) -> set[str]:
    """Return the options and the recipe keys that a command takes: `--out`, `train.steps`."""
    command: Any = context.command
    names = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    if not any("KEY=VALUE" in (parameter.metavar or "") for parameter in command.params):
        return names
    verb = {"prune": "eval", "report": "eval"}.get(command.name, "pretrain")
    keys = key_index.keys(command.name if command.name in library.VERBS else verb)
    return names | {info.key for info in keys if "[]" not in info.key and info.key not in ("extends", "verb")}


def _with_check(parameter: Any, process_value: Any) -> Any:
    """Return a `process_value` that checks the value as it was typed: an empty path would become `.`, the current one.

    A number must be finite: no option has a meaning for another one.
    """
    name = next((option for option in parameter.opts if option.startswith("--")), parameter.name.upper())

    def check(context: Any, value: Any) -> Any:
        is_list = isinstance(value, list | tuple)
        items = [_checked(name, item) for item in (value if is_list else [value])]
        processed = process_value(context, items if is_list else items[0])
        if isinstance(processed, float) and not math.isfinite(processed):
            raise RecipeError(f"{name} ({processed}): must be a finite number")
        return processed

    return check


def _checked(name: str, typed: Any) -> Any:
    """Return what was typed, text with `~` expanded. Raises RecipeError for empty text, and for credentials."""
    if not isinstance(typed, str):
        return typed
    value = typed
    if override := library.KEY_VALUE.match(typed):
        name, value = override[0].removesuffix("="), typed.removeprefix(override[0])
        if value[:1] in ("", "[", "{"):  # the schema of the recipe checks these
            return typed
    if not value:
        raise RecipeError(f"{name}: is empty: give a value, or leave it out")
    if secret := credentials.find_credentials(value):
        raise RecipeError(f"{name}: holds {secret}: {credentials.FIX}")
    try:
        return expand_home(typed)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error
