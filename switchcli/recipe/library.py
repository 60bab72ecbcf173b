"""The recipes that ship: their names, and where a recipe lies that is given by name or by path.

No torch is imported here: listing and showing are quick.
"""

import difflib
import errno
import re
from pathlib import Path

from switchcli import publish
from switchcli.errors import RecipeError, disk_errors
from switchcli.recipe.yaml_nodes import display_key, read_file

SUFFIXES = (".yaml", ".yml")
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors that another name on the same disk does not avoid."""


def recipes_folder() -> Path:
    """The folder of the recipes: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship, such as `quickstart/switch`, in alphabetical order."""
    root = recipes_folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of the shipped recipe `name`.

    Raises:
        RecipeError: there is none; the message has the nearest name.
    """
    if name not in recipe_names():
        raise RecipeError(f"{display_key(name)}: no such recipe ships.{_hint(name)}")
    return recipes_folder() / f"{name}.yaml"


def description(name: str) -> str:
    """The one line that the shipped recipe `name` says of itself; one that it inherits would be another's."""
    root = read_file(recipe_file(name)).value
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
        raise RecipeError(f"{display_key(str(path))}: cannot be read: {error.strerror}") from error
    if is_there and not is_folder:
        return path
    if is_folder and name_or_path not in recipe_names():
        raise RecipeError(f"{display_key(name_or_path)}: a folder, not a recipe: name a .yaml file in it")
    if path.suffix in SUFFIXES:
        raise RecipeError(f"{display_key(str(path))}: no such file.{_hint(str(Path(name_or_path).with_suffix('')))}")
    return recipe_file(name_or_path)


def _hint(name: str) -> str:
    name = name.removeprefix("recipes/")
    near = [ours for ours in recipe_names() if ours.endswith(f"/{name}")] or difflib.get_close_matches(
        name, recipe_names(), n=1
    )
    return f" Did you mean {min(near, key=len)}?" if near else " `switchcli recipes list` shows those that ship."


def copy_recipe(name: str, target: Path) -> Path:
    """Write a copy of the shipped recipe `name` to `target`, a new file or a folder for it, and return the new file.

    Raises:
        RecipeError: no such recipe, or the file is there already or cannot be written.
        CheckpointError: the disk is full or broken.
    """
    source = recipe_file(name)
    target = target / source.name if target.is_dir() else target
    with disk_errors(target, "give another name"):
        try:
            publish.write_file(target, _free_standing(source), replace=False)
        except FileExistsError as error:
            raise RecipeError(f"{target}: is there already: give another name, or remove it first") from error
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            raise RecipeError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def _free_standing(source: Path) -> str:
    """Return the text of `source` with the recipe that it extends named as it ships."""
    root = read_file(source).value
    content = source.read_text(encoding="utf-8")
    if not isinstance(root, dict) or "extends" not in root:
        return content
    parent = locate(str(root["extends"].value), beside=source.parent).resolve()
    name = parent.relative_to(recipes_folder().resolve()).with_suffix("").as_posix()
    return re.sub(r"(?m)^extends *:.*?(\s+#.*)?$", lambda line: f"extends: {name}{line[1] or ''}", content)
