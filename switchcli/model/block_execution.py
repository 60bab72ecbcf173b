"""How the blocks of a model are executed: compiled, or recomputed in the backward pass. Weights and names stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from switchcli.model.kernels.flex import SMALLEST_HEAD
from switchcli.model.moe.dispatch import LocalDispatcher
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import (
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    FeedForwardSublayer,
    SelfAttention,
    SwitchTransformer,
)

SUBLAYERS = (SelfAttention, CrossAttention, FeedForwardSublayer)


def compile_blocks(
    model: SwitchTransformer, backend: str = "inductor", fullgraph: bool = False, flex: bool = False
) -> None:
    """Compile every block, sparse layers included, in place. The first steps take longer.

    All shapes are static: the experts of a layer always get `Routing.max_filled_slots` rows. Blocks of a kind (encoder
    or decoder, dense or sparse) share a graph, whatever their number. Tensors that cross ranks inside a block would
    break its graph, so there only the sublayers without experts are compiled.

    Args:
        model: the model.
        backend: torch.compile's backend.
        fullgraph: raise an error at what cannot be compiled, instead of running it eagerly.
        flex: compute attention by flex_attention in training, if all blocks are compiled and heads are large enough.
    """
    is_whole = model.axis.size == 1
    for block in model.modules():
        if not isinstance(block, EncoderBlock | DecoderBlock):
            continue
        is_local = all(isinstance(layer.dispatcher, LocalDispatcher) for layer in sparse_layers(block).values())
        is_whole = is_whole and is_local
        compiled: list[nn.Module] = [block]
        if not is_local or model.axis.size > 1:
            compiled = [one for one in block.modules() if isinstance(one, SUBLAYERS) and not sparse_layers(one)]
        for module in compiled:
            # Not `module.compile()`: hooks, such as those that gather sharded weights, stay outside of the graph.
            forward = torch.compile(module.forward, backend=backend, fullgraph=fullgraph, dynamic=False)
            module.forward = forward
    uses_flex = flex and is_whole and model.spec.head_width >= SMALLEST_HEAD
    model.encoder.uses_flex = model.decoder.uses_flex = uses_flex


def recompute_blocks(model: nn.Module) -> None:
    """Turn on activation checkpointing for every block, in place: in training it keeps only its inputs.

    The backward pass runs the block again with the same random state, so dropout and jitter are the same and gradients
    are equal bit for bit. The tokens' all-to-alls run again too: every rank repeats the same blocks in the same order.
    The router statistics are those of the first run. Compiled blocks stay compiled: compile them before. torch stops
    recomputing at the last activation that the backward pass needs, so a final product without dropout is not computed
    again.
    """
    for block in model.modules():
        if isinstance(block, EncoderBlock | DecoderBlock):
            block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not block.training:
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
