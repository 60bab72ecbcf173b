"""Arguments and options that several verbs share, and the checks that apply to the values of every verb."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer
from typer.core import TyperGroup

from switchcli.commands import _completion
from switchcli.commands._help import simplify
from switchcli.errors import RecipeError
from switchcli.recipe import foreign_words, key_index, library
from switchcli.system import credentials
from switchcli.system.user_files import expanded

A_CHECKPOINT = "A run's folder (its newest checkpoint), one checkpoint's folder, or a Hugging Face folder."
Checkpoint = Annotated[Path, typer.Argument(help=A_CHECKPOINT, show_default=False)]
Destination = Annotated[Path, typer.Argument(help="The new folder: it must be empty or not exist.")]
Recipe = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a shipped recipe.", show_default=False, autocompletion=_completion.recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Recipe keys to set, by dotted path."),
]
EvalArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE ...]",
        help=r"What to measure on, such as tasks=\[rte] or text.corpora=\[...]; a recipe of `verb: eval`. "
        "Default: what the checkpoint was trained on.",
        autocompletion=_completion.first_recipe,
    ),
]


def check_folder(path: Path | None) -> Path | None:
    """Return the value of an option that takes a folder. Raises RecipeError if it is a file.

    A shell leaves the `~` of `--out=~/runs` to the program.
    """
    if path is None:
        return None
    try:
        folder = expanded(path)
    except OSError as error:
        raise RecipeError(f"--out {path}: {error.strerror}: give another path") from error
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--out {path}: takes a folder, and this is a file: give another path")
    return folder


Model = Annotated[str | None, typer.Option(metavar="CHECKPOINT", help=f"Where to start from. {A_CHECKPOINT}")]
BranchFrom = Annotated[
    str | None,
    typer.Option(
        "--branch-from",
        metavar="RUN[@STEP]",
        help="Continue a checkpoint of another run (default: the newest) as a new run with other settings.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="PATH", help="The run's folder. Default: runs/RECIPE.", callback=check_folder)
]
Resume = Annotated[bool, typer.Option(help="Resume the run in the folder, or archive it and start a new one.")]
Processes = Annotated[int, typer.Option(metavar="N", min=1, help="Number of ranks to start on this machine.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Open what the recipe names, print the size of the model and of the run, and stop."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]

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
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str):
                _check_value(name, item)
        processed = process_value(context, value)
        if isinstance(processed, float) and not math.isfinite(processed):
            raise RecipeError(f"{name} ({processed}): must be a finite number")
        return processed

    return check


def _check_value(name: str, value: str) -> None:
    """Raise RecipeError if the value is empty or holds credentials."""
    if override := library.KEY_VALUE.match(value):
        name, value = override[0].removesuffix("="), value.removeprefix(override[0])
        if value[:1] in ("", "[", "{"):  # the schema of the recipe checks these
            return
    if not value:
        raise RecipeError(f"{name}: is empty: give a value, or leave it out")
    if secret := credentials.find_credentials(value):
        raise RecipeError(f"{name}: holds {secret}: {credentials.FIX}")


def refuse_option(context: typer.Context, name: str, reason: str) -> None:
    """Raise RecipeError if the command line gives the option of the parameter `name`, which means nothing here."""
    source = context.get_parameter_source(name)
    if source is not None and source.name == "COMMANDLINE":
        option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
        raise RecipeError(f"{option}: {reason}")


def default_out(recipe: str) -> Path:
    """Return runs/NAME for a shipped recipe, runs/STEM for a file, and runs/FOLDER for the recipe.yaml of a run."""
    path = Path(recipe)
    if recipe in library.recipe_names() and not path.is_file():
        return Path("runs") / recipe
    if path.name == "recipe.yaml":
        path = path.resolve().parent
    return Path("runs") / (path.stem if path.suffix in library.SUFFIXES else path.name)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `[RECIPE] [KEY=VALUE ...]` into the recipe, None if there is none, and the overrides."""
    if arguments and not library.is_override(arguments[0]):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)
