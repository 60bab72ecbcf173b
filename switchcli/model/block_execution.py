"""How the blocks of a model are executed: compiled, or recomputed in the backward pass. Weights and names stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import CrossAttention, DecoderBlock, EncoderBlock, FeedForwardSublayer, SelfAttention


def compile_dense_sublayers(model: nn.Module) -> None:
    """Compile every attention and feed-forward sublayer without experts, in place. The first steps take longer.

    Sublayers with experts stay eager: the number of rows of an expert is known only after routing, and torch compiles
    its grouped product in bfloat16 only.
    """
    for sublayer in model.modules():
        if not isinstance(sublayer, SelfAttention | CrossAttention | FeedForwardSublayer):
            continue
        has_experts = any(isinstance(module, SwitchLayer) for module in sublayer.modules())
        if not has_experts:
            sublayer.compile()


def recompute_blocks(model: nn.Module) -> None:
    """Turn on activation checkpointing for every block, in place: in training it keeps only its inputs.

    The backward pass runs the block again with the same random state, so dropout and jitter are the same and gradients
    are equal bit for bit. The tokens' all-to-alls run again too: every rank repeats the same blocks in the same order.
    The router statistics are those of the first run. Compiled sublayers stay compiled. torch stops recomputing at the
    last activation that the backward pass needs, so a final product without dropout is not computed again.
    """
    for block in model.modules():
        if isinstance(block, EncoderBlock | DecoderBlock):
            block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not block.training:
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
