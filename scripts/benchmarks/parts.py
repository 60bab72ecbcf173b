"""Where a training step goes: each kind of part by itself, times how often it occurs, beside the whole."""

from collections.abc import Callable
from typing import Any

import torch
from machine import BATCH, D_MODEL, SOURCE, TARGET, Job, Result, batch, begin
from step import our_model
from torch import nn

from switchcli.model.moe import SwitchLayer
from switchcli.model.transformer import CrossAttention, FeedForwardPart, ModelOutput, SelfAttention, SwitchTransformer
from switchcli.train.objective import cross_entropy
from switchcli.train.optimizer import Adafactor


def parts(job: Job) -> Result:
    """Forward and backward of each kind of part by itself, times its number; the optimizer, and a whole step beside."""
    runtime, clock = begin(job)
    model = our_model(job, runtime.device)
    spec, device = model.spec, runtime.device
    x_BSD, y_BTD = (torch.randn(BATCH, length, D_MODEL, device=device).requires_grad_() for length in (SOURCE, TARGET))
    real_BS, real_BT = (torch.ones(x.shape[:2], dtype=torch.bool, device=device) for x in (x_BSD, y_BTD))
    encoded = model.encode(batch(device).inputs_BS)
    sparse = {stack: len(spec.sparse_layers(stack)) for stack in ("encoder", "decoder")}
    encoder, decoder = model.encoder, model.decoder

    def first(module: nn.Module, kind: type, sparse: bool) -> Any:
        found = (part for part in module.modules() if isinstance(part, kind))
        return next(part for part in found if not isinstance(part, FeedForwardPart) or sparse == is_sparse(part))

    def is_sparse(part: FeedForwardPart) -> bool:
        return isinstance(part.layer, SwitchLayer)

    def bias(stack: nn.Module, length: int) -> torch.Tensor:
        return stack.get_submodule("position_bias")(length, length)

    calls = {
        "encoder self-attention": lambda: first(encoder, SelfAttention, False)(x_BSD, real_BS, bias(encoder, SOURCE))[
            0
        ],
        "decoder self-attention": lambda: first(decoder, SelfAttention, False)(y_BTD, real_BT, bias(decoder, TARGET))[
            0
        ],
        "cross-attention": lambda: cross(first(decoder, CrossAttention, False)),
        "encoder dense feed-forward": lambda: first(encoder, FeedForwardPart, False)(x_BSD, real_BS)[0],
        "encoder sparse feed-forward": lambda: first(encoder, FeedForwardPart, True)(x_BSD, real_BS)[0],
        "decoder dense feed-forward": lambda: first(decoder, FeedForwardPart, False)(y_BTD, real_BT)[0],
        "decoder sparse feed-forward": lambda: first(decoder, FeedForwardPart, True)(y_BTD, real_BT)[0],
    }
    times = dict.fromkeys(calls, spec.num_layers)
    for stack in ("encoder", "decoder"):
        times[f"{stack} sparse feed-forward"] = sparse[stack]
        times[f"{stack} dense feed-forward"] = spec.num_layers - sparse[stack]
    memory_BSD = encoded.hidden_BSD.detach().requires_grad_()

    def cross(part: CrossAttention) -> torch.Tensor:
        return part(y_BTD, part.attention.key_value(memory_BSD), encoded.bias_B11S)

    def both_ways(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            with runtime.autocast():
                y = forward()
            y.backward(torch.ones_like(y))

        return call

    placed = batch(device)
    optimizer = Adafactor().build(dict(model.named_parameters()))
    only_loss = lambda: cross_entropy(_Fixed(y_BTD, model), placed).target_sum  # noqa: E731
    whole = both_ways(lambda: cross_entropy(model, placed).target_sum)
    todo = {name: both_ways(call) for name, call in calls.items() if times[name]}
    seconds = clock.in_turn({**todo, "loss over the vocabulary": both_ways(only_loss), "whole": whole}, job["rounds"])
    whole()
    seconds |= clock.in_turn({"Adafactor": lambda: optimizer.step(1e-3)}, job["rounds"])
    return {"seconds": seconds, "times": times, "parameters": sum(p.numel() for p in model.parameters())}


class _Fixed(nn.Module):
    """A model whose decoder has answered: what is left is the loss."""

    def __init__(self, hidden_BTD: torch.Tensor, model: SwitchTransformer) -> None:
        super().__init__()
        self.hidden_BTD, self.model = hidden_BTD, model

    def forward(self, *ids: torch.Tensor) -> Any:
        return ModelOutput(*self.model.vocabulary(self.hidden_BTD), None, (), ())
