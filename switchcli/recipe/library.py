"""The recipes that ship: their names, and where a recipe lies that is given by name or by path.

No torch is imported here: listing and showing are quick.
"""

import difflib
from pathlib import Path

from switchcli.errors import RecipeError
from switchcli.recipe.yaml_nodes import name_of, read_file

SUFFIXES = (".yaml", ".yml")


def folder() -> Path:
    """The folder of the recipes: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Names of the recipes that ship, such as `quickstart/switch`, in alphabetical order."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def named(name: str) -> Path:
    """The file of the shipped recipe `name`.

    Raises:
        RecipeError: there is none; the message has the nearest name.
    """
    if name not in names():
        raise RecipeError(f"{name_of(name)}: no such recipe ships.{_hint(name)}")
    return folder() / f"{name}.yaml"


def description(name: str) -> str:
    """The one line that the shipped recipe `name` says of itself; one that it inherits would be another's."""
    root = read_file(named(name)).value
    assert isinstance(root, dict)
    return str(root["description"].value) if "description" in root else ""


def locate(name_or_path: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path from `beside` (the current folder when absent), or the name of one that ships.

    A file that exists is taken as the path. Otherwise what ends in .yaml or .yml is a path, and anything else a name.

    Raises:
        RecipeError: no such file, or no such shipped recipe; the message has the nearest name.
    """
    path = (beside or Path()) / name_or_path
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise RecipeError(f"{name_of(str(path))}: cannot be read: {error.strerror}") from error
    if is_there and not is_folder:
        return path
    if is_folder and name_or_path not in names():
        raise RecipeError(f"{name_of(name_or_path)}: a folder, not a recipe: name a .yaml file in it")
    if path.suffix in SUFFIXES:
        raise RecipeError(f"{name_of(str(path))}: no such file.{_hint(str(Path(name_or_path).with_suffix('')))}")
    return named(name_or_path)


def _hint(name: str) -> str:
    name = name.removeprefix("recipes/")
    near = [ours for ours in names() if ours.endswith(f"/{name}")] or difflib.get_close_matches(name, names(), n=1)
    return f" Did you mean {min(near, key=len)}?" if near else " `switchcli recipes list` shows those that ship."
