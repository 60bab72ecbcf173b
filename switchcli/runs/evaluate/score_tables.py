"""Task scores as JSON for result.json, and as tables on the console."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from switchcli.checkpoint.saved_state import Best
from switchcli.metric_names import (
    BITS_PER_BYTE,
    HELD_OUT,
    LOSS,
    NEG_LOG_PERPLEXITY,
    TASKS_AVERAGE,
    task_score,
)
from switchcli.report.console import Console
from switchcli.report.safe_text import shorten
from switchcli.report.table import Table, Value
from switchcli.tasks.scores import Score, Scores, is_malformed
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.training.scoring import score_metrics, suite_scores

_COLUMNS = ("task", "score", "95 % interval", "chance", "majority", "examples", "malformed")
_LABEL_COLUMNS = ("label", "examples", "answered", "precision", "recall", "F1", "taken for")
MAX_LABELS = 20
"""Labels of a task up to which a table shows them; result.json has all."""
MALFORMED_LIMIT = 50.0
"""The percentage of malformed answers above which a score needs an explanation."""


def score_table(scores: Mapping[str, Scores], best: Mapping[str, Best] | None = None) -> Table:
    """Return a table with a row for each metric of each task, and the averages below them."""
    columns = _COLUMNS + (("best", "at step") if best else ())
    means = dict(suite_scores(scores))
    metrics = score_metrics(scores)
    if len(scores) > 1 and TASKS_AVERAGE in metrics:
        means["average"] = metrics[TASKS_AVERAGE]
    rows = [*_score_rows(scores, best or {})]
    rows += [[name, f"{mean:.2f}"] for name, mean in means.items()]
    return Table(columns, rows, "scores")


def label_tables(scores: Mapping[str, Scores]) -> Iterator[Table]:
    """Yield a table for each task with few labels: how often each label was right, and what it was taken for."""
    for name, one in scores.items():
        if 1 < len(one.labels) <= MAX_LABELS:
            rows = [
                (
                    label,
                    counts.examples,
                    counts.answered,
                    _share(counts.right, counts.answered),
                    _share(counts.right, counts.examples),
                    _share(2 * counts.right, counts.examples + counts.answered),
                    counts.taken_for and shorten(counts.taken_for, 30),
                )
                for label, counts in one.labels.items()
            ]
            yield Table(_LABEL_COLUMNS, rows, f"labels of {name}")


def _share(part: int, whole: int) -> str | None:
    return f"{100 * part / whole:.1f}" if whole else None


def shown_metric(name: str, value: float) -> tuple[str, float]:
    """Return the name and the value of a metric for people, who see a loss in place of a neg. log perplexity."""
    return ("held-out loss", -value) if name == HELD_OUT else (name, value)


def explain_malformed(
    console: Console,
    scored: Iterable[ScoredExamples],
    scores: Mapping[str, Scores],
    answers: Mapping[str, Sequence[AnsweredExample]],
) -> None:
    """Say why and what to do where more than half of a task's answers are not one of its labels, or no number."""
    have_labels: list[bool] = []
    for task in (one.task for one in scored):
        malformed, labels = scores[task.name].malformed, task.labels
        if malformed is None or malformed <= MALFORMED_LIMIT:
            continue
        have_labels.append(bool(labels))
        predictions = [answer.prediction.strip() for answer in answers[task.name]]
        (example, _), *_ = Counter(text for text in predictions if is_malformed(task, text)).most_common(1)
        kind = f"none of its labels ({', '.join(labels[:4])}{', ...' if len(labels) > 4 else ''})"
        console.warning(
            f"{task.name}: {malformed:.0f}% of the answers are {kind if labels else 'no numbers'}, such as "
            f"{shorten(example, 40)!r}"
        )
    if have_labels:
        console.message(
            "The model has not learned the form of the answers, so these scores say little about what it knows. Train "
            "for more steps or with a higher learning rate, or check that data.targets_length and "
            "scoring.decoding.max_tokens hold an answer"
            + ("; scoring.by=likelihood only compares the labels" if all(have_labels) else "")
        )


def text_table(texts: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with a row for each held-out text."""
    columns = {LOSS: "loss", BITS_PER_BYTE: "bits per byte"}
    rows = []
    for name, metrics in texts.items():
        values = {LOSS: -metrics[NEG_LOG_PERPLEXITY], **metrics}
        rows.append([name, *(f"{values[key]:.4f}" if key in values else None for key in columns)])
    return Table(("", *columns.values()), rows, "held-out texts")


def _score_rows(scores: Mapping[str, Scores], best: Mapping[str, Best]) -> Iterator[list[Value]]:
    for name, one in scores.items():
        best_cells = _best_cells(best, task_score(name)) if best else []
        if one.score is None:  # such as the test split of a benchmark, whose labels are not published
            yield [name, "no answers", "", "", "", one.num_unlabeled, "", *best_cells]
            continue
        majority = None if one.majority is None else f"{one.majority:.2f}"
        malformed = "" if one.malformed is None else f"{one.malformed:.1f}%"
        counts = (f"{one.chance:.2f}", majority, one.num_examples, malformed)
        yield [name, *_score_cells(one.score), *counts, *best_cells]
        metrics = {**one.metrics, **one.secondary_metrics}
        if len(metrics) > 1:
            for metric, score in metrics.items():
                yield [f"  {metric}", *_score_cells(score)]


def _score_cells(score: Score) -> tuple[str, str | None]:
    """Return the value and its interval."""
    interval = None if score.low is None or score.high is None else f"{score.low:.2f} to {score.high:.2f}"
    return f"{score.value:.2f}", interval


def _best_cells(best: Mapping[str, Best], name: str) -> tuple[Value, Value]:
    value = best.get(name)
    return (None, None) if value is None else (f"{value.value:.2f}", value.step)
