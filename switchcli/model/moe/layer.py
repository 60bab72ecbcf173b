"""The Switch layer: a router, E experts, and the dispatch of tokens between them (paper section 2).

A forward pass of `SwitchLayer`, from x [B, S, D] to y [B, S, O]:

1. Group the tokens: [B, S, D] -> [G, N, D], a fixed number of full sequences for each group (`route`).
2. Logits h(x) = W x [G, N, E], in float32, of a copy of x with jitter (`RouterWeights`).
3. Gates p(x), choices, and for each expert at most C tokens: Routing [G, E, C] (`router.py`, `slots.py`).
4. Dispatch: the tokens in slots become A rows, sorted by expert, on the process that stores the expert (`dispatch.py`).
5. Experts: y [A, O], one feed-forward for each expert's rows (`experts.py`).
6. Combine: the rows return to their tokens, multiplied by their gates and summed: [G, N, O]. Dropped tokens are 0.
7. Add the dense feed-forward beside the experts, if there is one, and return the statistics, which carry the losses.

Legend: B batch, S positions, G groups, N tokens per group, E experts, D model, O outputs, F hidden, A rows of the local
experts.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.attention import Bias, KeyValue, attend
from switchcli.model.config import ModelSpec, Stack
from switchcli.model.kernels.cpu_products import linear
from switchcli.model.kernels.opaque_ops import random_bits
from switchcli.model.layers import FeedForward, Linear
from switchcli.model.moe.dispatch import Dispatcher, LocalDispatcher
from switchcli.model.moe.experts import Experts
from switchcli.model.moe.router import Mode, Policy, Routing
from switchcli.model.moe.stats import RouterStats


class RouterWeights(nn.Module):
    """The router's logits h(x) = W x, without bias, in float32 even under autocast (section 2.4)."""

    bias: torch.Tensor | None
    """float32 [E]: the bias of choices (`balance: bias`), which is no part of the logits."""

    def __init__(self, spec: ModelSpec, stack: Stack) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.d_model))
        self.router_spec = spec.router_of(stack)
        self.dtype = torch.float32
        """bfloat16 in the paper's ablation (Table 2)."""
        self.register_buffer("bias", torch.empty(spec.num_experts) if self.router_spec.choice_bias_rate else None)

    def forward(self, x_GND: torch.Tensor) -> torch.Tensor:
        """Return the logits [G, N, E]. Jitter and dropout apply to a copy: the experts get the clean x (Appendix C)."""
        # Casting is not enough: under autocast a product of float32 tensors still runs in bfloat16.
        with torch.autocast(x_GND.device.type, enabled=False):
            x_GND = x_GND.to(self.dtype)
            if self.training and self.router_spec.jitter:
                x_GND = x_GND * jitter(x_GND, self.router_spec.jitter)
            x_GND = F.dropout(x_GND, self.router_spec.input_dropout, self.training)
            return linear(x_GND, self.weight.to(self.dtype))


