"""Promises of SECURITY.md and tests/faults/README.md: each names a test that proves it, and the test exists."""

import re
from collections.abc import Iterator

import pytest
from test_paper import REFERENCE, ROOT, rows, symbols


def promises(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each promise.

    A promise is a bullet below a heading that begins with "What a stranger's file cannot do" or "What is promised", or
    a row of a table below such a heading. A bullet goes on over its indented lines.
    """
    inside, bullet = False, None
    lines = text.splitlines()
    numbered = {number: "|".join(cells) for number, cells in rows(text)}
    for number, line in enumerate([*lines, "## end"], start=1):
        if bullet is not None and not line.startswith("  "):
            yield bullet
            bullet = None
        if line.startswith("## "):
            inside = line.startswith(("## What a stranger's file cannot do", "## What is promised"))
        elif inside and line.startswith("- "):
            bullet = number, line
        elif bullet is not None:
            bullet = bullet[0], f"{bullet[1]} {line.strip()}"
        elif inside and number in numbered:
            yield number, numbered[number]


def faults(text: str) -> Iterator[str]:
    """Yield the promises that name no test, and the tests that do not exist."""
    for number, promise in promises(text):
        named = REFERENCE.findall(promise)
        if not named:
            yield f"{number}: names no test"
        for path, symbol in named:
            if not path.startswith("tests/") or not symbol.startswith("test_"):
                yield f"{number}: {path}::{symbol} is no test"
            elif not (ROOT / path).is_file() or symbol not in symbols(ROOT / path):
                yield f"{number}: there is no {path}::{symbol}"


@pytest.mark.parametrize(("name", "at_least"), [("SECURITY.md", 9), ("tests/faults/README.md", 12)])
def test_every_promise_names_a_test_that_exists(name: str, at_least: int) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(list(promises(text))) >= at_least
    assert not list(faults(text))


PROVED = "`tests/repository/test_promises.py::test_every_promise_names_a_test_that_exists`"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"## What is promised\n\n- **Safe.** Always,\n  {PROVED}.\n- Sound: {PROVED}\n\n## Else\n\n- free", None),
        (f"## What is promised\n| a | b |\n|---|---|\n| safe | {PROVED} |\n", None),
        ("## What is promised\n\n- **Safe.** Always.\n", "3: names no test"),
        ("## What is promised, and how\n| a | b |\n|---|---|\n| safe | by hand |\n", "4: names no test"),
        (
            "## What a stranger's file cannot do\n\n- Safe: `tests/repository/test_promises.py::test_nothing`",
            "::test_nothing",
        ),
        ("## What a stranger's file cannot do\n\n- Safe: `tests/repository/test_promises.py::faults`", "is no test"),
        ("## What a stranger's file cannot do\n\n- Safe: `tests/gone.py::test_it`", "there is no tests/gone.py"),
    ],
)
def test_a_promise_without_a_test_is_found(text: str, fault: str | None) -> None:
    found = list(faults(text))
    assert [fault is not None and re.search(re.escape(fault), one) is not None for one in found] == (
        [] if fault is None else [True]
    )
