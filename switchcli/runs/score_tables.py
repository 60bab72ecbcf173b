"""Scores of tasks as people and scripts read them."""

from collections.abc import Iterator, Mapping
from typing import Any

from switchcli.checkpoint.saved_state import Best
from switchcli.metric_names import BITS_PER_BYTE, NEG_LOG_PERPLEXITY, TASKS_AVERAGE, suite_score, task_score
from switchcli.report.console import Console
from switchcli.tasks.scores import Score, Scores
from switchcli.train.scoring import score_metrics, suite_scores

HEADINGS = ("task", "score", "95 % interval", "chance", "majority", "examples", "malformed")


def task_results(scores: Mapping[str, Scores], best: Mapping[str, Best] | None = None) -> dict[str, Any]:
    """What result.json says of tasks: each one's scores, and the best of a run with its step; averages."""
    best = best or {}
    each = {name: {**one.to_json(), **_best(best, task_score(name))} for name, one in scores.items()}
    average = {"score": score_metrics(scores).get(TASKS_AVERAGE), **_best(best, TASKS_AVERAGE)}
    suites = {name: {"score": mean, **_best(best, suite_score(name))} for name, mean in suite_scores(scores).items()}
    return {"tasks": each, "average": average, "suites": suites}


def show_scores(console: Console, scores: Mapping[str, Scores], best: Mapping[str, Best] | None = None) -> None:
    """A table with a row a metric, and below it the averages."""
    headings = HEADINGS + (("best", "at step") if best else ())
    console.rows("scores", headings, _rows(scores, best or {}))
    means = suite_scores(scores)
    if len(scores) > 1 and TASKS_AVERAGE in (figures := score_metrics(scores)):
        means = {**means, "average": figures[TASKS_AVERAGE]}
    for name, mean in means.items():
        console.message(f"{name}: {mean:.2f}", "bold")


def show_texts(console: Console, texts: Mapping[str, Mapping[str, float]]) -> None:
    """A table with a row a text that is measured by itself."""
    figures = {NEG_LOG_PERPLEXITY: "neg. log perplexity", BITS_PER_BYTE: "bits a byte"}
    rows = ([name, *(f"{one[key]:.4f}" if key in one else "-" for key in figures)] for name, one in texts.items())
    console.rows("held-out texts", ("", *figures.values()), rows)


def _rows(scores: Mapping[str, Scores], best: Mapping[str, Best]) -> Iterator[list[str]]:
    for name, one in scores.items():
        found = best.get(task_score(name))
        peak = [] if not best else ["-", "-"] if found is None else [f"{found.value:.2f}", f"{found.step:,}"]
        if one.score is None:
            yield [name, "secret", "", "", "", f"{one.num_unlabelled:,}", "", *peak]
            continue
        majority = "-" if one.majority is None else f"{one.majority:.2f}"
        malformed = "" if one.malformed is None else f"{one.malformed:.1f}%"
        yield [name, *_figures(one.score), f"{one.chance:.2f}", majority, f"{one.num_examples:,}", malformed, *peak]
        parts = {**one.metrics, **one.beside}
        if len(parts) > 1:
            for metric, score in parts.items():
                yield [f"  {metric}", *_figures(score)]


def _figures(score: Score) -> list[str]:
    known = score.low is not None and score.high is not None
    return [f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}" if known else "-"]


def _best(best: Mapping[str, Best], name: str) -> dict[str, float | int]:
    found = best.get(name)
    return {} if found is None else {"best": found.value, "best_step": found.step}
