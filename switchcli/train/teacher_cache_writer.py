"""Asking a teacher once: its answers to every batch of a run into an TeacherCache, by all ranks, resumable.

Legend: N targets, V vocabulary, K kept probabilities.
"""

from collections.abc import Iterator

import torch

from switchcli.data.batch import AnyBatch, BatchSource, TeacherTopK
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.report.console import Console
from switchcli.train.distillation import FullTeacherProbs, Teacher
from switchcli.train.loss import CHUNK
from switchcli.train.teacher_cache import TeacherCache, TeacherCacheSpec, id_dtype


class TeacherCacheWriter:
    """What it takes to have a teacher's answers to the batches of a run."""

    def __init__(
        self,
        teacher: Teacher,
        settings: TeacherCacheSpec,
        source: BatchSource,
        rows_per_step: int,
        microbatch: int,
        packed: bool,
    ) -> None:
        """`microbatch` rows are asked about at a time."""
        self._teacher, self._settings, self._packed = teacher, settings, packed
        self._source, self._rows_per_step, self._microbatch = source, rows_per_step, microbatch

    def fill(
        self, store: TeacherCache, parts: list[range], context: DistributedContext, console: Console, stop: StopRequest
    ) -> None:
        """Add the answers to all `parts`, the ranks in turn. A rank may take long over a part: the others wait.

        Raises:
            StopTraining: a stop was requested on some rank.
        """
        turns = [range(start, min(start + context.world, len(parts))) for start in range(0, len(parts), context.world)]
        for turn in console.track(turns, "asking", len(turns)):
            if turn.start + context.rank in turn and not stop.requested:
                steps = parts[turn.start + context.rank]
                answers = [*self._answers(steps, context, stop)]
                if answers:
                    done = range(steps.start, steps.start + len(answers))
                    store.add(done, TeacherTopK(*(torch.cat(each) for each in zip(*answers, strict=True))))
            if any(context.sum_without_timeout([int(stop.requested)])):
                raise StopTraining

    def _answers(self, steps: range, context: DistributedContext, stop: StopRequest) -> Iterator[TeacherTopK]:
        """To all rows of each of these steps, until it is to stop."""
        for step in steps:
            parts = []
            for first in range(0, self._rows_per_step, self._microbatch):
                if stop.requested:
                    return
                batch = self._source.batch(step, first, min(self._microbatch, self._rows_per_step - first))
                parts.append(self._answer(context.to_device(batch)))
            yield TeacherTopK(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _answer(self, batch: AnyBatch) -> TeacherTopK:
        shape = batch.targets_BT.shape
        probabilities = self._teacher.predict(batch, self._packed)
        kept = top_k_probs(probabilities, shape.numel(), self._settings)
        return TeacherTopK(*(part.view(*shape, *part.shape[1:]).cpu() for part in kept))


@torch.no_grad()
def top_k_probs(probabilities: FullTeacherProbs, num_targets: int, settings: TeacherCacheSpec) -> TeacherTopK:
    """The K largest of each of N targets and what the others add up to: [N, K], [N, K], [N]."""
    chunks = []
    for start in range(0, num_targets, CHUNK):
        q_CV = probabilities.log_probs(slice(start, start + CHUNK)).exp_()
        vocabulary = q_CV.shape[1]
        q_CK, ids_CK = q_CV.topk(min(settings.top_k, vocabulary))
        whole = settings.top_k >= vocabulary
        rest_C = q_CK.new_zeros(len(q_CK)) if whole else (1.0 - q_CK.sum(1)).clamp_(min=0.0)
        dtype = settings.dtype
        chunks.append(TeacherTopK(ids_CK, q_CK.to(dtype), rest_C.to(dtype)))
    ids_NK, q_NK, rest_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return TeacherTopK(ids_NK.to(id_dtype(vocabulary)), q_NK, rest_N)
