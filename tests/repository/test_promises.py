"""Promises of pages: each names a test that proves it, exists, and runs by day."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_paper import REFERENCE, ROOT, rows, symbols

BY_NIGHT = {
    "test_a_run_takes_no_more_late_than_early": "takes five minutes",
    "test_any_of_four_ranks_may_fail_in_any_phase": "two ranks in two phases are an integration test",
    "test_ranks_of_any_mesh_do_the_same_about_any_number_at_any_step": "two ranks at one step are an integration test",
    "test_sums_in_any_order_differ_by_rounding": "sums in one order are an integration test",
}
"""The named tests of which all cases are nightly ones, and why they may be."""


def promises(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each promise.

    A promise is a bullet below a heading that begins with "What is promised", or a row of a table below such a heading.
    A bullet goes on over its indented lines.
    """
    inside, bullet = False, None
    lines = text.splitlines()
    numbered = {number: "|".join(cells) for number, cells in rows(text)}
    for number, line in enumerate([*lines, "## end"], start=1):
        if bullet is not None and not line.startswith("  "):
            yield bullet
            bullet = None
        if line.startswith("## "):
            inside = line.startswith("## What is promised")
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
            elif symbol not in BY_NIGHT and is_nightly(getattr(module(path), symbol)):
                yield f"{number}: all cases of {path}::{symbol} are nightly ones"


def module(path: str) -> Any:
    sys.path.insert(0, str((ROOT / path).parent))  # as pytest does
    return importlib.import_module(Path(path).stem)


def is_nightly(test: Callable[..., object]) -> bool:
    """Whether all cases of a test are nightly ones."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    cases = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    return any(mark.name == "nightly" for mark in marks) or any(
        all("nightly" in {mark.name for mark in getattr(case, "marks", ())} for case in each) for each in cases
    )


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("SECURITY.md", 9), ("docs/how-to/resume-and-failures.md", 8), ("tests/faults/README.md", 12)],
)
def test_every_promise_names_a_test_that_runs_by_day(name: str, at_least: int) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(list(promises(text))) >= at_least
    assert not list(faults(text))
