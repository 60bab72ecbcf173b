"""`switchcli data tokenizer`: train a tokenizer, look at one, compare some. No torch until a recipe is read."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Json, Overrides, Quiet, Recipe
from switchcli.report.console import Console, print_json
from switchcli.report.safe_text import one_line

if TYPE_CHECKING:
    from switchcli.runs.vocabularies import TokenizerComparison

group = typer.Typer(name="tokenizer", help="Train a tokenizer, look at one, compare some.", no_args_is_help=True)

A_TOKENIZER = "A tokenizer.json, a spiece.model, or the folder of a run, a checkpoint or a Hugging Face model."
_TABLES: Final = (
    ("Tokens a byte of text", "tokens_per_byte", ".4f"),
    ("Tokens that are unknown", "unknown", ".2%"),
    ("Tokens that are a byte of a character without a piece", "byte_fallback", ".2%"),
)


@group.command()
def train(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The new file.", show_default=False)],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the vocabulary of a recipe's data.tokenizer (kind: train) on its training documents; write it as a file."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import vocabularies

        vocabularies.check_free(out, replace=force)
        found = vocabularies.train(recipe, overrides or [], out, Console(quiet=quiet))
        if as_json:
            print_json(found)
        else:
            _show(found)
            typer.echo(f"\n{one_line(f'in a recipe: data.tokenizer={{kind: file, path: {out}}}')}")


@group.command()
def show(
    name: Annotated[Path, typer.Argument(metavar="TOKENIZER", help=A_TOKENIZER, show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Cut into pieces; <extra_id_0> is a sentinel.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """How many ids there are of what, and the pieces of each TEXT."""
    from switchcli.runs import vocabularies

    used = vocabularies.open_tokenizer(name)
    found, cut = vocabularies.tokenizer_facts(name, used), vocabularies.encode_texts(used, texts or [])
    if as_json:
        print_json({**found, "texts": cut})
    else:
        _show(found)
        _show_cut(cut)


@group.command()
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER [TOKENIZER ...] [KEY=VALUE ...]",
            help=f"{A_TOKENIZER} Then keys of the recipe to set.",
            show_default=False,
        ),
    ],
    on: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Measure on its held-out documents.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Measure on this text as well; may be repeated.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokens a byte, and the shares of unknown and of byte tokens, of each language or corpus."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import vocabularies

        compared = vocabularies.compare(arguments, on, text or [], Console(quiet=quiet))
        if as_json:
            print_json(compared.to_json())
        else:
            _show_compared(compared)


def _show(found: Mapping[str, Any]) -> None:
    """Print the facts about a tokenizer on stdout."""
    rows = {
        key.replace("_", " "): ("no", "yes")[value] if isinstance(value, bool) else value
        for key, value in found.items()
        if key != "tokenizer"
    }
    Console(stream=sys.stdout).table(found["tokenizer"], rows)


def _show_cut(texts: Iterable[Mapping[str, Any]]) -> None:
    for one in texts:
        typer.echo(f"\n{one_line(one['text'])}")
        typer.echo(f"pieces  {' '.join(map(one_line, one['pieces']))}")
        typer.echo(f"ids     {' '.join(map(str, one['ids']))}")


def _show_compared(compared: "TokenizerComparison") -> None:
    """Print a table of the tokenizers on stdout, and for each measure a table with a row for each text."""
    console = Console(stream=sys.stdout)
    columns = ("vocab_size", "pieces", "sentinels")
    rows = [
        (f"{place}  {one['tokenizer']}", *(f"{one[key]:,}" for key in columns))
        for place, one in enumerate(compared.tokenizers, start=1)
    ]
    console.rows("Tokenizers", ("", *(column.replace("_", " ") for column in columns)), rows)
    headings = ("", "bytes", *(str(place) for place in range(1, len(rows) + 1)))
    for title, key, form in _TABLES:
        found = [row.to_json() for row in (*compared.rows, compared.total)]
        if any(one[key] for row in found for one in row["measured"]):
            cells = (["-" if one[key] is None else format(one[key], form) for one in row["measured"]] for row in found)
            lines = ((row["text"], f"{row['bytes']:,}", *line) for row, line in zip(found, cells, strict=True))
            console.rows(title, headings, lines)
