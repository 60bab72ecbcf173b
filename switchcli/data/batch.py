"""Batch: what travels from the data to the model; Lesson, which brings a teacher's answers too; and their source."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Batch(NamedTuple):
    """One microbatch. B sequences; S source and T target positions; both int64, padded with `switchcli.spec.PAD`.

    Masks are derived (`!= PAD`); the decoder's input is the targets shifted right. Shapes do not change within a run.
    """

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class TeacherTopK(NamedTuple):
    """What a teacher found of each target: its K largest probabilities, whose they are, and the rest."""

    ids_BTK: torch.Tensor
    """Integers, the most probable first."""
    probability_BTK: torch.Tensor
    """float16 or float32, as they were kept."""
    rest_BT: torch.Tensor
    """The probability of all others together."""


class DistillBatch(NamedTuple):
    """A batch with its answers, of a teacher that is not asked again (train/teacher_cache.py)."""

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor
    teacher: TeacherTopK


AnyBatch = Batch | DistillBatch


class BatchSource(ABC):
    """The batches of a run: a pure function of the step, or of the step and a state that is saved with the run."""

    @abstractmethod
    def batch(self, step: int, first: int, count: int) -> AnyBatch:
        """Return rows first..first+count of the batch of `step`."""

    def state(self, step: int) -> list[int]:
        """Return what this rank adds to the state after `step` steps; the sum over ranks is the state of all."""
        return []

    def restore_state(self, step: int, state: Sequence[int]) -> None:
        """Go on after `step` steps from `state`, the sum over ranks of what `state(step)` returned."""
        assert not state, "these batches follow from their step alone"

    def record(self, step: int) -> Mapping[str, Any]:
        """Return what a record of `step` says of the rows so far."""
        return {}

    @property
    def is_sequential(self) -> bool:
        """Whether batches must be asked for in the order of their steps, by one thread."""
        return False
