"""The tasks that a model is scored on, in training and by `eval`: read, and what has to be said of them."""

from collections.abc import Collection, Sequence

from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError
from switchcli.report.console import Console
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import TaskDataSpec
from switchcli.tasks.task import Task
from switchcli.train.scoring import ScoringSpec

MANY_CUT = 0.25
"""Where more of the examples than this are cut, the rows are too short for the task."""


def scored_examples_of(
    tasks: Collection[Task], data: TaskDataSpec, scoring: ScoringSpec, tokenizer: Tokenizer, needed: bool = False
) -> tuple[tokens.ScoredExamples, ...]:
    """Those of the tasks that have the split to score on.

    Raises:
        DataError: as `tokens.scored`; or with `needed` that no example has a label.
    """
    lengths = RowLengths(data.inputs_length, data.targets_length)
    exams = tuple(
        tokens.scored_examples(task, scoring.split, data.folder, tokenizer, lengths, scoring.examples)
        for task in tasks
        if reading.has_split(task, scoring.split)
    )
    if needed and not any(exam.packed.num_rows for exam in exams):
        raise DataError(
            f"tasks: no labelled example of {', '.join(task.name for task in tasks)} in {scoring.split}: name a task "
            f"that has some, or give {scoring.split}: to a task of your own"
        )
    return exams


def report_task_sets(
    tasks: Collection[Task], exams: Sequence[tokens.ScoredExamples], split: str, console: Console
) -> None:
    """How many examples of each task are scored, which inputs are cut, and which tasks are not scored at all."""
    asked = {exam.task.name: exam for exam in exams}
    for task in tasks:
        if task.name not in asked:
            console.warning(f"{task.name}: has no {split} split: it is not scored")
            continue
        exam = asked[task.name]
        count, length = len(exam.examples), exam.packed.lengths.inputs
        cut = f", {exam.num_cut:,} inputs longer than {length} tokens and cut" if exam.num_cut else ""
        report_truncation(f"{task.name}: {count:,} examples to score{cut}", exam.num_cut / count, console)


def report_truncation(text: str, share: float, console: Console) -> None:
    """A message, or a warning with the way out where more than `MANY_CUT` of the examples are cut."""
    if share > MANY_CUT:
        console.warning(f"{text}: raise data.inputs_length or data.targets_length, if the model is to see the rest")
    else:
        console.message(text)
