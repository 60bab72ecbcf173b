"""`switchcli data tokenizer train`: the vocabulary of a recipe as a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.commands.tokenizers import facts
from switchcli.data.prepare.pipeline import documents
from switchcli.errors import RecipeError, disk_errors
from switchcli.recipe.schema import on_text
from switchcli.report.console import Console
from switchcli.report.sinks import write_whole


def check_free(out: Path, *, replace: bool) -> None:
    """Raises RecipeError where no new file can be."""
    if out.is_dir():
        raise RecipeError(f"--out {out}: is a folder: name a file in it, such as {out / 'tokenizer.json'}")
    if out.exists() and not replace:
        raise RecipeError(f"--out {out}: is there already: give another name, or --force to replace it")


def train(recipe: str, overrides: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    """Trains by the recipe's data.tokenizer on its training documents, and writes `out`, whole or not at all.

    Raises:
        RecipeError: the recipe is not of plain text, or has a tokenizer already.
        DataError: the text cannot be read, or has too many characters.
    """
    data = on_text(recipe, overrides).data
    if data.tokenizer.kind != "train":
        raise RecipeError(
            f"{recipe}: data.tokenizer.kind ({data.tokenizer.kind}) must be train to train one: set "
            "data.tokenizer={kind: train, vocab_size: N}"
        )
    tokenizer = data.tokenizer.load(lambda: documents(data, console.track, held_out=False))
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, tokenizer.to_json())
    return {**facts(out, tokenizer), "character_coverage": data.tokenizer.character_coverage}
