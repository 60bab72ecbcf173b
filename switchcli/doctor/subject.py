"""What a probe may ask of a model, so that ours and other systems' answer the same questions.

Legend: B batch, S source, T target, V vocabulary, G groups, N tokens a group, E experts.

An answer holds the routing reports of `switchcli.model.moe.stats`, also where the model is not ours. Nothing here
judges.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from switchcli.errors import OutOfMemory, machine_bytes
from switchcli.model.moe.router import Mode
from switchcli.model.moe.stats import StackStats


class ProbeText(NamedTuple):
    """Made-up ids, 0 is padding."""

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class RouterCall(NamedTuple):
    """One call of a router: its input as it was given, as it was left, and its logits in the precision they had."""

    given_GND: torch.Tensor
    left_GND: torch.Tensor
    logits_GNE: torch.Tensor


class ForwardTrace(NamedTuple):
    """What one forward pass shows; calls and reports in the order of the sparse layers."""

    logits_BTV: torch.Tensor
    calls: tuple[RouterCall, ...]
    router_stats: StackStats


class TrainingLoss(NamedTuple):
    """What training would minimise."""

    cross_entropy: torch.Tensor
    """Mean over the targets, with its graph."""
    auxiliary: float
    """What a training loop that asks for nothing special finds added to it."""
    auxiliary_asked: float
    """The same when the caller asks for the routers' losses."""


class Subject(ABC):
    """A model on the CPU in float32 that is being probed."""

    code: str
    """Whose code the model runs in."""
    model: nn.Module
    initialised: bool
    """Fresh weights, to be judged as an initialisation; else they are trained."""
    layers: tuple[str, ...]
    """The name of each sparse layer."""
    routers: tuple[nn.Module, ...]
    """The router of each sparse layer: its first argument is the hidden states, its parameters are W_r alone."""
    num_experts: int
    vocab_size: int
    rows: int
    """The number of sequences of a batch must be a multiple of it."""
    slots: int | None
    """The capacity of an expert in a sequence where that is a constant; None where it follows the length."""
    balance_coef: float | None
    """alpha of eq. 4; None for routing that is balanced by construction."""

    @abstractmethod
    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        """Teacher forcing without gradients; `mode` may mean nothing to a model that has one capacity only."""

    @abstractmethod
    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
        """Logits_BTV of the same targets, one position at a time from the cache."""

    @abstractmethod
    def loss(self, text: ProbeText) -> TrainingLoss:
        """As in training, dropout and noise included."""

    @abstractmethod
    def in_bfloat16(self) -> Self:
        """A copy whose weights are loaded in bfloat16."""

    @property
    def dense(self) -> bool:
        return not self.layers or self.num_experts == 1

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def check_memory(parameters: int, instead: str) -> None:
    """Raise OutOfMemory, which says what to do `instead`, if this machine is too small to probe so many of them."""
    needed, there = 8 * parameters, machine_bytes()  # weights and gradients
    if needed > there:
        raise OutOfMemory(f"weights and gradients take {needed:,} bytes, and this machine has {there:,}: {instead}")


@contextmanager
def record_router_calls(subject: Subject, logits_of: int | None) -> Iterator[list[RouterCall]]:
    """Within, each call of a router is noted; `logits_of` is where in its answer the logits are, if not alone."""
    given: list[torch.Tensor] = []
    calls: list[RouterCall] = []

    def before(router: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        given.append(arguments[0].detach().clone())

    def after(router: nn.Module, arguments: tuple[torch.Tensor, ...], answer: Any) -> None:
        logits_GNE = answer if logits_of is None else answer[logits_of]
        calls.append(RouterCall(given.pop(), arguments[0].detach(), logits_GNE.detach()))

    hooks = [router.register_forward_pre_hook(before) for router in subject.routers]
    hooks += [router.register_forward_hook(after) for router in subject.routers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in training mode."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def precision(autocast: bool) -> torch.autocast:
    """bfloat16 autocast, on or off."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
