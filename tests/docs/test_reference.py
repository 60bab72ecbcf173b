"""The generated pages: equal to what the code says, and without gaps."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOW = "run scripts/docs --reference, and commit what it writes"
PAGES = [
    *("reference/recipes.md", "reference/commands.md", "reference/exit-codes.md", "reference/python-api.md"),
    "notebooks/first-model.md",
]
PLANNED = "what-can-i-train.md"


def committed(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*PAGES, pytest.param(PLANNED, marks=pytest.mark.nightly)])
def test_a_page_is_what_the_code_says(name: str) -> None:
    import generate

    assert committed(name) == generate.FILES[f"docs/{name}"](), HOW


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
    assert len(items) > 240
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
