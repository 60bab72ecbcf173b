"""Arguments and options that several verbs share, the completion of names of recipes, and the end of a verb's help.

Nothing here imports torch, because each TAB starts a process. A completer returns no candidate where the shell's own
completion of paths serves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from switchcli.errors import RecipeError
from switchcli.recipe import library

_PACKAGE: Final = Path(__file__).parents[1]
DOCS: Final = (
    "switchcli/docs/{page}.md in site-packages" if (_PACKAGE / "docs").is_dir() else "docs/{page}.md in the repository"
)
"""Where a page of the documentation is: a wheel holds the pages that `--help` names."""


def epilog(page: str, *examples: str) -> str:
    """Return the end of a verb's help: commands to copy, and the page of the documentation that explains the verb.

    A line holds one command of at most 76 characters, so that a terminal of 80 columns does not break it.
    """
    lines = ["Examples:", *(f"  {example}" for example in examples), "", f"More: {DOCS.format(page=page)}"]
    return "\n".join(lines).replace("[", r"\[")  # Typer reads [name] as markup


def simplify(parameter: Any) -> Any:
    """Make a parameter of Typer short in `--help`, and return it.

    An argument is shown by its name in capitals, a flag without a type, a number without its range, which the error
    about a wrong one names.
    """
    if parameter.param_type_name == "argument":
        parameter.metavar = parameter.metavar or parameter.name.upper()
        in_usage = parameter.metavar
        if not parameter.required and not in_usage.startswith("["):
            in_usage = f"[{in_usage}]"
        parameter.get_usage_pieces = lambda context: [in_usage]
        parameter.display_type_rich = lambda ctx: ""
    else:
        if parameter.is_flag:
            parameter.metavar = ""
        parameter.min = parameter.max = None
    return parameter


def complete_recipes(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe: after a verb with recipes, of its own ones."""
    names = [name for name in library.recipe_names() if name.startswith(incomplete)]
    verb = context.command.name
    return [name for name in names if library.verb(name) == verb] if verb in library.VERBS else names


def complete_first_recipe(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the first word of `[RECIPE] [KEY=VALUE ...]`, as `complete_recipes` does."""
    return [] if context.params.get("arguments") else complete_recipes(context, incomplete)


A_CHECKPOINT = "A run's folder (its newest checkpoint), one checkpoint's folder, or a Hugging Face folder."
Checkpoint = Annotated[Path, typer.Argument(help=A_CHECKPOINT, show_default=False)]
Destination = Annotated[Path, typer.Argument(help="The new folder: it must be empty or not exist.")]
Recipe = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a shipped recipe.", show_default=False, autocompletion=complete_recipes
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
        autocompletion=complete_first_recipe,
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
