"""`switchcli eval`: task scores, held-out loss, routing health. Imports torch only when it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _training
from switchcli.commands._options import (
    Checkpoint,
    EvalArguments,
    Json,
    Processes,
    Quiet,
    check_folder,
    epilog,
    split_arguments,
)
from switchcli.commands._result import Line, finish
from switchcli.terminal.table import Table
from switchcli.terminal.units import number, percent

if TYPE_CHECKING:
    from switchcli.training.measure import Measurement

app = typer.Typer()


@app.command(
    "eval",
    epilog=epilog(
        "how-to/own-task",
        "switchcli eval runs/quickstart/finetune",
        "switchcli eval runs/quickstart/finetune scoring.decoding.beams=4 --json",
    ),
)
def evaluate(
    checkpoint: Checkpoint,
    arguments: EvalArguments = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder for result.json and predictions. Default: runs/eval/NAME.",
            callback=check_folder,
        ),
    ] = None,
    processes: Processes = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint: task scores with intervals, held-out loss, and routing health."""
    from switchcli import api
    from switchcli.runs.evaluate import eval_job

    recipe, overrides = split_arguments(arguments or [])
    model = api.open_checkpoint(checkpoint)
    if _training.starts_ranks(processes):
        _training.start_ranks(processes, api.resolve_evaluation(model, recipe, overrides).recipe, quiet)
    out = out or eval_job.default_out(checkpoint)
    evaluation = model.evaluate(overrides=overrides, recipe=recipe, out=out, verbose=not quiet)
    shown = (element for eval_pass in evaluation.passes for element in _shown(eval_pass))
    finish(evaluation.result, as_json, (*_text_settings(evaluation.result["recipe"]), *shown))


def _text_settings(recipe: Mapping[str, Any]) -> Iterator[Line]:
    """Yield which text was measured, the part of it that is held out, and the length of the inputs."""
    if (text := recipe["text"]) is None:
        return
    places = [place for one in text["corpora"] for place in one.get("paths") or [one.get("path", one["kind"])]]
    yield Line("")
    yield Line(
        f"text: {', '.join(places)}; {percent(text['held_out_fraction'])} held out; inputs of "
        f"{number(recipe['data']['inputs_length'])} tokens"
    )


def _shown(eval_pass: "Measurement") -> Iterator[Table | Line]:
    """Yield the metrics that were measured under one capacity."""
    from switchcli.runs.evaluate.score_tables import label_tables, score_table, text_table

    yield Line("")
    words = {"paper": "the recipe's", "dropless": "unlimited"}
    capacities = (f"{words.get(str(capacity), capacity)} for {name}" for name, capacity in eval_pass.capacity.items())
    yield Line(f"expert capacity: {', '.join(capacities)}", "bold")
    if eval_pass.scores:
        yield score_table(eval_pass.scores)
        yield from label_tables(eval_pass.scores)
    held_out = eval_pass.held_out()
    if texts := {**held_out, **eval_pass.target_records()}:
        yield text_table(texts)
    if len(eval_pass.texts) > 1:
        loads = {name: held_out[name].get("layers", {}) for name in eval_pass.texts}
        if layers := next(iter(loads.values())):
            experts = [(name, *map(_most_used, one.values())) for name, one in loads.items()]
            yield Table(("", *layers), experts, "the expert that most of its tokens go to, and their share")


def _most_used(layer: Mapping[str, Any]) -> str:
    load = layer["load"]
    max_load = max(load)
    return f"{load.index(max_load)} ({max_load / max(1, sum(load)):.0%})"
