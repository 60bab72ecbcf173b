"""Scoring a model on tasks: the ranks share the batches of examples, and each rank gets all answers.

Batches do not depend on the number of ranks, so answers do not either.

Legend: B batch, S source, T target, X examples, L labels.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint.saved_state import Best
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import TASKS_AVERAGE, suite_score, task_score
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate, label_log_likelihoods
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS
from switchcli.system.signals import NEVER, StopRequest, StopTraining
from switchcli.tasks.registry import SUITES
from switchcli.tasks.scores import Scores
from switchcli.tasks.suites import PAPER, average
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.terminal.console import Console
from switchcli.training.config import ScoringSpec


class TaskPredictor:
    """A model that answers the examples of tasks, on all ranks together."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        context: DistributedContext,
        settings: ScoringSpec,
        capacity: Policy = "dropless",
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._context = context
        self._settings = settings
        self._capacity = capacity

    def answer_all(
        self, task_sets: Sequence[ScoredExamples], console: Console, stop: StopRequest = NEVER
    ) -> dict[str, tuple[AnsweredExample, ...]]:
        """Return the answered examples of each task, by its name, and show the progress in examples."""
        answers = {}
        num_done, total = 0, sum(len(task_set.examples) for task_set in task_sets)
        with console.counting("answering examples", total) as show:
            for task_set in task_sets:
                answers[task_set.task.name] = self(task_set, stop, partial(_show_after, num_done, show))
                num_done += len(task_set.examples)
        return answers

    def __call__(
        self,
        examples: ScoredExamples,
        stop: StopRequest = NEVER,
        show: Callable[[int], None] = lambda count: None,
    ) -> tuple[AnsweredExample, ...]:
        """Return every example with the model's answer, in order and identical on all ranks.

        `show` is called with the number of answered examples.

        Raises:
            StopTraining: a stop was requested on some rank. All ranks raise it, between two tokens.
        """
        if self._settings.by == "likelihood":
            return self._choose_labels(examples, stop, show)
        return self._generate(examples, stop, show)

    def _generate(
        self, examples: ScoredExamples, stop: StopRequest, show: Callable[[int], None]
    ) -> tuple[AnsweredExample, ...]:
        """Return every example with a decoded answer."""
        # Each rank fills the rows of its own examples. The others stay 0, so a sum over ranks completes the table.
        decoding = Decoding(**self._settings.decoding.model_dump())
        shape = (len(examples.examples), decoding.max_tokens)
        tokens_XT = torch.zeros(shape, dtype=torch.int32, device=self._context.device)
        # A stop leaves the loop early; closing the generator then restores the mode of the model.
        with closing(self._batches(examples, stop, show)) as batches:
            for batch in batches:
                answers_BT = generate(
                    self._model,
                    batch.inputs_BS,
                    decoding,
                    all_done=lambda done_B: self._ends(done_B, stop),
                )
                if self._context.any_rank(stop.requested):
                    raise StopTraining
                if batch.is_own:
                    tokens_XT[batch.number_B, : answers_BT.shape[1]] = answers_BT.int()
        return tuple(
            AnsweredExample(example, self._tokenizer.decode(ids))
            for example, ids in zip(examples.examples, self._context.all_reduce(tokens_XT).tolist(), strict=True)
        )

    def _choose_labels(
        self, examples: ScoredExamples, stop: StopRequest, show: Callable[[int], None]
    ) -> tuple[AnsweredExample, ...]:
        """Return every example with the most probable label of its task, the first one of equals."""
        task, context = examples.task, self._context
        assert task.labels, f"{task.name}: the recipe was not checked for labels"
        ids = self._tokenizer.encode_batch([*task.labels])
        labels = [torch.tensor([*label, EOS], device=context.device) for label in ids]
        log_p_XL = torch.zeros(len(examples.examples), len(labels), dtype=torch.float64, device=context.device)
        with closing(self._batches(examples, stop, show)) as batches:
            for batch in batches:
                log_p_BL = label_log_likelihoods(self._model, batch.inputs_BS, labels)
                if context.any_rank(stop.requested):
                    raise StopTraining
                if batch.is_own:
                    log_p_XL[batch.number_B] = log_p_BL.double()
        best_X = context.all_reduce(log_p_XL).cpu().numpy().argmax(axis=1)  # numpy takes the first of equals
        return tuple(
            AnsweredExample(example, task.labels[best])
            for example, best in zip(examples.examples, best_X.tolist(), strict=True)
        )

    def _batches(
        self, examples: ScoredExamples, stop: StopRequest, show: Callable[[int], None]
    ) -> Generator["_AnswerBatch", None, None]:
        """Yield this rank's batches, equally many on each rank, with the model ready to answer them."""
        context = self._context
        batches = list(examples.batches(self._settings.batch_examples))
        if context.any_rank(stop.requested):
            raise StopTraining
        with evaluating(self._model, self._capacity), context.eager(), context.autocast():
            # The number of rounds is rounded up.
            for round_index in range(-(-len(batches) // context.dp_size)):
                index = round_index * context.dp_size + context.dp_rank
                # Forward passes are collective. In the last round a rank without a batch repeats the last one and drops
                # its answers.
                numbers = batches[min(index, len(batches) - 1)]
                inputs_BS = context.to_device(torch.from_numpy(examples.padded_inputs(numbers)))
                yield _AnswerBatch(inputs_BS, torch.from_numpy(numbers), index < len(batches))
                num_done = (round_index + 1) * context.dp_size * self._settings.batch_examples
                show(min(num_done, len(examples.examples)))

    def _ends(self, done_B: torch.Tensor, stop: StopRequest) -> bool:
        """Return whether to leave the decoding loop, together on all ranks: all are done, or one is to stop."""
        unfinished, stopping = self._context.sum_over_ranks([int(not done_B.all()), int(stop.requested)])
        return stopping > 0 or unfinished == 0


class _AnswerBatch(NamedTuple):
    """The examples that a rank answers together."""

    inputs_BS: torch.Tensor
    number_B: torch.Tensor
    """int64: the index of each example."""
    is_own: bool
    """False for a batch that only keeps the ranks in step: another rank has its answers."""


def _show_after(num_before: int, show: Callable[[int], None], count: int) -> None:
    show(num_before + count)


def score_metrics(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return each task's score, the averages of the benchmarks, and that of all tasks, by metric name.

    Tasks whose answers are secret have no score and are left out.
    """
    values = _values(scores)
    if not values:
        return {}
    task_metrics = {task_score(name): value for name, value in values.items()}
    suite_metrics = {suite_score(name): mean for name, mean in suite_scores(scores).items()}
    return {**task_metrics, **suite_metrics, TASKS_AVERAGE: average(values, SUITES.values())}


def suite_scores(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return the averages, by name, of the benchmarks whose tasks were all scored."""
    values = _values(scores)
    means = {suite.name: suite.mean(values) for suite in SUITES.values() if suite is not PAPER}  # Table 5 has no mean
    return {name: mean for name, mean in means.items() if mean is not None}


def _values(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return the score of each task that has one."""
    return {name: task.score.value for name, task in scores.items() if task.score is not None}


def task_results(scores: Mapping[str, Scores], best: Mapping[str, Best] | None = None) -> dict[str, Any]:
    """Return the scores of each task, their average and those of suites, for result.json.

    With the `best` values of a run, each entry has its best value and the step of that.
    """
    best = best or {}
    tasks = {name: {**one.to_json(), **_best(best, task_score(name))} for name, one in scores.items()}
    average = {"score": score_metrics(scores).get(TASKS_AVERAGE), **_best(best, TASKS_AVERAGE)}
    suites = {name: {"score": mean, **_best(best, suite_score(name))} for name, mean in suite_scores(scores).items()}
    return {"tasks": tasks, "average": average, "suites": suites}


def _best(best: Mapping[str, Best], name: str) -> dict[str, float | int]:
    value = best.get(name)
    return {} if value is None else {"best": value.value, "best_step": value.step}
