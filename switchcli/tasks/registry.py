"""Every task and metric that ships, by name. A new family adds its tuple here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from switchcli.tasks import (
    anli,
    arc,
    closed_book_qa,
    glue,
    label_metrics,
    squad,
    stdlib_tasks,
    summarization,
    superglue,
    text_metrics,
    translation,
    winogrande,
)
from switchcli.tasks import suites as benchmarks
from switchcli.tasks.suites import Suite
from switchcli.tasks.task import Metric, Task

_FAMILIES = (
    *(glue, superglue, squad, anli, winogrande, arc, closed_book_qa, summarization, translation),
    stdlib_tasks,
)
TASKS: Final[Mapping[str, Task]] = MappingProxyType({task.name: task for family in _FAMILIES for task in family.TASKS})
SUITES: Final[Mapping[str, Suite]] = MappingProxyType({suite.name: suite for suite in benchmarks.SUITES})

METRICS: Final[Mapping[str, Callable[[tuple[str, ...]], Metric]]] = MappingProxyType(
    {
        "exact_match": lambda labels: text_metrics.exact_match,
        "accuracy": lambda labels: label_metrics.ACCURACY,
        "f1": lambda labels: label_metrics.f1(*labels),
        "macro_f1": label_metrics.macro_f1,
        "matthews": label_metrics.matthews,
        "pearson": lambda labels: label_metrics.PEARSON,
        "spearman": lambda labels: label_metrics.SPEARMAN,
        "squad_em": lambda labels: text_metrics.squad_em,
        "squad_f1": lambda labels: text_metrics.squad_f1,
        "trivia_em": lambda labels: text_metrics.trivia_em,
        "rouge1": lambda labels: text_metrics.rouge1,
        "rouge2": lambda labels: text_metrics.rouge2,
        "rouge_lsum": lambda labels: text_metrics.rouge_lsum,
        "bleu": lambda labels: text_metrics.bleu,
    }
)
"""What a task of one's own may name, given its labels."""
COUNT_RIGHT_ANSWERS: Final = {"accuracy", "exact_match", "squad_em", "trivia_em", "f1", "macro_f1"}
"""Metrics that labels drawn at random score 100 / k by, where they are equally frequent."""
NEEDS_LABELS: Final[Mapping[str, int | None]] = MappingProxyType({"f1": 2, "macro_f1": None, "matthews": None})
"""Metrics over labels, and how many of them: f1 takes the second for positive."""
