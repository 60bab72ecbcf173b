"""`switchcli eval`: task scores, held-out loss, routing health. Imports torch only when it runs."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _training
from switchcli.commands._help import epilog
from switchcli.commands._options import Checkpoint, EvalArguments, Json, Processes, Quiet, check_folder, split_arguments
from switchcli.commands._result import Line, finish
from switchcli.metric_names import BITS_PER_BYTE, DEAD_EXPERTS, DROPPED_FRACTION, LOSS, MAX_LOAD
from switchcli.report.table import Table
from switchcli.report.units import number, percent

if TYPE_CHECKING:
    from switchcli.training.measure import Measurement

app = typer.Typer()

_SHOWN_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    LOSS: ("loss", "{:.4f}".format),
    BITS_PER_BYTE: ("bits per byte", "{:.4f}".format),
    "sequences": ("sequences", number),
    DROPPED_FRACTION: ("dropped tokens", percent),
    MAX_LOAD: ("largest load over the mean", "{:.2f}".format),
    DEAD_EXPERTS: ("dead experts", number),
}
"""The metrics in a table, their names there and how their values are written."""


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
    evaluation = model.evaluate(overrides=overrides, recipe=recipe, out=out, quiet=quiet)
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
    from switchcli.training.measure import ALL_TEXT

    yield Line("")
    yield Line(f"capacity: {', '.join(f'{name} {capacity}' for name, capacity in eval_pass.capacity.items())}", "bold")
    if eval_pass.scores:
        yield score_table(eval_pass.scores)
        yield from label_tables(eval_pass.scores)
    held_out = eval_pass.held_out()
    together = {name: held_out[name] for name in held_out if name == ALL_TEXT}
    for names in (together, eval_pass.target_records()):
        for name, metrics in names.items():
            rows = [(label, write(metrics[key])) for key, (label, write) in _SHOWN_METRICS.items() if key in metrics]
            yield Table(("", ""), rows, f"held-out {name}")
    if len(eval_pass.texts) > 1:
        texts = {label: held_out[label] for label in eval_pass.texts}
        yield text_table(texts)
        if layers := next(iter(texts.values())).get("layers", {}):
            experts = [(name, *map(_most_used, metrics.get("layers", {}).values())) for name, metrics in texts.items()]
            yield Table(("", *layers), experts, "the expert that most of its tokens go to, and their share")


def _most_used(layer: Mapping[str, Any]) -> str:
    load = layer["load"]
    max_load = max(load)
    return f"{load.index(max_load)} ({max_load / max(1, sum(load)):.0%})"
