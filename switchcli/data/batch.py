"""Batch: what travels from the data to the model; and Lesson, which brings a teacher's answers too."""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One microbatch. B sequences; S source and T target positions; both int64, padded with `switchcli.spec.PAD`.

    Masks are derived (`!= PAD`); the decoder's input is the targets shifted right. Shapes do not change within a run.
    """

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class Answers(NamedTuple):
    """What a teacher found of each target: its K largest probabilities, whose they are, and the rest."""

    ids_BTK: torch.Tensor
    """Integers, the most probable first."""
    probability_BTK: torch.Tensor
    """float16 or float32, as they were kept."""
    rest_BT: torch.Tensor
    """The probability of all others together."""


class Lesson(NamedTuple):
    """A batch with its answers, of a teacher that is not asked again (train/teacher_cache.py)."""

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor
    answers: Answers


AnyBatch = Batch | Lesson
