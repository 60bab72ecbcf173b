"""The files that are made from the code."""

from collections.abc import Callable
from pathlib import Path

import notebook_page
import pages
import planner_page
import recipe_keys

ROOT = Path(__file__).resolve().parents[2]
FILES: dict[str, Callable[[], str]] = {
    "switchcli/recipe/keys.json": lambda: recipe_keys.as_json(recipe_keys.key_index()),
    "docs/reference/recipes.md": pages.recipes,
    "docs/reference/commands.md": pages.commands,
    "docs/reference/exit-codes.md": pages.exit_codes,
    "docs/reference/python-api.md": pages.python_api,
    "docs/what-can-i-train.md": planner_page.what_can_i_train,
    "docs/notebooks/first-model.md": notebook_page.first_model,
}
"""The text of each generated file, by its path from the root. Later files are made from earlier ones."""


def write_files() -> None:
    """Write the files whose text has changed, and print their names."""
    for name, text_of in FILES.items():
        path, text = ROOT / name, text_of()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
