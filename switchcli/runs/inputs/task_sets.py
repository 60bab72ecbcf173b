"""Read the task examples that a model is scored on, in training and by `switchcli eval`, and report on them."""

from collections.abc import Collection, Sequence

from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.prepare.store import digest_of_lines
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError
from switchcli.runs.inputs.unknown_tokens import warn_of_unknown
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import TaskDataSpec
from switchcli.tasks.task import Task
from switchcli.terminal.console import Console
from switchcli.training.scoring_spec import ScoringSpec

TRUNCATION_LIMIT = 0.1
"""The fraction of truncated examples above which the rows are too short for the task."""


def scored_examples_of(
    tasks: Collection[Task], data: TaskDataSpec, scoring: ScoringSpec, tokenizer: Tokenizer, needed: bool = False
) -> tuple[tokens.ScoredExamples, ...]:
    """Return the examples to score of each task that has the split to score on.

    Raises:
        DataError: as `tokens.scored_examples` says. With `needed`, also if no example has a label.
    """
    lengths = RowLengths(data.inputs_length, data.targets_length)
    scored = tuple(
        tokens.scored_examples(task, scoring.split, data.folder, tokenizer, lengths, scoring.examples)
        for task in tasks
        if reading.has_split(task, scoring.split)
    )
    # Only examples with a label are packed into rows.
    if needed and not any(examples.packed.num_rows for examples in scored):
        raise DataError(
            f"tasks: no labeled example of {', '.join(task.name for task in tasks)} in {scoring.split}: name a task "
            f"that has some, or give {scoring.split}: to a task of your own"
        )
    return scored


def digests_of(scored: Sequence[tokens.ScoredExamples], tokenizer: Tokenizer) -> dict[str, str]:
    """Return digests of the tokenizer and of the examples of each task to score, by what they are of."""
    digests = {
        f"the examples of {examples.task.name} to score": digest_of_lines(map(repr, examples.examples))
        for examples in scored
    }
    return {"the tokenizer": tokenizer.sha256, **digests}


def report_task_sets(
    tasks: Collection[Task],
    scored: Sequence[tokens.ScoredExamples],
    split: str,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Print how many examples of each task are scored and truncated, and which tasks are not scored.

    Warns of inputs with many characters that the tokenizer does not know.
    """
    by_name = {examples.task.name: examples for examples in scored}
    for task in tasks:
        if task.name not in by_name:
            console.warning(f"{task.name}: has no {split} split: it is not scored")
            continue
        examples = by_name[task.name]
        count, num_truncated = len(examples.examples), examples.num_truncated
        unlabeled = sum(not example.targets for example in examples.examples)
        without = f", {unlabeled:,} more without a right answer" if unlabeled else ""
        message = f"{task.name}: {count - unlabeled:,} examples to score{without}"
        limit = f"data.inputs_length={examples.packed.lengths.inputs}"
        report_truncation(message, num_truncated, count, limit, console)
        if lacking := [label for label in task.labels if tokenizer.unknown in tokenizer.encode(label)]:
            console.warning(
                f"{task.name}: the model's vocabulary lacks characters of its labels ({', '.join(lacking[:4])}"
                f"{', ...' if len(lacking) > 4 else ''}), so that it cannot answer with them: take other labels, or a "
                "vocabulary with byte_fallback"
            )
        warn_of_unknown(f"inputs of {task.name}", examples.inputs.fraction_of(tokenizer.unknown), console)
        if not task.labels:
            warn_of_unknown(f"answers of {task.name}", examples.answers.fraction_of(tokenizer.unknown), console)


def report_truncation(text: str, truncated: int, count: int, limit: str, console: Console) -> None:
    """Print the text and how many of the examples are truncated: a warning above `TRUNCATION_LIMIT` of them."""
    if truncated:
        text += f"; {truncated:,} ({truncated / count:.0%}) are longer than {limit} and truncated"
    if truncated > TRUNCATION_LIMIT * count:
        console.warning(f"{text}: raise it if the model needs the rest")
    else:
        console.message(text)
