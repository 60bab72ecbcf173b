"""Commands in a pseudo-terminal: what a user at a terminal of so many columns sees of them."""

import errno
import os
import re
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ERASED = re.compile(r"\r?(\x1b\[[0-9]*[AK]\r?)+|\r?\n")
"""The end of a line, or where a bar is drawn anew: the cursor goes up, and lines are erased."""
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07)")
"""Whatever else a terminal acts on, such as colors."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
"""What rich and Typer put where they cut a text at the width."""


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
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    environment = {**environment, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        env=environment,
        stdin=writer,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    written = b"".join(iter(lambda: _read(reader), b""))
    code = process.wait()
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
