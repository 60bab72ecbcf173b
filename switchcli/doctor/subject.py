"""A model as the probes measure it. A subject measures; it does not judge.

Legend: B batch, S source, T target, V vocabulary, D model, G groups, N tokens per group, E experts.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.errors import OutOfMemory, machine_bytes
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initialize
from switchcli.model.moe.layer import RouterWeights, evaluating
from switchcli.model.moe.router import Mode
from switchcli.model.moe.stats import StackStats
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD


class ProbeText(NamedTuple):
    """Token ids, int64; 0 is padding."""

    inputs_BS: torch.Tensor
    targets_BT: torch.Tensor


class RouterCall(NamedTuple):
    """One call of a router: its input before and after the call, and its logits in the dtype that it returned."""

    input_before_GND: torch.Tensor
    input_after_GND: torch.Tensor
    logits_GNE: torch.Tensor


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


class Subject:
    """A model on the CPU in float32 that is being probed.

    Args:
        model: the model, in evaluation mode.
        initialized: whether the weights are initial, to be judged as an initialization; otherwise they are trained.
    """

    def __init__(self, model: SwitchTransformer, initialized: bool) -> None:
        spec = model.spec
        self.model = model
        self.initialized = initialized
        self.real_text: ProbeText | None = None
        """Rows of text in the model's vocabulary; None where there is no vocabulary or no text."""
        self.layers = spec.sparse_layer_names()
        self.routers = tuple(module for module in model.modules() if isinstance(module, RouterWeights))
        self.num_experts = spec.num_experts
        self.vocab_size = spec.vocab_size
        self.batch_multiple = spec.group_sequences
        """The number of sequences of a batch must be a multiple of this."""
        routers = [spec.router_of(stack) for stack in spec.sparse_stacks]
        self.experts_choose = any(router.experts_choose for router in routers)
        """Whether the experts of a layer choose their tokens, so that the sequences of a group depend on each other."""
        coefs = [
            router.balance_coef
            for router in routers
            if router.balance_coef or not (router.experts_choose or router.choice_bias_rate)
        ]
        self.balance_coef = min(coefs, default=None)
        """alpha of eq. 4; None for routing that is balanced by construction or by biases, and for a dense model."""

    @property
    def dense(self) -> bool:
        return not self.layers or self.num_experts == 1

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        """Run with teacher forcing, without gradients. With `dropless` this computes what `switchcli generate` does."""
        precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        with self._in(mode), torch.no_grad(), precision, self._recorded_calls() as calls:
            output = self.model(*text)
            return ForwardTrace(output.logits_BTV.float(), tuple(calls), output.router_stats)

    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
        """Return the logits [B, T, V] of the same targets, decoded one position at a time with the cache."""
        inputs_BT = F.pad(text.targets_BT, (1, -1), value=PAD)  # shifted right, as in `SwitchTransformer.forward`
        logits = []
        with self._in(mode), torch.no_grad():
            encoded = self.model.encode(text.inputs_BS)
            cache = self.model.decoder.cache(encoded)
            for step in range(text.targets_BT.shape[1]):
                position = slice(step, step + 1)
                x_B1D = self.model.embed(inputs_BT[:, position])
                real_B1 = text.targets_BT[:, position] != PAD
                hidden_B1D, _ = self.model.decoder(x_B1D, real_B1, encoded, cache)
                hidden_B1D, vocabulary = self.model.vocabulary(hidden_B1D)
                logits.append(F.linear(hidden_B1D, vocabulary.weight_VD))
        return torch.cat(logits, dim=1)

    def loss(self, text: ProbeText) -> TrainingLoss:
        """Return the loss as in training, including dropout and noise."""
        with self._training():
            output = self.model(*text)
        cross_entropy = F.cross_entropy(output.logits_BTV.flatten(0, 1), text.targets_BT.flatten(), ignore_index=PAD)
        return TrainingLoss(cross_entropy, 0.0 if output.auxiliary is None else float(output.auxiliary.mean().detach()))

    def choice_scores(self, router: RouterWeights, logits: torch.Tensor) -> torch.Tensor:
        """Return what tokens choose a router's experts by, given its logits [..., E]."""
        gates = router.router_spec.gates(logits)
        return gates if router.bias is None else gates + router.bias

    def in_bfloat16(self) -> Self:
        """Return a copy whose weights are in bfloat16."""
        return type(self)(copy.deepcopy(self.model).to(torch.bfloat16), self.initialized)

    def _in(self, mode: Mode) -> AbstractContextManager[None]:
        return self._training() if mode == "training" else evaluating(self.model, mode)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Put the model into training mode within the context."""
        was_training = self.model.training
        self.model.train()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _recorded_calls(self) -> Iterator[list[RouterCall]]:
        """Record each call of a router within the context."""
        inputs: list[torch.Tensor] = []
        calls: list[RouterCall] = []

        def before(router: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs.append(arguments[0].detach().clone())  # the router may change its argument in place

        def after(router: nn.Module, arguments: tuple[torch.Tensor, ...], logits_GNE: torch.Tensor) -> None:
            calls.append(RouterCall(inputs.pop(), arguments[0].detach(), logits_GNE.detach()))

        with ExitStack() as hooks:
            for router in self.routers:
                hooks.enter_context(router.register_forward_pre_hook(before))
                hooks.enter_context(router.register_forward_hook(after))
            yield calls


def initial_model(spec: ModelSpec, seed: int, router_dtype: torch.dtype) -> Subject:
    """Return a model with its initial weights.

    Raises:
        OutOfMemory: the machine is too small for the model.
    """
    needed, available = 8 * count(spec).parameters, machine_bytes()  # float32 weights and gradients, 4 bytes each
    if needed > available:
        raise OutOfMemory(
            f"weights and gradients take {needed:,} bytes, and this machine has {available:,}: probe it with fewer "
            "experts or layers, such as model.num_experts=8 model.num_layers=2"
        )
    model = SwitchTransformer(spec, router_dtype)
    initialize(model, seed)
    return Subject(model.eval(), initialized=True)
