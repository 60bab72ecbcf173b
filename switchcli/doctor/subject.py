"""The interface of a probed model, so that probes ask the same questions of our models and of other systems'.

Legend: B batch, S source, T target, V vocabulary, G groups, N tokens per group, E experts.

Router statistics are those of `switchcli.model.moe.stats`, also for a model of another system. A subject measures; it
does not judge.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from switchcli.errors import OutOfMemory, machine_bytes
from switchcli.model.moe.router import Mode
from switchcli.model.moe.stats import StackStats


class ProbeText(NamedTuple):
    """Token ids, int64; 0 is padding."""

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class RouterCall(NamedTuple):
    """One call of a router: its input before and after the call, and its logits in the dtype that it returned."""

    input_before_GND: torch.Tensor
    input_after_GND: torch.Tensor
    logits_GNE: torch.Tensor
    output: Any
    """All that it returned."""


class ForwardTrace(NamedTuple):
    """The observations of one forward pass. Calls and statistics are in the order of the sparse layers."""

    logits_BTV: torch.Tensor
    calls: tuple[RouterCall, ...]
    router_stats: StackStats


class TrainingLoss(NamedTuple):
    """The loss that training minimizes, in parts."""

    cross_entropy: torch.Tensor
    """Mean over the targets, with its graph."""
    auxiliary: float
    """The auxiliary loss that a training loop adds by default."""
    auxiliary_requested: float
    """The auxiliary loss if the caller asks for the routers' losses."""


class Subject(ABC):
    """A model on the CPU in float32 that is being probed."""

    code: str
    """The package whose code runs the model."""
    model: nn.Module
    initialized: bool
    """Whether the weights are initial, to be judged as an initialization; otherwise they are trained."""
    layers: tuple[str, ...]
    """The name of each sparse layer."""
    routers: tuple[nn.Module, ...]
    """The router of each sparse layer. Its first argument is the hidden states, its parameters are only W_r."""
    num_experts: int
    vocab_size: int
    batch_multiple: int
    """The number of sequences of a batch must be a multiple of this."""
    capacity: int | None
    """The capacity of an expert per sequence, if it is a constant; None if it depends on the length."""
    experts_choose: bool
    """Whether the experts of a layer choose their tokens, so that the sequences of a group depend on each other."""
    balance_coef: float | None
    """alpha of eq. 4; None for routing that is balanced by construction or by biases, and for a dense model."""
    real_text: ProbeText | None = None
    """Rows of text in the model's vocabulary; None where there is no vocabulary or no text."""

    @abstractmethod
    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        """Run with teacher forcing, without gradients. A model with only one capacity ignores `mode`."""

    @abstractmethod
    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
        """Return the logits [B, T, V] of the same targets, decoded one position at a time with the cache."""

    @abstractmethod
    def loss(self, text: ProbeText) -> TrainingLoss:
        """Return the loss as in training, including dropout and noise."""

    @abstractmethod
    def in_bfloat16(self) -> Self:
        """Return a copy whose weights are in bfloat16."""

    def choice_scores(self, router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
        """Return what tokens choose a router's experts by, given its logits [..., E]: by default probabilities."""
        return logits.softmax(-1)

    @property
    def dense(self) -> bool:
        return not self.layers or self.num_experts == 1

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def check_memory(num_parameters: int, hint: str) -> None:
    """Raise OutOfMemory, which ends with `hint`, if this machine is too small to probe so many parameters."""
    needed, available = 8 * num_parameters, machine_bytes()  # float32 weights and gradients, 4 bytes each
    if needed > available:
        raise OutOfMemory(f"weights and gradients take {needed:,} bytes, and this machine has {available:,}: {hint}")


@contextmanager
def record_router_calls(subject: Subject, logits_index: int | None) -> Iterator[list[RouterCall]]:
    """Record each call of a router within the context.

    Args:
        subject: the model.
        logits_index: the index of the logits in the router's output; None: the output is the logits.
    """
    inputs: list[torch.Tensor] = []
    calls: list[RouterCall] = []

    def before(router: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0].detach().clone())  # the router may change its argument in place

    def after(router: nn.Module, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
        logits_GNE = output if logits_index is None else output[logits_index]
        calls.append(RouterCall(inputs.pop(), arguments[0].detach(), logits_GNE.detach(), output))

    with ExitStack() as hooks:
        for router in subject.routers:
            hooks.enter_context(router.register_forward_pre_hook(before))
            hooks.enter_context(router.register_forward_hook(after))
        yield calls


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode within the context."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def precision(autocast: bool) -> torch.autocast:
    """Return a context of bfloat16 autocast, on or off."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
