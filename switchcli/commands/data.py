"""`switchcli data`: text as ids before a run, and tokenizers. No torch until a recipe is read."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import exit
from switchcli.commands.arguments import Json, Overrides, Quiet, Recipe
from switchcli.report.console import Console
from switchcli.report.output import print_json
from switchcli.report.safe_text import one_line

app = typer.Typer(help="What a run reads: text as ids, and tokenizers.", no_args_is_help=True)
tokenizer = typer.Typer(help="Train a tokenizer, look at one, compare some.", no_args_is_help=True)
app.add_typer(tokenizer, name="tokenizer")

A_TOKENIZER = "A tokenizer.json, a spiece.model, or the folder of a run, a checkpoint or a Hugging Face model."


@app.command()
def prepare(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Cut by this model's vocabulary, for a run that starts from it.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="At once on this machine; all processors when absent.", show_default=False)
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Make the I-th of N shares; N machines with one cache.", show_default=False),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare what is there with its checksums; what is damaged is made anew."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut a recipe's text into ids, once, with all processors; the same command goes on after a stop."""
    with exit.stoppable():
        from switchcli.commands import preparation

        console = Console(quiet=quiet)
        options = preparation.Options(model, processes, share, check)
        result = preparation.prepare(recipe, overrides or [], options, console)
        if as_json:
            print_json(result)
        else:
            preparation.show(result, Console(quiet=quiet, stream=sys.stdout))


@tokenizer.command()
def train(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The new file.", show_default=False)],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the vocabulary of a recipe's data.tokenizer (kind: train) on its training documents; write it as a file."""
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import tokenizers, vocabularies

        vocabularies.check_free(out, replace=force)
        found = vocabularies.train(recipe, overrides or [], out, Console(quiet=quiet))
        if as_json:
            print_json(found)
        else:
            tokenizers.show(found)
            typer.echo(f"\n{one_line(f'in a recipe: data.tokenizer={{kind: file, path: {out}}}')}")


@tokenizer.command()
def show(
    name: Annotated[Path, typer.Argument(metavar="TOKENIZER", help=A_TOKENIZER, show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Cut into pieces; <extra_id_0> is a sentinel.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """How many ids there are of what, and the pieces of each TEXT."""
    from switchcli.commands import tokenizers

    used = tokenizers.opened(name)
    found, cut = tokenizers.facts(name, used), tokenizers.cut(used, texts or [])
    if as_json:
        print_json({**found, "texts": cut})
    else:
        tokenizers.show(found)
        tokenizers.show_cut(cut)


@tokenizer.command()
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
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import tokenizers

        compared = tokenizers.compare(arguments, on, text or [], Console(quiet=quiet))
        if as_json:
            print_json(compared.to_json())
        else:
            tokenizers.show_compared(compared)
