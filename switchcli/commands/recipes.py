"""`switchcli recipes`: list, print, copy, check and explain recipes. Results go to stdout; errors are raised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands._options import Json, complete_recipes, epilog
from switchcli.commands._result import Line, finish
from switchcli.errors import RecipeError
from switchcli.recipe import foreign_words, key_index, library, yaml_nodes
from switchcli.recipe.key_info import KeyInfo
from switchcli.terminal.console import print_json
from switchcli.terminal.safe_text import one_line
from switchcli.terminal.table import Table

app = typer.Typer(
    name="recipes",
    help="List, print, copy, check and explain recipes.",
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes copy quickstart/switch mine.yaml",
        "switchcli recipes explain model.router",
    ),
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(help="The name of a shipped recipe, such as quickstart/switch.", autocompletion=complete_recipes),
]


@app.command(
    "list",
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes list",
        "switchcli recipes list --json",
    ),
)
def list_recipes(as_json: Json = False) -> None:
    """List the name and description of each shipped recipe."""
    recipes = {name: library.description(name) for name in library.recipe_names()}
    result = {"recipes": [{"name": name, "description": description} for name, description in recipes.items()]}
    finish(result, as_json, [Table(("", ""), [*recipes.items()], align="left")])


@app.command(
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes show quickstart/switch",
        "switchcli recipes show pretrain/switch-c --json",
    )
)
def show(name: Name, as_json: Json = False) -> None:
    """Print the file of a shipped recipe."""
    path = library.recipe_file(name)
    content = path.read_text(encoding="utf-8")
    if as_json:
        print_json({"name": name, "path": str(path), "text": content})
    else:
        typer.echo(content, nl=False)


@app.command(
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes copy quickstart/switch mine.yaml",
        "switchcli recipes copy finetune/glue glue.yaml",
    )
)
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The new file, which must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe to a file, to change it; its `extends` names the shipped recipe that it extends."""
    target = library.copy_recipe(name, file)
    finish({"name": name, "file": str(target)}, as_json, [Line(str(target), wrap=False)])


@app.command(
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes validate mine.yaml train.steps=20",
        "switchcli recipes validate quickstart/switch finetune/glue --json",
    )
)
def validate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE ... [KEY=VALUE ...]",
            help="Recipe files or names of shipped recipes, and keys to set in each of them.",
            autocompletion=complete_recipes,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check recipes, with KEY=VALUE set in each, and report every error, without opening what they name."""
    from switchcli.recipe.schema import resolve_standalone

    overrides = [argument for argument in files if library.is_override(argument)]
    names = [argument for argument in files if argument not in overrides]
    if not names:
        raise RecipeError("FILE: missing: name the recipe that the keys are to be set in")
    errors: dict[str, list[str]] = {file: [] for file in names}
    for file in names:
        try:
            resolve_standalone(file, overrides)
        except RecipeError as error:
            errors[file] = [one_line(line) for line in error.lines]
    results = [{"file": file, "ok": not file_errors, "errors": file_errors} for file, file_errors in errors.items()]
    valid = [Line(f"{yaml_nodes.display_key(file)}: ok", wrap=False) for file, lines in errors.items() if not lines]
    lines = [line for file_errors in errors.values() for line in file_errors]
    finish({"files": results}, as_json, valid, exit_code=RecipeError.exit_code if lines and as_json else 0)
    if lines:
        raise RecipeError(*lines)


@app.command(
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes schema pretrain > pretrain.schema.json",
        "switchcli recipes schema eval",
    )
)
def schema(
    verb: Annotated[
        str,
        typer.Argument(help="The verb whose recipes an editor is to complete."),
    ],
) -> None:
    """Print the JSON Schema of a verb's recipes."""
    from switchcli.recipe.schema import RECIPES, editor_schema

    if verb not in RECIPES:
        raise RecipeError(
            f"{yaml_nodes.display_key(verb)}: no such recipe schema: there is one for {', '.join(RECIPES)}"
        )
    print_json(editor_schema(verb))


@app.command(
    epilog=epilog(
        "reference/recipes",
        "switchcli recipes explain train.batch_tokens",
        "switchcli recipes explain model.router",
    )
)
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A key such as train.steps. Default: all top-level keys.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what a recipe key means, its type and default, and the keys below it."""
    name = key_index.normalize(key) if key else ""
    meanings = key_index.meanings(name)
    below = key_index.below(name) if key else [info for info in key_index.all_keys() if "." not in info.key]
    if key and not meanings:
        names = {info.key for info in key_index.all_keys()}
        meant = foreign_words.translated(key, names) or foreign_words.nearest(key, names)
        hint = f"Did you mean {meant}?" if meant else "`switchcli recipes explain` lists top-level keys."
        raise RecipeError(f"{yaml_nodes.display_key(key)}: no such recipe key. {hint}")
    explained = [{**info._asdict(), "example": key_index.example(info)} for info in meanings]
    result = {"key": name, "meanings": explained, "below": [info._asdict() for info in below]}
    # Meanings that differ only in default and description between verbs share a table.
    alike: dict[object, list[KeyInfo]] = {}
    for info in meanings:
        alike.setdefault((info.type, info.choices, info.when), []).append(info)
    tables = [_explanation(group) for group in alike.values()] + ([_overview(below)] if below else [])
    finish(result, as_json, tables)


def _explanation(infos: Sequence[KeyInfo]) -> Table:
    """Return a table that explains meanings of a key that differ only in default and description."""

    def by_verbs(texts: Sequence[str]) -> list[str]:
        if len(set(texts)) == 1:
            return [texts[0]]
        return [f"{', '.join(info.verbs)}: {text}" for info, text in zip(infos, texts, strict=True)]

    first = infos[0]
    texts = {
        "verbs": [", ".join(verb for info in infos for verb in info.verbs)],
        "with": [" or ".join(first.when)],
        "type": [first.type],
        "choices": [", ".join(first.choices)],
        "default": by_verbs(["none: the key is required" if info.default is None else info.default for info in infos]),
        "meaning": by_verbs([info.description for info in infos]),
        "example": [key_index.example(first)],
    }
    rows = [
        ("" if number else heading, text)
        for heading, lines in texts.items()
        for number, text in enumerate(lines)
        if text
    ]
    return Table(("", ""), rows, first.key, align="left")


def _overview(infos: Sequence[KeyInfo]) -> Table:
    """Return a table of keys with their meanings and defaults."""
    names = [info.key for info in infos]
    rows = []
    for info in infos:
        condition = key_index.kinds(info)
        if not condition and names.count(info.key) > 1:
            condition = info.verbs
        meaning = f"One of {', '.join(info.choices)}." if info.key.endswith(".kind") else info.description
        default = "Required." if info.default is None else f"Default: {info.default}"
        rows.append((info.key, f"{', '.join(condition)}: {meaning} {default}" if condition else f"{meaning} {default}"))
    return Table(("", ""), rows, align="left", folds_names=False)
