"""The command line: finds and runs the verbs, and turns errors into exit codes. Heavy imports wait for a verb.

A verb's module is imported when the verb is used. Completion after a verb imports that verb alone; completion of the
verb itself imports all, for their help.
"""

import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_group

from switchcli import __version__, commands
from switchcli.commands import _exit
from switchcli.commands._options import epilog
from switchcli.commands._parsing import CheckedGroup, extend_command
from switchcli.errors import CheckpointError, RecipeError, SwitchError, memory_error, path_error
from switchcli.system import credentials, startup

ORDER = (
    *("pretrain", "finetune", "distill", "eval", "generate", "doctor", "plan"),
    *("recipes", "data", "convert", "upcycle", "prune", "report", "sweep"),
)
"""The verbs in the order of `--help`. A verb that is not listed comes after these."""


class Verbs(Mapping[str, Any]):
    """The commands by verb. Each module of commands/ without a leading underscore defines the `app` of one."""

    def __init__(self) -> None:
        names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
        self._names = (*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER))
        self._commands: dict[str, Any] = {}

    def __getitem__(self, verb: str) -> Any:
        if verb not in self._names:
            raise KeyError(verb)
        if verb not in self._commands:
            group = get_group(importlib.import_module(f"switchcli.commands.{verb}").app)  # noqa: TID251 - one of ours
            if group.name:
                self._commands[verb] = group
            else:  # it holds only the verb itself
                (self._commands[verb],) = group.commands.values()
            extend_command(self._commands[verb])
        return self._commands[verb]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Root(CheckedGroup):
    """The root of the command line, with the verbs as its commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Verbs()  # type: ignore[assignment]  # nothing is added to it


app = typer.Typer(
    cls=Root,
    help="Train Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch.",
    epilog=epilog(
        "index",
        "switchcli pretrain quickstart/switch",
        "switchcli eval runs/quickstart/switch",
    ),
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


def _require_working_directory() -> None:
    """Raise RecipeError if the working directory was removed or may not be read."""
    try:
        Path.cwd()
    except OSError as error:
        raise RecipeError(
            f"the working directory cannot be used ({error.strerror}): change to one that exists"
        ) from error


def main() -> None:
    """Run the command line. An error that a user can fix ends in one line and the exit code of its kind."""
    startup.limit_spinning(os.environ)  # before torch is imported
    startup.keep_modules_of_current_folder_out(os.environ)
    startup.end_with_launcher()
    startup.reopen_closed_streams()
    startup.make_stderr_lenient()
    try:
        try:
            _require_working_directory()
            if secret := credentials.find_credentials(os.environ.get("HF_ENDPOINT", "")):
                raise RecipeError(  # huggingface_hub prints the addresses that do not answer
                    f"HF_ENDPOINT: holds {secret}, and logs would keep it: leave it out, and log in by HF_TOKEN"
                )
            with _exit.interruptible(saves_nothing=True):  # verbs that save something use their own
                app()
        finally:
            sys.stdout.flush()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # as typer ends a command whose output nobody reads
            _exit.exit_with(_exit.CLOSED_PIPE)
        _exit.exit_rank(ended.code)
        raise
    except SwitchError as error:
        _exit.exit_with_error(error)
    except BrokenPipeError as error:  # at the last flush
        if isinstance(error.__context__, SwitchError):
            _exit.exit_with_error(error.__context__)
        _exit.exit_with(_exit.CLOSED_PIPE)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            where = error.filename or "standard output"
            _exit.exit_with_error(
                CheckpointError(f"{where} cannot be written: {error.strerror}: free some space there")
            )
        if (known := path_error(error) or memory_error(error)) is not None:
            _exit.exit_with_error(known)
        _exit.exit_with_traceback(error)
        raise
