"""Batch: what travels from the data to the model."""

from typing import NamedTuple

import torch

from switchcli.spec import EOS, PAD

__all__ = ["EOS", "PAD", "Batch"]


class Batch(NamedTuple):
    """One microbatch. B sequences; S source and T target positions; both int64, padded with `PAD`.

    Masks are derived (`!= PAD`); the decoder's input is the targets shifted right. Shapes do not change within a run.
    """

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor
