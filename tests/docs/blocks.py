"""The code blocks of README.md and docs/, and the commands in them."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)(?: +title=\"(?P<title>[^\"]+)\")?\s*")
HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
OPERATORS = {"|", "||", "&&", ";", "&", "(", ")", "do", "then", "{", "}", "until", "while", "if", "!"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    """The line of the page on which the text begins."""
    language: str
    title: str | None
    """The file that the block is the content of."""
    text: str
    not_run: str | None
    """Why the block is not run; None if it is."""


class Command(NamedTuple):
    """A `switchcli` command of a block: the words after `switchcli`."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: switchcli {shlex.join(self.words)}"


def pages() -> list[str]:
    """Return the pages, by their path from the root: README.md, and all of docs/."""
    found = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    return ["README.md", *sorted(found)]


def blocks_of(page: str) -> list[Block]:
    return list(blocks_in((ROOT / page).read_text(encoding="utf-8"), page))


def blocks_in(text: str, page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    lines = iter(enumerate(text.splitlines(), start=1))
    before = ""
    for number, line in lines:
        opening = FENCE.fullmatch(line)
        if opening is None:
            before = line or before if NOT_RUN.search(before) and not line else line
            continue
        content: list[str] = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            content.append(inner.removeprefix(opening["indent"]))
        reason = NOT_RUN.search(before)
        body = "\n".join(content) + "\n"
        yield Block(page, number + 1, opening["language"], opening["title"], body, reason[1] if reason else None)
        before = ""


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the `switchcli` commands of a shell block, also those in loops, pipes and after other launchers."""
    lines = iter(block.text.splitlines())
    number = block.line - 1
    for first in lines:
        number += 1
        line, start = first, number
        while line.endswith("\\"):
            line = line.removesuffix("\\") + next(lines)
            number += 1
        if here := HERE_DOCUMENT.search(line):
            for inner in lines:
                number += 1
                if inner.strip() == here[2]:
                    break
        for words in _simple_commands(line):
            for place, word in enumerate(words):
                if word == "switchcli" and (place == 0 or words[place - 1] == "-m" or words[0] in ("srun", "time")):
                    yield Command(block.page, start, tuple(words[place + 1 :]))
                    break


def _simple_commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line, without redirections."""
    line = re.sub(r"(?<!\S)\d(?=>)", "", line)  # the 2 of `2>&1`
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&()<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    skip = False
    for word in lexer:
        if word.startswith("#") and not skip:
            break
        if skip:
            skip = False
        elif word in OPERATORS:
            yield words
            words = []
        elif set(word) <= {"<", ">", "&"}:
            skip = True
        else:
            words.append(word)
    yield words


def overrides_in(words: Sequence[str]) -> list[str]:
    """Return the KEY=VALUE words."""
    return [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
