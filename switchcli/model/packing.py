"""Packed rows: several examples one after another in a row, where no example sees another.

Legend: B batch, S source, T target.

An example's inputs end in exactly one EOS, and so do its targets. The example of a position is therefore the number of
EOS before it, and masks follow from the ids. Relative positions depend only on distances, so they need no reset. The
examples of a row still share expert capacity, a group of the load-balancing loss, and dropout masks, as the sequences
of a group do.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.attention import MASKED
from switchcli.spec import EOS, PAD


class SegmentIds(NamedTuple):
    """The example of each position within its row, int64, from 0. The padding of a row gets the next number."""

    source_BS: torch.Tensor
    target_BT: torch.Tensor


def segment_ids(inputs_BS: torch.Tensor, targets_BT: torch.Tensor) -> SegmentIds:
    """Return the segment ids of packed rows; the n-th inputs of a row and its n-th targets are one example."""
    # The number of EOS before a position: the cumulative count, less 1 at an EOS, which belongs to the example it ends.
    source_end_BS, target_end_BT = inputs_BS == EOS, targets_BT == EOS
    return SegmentIds(
        source_end_BS.cumsum(1) - source_end_BS.long(),
        target_end_BT.cumsum(1) - target_end_BT.long(),
    )


def segment_bias(query_BT: torch.Tensor, key_BS: torch.Tensor) -> torch.Tensor:
    """Return an attention bias, float32 [B, 1, T, S]: 0 within a segment, `MASKED` between segments."""
    return torch.where(query_BT.unsqueeze(-1) == key_BS.unsqueeze(-2), 0.0, MASKED).unsqueeze(1)


def decoder_inputs(targets_BT: torch.Tensor, segments: SegmentIds | None) -> torch.Tensor:
    """Return the targets shifted right by one, behind the start token PAD. In packed rows each example starts so."""
    shifted_BT = F.pad(targets_BT, (1, -1), value=PAD)
    # A shifted EOS is where the next example of a packed row starts.
    return shifted_BT if segments is None else shifted_BT.masked_fill(shifted_BT == EOS, PAD)
