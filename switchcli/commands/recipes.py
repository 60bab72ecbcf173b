"""`switchcli recipes`: the recipes that ship, and whether one is sound. Results go to stdout, errors are raised."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.errors import RecipeError
from switchcli.recipe import library, yaml_nodes
from switchcli.report.console import print_json
from switchcli.report.safe_text import one_line

app = typer.Typer(name="recipes", help="The recipes that ship, and whether one is sound.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name and description of each recipe that ships."""
    rows = [(name, library.description(name)) for name in library.recipe_names()]
    if as_json:
        print_json({"recipes": [{"name": name, "description": described} for name, described in rows]})
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, described in rows:
        typer.echo(f"{name:{width}}  {described}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="Such as quickstart/switch.")], as_json: Json = False) -> None:
    """Print the file of a recipe that ships."""
    path = library.recipe_file(name)
    content = path.read_text(encoding="utf-8")
    if as_json:
        print_json({"name": name, "path": str(path), "text": content})
    else:
        typer.echo(content, nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Such as quickstart/switch.")],
    file: Annotated[Path, typer.Argument(help="The new file; it must not be there yet.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe that ships, to change it. What it extends is then named as it ships."""
    target = library.copy_recipe(name, file)
    if as_json:
        print_json({"name": name, "file": str(target)})
    else:
        typer.echo(one_line(str(target)))


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Paths, or names of recipes that ship.")],
    as_json: Json = False,
) -> None:
    """Check recipes and report everything that is wrong with any of them."""
    errors = {file: _errors(file) for file in files}
    if as_json:
        print_json({"files": [{"file": file, "ok": not found, "errors": found} for file, found in errors.items()]})
    else:
        for file in (file for file, found in errors.items() if not found):
            typer.echo(f"{yaml_nodes.display_key(file)}: ok")
    if broken := [line for found in errors.values() for line in found]:
        raise RecipeError(*broken)


@app.command()
def schema(verb: Annotated[str, typer.Argument(help="The command whose recipes an editor is to complete.")]) -> None:
    """Print the JSON Schema of a verb's recipes."""
    from switchcli.recipe.schema import RECIPES, editor_schema

    if verb not in RECIPES:
        raise RecipeError(
            f"{yaml_nodes.display_key(verb)}: no such recipe schema: there is one for {', '.join(RECIPES)}"
        )
    print_json(editor_schema(verb))


def _errors(file: str) -> list[str]:
    """Everything wrong with `file`, one line each, by the schema of the verb that it names."""
    from switchcli.recipe.schema import resolve_standalone

    try:
        resolve_standalone(file)
    except RecipeError as error:
        return [one_line(line) for line in error.lines]
    return []
