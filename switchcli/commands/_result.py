"""The end of a verb: its result on stdout, as one JSON object or for people, and its exit code."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import typer

from switchcli.system.startup import is_main_rank
from switchcli.terminal.console import Console, print_json
from switchcli.terminal.table import Table


class Line(NamedTuple):
    """A line of a result for people, in a style of rich; a line to paste is not wrapped."""

    text: str
    style: str = ""
    wrap: bool = True


def finish(
    result: Mapping[str, Any],
    as_json: bool,
    shown: Iterable[Table | Line] = (),
    *,
    exit_code: int = 0,
) -> None:
    """Print the result of a verb on stdout, once for all ranks, and end the verb with an exit code that is not 0.

    Args:
        result: The JSON object for scripts.
        as_json: Whether to print the object, and not what people read.
        shown: Tables and lines for people. They are not made if nobody reads them.
        exit_code: The exit code of the command.

    Raises:
        typer.Exit: the exit code is not 0.
    """
    if is_main_rank():
        if as_json:
            print_json(result)
        else:
            console = Console(stream=sys.stdout)
            for element in shown:
                if isinstance(element, Table):
                    console.show(element)
                else:
                    console.message(*element)
    if exit_code:
        raise typer.Exit(exit_code)
