"""Task scores as JSON for result.json, and as tables on the console."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from switchcli.checkpoint.saved_state import Best
from switchcli.metric_names import (
    BITS_PER_BYTE,
    DEAD_EXPERTS,
    DROPPED_FRACTION,
    HELD_OUT,
    LOSS,
    MAX_LOAD,
    NEG_LOG_PERPLEXITY,
    TASKS_AVERAGE,
    task_score,
)
from switchcli.tasks.scores import Score, Scores, is_malformed
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shorten
from switchcli.terminal.table import Table, Value
from switchcli.terminal.units import number, percent
from switchcli.training.scoring import score_metrics, suite_scores

_COLUMNS = ("task", "score", "95 % interval", "no skill", "malformed")
_LABEL_COLUMNS = ("label", "precision", "recall", "F1", "examples", "confused with")
_TEXT_COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    LOSS: ("loss", "{:.4f}".format),
    BITS_PER_BYTE: ("bits/byte", "{:.4f}".format),
    "sequences": ("sequences", number),
    DROPPED_FRACTION: ("dropped", percent),
    MAX_LOAD: ("max load", "{:.2f}".format),
    DEAD_EXPERTS: ("dead", number),
}
"""The metrics of a held-out text, their headings and how their values are written."""
MAX_LABELS = 20
"""Labels of a task up to which a table shows them; result.json has all."""
MALFORMED_LIMIT = 50.0
"""The percentage of malformed answers above which a score needs an explanation."""


def score_table(scores: Mapping[str, Scores], best: Mapping[str, Best] | None = None) -> Table:
    """Return a table with a row for each metric of each task, and the averages below them.

    `no skill` is the better score of random guesses and of the most frequent answer. `best` has the best score of each
    task in training, and stands in the place of the number of examples.
    """
    means = dict(suite_scores(scores))
    metrics = score_metrics(scores)
    if len(scores) > 1 and TASKS_AVERAGE in metrics:
        means["average"] = metrics[TASKS_AVERAGE]
    rows = [*_score_rows(scores, best)]
    rows += [[name, f"{mean:.2f}"] for name, mean in means.items()]
    return Table((*_COLUMNS, "best @ step" if best else "examples"), rows, "scores")


def label_tables(scores: Mapping[str, Scores]) -> Iterator[Table]:
    """Yield a table for each task with few labels: how often each label was right, and its most frequent error."""
    for name, one in scores.items():
        if 1 < len(one.labels) <= MAX_LABELS:
            rows = [
                (
                    label,
                    _share(counts.right, counts.answered),
                    _share(counts.right, counts.examples),
                    _share(2 * counts.right, counts.examples + counts.answered),
                    counts.examples,
                    counts.confused_with and shorten(counts.confused_with, 15),
                )
                for label, counts in one.labels.items()
            ]
            yield Table(_LABEL_COLUMNS, rows, f"labels of {name}")


def _share(part: int, whole: int) -> str | None:
    return f"{100 * part / whole:.1f}" if whole else None


def shown_metric(name: str, value: float) -> tuple[str, float]:
    """Return the name and the value of a metric for people, who see a loss in place of a neg. log perplexity."""
    return ("held-out loss", -value) if name == HELD_OUT else (name, value)


def explain_scores(
    console: Console,
    scored: Iterable[ScoredExamples],
    scores: Mapping[str, Scores],
    answers: Mapping[str, Sequence[AnsweredExample]],
) -> None:
    """Say what to do where a score shows no skill, or more than half of the answers are no labels or numbers."""
    have_labels: list[bool] = []
    for task in (one.task for one in scored):
        result, labels = scores[task.name], task.labels
        malformed = result.malformed
        if malformed is None or malformed <= MALFORMED_LIMIT:
            if result.score is not None and result.score.value <= result.no_skill:
                console.warning(
                    f"{task.name}: {result.score.value:.2f} is not better than a constant answer "
                    f"({result.no_skill:.2f}): train for more steps or with another learning rate"
                )
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
    """Return a table with a row for each held-out text, with the metrics that one of them has."""
    records = {name: {LOSS: -metrics[NEG_LOG_PERPLEXITY], **metrics} for name, metrics in texts.items()}
    columns = {key: column for key, column in _TEXT_COLUMNS.items() if any(key in one for one in records.values())}
    rows = [
        [name, *(write(one[key]) if key in one else None for key, (_, write) in columns.items())]
        for name, one in records.items()
    ]
    return Table(("", *(heading for heading, _ in columns.values())), rows, "held-out text")


def _score_rows(scores: Mapping[str, Scores], best: Mapping[str, Best] | None) -> Iterator[list[Value]]:
    for name, one in scores.items():
        last: Value = one.num_examples
        if best:
            top = best.get(task_score(name))
            last = top and f"{top.value:.2f} @ {top.step:,}"
        if one.score is None:  # such as the test split of a benchmark, whose labels are not published
            yield [name, "no answers", "", "", "", last if best else one.num_unlabeled]
            continue
        malformed = "" if one.malformed is None else f"{one.malformed:.1f}%"
        yield [name, *_score_cells(one.score), f"{one.no_skill:.2f}", malformed, last]
        metrics = {**one.metrics, **one.secondary_metrics}
        if len(metrics) > 1:
            for metric, score in metrics.items():
                yield [f"  {metric}", *_score_cells(score)]


def _score_cells(score: Score) -> tuple[str, str | None]:
    """Return the value and its interval."""
    interval = None if score.low is None or score.high is None else f"{score.low:.2f} to {score.high:.2f}"
    return f"{score.value:.2f}", interval
