"""The recipes that ship with the package: list, describe, locate and copy them.

This module does not import torch, so that listing and showing are fast.
"""

import difflib
import errno
import os
import re
from pathlib import Path
from typing import Final

from switchcli.errors import RecipeError, disk_errors
from switchcli.recipe.yaml_nodes import Node, display_key, display_path, read_file
from switchcli.system import publish
from switchcli.system.user_files import expand_home

VERBS: Final = ("pretrain", "finetune", "distill", "eval")
"""The verbs that have recipes. Each writes a result.json."""
SUFFIXES = (".yaml", ".yml")
KEY_VALUE: Final = re.compile(r"[A-Za-z_][\w.\[\]-]*=", re.ASCII)
"""The beginning of an argument that sets a key of a recipe. A - and brackets are in what users type, not in a key."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Error numbers that concern the whole disk: another name on it does not help."""


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship, such as `quickstart/switch`, in alphabetical order."""
    root = recipes_folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of the shipped recipe `name`.

    Raises:
        RecipeError: there is no such recipe; the message has the nearest name.
    """
    if name not in recipe_names():
        raise RecipeError(f"{display_key(name)}: no such recipe ships.{_hint(name)}")
    return recipes_folder() / f"{name}.yaml"


def verb(name: str) -> str:
    """Return the verb of the shipped recipe `name`, which it or a recipe that it extends states."""
    keys: dict[str, Node] = {}
    for layer in read_layers(recipe_file(name)):
        assert isinstance(layer.value, dict)
        keys |= layer.value
    return verb_of(Node(keys, name)) or "pretrain"


def verb_of(tree: Node) -> str | None:
    """Return the verb of a recipe: the one that it states, else the one whose keys it has; None if it may be any."""
    if (verb := tree.stated("verb")) is not None:
        return str(verb)
    if tree.stated("distill") is not None or tree.stated("student") is not None:
        return "distill"
    if tree.stated("train") is None:
        return None
    return "pretrain" if tree.stated("tasks") is None else "finetune"


def read_layers(path: Path) -> list[Node]:
    """Return the file at `path` and all that it extends, without their `extends`, the lowest first."""
    return [*read_files(path).values()][::-1]


def read_files(path: Path) -> dict[Path, Node]:
    """Return the file at `path` and all that it extends, without their `extends`, by path, the lowest last."""
    layers: dict[Path, Node] = {}
    seen = {path.resolve()}
    while True:
        root = layers[path] = read_file(path)
        if not isinstance(root.value, dict):
            raise RecipeError(f"{root.where}: a recipe is a mapping of keys, such as `model: {{size: tiny}}`")
        if len(layers) > 1:
            root.value.pop("description", None)  # it describes the recipe that is extended
        extends = root.value.pop("extends", None)
        if extends is None:
            return layers
        if not isinstance(extends.value, str):
            raise RecipeError(f"{extends.where}: extends: must be the path of one recipe; there can be only one")
        try:
            path = locate(extends.value, beside=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{extends.where}: extends: {error}") from error
        if path.resolve() in seen:
            raise RecipeError(f"{extends.where}: extends: a circle: {display_path(path)} extends this file")
        seen.add(path.resolve())


def list_file(name_or_path: str) -> Path:
    """Return the file of a list of runs: the path itself, or else the list that ships: `paper/table1/small.runs`."""
    shipped = {path.relative_to(recipes_folder()).as_posix(): path for path in recipes_folder().rglob("*.runs")}
    path = Path(name_or_path)
    return path if os.path.lexists(path) else shipped.get(name_or_path.removeprefix("recipes/"), path)


def shipped_name(path: str) -> str | None:
    """Return the name of the shipped recipe whose file is at `path`, or None if it is none of them."""
    root, file = recipes_folder().resolve(), Path(path).resolve()
    name = file.relative_to(root).with_suffix("").as_posix() if file.is_relative_to(root) else None
    return name if name in recipe_names() else None


def description(name: str) -> str:
    """Return the `description` of the shipped recipe `name`, or "". An inherited one is ignored: it is the parent's."""
    root = read_file(recipe_file(name)).value
    assert isinstance(root, dict)
    return str(root["description"].value) if "description" in root else ""


def is_override(argument: str) -> bool:
    """Return whether an argument of the command line sets a key, as KEY=VALUE, and is not the name of a file."""
    return KEY_VALUE.match(argument) is not None and not os.path.lexists(argument)


def locate(name_or_path: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe, given as a path relative to `beside` or as the name of a recipe that ships.

    `beside` defaults to the current folder, and `~` is the home folder. If the file exists, the argument is its path.
    Otherwise it is a path if it ends in .yaml or .yml, and a name if not.

    Raises:
        RecipeError: no such file, or no such shipped recipe; the message has the nearest name.
    """
    if beside is None and is_override(name_or_path):
        raise RecipeError(f"{name_or_path.partition('=')[0]}=...: is no recipe: the recipe comes first, then KEY=VALUE")
    path = Path(name_or_path)
    try:
        path = (beside or Path()) / expand_home(name_or_path)
        exists, is_folder = path.exists(), path.is_dir()
    except ValueError as error:
        raise RecipeError(f"{display_key(name_or_path)}: {error}") from error
    except OSError as error:  # a name too long, a folder that may not be entered
        raise RecipeError(f"{display_key(str(path))}: cannot be read: {error.strerror}") from error
    if exists and not is_folder:
        return path
    if is_folder and name_or_path not in recipe_names():
        raise RecipeError(f"{display_key(name_or_path)}: a folder, not a recipe: name a .yaml file in it")
    if path.suffix in SUFFIXES:
        raise RecipeError(f"{display_key(str(path))}: no such file.{_hint(str(Path(name_or_path).with_suffix('')))}")
    return recipe_file(name_or_path)


def _hint(name: str) -> str:
    """Return a sentence with the recipe that the user may have meant, to append to a message."""
    name = name.removeprefix("recipes/")
    candidates = [known for known in recipe_names() if known.endswith(f"/{name}")]
    candidates = candidates or difflib.get_close_matches(name, recipe_names(), n=1)
    if not candidates:
        return " `switchcli recipes list` shows those that ship."
    return f" Did you mean {min(candidates, key=len)}?"


def copy_recipe(name: str, target: Path) -> Path:
    """Copy the shipped recipe `name` to `target`, a new file or a folder, and return the new file.

    Raises:
        RecipeError: no such recipe, or the file exists or cannot be written.
        CheckpointError: the disk is full or broken.
    """
    source = recipe_file(name)
    target = target / source.name if target.is_dir() else target
    with disk_errors(target, "give another name"):
        try:
            publish.write_file(target, _standalone_text(source), replace=False)
        except FileExistsError as error:
            raise RecipeError(f"{target}: exists already: give another name, or remove it first") from error
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            raise RecipeError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def _standalone_text(source: Path) -> str:
    """Return the text of a shipped recipe, with the path after `extends` replaced by the name of that recipe."""
    root = read_file(source).value
    content = source.read_text(encoding="utf-8")
    if not isinstance(root, dict) or "extends" not in root:
        return content
    parent = locate(str(root["extends"].value), beside=source.parent).resolve()
    name = parent.relative_to(recipes_folder().resolve()).with_suffix("").as_posix()
    return re.sub(r"(?m)^extends *:.*?(\s+#.*)?$", lambda line: f"extends: {name}{line[1] or ''}", content)
