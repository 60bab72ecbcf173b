"""Commands in a pseudo-terminal: what a user at a terminal of so many columns sees of them."""

import errno
import importlib
import os
import re
import subprocess
import sys
import termios
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from switchcli.cli import main

ERASED = re.compile(r"\r?(\x1b\[[0-9]*[AK]\r?)+|\r?\n")
"""The end of a line, or where a bar is drawn anew: the cursor goes up, and lines are erased."""
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07)")
"""Whatever else a terminal acts on, such as colors."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
"""What rich and Typer put where they cut a text at the width."""


IMPORTED = (
    *("api", "commands._training", "report.run_report", "report.charts", "recipe.schema", "recipe.key_index"),
    *("convert.to_transformers", "doctor.probes", "planner.meshes", "data.prepare.pipeline"),
    *(
        "runs.models.conversion",
        "doctor.diagnosis",
        "runs.train.distilling",
        "runs.evaluate.eval_job",
        "plan.recipe_plan",
    ),
    *(
        "runs.models.pruning",
        "report.routing_survey",
        "report.run_comparison",
        "runs.evaluate.text_generation",
    ),
    *("runs.text.text_preparation", "runs.text.tokenizer_tools", "runs.train.trainer"),
    *("runs.models.upcycling",),
)
"""Modules that the verbs import when they are called."""


def import_what_verbs_call() -> None:
    """Import what the verbs import when they are called: forks of this process then import nothing again."""
    for name in IMPORTED:
        importlib.import_module(f"switchcli.{name}")


class Shown(NamedTuple):
    """How a command ended, and all that it wrote: stdout and stderr together, bars as often as they were drawn."""

    code: int
    text: str

    @property
    def faults(self) -> list[str]:
        """What no user should see: another exit code than 0, a traceback, cut lines, a bar over nothing."""
        faults = [f"exit code {self.code}"] if self.code else []
        if "Traceback" in self.text:
            faults.append("a traceback")
        faults += [f"cut: {line}" for line in self.text.splitlines() if ELLIPSIS in line or " 0/0 " in line]
        return faults


def in_terminal(
    command: Sequence[object], columns: int, cwd: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Shown:
    """Run a command with a terminal as its stdin, stdout and stderr."""
    reader, writer = _opened(columns)
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        env=_of_terminal(environment),
        stdin=writer,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    return _shown(reader, process.wait)


def switchcli_in_terminal(words: Sequence[object], columns: int, cwd: Path) -> Shown:
    """Run `switchcli WORDS` in a fork of this process, which need not import again what this process has imported."""
    reader, writer = _opened(columns)
    child = fork_switchcli(words, cwd, (writer, writer, writer))
    os.close(writer)
    return _shown(reader, lambda: exit_code(child))


def fork_switchcli(words: Sequence[object], cwd: Path, streams: Sequence[int]) -> int:
    """Begin `switchcli WORDS` in a fork of this process, with descriptors as its standard streams. Return its ID."""
    child = os.fork()
    if child == 0:
        os.setsid()
        run_switchcli([*map(str, words)], cwd, streams, _of_terminal(os.environ))
    return child


def exit_code(child: int) -> int:
    """Wait for a child, and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_switchcli(words: Sequence[str], cwd: Path, streams: Sequence[int], environment: Mapping[str, str]) -> NoReturn:
    """In a fork: run the entry point that a shell calls, and exit. An error that no user should see is a traceback."""
    code = 1
    try:
        for standard, descriptor in enumerate(streams):
            os.dup2(descriptor, standard)
        os.closerange(3, 2**16)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.argv = ["switchcli", *words]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _opened(columns: int) -> tuple[int, int]:
    """Open a terminal: what it shows is read from the first descriptor, and commands have the second."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    return reader, writer


def _of_terminal(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a terminal with colors, whose size is its own."""
    others = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**others, "TERM": "xterm-256color"}


def _shown(reader: int, wait: Callable[[], int]) -> Shown:
    """Read a terminal until its command, for which `wait` waits, has ended."""
    written = b"".join(iter(lambda: _read(reader), b""))
    code = wait()
    os.close(reader)  # not before the process has ended: its terminal would hang up
    lines = ERASED.sub("\n", written.decode(errors="replace"))
    return Shown(code, ESCAPE.sub("", lines))


def _read(reader: int) -> bytes:
    """Return what a terminal hands out next; nothing once no process has it open."""
    try:
        return os.read(reader, 1 << 16)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""
