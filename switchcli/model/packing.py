"""Packed rows: several examples one after another, none of which sees another.

Legend: B batch, S source, T target.

An example's inputs end in exactly one EOS, and so do its targets: the example of a position is the number of EOS before
it, and masks follow from the ids. Relative positions depend on distances alone and need no reset. What the examples of
a row still share is a capacity, a group of the balance loss, and the masks of dropout, as sequences of a group do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.attention import MASKED
from switchcli.spec import EOS, PAD


class SegmentIds(NamedTuple):
    """Which example of its row each position belongs to, from 0, int64; padding belongs to one more."""

    source_BS: torch.Tensor
    target_BT: torch.Tensor


def segment_ids(inputs_BS: torch.Tensor, targets_BT: torch.Tensor) -> SegmentIds:
    """The segments of packed rows: the n-th inputs of a row and its n-th targets are one example."""
    ends = inputs_BS == EOS, targets_BT == EOS
    return SegmentIds(*(end.cumsum(1) - end.long() for end in ends))


def segment_bias(query_BT: torch.Tensor, key_BS: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, S] float32, a bias of attention: 0 within a segment, `MASKED` between two."""
    return torch.where(query_BT.unsqueeze(-1) == key_BS.unsqueeze(-2), 0.0, MASKED).unsqueeze(1)


def decoder_inputs(targets_BT: torch.Tensor, segments: SegmentIds | None) -> torch.Tensor:
    """The targets shifted right behind a PAD, the start token; packed, each example begins with one of its own."""
    shifted_BT = F.pad(targets_BT, (1, -1), value=PAD)
    return shifted_BT if segments is None else shifted_BT.masked_fill(shifted_BT == EOS, PAD)
