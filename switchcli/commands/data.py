"""`switchcli data`: text as ids before a run, and tokenizers. No torch until a recipe is read."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from switchcli.commands import _exit, tokenizers
from switchcli.commands._options import Json, Overrides, Quiet, Recipe
from switchcli.report.console import Console, print_json
from switchcli.report.units import binary

app = typer.Typer(name="data", help="What a run reads: text as ids, and tokenizers.", no_args_is_help=True)
app.add_typer(tokenizers.group)


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
    with _exit.interruptible():
        from switchcli.runs import text_preparation

        result = text_preparation.prepare(
            recipe,
            overrides or [],
            Console(quiet=quiet),
            model=model,
            processes=processes,
            share=share,
            check=check,
        )
        if as_json:
            print_json(result)
        else:
            _show(result, Console(quiet=quiet, stream=sys.stdout))


def _show(result: Mapping[str, Any], console: Console) -> None:
    """Print how much there is of each text."""
    from switchcli.data.prepare.prepared_text import SPLITS

    there = {label or "text": text for label, text in result["texts"].items() if text is not None}
    rows = []
    for label, text in there.items():
        train, held_out = (text[part] for part in SPLITS)
        figures = (train["documents"], train["tokens"], held_out["documents"], held_out["tokens"])
        rows.append([label, *(f"{figure:,}" for figure in figures), binary(train["bytes"] + held_out["bytes"])])
    console.rows("prepared", ("", "documents", "tokens", "held out", "tokens", "text"), rows)
    for label, text in there.items():
        if said := ", ".join(f"{number:,} {reason}" for reason, number in text["dropped"].items() if number):
            console.message(f"left out of {label}: {said}")
        console.message(f"{label}: {text['folder']}")
