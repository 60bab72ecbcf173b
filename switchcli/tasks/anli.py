"""ANLI (Nie et al. 2020): natural language inference in three rounds, each written to mislead the models of its day.

T5 has no such task, and the Switch paper, which reports round 3, gives no format. Ours is T5's for MNLI under the name
`anli`, the same for each round, so that one can be trained on for another.
"""

from switchcli.tasks.labelled_rows import label_task
from switchcli.tasks.task import HubSource, Task

LABELS = ("entailment", "neutral", "contradiction")

TASKS: tuple[Task, ...] = tuple(
    label_task(
        f"anli_r{number}",
        HubSource("facebook/anli", None, "anli", f"train_r{number}", f"dev_r{number}", f"test_r{number}"),
        ("hypothesis", "premise"),
        LABELS,
        prefix="anli",
    )
    for number in (1, 2, 3)
)
