"""Greedy decoding with a key-value cache.

Legend: B batch, S source, T target.
"""

import math

import torch
import torch.nn.functional as F

from switchcli.model.moe import SwitchLayer
from switchcli.model.transformer import Cache, SwitchTransformer
from switchcli.spec import EOS, PAD


@torch.no_grad()
def greedy(model: SwitchTransformer, inputs_BS: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """The most probable answer to each input, token by token: int64 [B, T], T <= max_tokens, ended by EOS, then 0.

    The model must be in evaluation mode (`moe.evaluating`). Where routing counts capacity, the group of a decoding step
    is one token of each of `group_sequences` sequences.
    """
    B = len(inputs_BS)
    layers = [module for module in model.modules() if isinstance(module, SwitchLayer)]
    group = math.lcm(*(layer.rule.together(layer.mode) for layer in layers))
    rows = -B % group  # the batch is filled up to whole groups: padding takes no slot
    inputs_BS = F.pad(inputs_BS, (0, 0, 0, rows), value=PAD)
    encoded = model.encode(inputs_BS)
    last_B1 = torch.full_like(inputs_BS[:, :1], PAD)
    going_B1 = (inputs_BS != PAD).any(1, keepdim=True)
    cache: tuple[Cache, ...] | None = None
    steps: list[torch.Tensor] = []
    for _ in range(max_tokens):
        hidden_B1D, cache, _ = model.decoder(model.embed(last_B1), going_B1, encoded, cache)
        last_B1 = F.linear(*model.vocabulary(hidden_B1D)).argmax(-1).masked_fill(~going_B1, PAD)
        steps.append(last_B1)
        going_B1 = going_B1 & (last_B1 != EOS)
        if not going_B1.any():
            break
    return torch.cat(steps, dim=1)[:B]
