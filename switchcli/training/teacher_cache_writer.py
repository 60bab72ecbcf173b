"""TeacherCacheWriter: runs a teacher on every batch of a run, on all ranks, and writes to a TeacherCache.

Legend: B rows, T target, N targets of all rows, C targets of a chunk, V vocabulary, K cached probabilities of a target.
"""

from collections.abc import Iterator

import torch

from switchcli.data.batch import AnyBatch, BatchSource, TeacherTopK
from switchcli.distributed.context import DistributedContext
from switchcli.report.console import Console
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.training.distillation import FullTeacherProbs, Teacher
from switchcli.training.distillation_specs import TeacherCacheSpec
from switchcli.training.loss import CHUNK
from switchcli.training.teacher_cache import TeacherCache, id_dtype


class TeacherCacheWriter:
    """A teacher, and the batches that it runs on."""

    def __init__(
        self,
        teacher: Teacher,
        settings: TeacherCacheSpec,
        source: BatchSource,
        rows_per_step: int,
        microbatch: int,
        packed: bool,
        temperature: float,
    ) -> None:
        """Run on batches of `source`, `microbatch` rows in one forward pass. `packed`: examples share rows."""
        self._teacher, self._settings, self._packed, self._temperature = teacher, settings, packed, temperature
        self._source, self._rows_per_step, self._microbatch = source, rows_per_step, microbatch

    def fill(
        self,
        cache: TeacherCache,
        step_ranges: list[range],
        context: DistributedContext,
        console: Console,
        stop: StopRequest,
    ) -> None:
        """Add the probabilities of all `step_ranges`, each of which becomes one file.

        Ranks take one range each at a time, and wait for one another after each round, without a timeout.

        Raises:
            StopTraining: a stop was requested on some rank. Steps that are complete are in the cache.
        """
        rounds = range(0, len(step_ranges), context.world)  # the first range of each round
        for first in console.track(rounds, "running the teacher", len(rounds)):
            index = first + context.rank
            if index < len(step_ranges) and not stop.requested:
                steps = step_ranges[index]
                probs = [*self._probs_by_step(steps, context, stop)]
                if probs:  # fewer than the steps after a stop
                    done = range(steps.start, steps.start + len(probs))
                    cache.add(done, _concatenate(probs))
            if any(context.sum_without_timeout([int(stop.requested)])):
                raise StopTraining

    def _probs_by_step(self, steps: range, context: DistributedContext, stop: StopRequest) -> Iterator[TeacherTopK]:
        """Yield the probabilities of all rows of each step, [R, T, K] and [R, T], until a stop is requested."""
        for step in steps:
            probs = []
            for first in range(0, self._rows_per_step, self._microbatch):
                if stop.requested:
                    return
                batch = self._source.batch(step, first, min(self._microbatch, self._rows_per_step - first))
                probs.append(self._probs(context.to_device(batch)))
            yield _concatenate(probs)

    def _probs(self, batch: AnyBatch) -> TeacherTopK:
        """Return the probabilities of a batch on the CPU: [B, T, K] and [B, T]."""
        shape = batch.targets_BT.shape
        top_k = top_k_probs(
            self._teacher.predict(batch, self._packed, self._temperature), shape.numel(), self._settings
        )
        # N = B * T targets: [N, K] to [B, T, K], and [N] to [B, T].
        return TeacherTopK(*(tensor.view(*shape, *tensor.shape[1:]).cpu() for tensor in top_k))


def _concatenate(probs: list[TeacherTopK]) -> TeacherTopK:
    """Return probabilities one after another along dim 0."""
    return TeacherTopK(*(torch.cat(tensors) for tensors in zip(*probs, strict=True)))


@torch.no_grad()
def top_k_probs(probabilities: FullTeacherProbs, num_targets: int, settings: TeacherCacheSpec) -> TeacherTopK:
    """Return the K largest probabilities of N targets and the sum of the others: [N, K], [N, K], [N]."""
    chunks = []
    for start in range(0, num_targets, CHUNK):
        q_CV = probabilities.log_probs(slice(start, start + CHUNK)).exp_()
        vocabulary = q_CV.shape[1]
        q_CK, ids_CK = q_CV.topk(min(settings.top_k, vocabulary))
        # Exactly 0 if no token is left out, and never below 0 by rounding.
        has_others = settings.top_k < vocabulary
        rest_C = (1.0 - q_CK.sum(1)).clamp_(min=0.0) if has_others else q_CK.new_zeros(len(q_CK))
        chunks.append(TeacherTopK(ids_CK, q_CK.to(settings.dtype), rest_C.to(settings.dtype)))
    top_k = _concatenate(chunks)
    return top_k._replace(ids=top_k.ids.to(id_dtype(vocabulary)))
