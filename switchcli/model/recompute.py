"""Activation checkpointing: a block keeps its inputs alone, and is computed again on the way back.

Dropout and jitter are drawn again from where their generator was, so that gradients are those without it, bit for bit.
Tokens travel again as well: every rank repeats the same blocks in the same order. Reports are of the first time.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from switchcli.model.transformer import DecoderBlock, EncoderBlock


def recompute_blocks(model: nn.Module) -> None:
    """Have the blocks of `model` do so in training, in place: names and weights stay. Evaluation is as it was.

    Parts that are compiled stay so. What is not kept of a block's end, as its last product without dropout, is not
    computed again.
    """
    for block in model.modules():
        if isinstance(block, EncoderBlock | DecoderBlock):
            block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]


def _forward(block: nn.Module, forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if block.training else forward(*inputs)
