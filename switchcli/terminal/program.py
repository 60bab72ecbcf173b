"""The command that started this program: its words, its name for a shell, and the whole command line."""

import shutil
import sys
from pathlib import Path

from switchcli.terminal.safe_text import shell_words


def program_name() -> str:
    """Return the command that starts this program again: `switchcli` if it is on the PATH, else its path."""
    script = Path(sys.executable).with_name("switchcli")
    on_path = shutil.which("switchcli")
    if on_path and (not script.exists() or script.samefile(on_path)):
        return "switchcli"
    if not script.exists():
        return shell_words(sys.executable, "-m", "switchcli")
    return shell_words(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def command_words() -> list[str] | None:
    """Return the words of this command from `switchcli` on, or None in a program of the user's own."""
    program = Path(sys.argv[0])
    is_ours = program.name == "switchcli" or program.parts[-2:] == ("switchcli", "__main__.py")
    return ["switchcli", *sys.argv[1:]] if is_ours else None


def command_line() -> str:
    """Return the command that goes on where this one was stopped, to paste into a shell."""
    words = (word for word in sys.argv[1:] if word != "--no-resume")  # which would archive what there is
    return f"{program_name()} {shell_words(*words)}"
