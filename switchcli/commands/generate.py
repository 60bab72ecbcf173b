"""`switchcli generate`: a checkpoint's answers to texts with gaps, or to a task's inputs. No torch until it runs."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from switchcli.commands._options import Checkpoint, Json
from switchcli.errors import DataError, RecipeError
from switchcli.report.console import Console, print_json
from switchcli.report.safe_text import safe_text

if TYPE_CHECKING:
    from switchcli.model.decoding import Decoding

app = typer.Typer()


@app.command()
def generate(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Read from stdin, a line each, when absent.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    beams: Annotated[int, typer.Option(min=1, help="Beam search with so many; 1 is greedy.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(min=0.0, help="Of beam search: more favours longer answers (T5's alpha).")
    ] = 0.6,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Draw tokens at random, the more evenly the higher; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(max=1.0, help="Draw from the likeliest tokens that have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Lines answered together: faster, once so many are there.")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    capacity: Annotated[
        Literal["paper", "dropless"],
        typer.Option(help="Slots an expert: by eval_capacity_factor, or one for every token."),
    ] = "dropless",
    as_json: Json = False,
) -> None:
    """Fill in the gaps of texts, a line each: "The capital of <extra_id_0> is Paris." """
    if texts and not all(map(str.strip, texts)):
        raise DataError("a TEXT is empty: write some, with <extra_id_0> where the model is to fill in")
    from switchcli.runs import text_generation

    decoding = _decoding(
        {
            "max_tokens": max_tokens,
            "beams": beams,
            "length_penalty": length_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
    )
    console = Console()
    loaded = text_generation.load_on(checkpoint, device, console)
    if texts and len(texts) == 1 and beams == 1 and not as_json and sys.stdout.isatty():
        for piece in text_generation.stream(loaded, texts[0], decoding, capacity, console):
            typer.echo(_on_one_line(piece), nl=False)
        typer.echo()
        return
    answers = text_generation.generate(loaded, texts or _lines(), decoding, capacity, batch, console)
    if as_json:
        print_json({"checkpoint": str(checkpoint), "answers": [answer._asdict() for answer in answers]})
        return
    for answer in answers:
        typer.echo(_on_one_line(answer.output))


def _decoding(settings: dict[str, Any]) -> "Decoding":
    """Return how tokens are chosen. Raises RecipeError when the options contradict one another."""
    from pydantic import ValidationError

    from switchcli.model.decoding import Decoding

    try:
        return Decoding.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{name}: ".replace("_", "-") for name in map(str, first["loc"]))
        raise RecipeError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def _on_one_line(text: str) -> str:
    return safe_text(text).replace("\n", " ")


def _lines() -> Iterator[str]:
    """Yield the lines of stdin, each as soon as it is there. Raises DataError for what is no text."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding} ({error.reason}): convert it first") from error
