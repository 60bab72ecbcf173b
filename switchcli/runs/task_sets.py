"""The tasks that a model is scored on, in training and by `eval`: read, and what has to be said of them."""

from collections.abc import Callable, Collection, Sequence

from switchcli.data.objectives.example_packing import Lengths
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import TaskDataSpec
from switchcli.tasks.task import Task
from switchcli.train.scoring import ScoringSpec

MANY_CUT = 0.25
"""Where more of the examples than this are cut, the rows are too short for the task."""

Say = Callable[[str], None]


def exams_of(
    tasks: Collection[Task], data: TaskDataSpec, scoring: ScoringSpec, tokenizer: Tokenizer
) -> tuple[tokens.Scored, ...]:
    """Those of the tasks that have the split to score on. Raises DataError as `tokens.scored`."""
    lengths = Lengths(data.inputs_length, data.targets_length)
    return tuple(
        tokens.scored(task, scoring.split, data.folder, tokenizer, lengths, scoring.examples)
        for task in tasks
        if reading.has(task, scoring.split)
    )


def tell(tasks: Collection[Task], exams: Sequence[tokens.Scored], split: str, say: Say, warn: Say) -> None:
    """How many examples of each task are scored, which inputs are cut, and which tasks are not scored at all."""
    asked = {exam.task.name: exam for exam in exams}
    for task in tasks:
        if task.name not in asked:
            warn(f"{task.name}: has no {split} split: it is not scored")
            continue
        exam = asked[task.name]
        count, length = len(exam.examples), exam.packed.lengths.inputs
        cut = f", {exam.num_cut:,} inputs longer than {length} tokens and cut" if exam.num_cut else ""
        tell_of_cut(f"{task.name}: {count:,} examples to score{cut}", exam.num_cut / count, say, warn)


def tell_of_cut(text: str, share: float, say: Say, warn: Say) -> None:
    """A message, or a warning with the way out where more than `MANY_CUT` of the examples are cut."""
    if share > MANY_CUT:
        warn(f"{text}: raise data.inputs_length or data.targets_length, if the model is to see the rest")
    else:
        say(text)
