"""`switchcli generate`: a checkpoint's answers to texts with gaps or task inputs. Imports torch only when it runs."""

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
        typer.Argument(metavar="[TEXT ...]", help="Inputs of the model. Default: the lines of stdin."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 128,
    beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search; 1 is greedy decoding.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(min=0.0, help="Length penalty of beam search (T5's alpha); higher favors longer answers.")
    ] = 0.6,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of random sampling; 0 takes the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Sample from the most probable tokens whose probabilities sum to this.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random sampling.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Texts that are answered together: faster, but output waits for a full batch.")
    ] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    capacity: Annotated[
        Literal["paper", "dropless"],
        typer.Option(help="Slots per expert: by the recipe's eval_capacity_factor, or enough for every token."),
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
    model = text_generation.load_on(checkpoint, device, console)
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


def _decoding(settings: dict[str, Any]) -> "Decoding":
    """Return how tokens are chosen. Raises RecipeError if the options contradict one another."""
    from pydantic import ValidationError

    from switchcli.model.decoding import Decoding

    try:
        return Decoding.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{name}: ".replace("_", "-") for name in map(str, first["loc"]))
        raise RecipeError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def _without_line_breaks(text: str) -> str:
    return safe_text(text).replace("\n", " ")


def _stdin_lines() -> Iterator[str]:
    """Yield each line of stdin as soon as it arrives. Raises DataError if stdin is not text."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding} ({error.reason}): convert it first") from error
