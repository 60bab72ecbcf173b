"""The scores of tasks, and the metrics of each language or corpus, in the results of runs and evaluations."""

from collections.abc import Callable, Mapping, Sequence

from switchcli.metric_names import LOSS, NEG_LOG_PERPLEXITY
from switchcli.report.runs import Run
from switchcli.report.series import SeedSpread, differing, flatten, seed_spread
from switchcli.terminal.metrics_file import as_mapping, number

RunsByLabel = Mapping[str, Sequence[Run]]
"""Runs by the column that shows them: those of a series, or one evaluation."""
Scores = dict[str, dict[str, SeedSpread]]
"""Spreads by column, then by the name of the task or the text."""


def tasks(runs: RunsByLabel) -> Scores:
    """Return the scores of all tasks and their average, for each capacity of an evaluation."""
    return _over_runs(runs, task_scores)


def texts(runs: RunsByLabel, metric: str) -> Scores:
    """Return `loss` or `bits_per_byte` of each held-out text."""
    return _over_runs(runs, lambda run: _text_metrics(run, metric))


def by_tokens(runs: RunsByLabel) -> bool:
    """Return whether losses of texts can be compared: all runs with some have one known tokenizer."""
    columns = texts(runs, LOSS)
    tokenizers = {run.tokenizer for label in columns for run in runs[label] if _text_metrics(run, LOSS)}
    return len(columns) < 2 or (len(tokenizers) == 1 and None not in tokenizers)


def differing_settings(evaluations: Sequence[Run]) -> list[str]:
    """Return the keys of evaluations that decide losses or scores, and in which those that have these differ."""
    keys: dict[str, None] = {}
    for metrics_of, capacity, decisive in (
        (lambda run: _text_metrics(run, LOSS), "text", ("text", "data.inputs_length")),
        (task_scores, "tasks", ("scoring", "data.inputs_length", "data.targets_length")),
    ):
        settings = []
        for run in evaluations:
            if metrics_of(run) and (recipe := as_mapping(run.result.get("recipe"))):
                capacities = [as_mapping(one.get("capacity")).get(capacity) for one in _passes(run)]
                chosen = {
                    key: value
                    for key, value in flatten(recipe).items()
                    if any(f"{key}.".startswith(f"{section}.") for section in decisive)
                }
                settings.append({**chosen, "eval.capacity": capacities})
        keys |= dict.fromkeys(differing(settings))
    return [*keys]


def _over_runs(runs_by_label: RunsByLabel, metrics_of: Callable[[Run], Mapping[str, object]]) -> Scores:
    scores: Scores = {}
    for label, runs in runs_by_label.items():
        values: dict[str, list[float | None]] = {}
        for run in runs:
            for name, value in metrics_of(run).items():
                values.setdefault(name, []).append(number(value))
        spreads = {name: seed_spread(numbers) for name, numbers in values.items()}
        if known := {name: spread for name, spread in spreads.items() if spread is not None}:
            scores[label] = known
    return scores


def task_scores(run: Run) -> dict[str, object]:
    """Return the score of each task and their average, for each capacity of an evaluation."""
    passes = _passes(run) or [run.result]
    scores: dict[str, object] = {}
    for one in passes:
        # An evaluation under several capacities has one pass for each.
        suffix = f", capacity {as_mapping(one.get('capacity')).get('tasks')}" if len(passes) > 1 else ""
        tasks = as_mapping(one.get("tasks"))
        for name, task in tasks.items():
            scores[f"{name}{suffix}"] = as_mapping(as_mapping(task).get("score")).get("value")
        if len(tasks) > 1:
            scores[f"average{suffix}"] = as_mapping(one.get("average")).get("score")
    return scores


def _text_metrics(run: Run, metric: str) -> dict[str, object]:
    """Return a metric of each text. An evaluation has a pass for each capacity; texts are shown under the first."""
    texts: Mapping[str, object]
    if passes := _passes(run):
        texts = as_mapping(passes[0].get("held_out"))
        if len(texts) > 1:  # `text` is all of them together
            texts = {name: metrics for name, metrics in texts.items() if name != "text"}
    else:
        texts = as_mapping(run.result.get("texts")) or run.texts
    if metric != LOSS:
        return {name: as_mapping(metrics).get(metric) for name, metrics in texts.items()}
    known = {name: number(as_mapping(metrics).get(NEG_LOG_PERPLEXITY)) for name, metrics in texts.items()}
    return {name: -value for name, value in known.items() if value is not None}


def _passes(run: Run) -> list[Mapping[str, object]]:
    """Return the passes of an evaluation's result; a training's has none."""
    passes = run.result.get("passes")
    return [as_mapping(one) for one in passes] if isinstance(passes, list) else []
