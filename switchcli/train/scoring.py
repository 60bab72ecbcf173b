"""Scoring a model on tasks: it answers every example, the ranks share the batches, and each of them has all answers.

A batch is the same whatever the number of ranks, so the answers are too.

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
from switchcli.spec import MOST, Spec
from switchcli.tasks.registry import SUITES
from switchcli.tasks.scores import Scores, score
from switchcli.tasks.suites import PAPER, average
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.train.callbacks import EvaluationCallback, MetricsLog
from switchcli.train.state import TrainState


class ScoringSpec(Spec):
    """How answers to tasks are had and scored."""

    split: Literal["validation", "test"] = "validation"
    examples: int | None = Field(default=None, ge=1, le=MOST["count"])
    """At most so many of each task, drawn by lot, the same ones each time, all answers to a question together; absent:
    all."""
    batch_examples: int = Field(default=32, ge=1, le=MOST["count"])
    """Examples that are answered together, on one rank."""
    decoding: Decoding = Decoding()
    capacity: Policy = "dropless"
    """How the routers count capacity while they answer, in training: `dropless`, `paper`, or a factor."""
    draws: int = Field(default=1000, ge=1, le=MOST["ranks"])
    """Bootstrap draws for the intervals."""

    @model_validator(mode="after")
    def _repeats(self) -> Self:
        if self.decoding.temperature:
            raise ValueError(
                f"decoding.temperature ({self.decoding.temperature}) draws answers, and a score is of those that the "
                "model finds most probable: leave it out"
            )
        return self


class TaskPredictor:
    """A model that answers the examples of tasks, with the other ranks."""

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        context: DistributedContext,
        settings: ScoringSpec,
        capacity: Policy,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._context = context
        self._settings = settings
        self._capacity = capacity

    def __call__(self, exam: ScoredExamples, stop: StopRequest | None = None) -> tuple[AnsweredExample, ...]:
        """Every example with the model's answer, in order; the same on every rank.

        Raises:
            StopTraining: a stop was requested on some rank.
        """
        context, decoding = self._context, self._settings.decoding
        batches = list(exam.batches(self._settings.batch_examples))
        tokens_XT = torch.zeros(len(exam.examples), decoding.max_tokens, dtype=torch.int32, device=context.device)
        rounds = -(-len(batches) // context.dp_size)

        def is_stopping() -> bool:
            return stop is not None and stop.requested

        def all_done(done_B: torch.Tensor) -> bool:
            going, stopping = context.sum_over_ranks([int(not done_B.all()), int(is_stopping())])
            return stopping > 0 or going == 0

        if context.any_rank(is_stopping()):
            raise StopTraining
        with evaluating(self._model, self._capacity), context.eager(), context.autocast():
            for turn in range(rounds):
                mine = turn * context.dp_size + context.dp_rank
                # A rank without a batch of its own answers the last one as well, for nobody: all ranks do the same.
                numbers = batches[min(mine, len(batches) - 1)]
                inputs_BS = context.to_device(torch.from_numpy(exam.padded(numbers)))
                answers_BT = generate(self._model, inputs_BS, decoding, all_done=all_done)
                if context.any_rank(is_stopping()):
                    raise StopTraining
                if mine < len(batches):
                    tokens_XT[torch.from_numpy(numbers), : answers_BT.shape[1]] = answers_BT.int()
        everything = context.all_reduce(tokens_XT).tolist()
        decode = self._tokenizer.decode
        return tuple(AnsweredExample(one, decode(ids)) for one, ids in zip(exam.examples, everything, strict=True))


class TaskEvalCallback(EvaluationCallback):
    """Scores the model on every task, notes the figures in the state, and writes them."""

    def __init__(
        self,
        every_steps: int,
        predictor: TaskPredictor,
        exams: Sequence[ScoredExamples],
        context: DistributedContext,
        log: MetricsLog,
        stop: StopRequest,
    ) -> None:
        """A `stop` on any rank ends it between two tokens, with no figure: it is pending then."""
        super().__init__(every_steps, TASKS_AVERAGE)
        self._stop = stop
        self._predictor = predictor
        self._exams = exams
        self._context = context
        self._log = log
        self.answers: dict[str, tuple[AnsweredExample, ...]] = {}
        """The last answers, by the name of the task."""

    def predict(self) -> None:
        """Have every example answered. Raises StopTraining when it was stopped: there are no answers then."""
        self.answers = {}
        self.answers = {exam.task.name: self._predictor(exam, self._stop) for exam in self._exams}

    def scores(self, draws: int) -> dict[str, Scores]:
        """Of the last answers, with intervals from so many draws."""
        return {exam.task.name: score(exam.task, self.answers[exam.task.name], draws) for exam in self._exams}

    def __call__(self, state: TrainState) -> None:
        self.predict()
        figures = score_metrics(self.scores(draws=0))
        state.note(figures)
        if self._context.is_main:
            self._log.write({"step": state.step, **figures})


def score_metrics(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Each task's score, the benchmarks' averages, and that of all tasks, by name; nothing of secret answers."""
    values = {name: one.score.value for name, one in scores.items() if one.score is not None}
    if not values:
        return {}
    each = {task_score(name): value for name, value in values.items()}
    suites = {suite_score(name): mean for name, mean in suite_scores(scores).items()}
    return {**each, **suites, TASKS_AVERAGE: average(values, SUITES.values())}


def suite_scores(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The averages of the benchmarks all of whose tasks were scored."""
    values = {name: one.score.value for name, one in scores.items() if one.score is not None}
    means = {suite.name: suite.mean(values) for suite in SUITES.values() if suite is not PAPER}  # Table 5 has none
    return {name: mean for name, mean in means.items() if mean is not None}


def answer_texts(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs_BS: torch.Tensor,
    max_tokens: int,
    policy: Policy = "dropless",
    all_done: AllDone = all_done_locally,
) -> list[str]:
    """The model's greedy answer to each row of ids, as text with the sentinels readable."""
    with evaluating(model, policy):
        rows_BT = generate(model, inputs_BS, Decoding(max_tokens=max_tokens), all_done=all_done)
    return [tokenizer.decode(row) for row in rows_BT.tolist()]
