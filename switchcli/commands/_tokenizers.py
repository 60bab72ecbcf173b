"""`switchcli data tokenizer`: train, show and compare tokenizers. Imports torch only when it reads a recipe."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from switchcli.commands import _completion, _exit
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, Overrides, Quiet, Recipe
from switchcli.recipe import yaml_nodes
from switchcli.report.console import Console, print_json
from switchcli.report.safe_text import one_line, shell_words

if TYPE_CHECKING:
    from switchcli.runs.tokenizer_tools import TokenizerComparison

group = typer.Typer(
    name="tokenizer",
    help="Train, show and compare tokenizers.",
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer train quickstart/switch --out tokenizer.json",
        "switchcli data tokenizer show tokenizer.json",
    ),
    no_args_is_help=True,
)

A_TOKENIZER = "A tokenizer.json, a spiece.model, or the folder of a run, a checkpoint or a Hugging Face model."
_MEASURES: Final = (
    ("Tokens a byte of text", "tokens_per_byte", ".4f"),
    ("Tokens that are unknown", "unknown", ".2%"),
    ("Tokens that are a byte of a character without a piece", "byte_fallback", ".2%"),
)
"""Title, JSON key and number format of each measure's table."""


@group.command(
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer train quickstart/switch --out tokenizer.json",
        "switchcli data tokenizer train pretrain/wikipedia --out wiki.json --force",
    )
)
def train(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new file.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the tokenizer of a recipe (data.tokenizer, kind: train) on its training documents, and write a file."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import tokenizer_tools

        tokenizer_tools.check_free(out, replace=force)
        facts = tokenizer_tools.train(recipe, overrides or [], out, Console(quiet=quiet))
        if as_json:
            print_json(facts)
        else:
            _show_facts(facts)
            _show_use(out)


@group.command(
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer show runs/quickstart/switch",
        'switchcli data tokenizer show tokenizer.json "Guten Morgen, <extra_id_0>"',
    )
)
def show(
    name: Annotated[Path, typer.Argument(metavar="TOKENIZER", help=A_TOKENIZER)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Texts to tokenize, in which <extra_id_0> is a sentinel."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the numbers of pieces and sentinels of a tokenizer, and the pieces of each TEXT."""
    from switchcli.runs import tokenizer_tools

    tokenizer = tokenizer_tools.open_tokenizer(name)
    facts = tokenizer_tools.tokenizer_facts(name, tokenizer)
    tokenized = tokenizer_tools.encode_texts(tokenizer, texts or [])
    if as_json:
        print_json({**facts, "texts": tokenized})
    else:
        _show_facts(facts)
        _show_tokenized(tokenized)


@group.command(
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer compare tokenizer.json spiece.model --text a.txt",
        "switchcli data tokenizer compare tokenizer.json --on quickstart/switch",
    )
)
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER [TOKENIZER ...] [KEY=VALUE ...]", help=f"{A_TOKENIZER} Then recipe keys to set."
        ),
    ],
    on: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Measure on this recipe's held-out documents.",
            autocompletion=_completion.recipes,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Measure on this text too; the option may be repeated."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare tokens per byte, and the fractions of unknown and of byte tokens, for each language or corpus."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import tokenizer_tools

        comparison = tokenizer_tools.compare(arguments, on, text or [], Console(quiet=quiet))
        if as_json:
            print_json(comparison.to_json())
        else:
            _show_comparison(comparison)


def _show_facts(facts: Mapping[str, Any]) -> None:
    """Print the facts about a tokenizer on stdout."""
    rows = {
        key.replace("_", " "): ("no", "yes")[value] if isinstance(value, bool) else value
        for key, value in facts.items()
        if key != "tokenizer"
    }
    Console(stream=sys.stdout).table(facts["tokenizer"], rows)


def _show_use(file: Path) -> None:
    """Print how a run uses the tokenizer: an override to paste into a shell, and lines to paste into a recipe."""
    value = {"kind": "file", "path": str(file)}
    override = f"data.tokenizer={yaml_nodes.write(value, in_one_line=True).strip()}"
    typer.echo(f"\non the command line:\n  {shell_words(override)}\nin a recipe:")
    for line in yaml_nodes.write({"data": {"tokenizer": value}}).splitlines():
        typer.echo(f"  {one_line(line)}")


def _show_tokenized(texts: Iterable[Mapping[str, Any]]) -> None:
    for text in texts:
        typer.echo(f"\n{one_line(text['text'])}")
        typer.echo(f"pieces  {' '.join(map(one_line, text['pieces']))}")
        typer.echo(f"ids     {' '.join(map(str, text['ids']))}")


def _show_comparison(comparison: "TokenizerComparison") -> None:
    """Print a table of the tokenizers on stdout, then for each measure a table with a row for each text."""
    console = Console(stream=sys.stdout)
    columns = ("vocab_size", "pieces", "sentinels")
    tokenizer_rows = [
        (f"{number}  {facts['tokenizer']}", *(f"{facts[key]:,}" for key in columns))
        for number, facts in enumerate(comparison.tokenizers, start=1)
    ]
    console.rows("Tokenizers", ("", *(column.replace("_", " ") for column in columns)), tokenizer_rows)
    headings = ("", "bytes", *(str(number) for number in range(1, len(tokenizer_rows) + 1)))
    texts = [text.to_json() for text in (*comparison.texts, comparison.total)]
    for title, key, number_format in _MEASURES:
        if not any(measured[key] for text in texts for measured in text["measured"]):
            continue  # such as the byte tokens of tokenizers without byte fallback
        rows = []
        for text in texts:
            values = [measured[key] for measured in text["measured"]]
            cells = ["-" if value is None else format(value, number_format) for value in values]
            rows.append((text["text"], f"{text['bytes']:,}", *cells))
        console.rows(title, headings, rows)
