"""A model of this package as the subject of probes.

Legend: B batch, T target, V vocabulary, D model.
"""

import copy
from contextlib import AbstractContextManager
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.doctor.subject import (
    ForwardTrace,
    ProbeText,
    Subject,
    TrainingLoss,
    check_memory,
    precision,
    record_router_calls,
    training_mode,
)
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initialize
from switchcli.model.moe.layer import RouterWeights, evaluating
from switchcli.model.moe.router import Mode
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD


class SwitchcliSubject(Subject):
    """A `SwitchTransformer`. With the policy `dropless` it computes what `switchcli generate` does."""

    code = "switchcli"

    def __init__(self, model: SwitchTransformer, initialized: bool) -> None:
        spec = model.spec
        self.model: SwitchTransformer = model
        self.initialized = initialized
        self.layers = spec.sparse_layer_names()
        self.routers = tuple(module for module in model.modules() if isinstance(module, RouterWeights))
        self.num_experts = spec.num_experts
        self.vocab_size = spec.vocab_size
        self.batch_multiple = spec.group_sequences
        self.capacity = None
        routers = [spec.router_of(stack) for stack in spec.sparse_stacks]
        self.experts_choose = any(router.experts_choose for router in routers)
        coefs = [router.balance_coef for router in routers if router.needs_balance_loss or router.balance_coef]
        self.balance_coef = min(coefs, default=None)

    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        with self._in(mode), torch.no_grad(), precision(autocast), record_router_calls(self, None) as calls:
            output = self.model(*text)
            return ForwardTrace(output.logits_BTV.float(), tuple(calls), output.router_stats)

    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
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
        with training_mode(self.model):
            output = self.model(*text)
        cross_entropy = F.cross_entropy(output.logits_BTV.flatten(0, 1), text.targets_BT.flatten(), ignore_index=PAD)
        auxiliary = 0.0 if output.auxiliary is None else float(output.auxiliary.mean().detach())
        return TrainingLoss(cross_entropy, auxiliary, auxiliary)  # always added, so asking changes nothing

    def choice_scores(self, router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
        assert isinstance(router, RouterWeights)
        gates = router.router_spec.gates(logits)
        return gates if router.bias is None else gates + router.bias

    def in_bfloat16(self) -> Self:
        return type(self)(copy.deepcopy(self.model).to(torch.bfloat16), self.initialized)

    def _in(self, mode: Mode) -> AbstractContextManager[None]:
        return training_mode(self.model) if mode == "training" else evaluating(self.model, mode)


def initial_model(spec: ModelSpec, seed: int, router_dtype: torch.dtype) -> SwitchcliSubject:
    """Return a model with its initial weights.

    Raises:
        OutOfMemory: the machine is too small for the model.
    """
    check_memory(
        count(spec).parameters, "probe it with fewer experts or layers, such as model.num_experts=8 model.num_layers=2"
    )
    model = SwitchTransformer(spec, router_dtype)
    initialize(model, seed)
    return SwitchcliSubject(model.eval(), initialized=True)
