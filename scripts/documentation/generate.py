"""The parts of pages, between two comments, that are made from the code."""

from collections.abc import Callable
from pathlib import Path

import notebook_page
import pages
import planner_page

ROOT = Path(__file__).resolve().parents[2]
PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "docs/reference/recipes.md": ("the docstrings of the fields", pages.recipes),
    "docs/reference/commands.md": ("the help texts in switchcli/commands", pages.commands),
    "docs/reference/python-api.md": ("the docstrings of switchcli/api.py", pages.python_api),
    "docs/what-can-i-train.md": ("the numbers of the planner", planner_page.sizes_by_machine),
    "docs/notebooks/first-model.md": ("the notebook", notebook_page.first_model),
}
"""What a page's part is made from, and its text, by the path of the page from the root."""
BEGIN = "<!-- From here on made from {source} by scripts/docs --reference: edit that instead. -->"
END = "<!-- To here. -->"


def page(name: str) -> str:
    """Return a page with its part made anew. The text before and after the part stays."""
    source, part = PARTS[name]
    begin = BEGIN.format(source=source)
    before, found, rest = (ROOT / name).read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(END)
    assert found, f"{name} has no line {begin}"
    assert found_end, f"{name} has no line {END}"
    return f"{before}{begin}\n\n{part().strip()}\n\n{END}{after}"


def write_files() -> None:
    """Write the pages whose text has changed, and print their names."""
    for name in PARTS:
        path, text = ROOT / name, page(name)
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
