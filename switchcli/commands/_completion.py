"""Shell completion of the names of recipes. Nothing here imports torch, because each TAB starts a process.

A completer returns no candidate where the shell's own completion of paths serves.
"""

import typer

from switchcli.recipe import library


def recipes(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe: after a verb with recipes, of its own ones."""
    names = [name for name in library.recipe_names() if name.startswith(incomplete)]
    verb = context.command.name
    return [name for name in names if library.verb(name) == verb] if verb in library.VERBS else names


def first_recipe(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the first word of `[RECIPE] [KEY=VALUE ...]`, as `recipes` does."""
    return [] if context.params.get("arguments") else recipes(context, incomplete)
