"""`switchcli data`: prepare text before a run, and work with tokenizers. Imports torch only when it reads a recipe."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from switchcli.commands import _exit, _tokenizers
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, Overrides, Quiet, Recipe
from switchcli.commands._result import Line, finish
from switchcli.report.console import Console
from switchcli.report.table import Table
from switchcli.report.units import binary

app = typer.Typer(
    name="data",
    help="Prepare the text of a recipe, and work with tokenizers.",
    epilog=epilog(
        "how-to/own-text",
        "switchcli data prepare quickstart/switch",
        "switchcli data tokenizer show runs/quickstart/switch",
    ),
    no_args_is_help=True,
)
app.add_typer(_tokenizers.group)


@app.command(
    epilog=epilog(
        "how-to/own-text",
        "switchcli data prepare quickstart/switch",
        "switchcli data prepare pretrain/wikipedia --processes 4",
    )
)
@_exit.interruptible()
def prepare(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Tokenize by this model's tokenizer, for a run that starts from the model.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of processes on this machine. Default: one per processor; for less than 8 MiB, one.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare prepared text with its checksums, and prepare damaged text again."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokenize a recipe's text once, with all processors; the same command resumes after a stop."""
    from switchcli.runs.text import text_preparation

    result = text_preparation.prepare(
        recipe,
        overrides or [],
        Console(quiet=quiet),
        model=model,
        processes=processes,
        check=check,
    )
    finish(result, as_json, _shown(result))


def _shown(result: Mapping[str, Any]) -> Iterator[Table | Line]:
    """Yield the size and the folder of each text."""
    from switchcli.data.prepare.prepared_text import SPLITS

    texts = {label or "text": text for label, text in result["texts"].items()}
    rows = []
    for label, text in texts.items():
        train, held_out = (text[part] for part in SPLITS)
        counts = (train["documents"], train["tokens"], held_out["documents"], held_out["tokens"])
        rows.append((label, *counts, binary(train["bytes"] + held_out["bytes"])))
    yield Table(("", "documents", "tokens", "held out", "tokens", "text"), rows, "prepared")
    for label, text in texts.items():
        if dropped := ", ".join(f"{count:,} {reason}" for reason, count in text["dropped"].items() if count):
            yield Line(f"left out of {label}: {dropped}")
        yield Line(f"{label}: {text['folder']}")
