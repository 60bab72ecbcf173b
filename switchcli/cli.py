"""The command line: finds and runs the verbs, and turns errors into exit codes. Heavy imports wait for a verb."""

import errno
import importlib
import os
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli import __version__, commands, startup
from switchcli.commands import _exit
from switchcli.commands._options import CheckedGroup
from switchcli.errors import CheckpointError, RecipeError, RenamedWarning, SwitchError, path_error

ORDER = (
    *("pretrain", "finetune", "distill", "eval", "generate", "doctor", "plan"),
    *("recipes", "data", "convert", "upcycle", "prune", "report", "sweep", "launch"),
)
"""The verbs in the order of `--help`. A verb that is not listed comes after these."""

app = typer.Typer(
    cls=CheckedGroup,
    help="Train Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"switchcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _add_verbs() -> None:
    """Add the `app` of each module of commands/ that has one. Modules with a leading underscore are not imported."""
    names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    for name in (*ORDER, *(name for name in names if name not in ORDER)):
        verb = getattr(importlib.import_module(f"switchcli.commands.{name}"), "app", None)
        if verb is not None:
            app.add_typer(verb)


_add_verbs()


def _require_working_directory() -> None:
    """Raise RecipeError if the working directory was removed or may not be read."""
    try:
        Path.cwd()
    except OSError as error:
        raise RecipeError(
            f"the working directory cannot be used ({error.strerror}): change to one that exists"
        ) from error


_python_showwarning = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Print a warning about the user's recipe as one line; leave warnings of libraries to Python."""
    if issubclass(category, RenamedWarning):
        _exit.console().warning(str(message))
    else:
        _python_showwarning(message, category, *args, **kwargs)


def main() -> None:
    """Run the command line. An error that a user can fix ends in one line and the exit code of its kind."""
    startup.limit_spinning(os.environ)  # before torch is imported
    startup.end_with_launcher()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the rest of the process
    startup.make_stderr_lenient()
    warnings.showwarning = _show_warning
    try:
        try:
            _require_working_directory()
            app()
        finally:
            sys.stdout.flush()
    except SwitchError as error:
        _exit.exit_with_error(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            _exit.exit_with_error(
                CheckpointError(f"standard output cannot be written: {error.strerror}: free some space there")
            )
        if (known := path_error(error)) is not None:
            _exit.exit_with_error(known)
        _exit.exit_with_traceback(error)
        raise
