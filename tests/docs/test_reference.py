"""The pages of the reference: what the code says, and without gaps."""

import re
from pathlib import Path

import pytest

from switchcli import errors
from switchcli.planner import devices

ROOT = Path(__file__).resolve().parents[2]
HOW = "run scripts/docs --reference, and commit what it writes"
PAGES = ["reference/recipes.md", "reference/commands.md", "reference/python-api.md", "notebooks/first-model.md"]
PLANNED = "what-can-i-train.md"


def committed(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*PAGES, pytest.param(PLANNED, marks=pytest.mark.nightly)])
def test_a_page_is_what_the_code_says(name: str) -> None:
    import generate

    assert committed(name) == generate.page(f"docs/{name}"), HOW


def test_the_page_of_exit_codes_has_every_code_and_every_class() -> None:
    text = committed("reference/exit-codes.md")
    # An error about another rank has the code of that rank. The Python API raises KeyboardInterrupt itself.
    kinds = {errors.SwitchError, *errors.SwitchError.__subclasses__()} - {errors.OtherRankError, errors.RankError}
    codes = {
        ("KeyboardInterrupt" if kind is errors.InterruptedByForce else kind.__name__, kind.exit_code) for kind in kinds
    }
    assert {(name, int(code)) for name, code in re.findall(r"^\| `(\w+)` \| (\d+) \|$", text, re.MULTILINE)} == codes
    assert {int(code) for code in re.findall(r"^\| (\d+) \| \w", text, re.MULTILINE)} == {
        0,
        *(code for _, code in codes),
    }


def test_the_page_of_sizes_has_the_assumptions_of_the_planner() -> None:
    prose = " ".join(committed(PLANNED).split())
    assert f"leaves {devices.RESERVED_FRACTION:.0%} of the memory free" in prose
    assert f"{devices.UTILIZATION:.0%} of the FLOP/s" in prose


def test_every_option_and_argument_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in committed("reference/commands.md").splitlines() if line.startswith("| ")]
    assert len(rows) > 150
    for row in rows:
        assert row[1].strip(), f"{row[0]}: add a help text"


def test_every_command_has_a_section_with_usage() -> None:
    text = committed("reference/commands.md")
    sections = re.findall(r"^## (switchcli [\w ]+)\n\n(.+)\n\n```text\n\1", text, re.MULTILINE)
    assert len(sections) >= 18
    assert all(len(meaning) > 10 for _, meaning in sections)


def test_every_key_has_a_meaning() -> None:
    items = re.findall(r"^- \*\*`([\w.\[\]]+)`\*\*: (.+)<br>\n  (.*)$", committed("reference/recipes.md"), re.MULTILINE)
    assert len(items) > 160
    for key, about, meaning in items:
        assert "default" in about or "required" in about, key
        assert meaning.strip(), key


def test_every_name_of_the_api_has_a_docstring() -> None:
    import switchcli

    text = committed("reference/python-api.md")
    for name in getattr(switchcli, "__all__", ()):
        assert name == "errors" or re.search(rf"^## switchcli\.{name}\n\n.", text, re.MULTILINE), name
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"^[A-Z].*\.", section.partition("\n")[2], re.MULTILINE), section[:60]
    assert not re.findall(r"^\| `\w+` \| .* \|  \|$", text, re.MULTILINE)
