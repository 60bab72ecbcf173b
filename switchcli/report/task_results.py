"""What the results of runs and evaluations say of tasks, and of each language or corpus."""

from collections.abc import Callable, Mapping, Sequence

from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.report.runs import Run, as_mapping
from switchcli.report.series import SeedSpread, seed_spread

Holders = Mapping[str, Sequence[Run]]
"""Runs by the column that they are shown in: those of a series, or one evaluation."""
Figures = dict[str, dict[str, SeedSpread]]
"""By holder, and by the name of the task or the text."""


def tasks(holders: Holders) -> Figures:
    """The scores, of an evaluation under several capacities each of them; and their average."""
    return _over_runs(holders, _tasks)


def texts(holders: Holders, figure: str) -> Figures:
    """`neg_log_perplexity` or `bits_per_byte` of each held-out text."""
    return _over_runs(holders, lambda run: _texts(run, figure))


def by_tokens(holders: Holders) -> bool:
    """Whether the neg. log perplexities of the texts say something of one another: all by one tokenizer."""
    found = texts(holders, NEG_LOG_PERPLEXITY)
    by = {run.tokenizer for label in found for run in holders[label] if _texts(run, NEG_LOG_PERPLEXITY)}
    return len(found) < 2 or (len(by) == 1 and None not in by)


def _over_runs(holders: Holders, figures: Callable[[Run], Mapping[str, object]]) -> Figures:
    found: Figures = {}
    for label, runs in holders.items():
        each = [{name: value for name, value in figures(run).items() if isinstance(value, float)} for run in runs]
        names = dict.fromkeys(name for values in each for name in values)
        spreads = {name: seed_spread(values.get(name) for values in each) for name in names}
        if known := {name: one for name, one in spreads.items() if one is not None}:
            found[label] = known
    return found


def _tasks(run: Run) -> dict[str, object]:
    passes = _passes(run) or [run.result]
    found: dict[str, object] = {}
    for one in passes:
        under = f", capacity {as_mapping(one.get('capacity')).get('tasks')}" if len(passes) > 1 else ""
        scores = {
            name: as_mapping(as_mapping(task).get("score")).get("value")
            for name, task in as_mapping(one.get("tasks")).items()
        }
        if len(scores) > 1:
            scores["average"] = as_mapping(one.get("average")).get("score")
        found |= {f"{name}{under}": score for name, score in scores.items()}
    return found


def _texts(run: Run, figure: str) -> dict[str, object]:
    if passes := _passes(run):
        each = as_mapping(passes[0].get("texts")) or {"text": passes[0].get("text")}
    else:
        each = as_mapping(run.result.get("texts")) or run.texts
    return {name: as_mapping(figures).get(figure) for name, figures in each.items()}


def _passes(run: Run) -> list[Mapping[str, object]]:
    """Of an evaluation."""
    passes = run.result.get("passes")
    return [as_mapping(one) for one in passes] if isinstance(passes, list) else []
