"""`switchcli data`: prepare text before a run, and work with tokenizers. Imports torch only when it reads a recipe."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Json, Overrides, Quiet, Recipe, epilog
from switchcli.commands._result import Line, finish
from switchcli.recipe import yaml_nodes
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words
from switchcli.terminal.table import Table
from switchcli.terminal.units import binary

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
tokenizers = typer.Typer(
    name="tokenizer",
    help="Train and show tokenizers.",
    epilog=epilog(
        "how-to/tokenizers",
        "switchcli data tokenizer train quickstart/switch --out tokenizer.json",
        "switchcli data tokenizer show tokenizer.json",
    ),
    no_args_is_help=True,
)
app.add_typer(tokenizers)

A_TOKENIZER = "A tokenizer.json, a spiece.model, or the folder of a run, a checkpoint or a Hugging Face model."


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
    title = f"{'found in the cache' if result['cached'] else 'prepared'} in {result['seconds']:.1f} s"
    yield Table(("", "documents", "tokens", "held out", "tokens", "text"), rows, title)
    for label, text in texts.items():
        if dropped := ", ".join(f"{count:,} {reason}" for reason, count in text["dropped"].items() if count):
            yield Line(f"left out of {label}: {dropped}")
        yield Line(f"{label}: {text['folder']}")


@tokenizers.command(
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
    from switchcli.runs.text import tokenizer_tools

    tokenizer_tools.check_free(out, replace=force)
    facts = tokenizer_tools.train(recipe, overrides or [], out, Console(quiet=quiet))
    value = yaml_nodes.write({"kind": "file", "path": str(out)}, in_one_line=True).strip()
    use = [Line(""), Line("to use it:"), Line(f"  {shell_words(f'data.tokenizer={value}')}")]
    finish(facts, as_json, [_facts_table(facts), *use])


@tokenizers.command(
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
    from switchcli.runs.text import tokenizer_tools

    tokenizer = tokenizer_tools.open_tokenizer(name)
    facts = tokenizer_tools.tokenizer_facts(name, tokenizer)
    tokenized = tokenizer_tools.encode_texts(tokenizer, texts or [])
    shown: list[Table | Line] = [_facts_table(facts)]
    for text in tokenized:
        pieces, ids = " ".join(text["pieces"]), " ".join(map(str, text["ids"]))
        shown += [Line(""), Line(text["text"]), Line(f"pieces  {pieces}"), Line(f"ids     {ids}")]
    finish({**facts, "texts": tokenized}, as_json, shown)


def _facts_table(facts: Mapping[str, Any]) -> Table:
    rows = [
        (key.replace("_", " "), ("no", "yes")[value] if isinstance(value, bool) else value)
        for key, value in facts.items()
        if key != "tokenizer"
    ]
    return Table(("", ""), rows, facts["tokenizer"])
