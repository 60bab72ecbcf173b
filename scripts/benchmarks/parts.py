"""Where a training step goes: each kind of part by itself, times how often it occurs, beside the whole."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from machine import BATCH, D_MODEL, SOURCE, TARGET, Job, Result, batch, begin
from step import our_model
from torch import nn

from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import EncoderOutput, ModelOutput, SwitchTransformer
from switchcli.training.loss import cross_entropy
from switchcli.training.optimizer_specs import Adafactor


class Part(NamedTuple):
    """A kind of part: how often a step has it, and its forward pass on an input of its own."""

    name: str
    times: int
    forward: Callable[[], torch.Tensor]


def parts(job: Job) -> Result:
    """Forward and backward of each kind of part by itself, times its number; the optimizer, and a whole step beside."""
    context, clock = begin(job)
    model, placed = our_model(job, context.device), batch(context.device)

    def both_ways(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            with context.autocast():
                y = forward()
            y.backward(torch.ones_like(y))

        return call

    found = [part for part in parts_of(model) if part.times]
    whole = both_ways(lambda: cross_entropy(model, placed).target_sum)
    calls = {part.name: both_ways(part.forward) for part in found}
    seconds = clock.in_turn({**calls, "whole": whole}, job["rounds"])
    whole()  # leaves the gradients of all weights
    optimizer = Adafactor().build(dict(model.named_parameters()))
    seconds |= clock.in_turn({"Adafactor": lambda: optimizer.step(1e-3)}, job["rounds"])
    times = {part.name: part.times for part in found}
    return {"seconds": seconds, "times": times, "parameters": sum(p.numel() for p in model.parameters())}


def parts_of(model: SwitchTransformer) -> Iterator[Part]:
    """What a step of `model` is made of; of each kind the first is taken."""
    device = model.embedding.device
    x_BSD, y_BTD = (torch.randn(BATCH, length, D_MODEL, device=device).requires_grad_() for length in (SOURCE, TARGET))
    sides: tuple[tuple[str, nn.Module, torch.Tensor], ...] = (
        ("encoder", model.encoder, x_BSD),
        ("decoder", model.decoder, y_BTD),
    )
    for name, stack, x in sides:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
        blocks: list[Any] = list(stack.get_submodule("blocks").children())
        attention, bias, length = blocks[0].self_attention, stack.get_submodule("position_bias"), x.shape[1]
        yield Part(
            f"{name} self-attention",
            len(blocks),
            lambda attention=attention, x=x, real=real, bias=bias, n=length: attention(x, real, bias(n, n))[0],
        )
        for kind, sparse in (("dense", False), ("sparse", True)):
            fed = [b.feed_forward for b in blocks if isinstance(b.feed_forward.layer, SwitchLayer) == sparse]
            yield Part(f"{name} {kind} feed-forward", len(fed), lambda fed=fed, x=x, real=real: fed[0](x, real)[0])
    encoded: EncoderOutput = model.encode(batch(device).inputs_BS)
    memory_BSD = encoded.hidden_BSD.detach().requires_grad_()
    cross: Any = model.decoder.blocks[0].get_submodule("cross_attention")
    yield Part(
        "cross-attention",
        len(model.decoder.blocks),
        lambda: cross(y_BTD, cross.attention.key_value(memory_BSD), encoded.bias_B1TS),
    )
    answered, placed = _Answered(y_BTD, model), batch(device)
    yield Part("loss over the vocabulary", 1, lambda: cross_entropy(answered, placed).target_sum)


class _Answered(nn.Module):
    """A model whose decoder has answered: what is left is the loss."""

    def __init__(self, hidden_BTD: torch.Tensor, model: SwitchTransformer) -> None:
        super().__init__()
        self.hidden_BTD, self.model = hidden_BTD, model

    def forward(self, *ids: torch.Tensor) -> ModelOutput:
        return ModelOutput(*self.model.vocabulary(self.hidden_BTD), None, (), ())
