"""Batch: what travels from the data to the model."""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One microbatch. B sequences; S source and T target positions; both int64, padded with `switchcli.spec.PAD`.

    Masks are derived (`!= PAD`); the decoder's input is the targets shifted right. Shapes do not change within a run.
    """

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor
