"""Arguments and options that several verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import _completion
from switchcli.errors import RecipeError
from switchcli.recipe import library

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
    """Return the value of an option that takes a folder. Raises RecipeError if it is a file."""
    if path is not None and path.exists() and not path.is_dir():
        raise RecipeError(f"--out {path}: takes a folder, and this is a file: give another path")
    return path


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
