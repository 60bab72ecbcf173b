"""Names and values stay on their line; a command that names a file can be copied into a shell."""

import io
import subprocess

import pytest

from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import one_line, shell_word
from switchcli.terminal.table import Table

EVIL = "new\nerror: forged\x1b[31m\u2028\u2029\u202e\t\r\x85x"


def test_a_name_with_line_breaks_stays_on_one_line() -> None:
    line = one_line(f"runs/{EVIL}")
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert "\\nerror: forged\\x1b[31m" in line


def test_the_console_prints_each_text_on_one_line() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.message(EVIL)
    console.warning(EVIL)
    console.error(f"first {EVIL}", "second line")
    console.show(Table(("", ""), [(EVIL, EVIL)], EVIL))
    console.show(Table((EVIL, "b"), [(EVIL, 1)], EVIL, EVIL))
    console.sample(EVIL, EVIL, EVIL)
    lines = stream.getvalue().splitlines()
    assert not [line for line in lines if line.strip().startswith("error: forged")]
    assert sum(line.startswith(("error: first", "warning: new", "new\\n")) for line in lines) >= 3
    assert "second line" in lines


@pytest.mark.parametrize(
    "word", ["plain", "two words", "it's", "new\nline", "tab\t'\\\x1b", "caf\u00e9 \u2028", "a\\b\n"]
)
def test_a_shell_reads_a_quoted_word_as_it_was(word: str) -> None:
    quoted = shell_word(word)
    assert len(quoted.splitlines()) == 1
    shown = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert shown.decode() == word