def jitter(x: torch.Tensor, width: float) -> torch.Tensor:
    """Return noise with the shape and dtype of x, uniform on [1 - width, 1 + width) in 2**16 steps.

    Drawing is the slow part on a CPU, so one 64-bit draw makes four numbers of 16 bits.
    """
    num_draws = -(-x.numel() // 4)  # rounded up
    steps = random_bits(num_draws, x.device).view(torch.int16)[: x.numel()].view(x.shape)  # uniform on [-2**15, 2**15)
    return steps.to(x.dtype).mul_(width * 2.0**-15).add_(1.0)


class SwitchOutput(NamedTuple):
    """The outputs of the tokens, and the statistics that carry the layer's losses."""

    y_BSO: torch.Tensor
    stats: RouterStats


class SwitchLayer(nn.Module):
    """The sum of p_i(x) E_i(x) over the experts i that have x in a slot (eq. 2); zero for a dropped token.

    Beyond the paper, the sum may have a factor (`expert_scale`), and a dense feed-forward beside it (`shared_d_ff`).
    """

    def __init__(self, spec: ModelSpec, stack: Stack, num_outputs: int, shared_d_ff: int = 0) -> None:
        super().__init__()
        self.router_spec = spec.router_of(stack)
        self.router = RouterWeights(spec, stack)
        self.experts = Experts(spec, num_outputs)
        self.shared = FeedForward(spec, shared_d_ff) if shared_d_ff else None
        self.scale = spec.scale_of_experts(stack)
        self.dispatcher: Dispatcher[Any] = LocalDispatcher()
        self.policy: Policy = "paper"

    @property
    def mode(self) -> Mode:
        return "training" if self.training else self.policy

    def route(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Return the tokens by group, [G, N, D], and their slots with the weights of the experts' outputs."""
        # A group is that many full sequences, one after another: G = B / group_size, N = group_size * S.
        x_GND = x_BSD.reshape(x_BSD.shape[0] // self.router_spec.group_size(self.mode), -1, x_BSD.shape[2])
        with torch.autocast(x_BSD.device.type, enabled=False):  # autocast would choose the precision of the softmax
            logits_GNE, real_GN = self.router(x_GND), real_BS.reshape(x_GND.shape[:2])
            routing = self.router_spec.assign(logits_GNE, real_GN, self.mode, self.router.bias)
            if self.scale != 1.0:
                routing = routing._replace(weight_GEC=routing.weight_GEC * self.scale)
        return x_GND, routing

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> SwitchOutput:
        """Route the tokens and return their outputs.

        Args:
            x_BSD: the tokens. B must be a multiple of the router's `group_size`.
            real_BS: bool, False for padding.
        """
        axis = self.experts.axis
        B, S, _ = x_BSD.shape
        x_GND, routing = self.route(x_BSD, real_BS)
        # The weights enter the region of divided hidden units too: each process has a part of their gradient, which
        # autocast would send in bfloat16.
        with torch.autocast(x_BSD.device.type, enabled=False):
            routing = routing._replace(weight_GEC=axis.enter_region(routing.weight_GEC))
        x_AD, meta = self.dispatcher.dispatch(axis.enter_region(x_GND), routing, equal_batches=self.training)
        mask_BF = self.experts.draw_dropout_mask(x_AD, B)
        mask_AF = None if mask_BF is None else self.dispatcher.expand_mask(mask_BF, meta, S)
        y_AO = self.experts(x_AD, meta.end_E, mask_AF, meta.equal_rows)
        y_GNO = axis.all_reduce(self.dispatcher.combine(y_AO, meta, x_GND))
        y_BSO = y_GNO.reshape(B, S, -1)
        return SwitchOutput(y_BSO if self.shared is None else y_BSO + self.shared(x_BSD), routing.stats)


def sparse_layers(model: nn.Module) -> dict[str, SwitchLayer]:
    """Return the sparse layers in the order of their statistics, keyed as in `ModelSpec.sparse_layer_names`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchLayer)}
    return {sublayer_name(name): layer for name, layer in layers.items()}


def sublayer_name(module: str) -> str:
    """Return the name of the sublayer that a SwitchLayer, or a tensor within it, belongs to.

    `decoder.blocks.0.feed_forward.layer.router.weight` belongs to `decoder.blocks.0.feed_forward`.
    """
    return re.split(r"\.(?:layer|attention\.switch)(?=\.|$)", module)[0]


def local_experts(model: nn.Module) -> range:
    """Return the numbers of the experts that this process stores, the same in each sparse layer."""
    return next((module.expert_ids for module in model.modules() if isinstance(module, Experts)), range(1))


@contextmanager
def observing(
    model: nn.Module, observe: Callable[[str, SwitchLayer, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `observe(name, layer, x_BSD, real_BS)` after each forward pass of a sparse layer within the context."""

    def hook(name: str, layer: SwitchLayer, inputs: tuple[torch.Tensor, torch.Tensor], _: SwitchOutput) -> None:
        observe(name, layer, *inputs)

    hooks = [layer.register_forward_hook(partial(hook, name)) for name, layer in sparse_layers(model).items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module, policy: Policy) -> Iterator[None]:
    """Put `model` into evaluation mode with this capacity policy, and restore its modes and policies at the end."""
    modes = [(module, module.training) for module in model.modules()]
    policies = [(layer, layer.policy) for layer in sparse_layers(model).values()]
    evaluate_by(model, policy)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, previous in policies:
            layer.policy = previous


def evaluate_by(model: nn.Module, policy: Policy) -> None:
    """Put `model` into evaluation mode, with `policy` as the capacity policy of its sparse layers."""
    model.eval()
    for layer in sparse_layers(model).values():
        layer.policy = policy


class SwitchAttention(nn.Module):
    """Multi-head self-attention: experts produce the queries, and one vector that serves as key and value (Appendix A).

    Legend: T queries, H heads, K head size, O = 2 * H * K outputs of the experts.

    As in Mesh-TensorFlow, one routed layer has a hidden vector and two outputs of width H * K. The gate multiplies
    both, a dropped token has zeros for both, and the output projection stays dense. The query is divided by sqrt(K),
    which T5's own attention folds into its initial weights.
    """

    def __init__(self, spec: ModelSpec, stack: Stack) -> None:
        super().__init__()
        width = spec.num_heads * spec.head_width
        self.switch = SwitchLayer(spec, stack, 2 * width)
        self.o = Linear(width, spec.d_model)
        self.num_heads = spec.num_heads
        self.dropout = spec.dropout

    def project(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> tuple[torch.Tensor, KeyValue, RouterStats]:
        """Return the queries [B, H, S, K], the keys and values of x, and the statistics of the routed layer."""
        y_BSO, stats = self.switch(x_BSD, real_BS)
        B, S, _ = y_BSO.shape
        # [B, S, 2, H, K] -> [2, B, H, S, K]: the first half of the outputs is the query, the second key and value.
        query_BHSK, key_value_BHSK = y_BSO.view(B, S, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return query_BHSK * query_BHSK.shape[-1] ** -0.5, KeyValue(key_value_BHSK, key_value_BHSK), stats

    def forward(self, query_BHTK: torch.Tensor, memory: KeyValue, bias: Bias) -> torch.Tensor:
        """Return softmax(q k + bias) v of all heads through the output projection: [B, T, D]."""
        mixed_BHTK = attend(query_BHTK, memory, bias, self.dropout if self.training else 0.0)
        return self.o(mixed_BHTK.transpose(1, 2).flatten(2))
