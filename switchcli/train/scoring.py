"""Scoring a model on tasks: the ranks share the batches of examples, and each rank gets all answers.

Batches do not depend on the number of ranks, so answers do not either.

Legend: B batch, S source, T target, X examples.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.metric_names import TASKS_AVERAGE, suite_score, task_score
from switchcli.model.decoding import Decoding
from switchcli.model.generation import AllDone, all_done_locally, generate
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import LIMITS, Spec
from switchcli.tasks.registry import SUITES
from switchcli.tasks.scores import Scores, score
from switchcli.tasks.suites import PAPER, average
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.train.callbacks import EvaluationCallback, MetricsLog
from switchcli.train.state import TrainState


class ScoringSpec(Spec):
    """How a model answers the examples of tasks, and how its answers are scored."""

    split: Literal["validation", "test"] = "validation"
    """Split of each task that is scored."""
    examples: int | None = Field(default=None, ge=1, le=LIMITS["count"])
    """Examples of each task, at most: a random sample, the same in each evaluation, that keeps all answers to a
    question together; by default all examples."""
    batch_examples: int = Field(default=32, ge=1, le=LIMITS["count"])
    """Examples that one rank answers together."""
    decoding: Decoding = Decoding()
    """How answers are decoded."""
    capacity: Policy = "dropless"
    """How routers count capacity in evaluations during training: `dropless`, `paper`, or a factor."""
    draws: int = Field(default=1000, ge=1, le=LIMITS["ranks"])
    """Bootstrap samples for the confidence intervals."""

    @model_validator(mode="after")
    def _repeats(self) -> Self:
        if self.decoding.temperature:
            raise ValueError(
                f"decoding.temperature ({self.decoding.temperature}) draws answers at random, and a score is that of "
                "the most probable answers: leave it out"
            )
        return self


class TaskPredictor:
    """A model that answers the examples of tasks, on all ranks together."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        context: DistributedContext,
        settings: ScoringSpec,
        capacity: Policy,
    ) -> None:
        """`capacity` is how routers count capacity; that of the settings does not apply."""
        self._model = model
        self._tokenizer = tokenizer
        self._context = context
        self._settings = settings
        self._capacity = capacity

    def __call__(self, examples: ScoredExamples, stop: StopRequest | None = None) -> tuple[AnsweredExample, ...]:
        """Return every example with the model's answer, in order and identical on all ranks.

        Raises:
            StopTraining: a stop was requested on some rank. All ranks raise it, between two tokens.
        """
        context, decoding = self._context, self._settings.decoding
        batches = list(examples.batches(self._settings.batch_examples))
        num_examples = len(examples.examples)
        # Each rank fills the rows of its own examples. The others stay 0, so a sum over ranks completes the table.
        tokens_XT = torch.zeros(num_examples, decoding.max_tokens, dtype=torch.int32, device=context.device)
        num_rounds = -(-len(batches) // context.dp_size)  # rounded up

        def is_stopping() -> bool:
            return stop is not None and stop.requested

        def all_done(done_B: torch.Tensor) -> bool:
            # Ranks must leave the decoding loop together: when all are done, or when one is to stop.
            unfinished, stopping = context.sum_over_ranks([int(not done_B.all()), int(is_stopping())])
            return stopping > 0 or unfinished == 0

        if context.any_rank(is_stopping()):
            raise StopTraining
        with evaluating(self._model, self._capacity), context.eager(), context.autocast():
            for round_index in range(num_rounds):
                batch_index = round_index * context.dp_size + context.dp_rank
                # Forward passes are collective. In the last round a rank without a batch repeats the last one and drops
                # its answers.
                numbers = batches[min(batch_index, len(batches) - 1)]
                inputs_BS = context.to_device(torch.from_numpy(examples.padded(numbers)))
                answers_BT = generate(self._model, inputs_BS, decoding, all_done=all_done)
                if context.any_rank(is_stopping()):
                    raise StopTraining
                if batch_index < len(batches):
                    tokens_XT[torch.from_numpy(numbers), : answers_BT.shape[1]] = answers_BT.int()
        answers = context.all_reduce(tokens_XT).tolist()
        return tuple(
            AnsweredExample(example, self._tokenizer.decode(ids))
            for example, ids in zip(examples.examples, answers, strict=True)
        )


class TaskEvalCallback(EvaluationCallback):
    """Scores the model on every task, records the metrics in the state, and logs them."""

    def __init__(
        self,
        every_steps: int,
        predictor: TaskPredictor,
        task_sets: Sequence[ScoredExamples],
        context: DistributedContext,
        log: MetricsLog,
        stop: StopRequest,
    ) -> None:
        """Score the examples of `task_sets`, one for each task.

        A `stop` on any rank ends the evaluation between two tokens without a metric: then it is pending.
        """
        super().__init__(every_steps, TASKS_AVERAGE)
        self._predictor = predictor
        self._task_sets = task_sets
        self._context = context
        self._log = log
        self._stop = stop
        self.answers: dict[str, tuple[AnsweredExample, ...]] = {}
        """The last answers by name of the task; empty if there are none."""

    def predict(self) -> None:
        """Answer every example. Raises StopTraining after a stop, and then there are no answers."""
        self.answers = {}
        self.answers = {task_set.task.name: self._predictor(task_set, self._stop) for task_set in self._task_sets}

    def scores(self, draws: int) -> dict[str, Scores]:
        """Return the scores of the last answers by task, with intervals from `draws` bootstrap samples."""
        return {
            task_set.task.name: score(task_set.task, self.answers[task_set.task.name], draws)
            for task_set in self._task_sets
        }

    def __call__(self, state: TrainState) -> None:
        self.predict()
        metrics = score_metrics(self.scores(draws=0))
        state.record_evaluation(metrics)
        if self._context.is_main:
            self._log.write({"step": state.step, **metrics})


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


def answer_texts(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs_BS: torch.Tensor,
    max_tokens: int,
    policy: Policy = "dropless",
    all_done: AllDone = all_done_locally,
) -> list[str]:
    """Return the model's greedy answer to each row of token ids, as text in which sentinels are readable."""
    with evaluating(model, policy):
        answers_BT = generate(model, inputs_BS, Decoding(max_tokens=max_tokens), all_done=all_done)
    return [tokenizer.decode(answer) for answer in answers_BT.tolist()]
