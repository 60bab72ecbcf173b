"""The command line: verbs, options, help, exit codes. Nothing that computes is imported until a verb runs."""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from switchcli import __version__, startup
from switchcli.commands import checkpoints, data, distill, exit, finetune, pretrain, recipes, reports
from switchcli.commands.arguments import (
    CheckedGroup,
    Checkpoint,
    Json,
    Measured,
    Overrides,
    Processes,
    Quiet,
)
from switchcli.errors import CheckpointError, DataError, RecipeError, SwitchError, path_error
from switchcli.report.console import Console
from switchcli.report.output import print_json
from switchcli.report.safe_text import safe_text

if TYPE_CHECKING:
    pass

app = typer.Typer(
    cls=CheckedGroup,
    help="Train Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app)
app.add_typer(reports.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"switchcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


app.command()(pretrain.pretrain)
app.command()(finetune.finetune)
app.command()(distill.distill)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    arguments: Measured = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of result.json and predictions; runs/eval/NAME when absent.")
    ] = None,
    processes: Processes = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Scores of tasks with intervals, held-out neg. log perplexity, routing health, capacity sweeps."""
    with exit.stoppable(saves_nothing=True, ranks=True):
        from switchcli.commands import evaluate

        evaluate.run(checkpoint, arguments or [], out, processes, as_json, quiet)


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
    from switchcli.commands.generate import Options, decoding_of, stream
    from switchcli.commands.generate import generate as run

    decoding = decoding_of(
        {
            "max_tokens": max_tokens,
            "beams": beams,
            "length_penalty": length_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
    )
    options = Options(decoding, batch, capacity, device)
    console = Console()
    if texts and len(texts) == 1 and beams == 1 and not as_json and sys.stdout.isatty():
        for piece in stream(checkpoint, texts[0], options, console):
            typer.echo(_on_one_line(piece), nl=False)
        typer.echo()
        return
    answered = run(checkpoint, texts or _lines(), options, console)
    if as_json:
        print_json({"checkpoint": str(checkpoint), "answers": [answer._asdict() for answer in answered]})
        return
    for answer in answered:
        typer.echo(_on_one_line(answer.output))


def _on_one_line(text: str) -> str:
    return safe_text(text).replace("\n", " ")


def _lines() -> Iterator[str]:
    """Those of stdin, each as soon as it is there."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not {error.encoding} ({error.reason}): convert it first") from error


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help="A run's folder, one checkpoint's, a Hugging Face folder; or a recipe, for its initial weights.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    checkpoint_files: Annotated[
        bool,
        typer.Option(
            "--checkpoint-files",
            help="Read the files of a checkpoint, or of all of a run, through instead: exit code 4 if one is damaged.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Is this Switch model sound? Router gradient, precision, padding, balance, dead experts; exit code 1 if not."""
    from switchcli.commands import doctor

    if checkpoint_files:
        verified = doctor.verify(model, overrides or [])
        if as_json:
            print_json(verified)
        else:
            doctor.show_files(verified)
        raise typer.Exit(0 if verified["whole"] else CheckpointError.exit_code)
    diagnosis = doctor.doctor(model, overrides or [], Console())
    if as_json:
        print_json(diagnosis.to_json())
    else:
        doctor.show(diagnosis)
    if not diagnosis.sound:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|SIZE", help="A recipe, or a size such as switch-c.", show_default=False)
    ],
    devices: Annotated[int, typer.Option(help="How many there are.")] = 8,
    overrides: Overrides = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of one device.")] = "80GiB",
    flops: Annotated[float, typer.Option(help="FLOP/s that a device reaches.")] = 312e12,
    memory_bandwidth: Annotated[float, typer.Option(help="Bytes a second of its own memory.")] = 2e12,
    bandwidth: Annotated[float, typer.Option(help="Bytes a second that a device sends within a node.")] = 300e9,
    network: Annotated[float, typer.Option(help="Bytes a second that a device sends to other nodes.")] = 25e9,
    node_devices: Annotated[int, typer.Option(help="Devices of a node.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write a page with every mesh.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes a device, bytes a collective, seconds a step: which mesh fits. No GPU is needed."""
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import plan

        options = plan.Options(devices, memory, flops, memory_bandwidth, bandwidth, network, node_devices)
        planned = plan.planned(recipe, overrides or [], options)
        if html is not None:
            plan.write_html(planned, html)
        if as_json:
            print_json(planned.to_json())
        else:
            plan.show(planned)


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise RecipeError(
            f"the working directory cannot be used ({error.strerror}): change to one that exists"
        ) from error


def main() -> None:
    """Run the command line; every failure that a user can mend ends in one line and the exit code of its kind."""
    startup.limit_spinning(os.environ)
    startup.end_with_launcher()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the rest of the process
    startup.make_stderr_lenient()
    try:
        try:
            _require_working_directory()
            app()
        finally:
            sys.stdout.flush()
    except SwitchError as error:
        exit.leave(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            exit.leave(CheckpointError(f"standard output cannot be written: {error.strerror}: free some space there"))
        if (known := path_error(error)) is not None:
            exit.leave(known)
        exit.leave_by_defect(error)
        raise
