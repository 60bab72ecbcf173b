"""Arguments and options that several verbs have, with their help; and the checks of the values of every verb."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer
from typer.core import TyperGroup

from switchcli import credentials
from switchcli.errors import RecipeError
from switchcli.recipe import library
from switchcli.report.safe_text import one_line

A_CHECKPOINT = "A run's folder, one checkpoint's, or a Hugging Face folder."
Checkpoint = Annotated[Path, typer.Argument(help=A_CHECKPOINT, show_default=False)]
Destination = Annotated[Path, typer.Argument(help="The new folder.", show_default=False)]
Recipe = Annotated[str, typer.Argument(help="A file, or the name of a recipe that ships.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Keys to set, by dotted path.", show_default=False)
]
Measured = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE ...]",
        help=r"What to measure, such as tasks=\[rte]; absent: what the checkpoint was trained on.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="What to start from: a run's folder, one checkpoint's, or a Hugging Face folder.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/RECIPE when absent.", show_default=False)]
Resume = Annotated[bool, typer.Option(help="Go on with the run in the folder, or set it aside and begin anew.")]
Processes = Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what the recipe comes to, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]

_TEXTS: Final = "texts"
"""The parameter that holds a model's input. All others may name a place."""
_OVERRIDE: Final = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)
_USAGE_ERROR: Final = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
"""The base class of errors in the syntax of a command line, which typer does not export."""


class CheckedGroup(TyperGroup):
    """The root of the command line. Each value of each option and argument of its commands, old and new, is checked.

    Empty values and credentials are refused; messages about wrong usage, which repeat what was typed, are one line.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _check_values_of(self)


@contextmanager
def _plain_usage_errors() -> Iterator[None]:
    """Within, or within a function that this decorates, errors of usage are one line."""
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = one_line(error.message)
        raise


def _check_values_of(command: Any) -> None:
    """Let a command, and those below it, refuse values and tell of wrong usage as `CheckedGroup` says.

    What parses is wrapped, and not what runs: no frame of these lies below a command that runs.
    """
    command.parse_args = _plain_usage_errors()(command.parse_args)
    is_group = isinstance(command, TyperGroup)
    if is_group:
        command.resolve_command = _plain_usage_errors()(command.resolve_command)
    for inner in command.commands.values() if is_group else ():
        _check_values_of(inner)
    for parameter in command.params:
        if parameter.name != _TEXTS:
            parameter.process_value = _checked(parameter, parameter.process_value)


def _checked(parameter: Any, process_value: Any) -> Any:
    """Return `process_value` with a check of what was typed: an empty path would become `.`, the current folder."""
    name = next((one for one in parameter.opts if one.startswith("--")), parameter.name.upper())

    def check(context: Any, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, str):
                _check_value(name, one)
        return process_value(context, value)

    return check


def _check_value(name: str, value: str) -> None:
    """Raise RecipeError for a value that is empty or holds credentials."""
    if override := _OVERRIDE.match(value):
        name, value = override[0].removesuffix("="), value.removeprefix(override[0])
        if value[:1] in ("", "[", "{"):  # for the recipe's schema to judge
            return
    if not value:
        raise RecipeError(f"{name}: is empty: give a value, or leave it out")
    if found := credentials.find_credentials(value):
        raise RecipeError(f"{name}: holds {found}: {credentials.FIX}")


def default_out(recipe: str) -> Path:
    """runs/NAME for a recipe that ships; for a file runs/STEM, or runs/FOLDER when it is a run's recipe.yaml."""
    path = Path(recipe)
    if recipe in library.recipe_names() and not path.is_file():
        return Path("runs") / recipe
    if path.name == "recipe.yaml":
        path = path.resolve().parent
    return Path("runs") / (path.stem if path.suffix in library.SUFFIXES else path.name)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """`[RECIPE] [KEY=VALUE ...]`: the recipe, if there is one, and the rest."""
    named = bool(arguments) and "=" not in arguments[0]
    return (arguments[0] if named else None), list(arguments[named:])
