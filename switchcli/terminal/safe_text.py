"""Text made harmless for a terminal (`safe_text` keeps line breaks, `one_line` does not), HTML and Markdown.

The first two do not escape rich markup: wrap the result in `rich.text.Text`, which reads none.

Also the command that started this program: its words, its name for a shell, and the whole command line.
"""

import re
import shlex
import shutil
import sys
from html import escape
from pathlib import Path

from switchcli.system import credentials

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f"  # C0 but tab and newline: ESC starts a terminal command, a carriage return overwrites the line
    "\x7f-\x9f"  # DEL and C1: 0x9b is ESC [ in one character
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls: they reorder what is read
    "\ud800-\udfff"  # lone surrogates: no encoding prints them
    "]"
)
_BREAKS = re.compile("[\n\t\u2028\u2029]")
_MARKUP = re.compile(
    r"[\\`*{}\[\]<>()#+!|~&:@$^=]"
    r"|(?<!\d)\.|\.(?!\d)"  # a decimal point has no meaning
    r"|(?<![^\W_])[-_]"  # nor has a hyphen or an underscore after a letter or a digit
)
"""Punctuation with a meaning in Markdown, HTML or a link."""


def safe_text(text: str) -> str:
    """Return `text` with control characters, bidirectional controls and lone surrogates as escapes.

    Newlines and tabs stay.
    """
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    """Return `text` as part of one line of output: as `safe_text`, with line breaks and tabs as escapes too.

    A path or a value that a user gave can then not forge a line of its own. Credentials in URLs are left out.
    """
    return credentials.redact(_BREAKS.sub(_escape, safe_text(text)))


def html_text(text: str) -> str:
    """Return text that HTML shows as it is, with line breaks."""
    return escape(safe_text(text))


def markdown_text(text: str) -> str:
    """Return text on one line that Markdown shows as it is, without credentials in URLs."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def shell_word(text: str) -> str:
    """Return `text` quoted for a shell on one line, with characters that are not printable as in `$'a\\x0ab'`."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(letter if letter.isprintable() else _shell_escape(letter) for letter in escaped) + "'"


def _shell_escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def shell_words(*words: object) -> str:
    """Return the words of a command, each quoted for a shell."""
    return " ".join(shell_word(str(word)) for word in words)


def capitalize(text: str) -> str:
    """Return `text` with its first letter in upper case and the others as they are."""
    return text[:1].upper() + text[1:]


def shorten(text: str, characters: int) -> str:
    """Return `text` on one line, cut after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters].rstrip() + " ..."


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
