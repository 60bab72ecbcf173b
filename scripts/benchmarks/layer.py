"""A Switch layer against the dense feed-forward of equal FLOPs, other ways to compute it, and packages with one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from contestants import Contestant, prepare
from machine import PRECISIONS, Job, sizes_of, spec_of
from models import their_layer
from peers import st_moe_layer, switch_transformers_layer
from torch import nn

from switchcli.model.layers import FeedForward
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.router import SwitchRouter

OURS = ("switchcli", "dense", "padded", "one-hot")
"""Contestants that are made of this project's modules."""
Layer = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], float]]
"""A layer, its output for x_BSD, and the share of the tokens of x_BSD that an expert takes."""


def padded(layer: SwitchLayer, x_BSD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows gathered into [E, C, D], batched products, rows added back: capacity that nobody takes is computed too."""
    x_GND, token_GEC, weight_GEC = routed(layer, x_BSD)
    G, E, C = token_GEC.shape
    N = x_GND.shape[1]
    row_EGC = (token_GEC + torch.arange(G, device=x_BSD.device).view(G, 1, 1) * (N + 1)).transpose(0, 1)
    rows = F.pad(x_GND.to(dtype), (0, 0, 0, 1)).flatten(0, 1)
    sent_ESD = rows.index_select(0, row_EGC.flatten()).view(E, G * C, -1)
    y_ESD = (sent_ESD @ layer.experts.wi.to(dtype).mT).relu() @ layer.experts.wo.to(dtype).mT
    y_AD = y_ESD.flatten(0, 1) * weight_GEC.transpose(0, 1).flatten().unsqueeze(1).to(dtype)
    y_RD = y_AD.new_zeros(G * (N + 1), x_BSD.shape[-1]).index_add(0, row_EGC.flatten(), y_AD)
    return y_RD.view(G, N + 1, -1)[:, :N]  # without the row of each group to which empty capacity is added


def one_hot(layer: SwitchLayer, x_BSD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The masked products of Appendix F."""
    x_GND, token_GEC, weight_GEC = routed(layer, x_BSD)
    N = x_GND.shape[1]
    mask_GECN = F.one_hot(token_GEC, N + 1)[..., :N].to(dtype)
    sent_GECD = torch.einsum("gecn,gnd->gecd", mask_GECN, x_GND.to(dtype))
    sent_ESD = sent_GECD.transpose(0, 1).flatten(1, 2)
    y_ESD = (sent_ESD @ layer.experts.wi.to(dtype).mT).relu() @ layer.experts.wo.to(dtype).mT
    y_GECD = y_ESD.unflatten(1, (x_GND.shape[0], -1)).transpose(0, 1)
    return torch.einsum("gecd,gecn->gnd", y_GECD, mask_GECN * weight_GEC.unsqueeze(-1).to(dtype))


def routed(layer: SwitchLayer, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_GND = x_BSD.reshape(len(x_BSD) // layer.router_spec.group_sequences, -1, x_BSD.shape[-1])
    routing = layer.router_spec.assign(
        layer.router(x_GND), torch.ones_like(x_GND[..., 0], dtype=torch.bool), "training"
    )
    return x_GND, routing.token_GEC, routing.weight_GEC


def both_ways(
    learned: Iterable[torch.Tensor],
    gradient: torch.Tensor,
    forward: Callable[[], torch.Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
) -> Callable[[], None]:
    """Return a call of forward and backward that leaves the gradients of `learned`, of this call alone."""
    learned = list(learned)

    def call() -> None:
        for tensor in learned:
            tensor.grad = None
        with autocast():
            y = forward()
        y.backward(gradient.to(y.dtype).reshape(y.shape))

    return call


def layer_against_others(job: Job) -> Contestant:
    """Forward and backward of one contestant's layer, whose tokens are the same and go to the same experts.

    A sequence is a group, and capacities, router weights and jitter (none) are equal, so every contestant with a
    capacity keeps the same tokens.
    """
    device, context = prepare(job)
    sizes, low = sizes_of(job), job["precision"] == "bfloat16"
    module, forward, kept = layer_of(job)
    module = module.to(device).train()
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(sizes.batch, sizes.source, sizes.d_model, generator=generator).to(device).requires_grad_()
    gradient_BSD = torch.randn_like(x_BSD)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in module.named_parameters():
            if parameter.shape == (job["experts"], sizes.d_model):  # the router's
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            elif name.endswith("gate.bias"):
                parameter.zero_()
        share = kept(x_BSD)
    if job.get("compile"):
        module.compile()

    def autocast() -> AbstractContextManager[object]:
        ours = context is not None and job["who"] in OURS
        return context.autocast() if ours else torch.autocast(device.type, torch.bfloat16, enabled=low)

    turn = both_ways([x_BSD, *module.parameters()], gradient_BSD, lambda: forward(x_BSD), autocast)
    return Contestant(turn, {"parameters": sum(weight.numel() for weight in module.parameters()), "kept": share})


def layer_of(job: Job) -> Layer:
    sizes, who = sizes_of(job), job["who"]
    tokens = sizes.batch * sizes.source
    if who == "transformers":
        capacity = max(4, int(sizes.source * 1.25 / job["experts"]))
        loop = their_layer(sizes.d_model, sizes.d_ff, job["experts"], capacity)
        return loop, lambda x_BSD: loop(x_BSD.clone()), lambda x_BSD: float(loop.router(x_BSD)[0].sum()) / tokens
    if who == "switch-transformers":
        package = switch_transformers_layer(job)
        return package, lambda x_BSD: package(x_BSD.flatten(0, 1))[0], lambda x_BSD: 1.0
    if who == "st-moe-pytorch":
        moe = st_moe_layer(job)
        return moe, lambda x_BSD: moe(x_BSD).outputs, lambda x_BSD: float(moe.gate(x_BSD)[0].sum()) / tokens
    router = SwitchRouter(capacity_factor=job.get("capacity_factor", 1.25), group_sequences=1, jitter=0.0)
    spec, dtype = spec_of(job, dropout=0.0, router=router), PRECISIONS[job["precision"]]
    if who == "dense":
        dense = FeedForward(spec, spec.d_ff)
        return dense, dense, lambda x_BSD: 1.0
    ours, real_BS = SwitchLayer(spec, "encoder", sizes.d_model), torch.ones(sizes.batch, sizes.source, dtype=torch.bool)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "switchcli": lambda x_BSD: ours(x_BSD, real_BS.to(x_BSD.device)).y_BSO,
        "padded": lambda x_BSD: padded(ours, x_BSD, dtype),
        "one-hot": lambda x_BSD: one_hot(ours, x_BSD, dtype),
    }

    def kept(x_BSD: torch.Tensor) -> float:
        stats = ours(x_BSD, real_BS.to(x_BSD.device)).stats
        return 1 - float(stats.dropped / stats.tokens)

    return ours, ways[who], kept
