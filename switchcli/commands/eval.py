"""`switchcli eval`: task scores, held-out neg. log perplexity, routing health. Imports torch only when it runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _exit, _training
from switchcli.commands._options import Checkpoint, EvalArguments, Json, Processes, Quiet, split_arguments
from switchcli.metric_names import BALANCE, DEAD_EXPERTS, DROPPED_FRACTION, NEG_LOG_PERPLEXITY
from switchcli.report.console import Console

if TYPE_CHECKING:
    from switchcli.runs.evaluator import EvalPass

app = typer.Typer()

_SHOWN_METRICS = (NEG_LOG_PERPLEXITY, "sequences", DROPPED_FRACTION, BALANCE, DEAD_EXPERTS)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    arguments: EvalArguments = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json and predictions. Default: runs/eval/NAME.")
    ] = None,
    processes: Processes = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure task scores with intervals, held-out neg. log perplexity, and routing health, by capacity."""
    with _exit.interruptible(saves_nothing=True, ranks=True):
        from switchcli.runs import eval_job

        recipe, overrides = split_arguments(arguments or [])
        job = eval_job.resolve_job(checkpoint, recipe, overrides, _exit.console())
        _training.start_ranks(processes, job.recipe, as_json)
        evaluation = eval_job.measure(job, out or eval_job.default_out(checkpoint), quiet)
        if evaluation is not None and not as_json:
            console = Console(stream=sys.stdout)
            for eval_pass in evaluation.passes:
                _show_pass(eval_pass, console)
        _training.finish(evaluation.result if evaluation else {}, as_json)


def _show_pass(eval_pass: "EvalPass", console: Console) -> None:
    """Print the metrics that were measured under one capacity."""
    from switchcli.runs.score_tables import show_scores, show_texts

    capacities = ", ".join(f"{name} {capacity}" for name, capacity in eval_pass.capacity.items())
    console.message()
    console.message(f"capacity: {capacities}", "bold")
    if eval_pass.scores:
        show_scores(console, eval_pass.scores)
    held_out = eval_pass.held_out
    for name, metrics in {"text": held_out.text, **held_out.tasks}.items():
        if metrics is not None:
            console.table(f"held-out {name}", {key: metrics[key] for key in _SHOWN_METRICS if key in metrics})
    if held_out.texts:
        show_texts(console, held_out.texts)
        _show_most_used_experts(held_out.texts, console)


def _show_most_used_experts(texts: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a table with a row for each text and a column for each sparse layer."""
    layers = next(iter(texts.values())).get("layers", {})
    if layers:
        rows = ([name, *map(_most_used, metrics.get("layers", {}).values())] for name, metrics in texts.items())
        console.rows("the expert that most of its tokens go to, and their share", ("", *layers), rows)


def _most_used(layer: Mapping[str, Any]) -> str:
    load = layer["load"]
    max_load = max(load)
    return f"{load.index(max_load)} ({max_load / max(1, sum(load)):.0%})"
