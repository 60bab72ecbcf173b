"""Batch, which goes from the data to the model, and BatchSource, which makes the batches of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Batch(NamedTuple):
    """A microbatch: inputs [B, S] and targets [B, T], int64, padded with `switchcli.spec.PAD`.

    Masks are derived from it (`!= PAD`), and the decoder's input is the targets shifted right. Shapes do not change
    within a run. B sequences, S source positions, T target positions.
    """

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class BatchSource(ABC):
    """The batches of a run: a pure function of the step, or of the step and a state that is saved with the run."""

    row_offset: int = 0
    """Added to the number of every row in the order of the data. Only a run that was branched has another than 0."""

    @abstractmethod
    def batch(self, step: int, first: int, count: int) -> Batch:
        """Return rows first..first+count of the batch of `step`."""

    def state(self, step: int) -> list[int]:
        """Return this rank's contribution to the state after `step` steps. The state is the sum over all ranks."""
        return []

    def restore_state(self, step: int, state: Sequence[int], row_offset: int = 0) -> None:
        """Go on after `step` steps from `state`, the sum over ranks of the values that `state(step)` returned.

        An empty `state` is that before the first row.
        """
        assert not state, "these batches depend on their step only"
        self.row_offset = row_offset

    def record(self, step: int) -> Mapping[str, Any]:
        """Return facts about the rows up to `step`, to be added to the record of that step."""
        return {}
