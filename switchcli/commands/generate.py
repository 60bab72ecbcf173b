"""`switchcli generate`: a checkpoint's answers to texts with gaps or task inputs. Imports torch only when it runs."""

import os
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

import typer

from switchcli.commands._options import Checkpoint, Json, epilog
from switchcli.errors import DataError, RecipeError
from switchcli.terminal.console import main_console, print_json
from switchcli.terminal.safe_text import safe_text, shell_words

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/generate",
        'switchcli generate runs/tickets "ticket: I was charged twice"',
        "switchcli generate runs/tickets --beams 4 < inputs.txt",
    )
)
def generate(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Inputs of the model. Default: the lines of stdin."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer, in tokens.")] = 128,
    beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of a beam search; 1 is greedy decoding.")] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", min=0.0, help="Length penalty of beam search (T5's alpha); higher favors longer answers."
        ),
    ] = 0.6,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", min=0.0, help="Temperature of random sampling; 0 takes the most probable token."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", max=1.0, help="Sample from the most probable tokens whose probabilities sum to this."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random sampling.")] = 0,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Texts that are answered together: faster, but output waits for a full batch."
        ),
    ] = 1,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")
    ] = "auto",
    precision: Annotated[
        Literal["float32", "selective"],
        typer.Option(
            metavar="float32|selective",
            help="Selective: weights in bfloat16, half as large, and routers in float32; answers may differ.",
        ),
    ] = "float32",
    capacity: Annotated[
        Literal["paper", "dropless"],
        typer.Option(
            metavar="paper|dropless",
            help="Slots per expert: by the recipe's eval_capacity_factor, or enough for every token.",
        ),
    ] = "dropless",
    as_json: Json = False,
) -> None:
    """Answer texts with a checkpoint: the words for a gap such as <extra_id_0>, or the output of a task."""
    if texts and not all(map(str.strip, texts)):
        raise DataError("a TEXT is empty: write some, with <extra_id_0> where the model is to fill in")
    if texts and len(texts) == 1 and os.path.isfile(texts[0]):  # noqa: PTH113 - a text may be too long for a Path
        main_console().warning(f"the text is the name of a file: to answer its lines, write < {shell_words(texts[0])}")
    from switchcli import api
    from switchcli.runs.evaluate import text_generation

    settings = {
        "max_tokens": max_tokens,
        "beams": beams,
        "length_penalty": length_penalty,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    try:
        decoding = api.make_decoding(settings)
    except RecipeError as error:
        raise RecipeError(*map(_as_option, error.lines)) from None
    model, console = api.loaded(api.load(checkpoint, device, precision)), main_console()
    if texts and len(texts) == 1 and beams == 1 and not as_json and sys.stdout.isatty():
        for piece in text_generation.stream(model, texts[0], decoding, capacity, console):
            typer.echo(_without_line_breaks(piece), nl=False)
        typer.echo()
        return
    answers = text_generation.generate(model, texts or _stdin_lines(), decoding, capacity, batch, console)
    if as_json:
        print_json({"checkpoint": str(checkpoint), "answers": [answer._asdict() for answer in answers]})
        return
    for answer in answers:
        typer.echo(_without_line_breaks(answer.output))


def _as_option(line: str) -> str:
    """Return the line of an error with the name of a setting at its start as the name of the option."""
    return re.sub(r"^\w+(?=: )", lambda name: "--" + name[0].replace("_", "-"), line)


def _without_line_breaks(text: str) -> str:
    return safe_text(text).replace("\n", " ")


def _stdin_lines() -> Iterator[str]:
    """Yield each line of stdin as soon as it arrives. Raises DataError if stdin is not text."""
    try:
        for number, line in enumerate(sys.stdin):
            text = line.rstrip("\r\n")
            yield text.removeprefix("\ufeff") if number == 0 else text  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding} ({error.reason}): convert it first") from error
