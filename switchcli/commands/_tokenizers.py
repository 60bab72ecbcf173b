"""`switchcli data tokenizer`: train and show tokenizers. Imports torch only when it reads a recipe."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli.commands import _exit
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, Overrides, Quiet, Recipe
from switchcli.recipe import yaml_nodes
from switchcli.report.console import Console, print_json
from switchcli.report.safe_text import one_line, shell_words

group = typer.Typer(
    name="tokenizer",
    help="Train and show tokenizers.",
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer train quickstart/switch --out tokenizer.json",
        "switchcli data tokenizer show tokenizer.json",
    ),
    no_args_is_help=True,
)

A_TOKENIZER = "A tokenizer.json, a spiece.model, or the folder of a run, a checkpoint or a Hugging Face model."


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
