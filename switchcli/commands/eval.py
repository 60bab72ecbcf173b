"""`switchcli eval`: scores of tasks, held-out neg. log perplexity, routing health. No torch until it runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Checkpoint, Json, Measured, Processes, Quiet, split_arguments
from switchcli.metric_names import BALANCE, DEAD_EXPERTS, DROPPED_FRACTION, NEG_LOG_PERPLEXITY
from switchcli.report.console import Console

if TYPE_CHECKING:
    from switchcli.runs.evaluator import EvalPass

app = typer.Typer()

SHOWN = (NEG_LOG_PERPLEXITY, "sequences", DROPPED_FRACTION, BALANCE, DEAD_EXPERTS)


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
    with _exit.interruptible(saves_nothing=True, ranks=True):
        from switchcli.commands import _job
        from switchcli.runs import eval_job

        recipe, overrides = split_arguments(arguments or [])
        job = eval_job.resolve_job(checkpoint, recipe, overrides, _exit.console())
        _job.start_ranks(processes, job.recipe, as_json)
        evaluation = eval_job.measure(job, out or eval_job.default_out(checkpoint), quiet)
        if evaluation is not None and not as_json:
            console = Console(stream=sys.stdout)
            for measured in evaluation.passes:
                _show(measured, console)
        _job.finish(evaluation.result if evaluation else {}, as_json)


def _show(measured: "EvalPass", console: Console) -> None:
    """Print the figures measured under one capacity."""
    from switchcli.runs.score_tables import show_scores, show_texts

    counted = ", ".join(f"{what} {capacity}" for what, capacity in measured.capacity.items())
    console.message()
    console.message(f"capacity: {counted}", "bold")
    if measured.scores:
        show_scores(console, measured.scores)
    texts = measured.held_out.texts
    for name, figures in {"text": measured.held_out.text, **measured.held_out.tasks}.items():
        if figures is not None:
            console.table(f"held-out {name}", {key: figures[key] for key in SHOWN if key in figures})
    if texts:
        show_texts(console, texts)
        layers = next(iter(texts.values())).get("layers", {})
        used = ([name, *map(_most_used, figures.get("layers", {}).values())] for name, figures in texts.items())
        if layers:
            console.rows("the expert that most of its tokens go to, and their share", ("", *layers), used)


def _most_used(layer: Mapping[str, Any]) -> str:
    load = layer["load"]
    most = max(load)
    return f"{load.index(most)} ({most / max(1, sum(load)):.0%})"
