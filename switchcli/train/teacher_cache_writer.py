"""Asking a teacher once: its answers to every batch of a run into an AnswerStore, by all ranks, resumable.

Legend: N targets, V vocabulary, K kept probabilities.
"""

from collections.abc import Iterator

import torch

from switchcli.data.batch import Answers, AnyBatch, BatchSource
from switchcli.distributed.context import Runtime
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.report.console import Console
from switchcli.train.distillation import AllProbabilities, Teacher
from switchcli.train.loss import CHUNK
from switchcli.train.teacher_cache import AnswersSpec, AnswerStore, id_dtype


class Asking:
    """What it takes to have a teacher's answers to the batches of a run."""

    def __init__(
        self,
        teacher: Teacher,
        settings: AnswersSpec,
        source: BatchSource,
        rows_per_step: int,
        microbatch: int,
        packed: bool,
    ) -> None:
        """`microbatch` rows are asked about at a time."""
        self._teacher, self._settings, self._packed = teacher, settings, packed
        self._source, self._rows_per_step, self._microbatch = source, rows_per_step, microbatch

    def fill(
        self, store: AnswerStore, parts: list[range], runtime: Runtime, console: Console, stop: StopRequest
    ) -> None:
        """Add the answers to all `parts`, the ranks in turn. A rank may take long over a part: the others wait.

        Raises:
            StopTraining: a stop was requested on some rank.
        """
        turns = [range(start, min(start + runtime.world, len(parts))) for start in range(0, len(parts), runtime.world)]
        for turn in console.track(turns, "asking", len(turns)):
            if turn.start + runtime.rank in turn and not stop.requested:
                steps = parts[turn.start + runtime.rank]
                answers = [*self._answers(steps, runtime, stop)]
                if answers:
                    done = range(steps.start, steps.start + len(answers))
                    store.add(done, Answers(*(torch.cat(each) for each in zip(*answers, strict=True))))
            if any(runtime.sum_when_all_are_there([int(stop.requested)])):
                raise StopTraining

    def _answers(self, steps: range, runtime: Runtime, stop: StopRequest) -> Iterator[Answers]:
        """To all rows of each of these steps, until it is to stop."""
        for step in steps:
            parts = []
            for first in range(0, self._rows_per_step, self._microbatch):
                if stop.requested:
                    return
                batch = self._source.batch(step, first, min(self._microbatch, self._rows_per_step - first))
                parts.append(self._answer(runtime.place(batch)))
            yield Answers(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _answer(self, batch: AnyBatch) -> Answers:
        shape = batch.targets_BT.shape
        probabilities = self._teacher.ask(batch, self._packed)
        kept = largest(probabilities, shape.numel(), self._settings)
        return Answers(*(part.view(*shape, *part.shape[1:]).cpu() for part in kept))


@torch.no_grad()
def largest(probabilities: AllProbabilities, num_targets: int, settings: AnswersSpec) -> Answers:
    """The K largest of each of N targets and what the others add up to: [N, K], [N, K], [N]."""
    chunks = []
    for start in range(0, num_targets, CHUNK):
        q_CV = probabilities.log_probs(slice(start, start + CHUNK)).exp_()
        vocabulary = q_CV.shape[1]
        q_CK, ids_CK = q_CV.topk(min(settings.top_k, vocabulary))
        whole = settings.top_k >= vocabulary
        rest_C = q_CK.new_zeros(len(q_CK)) if whole else (1.0 - q_CK.sum(1)).clamp_(min=0.0)
        dtype = settings.dtype
        chunks.append(Answers(ids_CK, q_CK.to(dtype), rest_C.to(dtype)))
    ids_NK, q_NK, rest_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Answers(ids_NK.to(id_dtype(vocabulary)), q_NK, rest_N)
