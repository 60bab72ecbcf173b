"""`switchcli recipes`: list, print, copy and check recipes. Results go to stdout; errors are raised."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands._options import Json
from switchcli.errors import RecipeError
from switchcli.recipe import library, yaml_nodes
from switchcli.report.console import print_json
from switchcli.report.safe_text import one_line

app = typer.Typer(name="recipes", help="List, print, copy and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The name of a shipped recipe, such as quickstart/switch.")]


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the name and description of each shipped recipe."""
    rows = [(name, library.description(name)) for name in library.recipe_names()]
    if as_json:
        print_json({"recipes": [{"name": name, "description": description} for name, description in rows]})
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, description in rows:
        typer.echo(f"{name:{width}}  {description}".rstrip())


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Print the file of a shipped recipe."""
    path = library.recipe_file(name)
    content = path.read_text(encoding="utf-8")
    if as_json:
        print_json({"name": name, "path": str(path), "text": content})
    else:
        typer.echo(content, nl=False)


@app.command()
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The new file, which must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe to change it. Its `extends` then names the shipped recipe that it extends."""
    target = library.copy_recipe(name, file)
    if as_json:
        print_json({"name": name, "file": str(target)})
    else:
        typer.echo(one_line(str(target)))


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Recipe files, or names of shipped recipes.")],
    as_json: Json = False,
) -> None:
    """Check recipes and report every error in each of them."""
    errors = {file: _errors_in(file) for file in files}
    if as_json:
        results = [{"file": file, "ok": not file_errors, "errors": file_errors} for file, file_errors in errors.items()]
        print_json({"files": results})
    else:
        for file, file_errors in errors.items():
            if not file_errors:
                typer.echo(f"{yaml_nodes.display_key(file)}: ok")
    lines = [line for file_errors in errors.values() for line in file_errors]
    if lines:
        raise RecipeError(*lines)


@app.command()
def schema(verb: Annotated[str, typer.Argument(help="The verb whose recipes an editor is to complete.")]) -> None:
    """Print the JSON Schema of a verb's recipes."""
    from switchcli.recipe.schema import RECIPES, editor_schema

    if verb not in RECIPES:
        raise RecipeError(
            f"{yaml_nodes.display_key(verb)}: no such recipe schema: there is one for {', '.join(RECIPES)}"
        )
    print_json(editor_schema(verb))


def _errors_in(file: str) -> list[str]:
    """Return a line for each error in `file`, by the schema of the verb that it names."""
    from switchcli.recipe.schema import resolve_standalone

    try:
        resolve_standalone(file)
    except RecipeError as error:
        return [one_line(line) for line in error.lines]
    return []
