"""A Switch layer against the dense feed-forward of equal FLOPs, other ways to compute it, and its floor."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from contestants import Contestant, prepare, sizes_of
from machine import BATCH, D_FF, D_MODEL, PRECISIONS, SOURCE, TOKENS, Job, Result, Sizes, bandwidth, begin, shape
from peers import st_moe_layer, switch_transformers_layer
from torch import nn

from switchcli.model.layers import FeedForward
from switchcli.model.moe.experts import Experts
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.router import SwitchRouter


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
    return y_AD.new_zeros(G * (N + 1), x_BSD.shape[-1]).index_add(0, row_EGC.flatten(), y_AD)


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


def products_alone(experts: Experts, dtype: torch.dtype) -> Callable[[], None]:
    """The six products of each expert with an equal share of the tokens, into standing memory."""
    E = len(experts.wi)
    wi, wo = experts.wi.detach().to(dtype), experts.wo.detach().to(dtype)
    x, y = (torch.randn(E, TOKENS // E, D_MODEL, device=wi.device).to(dtype) for _ in range(2))
    hidden, back = (torch.randn(E, TOKENS // E, D_FF, device=wi.device).to(dtype) for _ in range(2))
    grad_wi, grad_wo = torch.empty_like(wi), torch.empty_like(wo)

    def call() -> None:
        for e in range(E):
            torch.mm(x[e], wi[e].T, out=hidden[e])
            torch.mm(hidden[e], wo[e].T, out=y[e])
        for e in range(E):
            torch.mm(y[e], wo[e], out=back[e])
            torch.mm(y[e].T, hidden[e], out=grad_wo[e])
            torch.mm(back[e].T, x[e], out=grad_wi[e])
            torch.mm(back[e], wi[e], out=y[e])

    return call


def layer(job: Job) -> Result:
    """Forward and backward of one layer, on 4,096 tokens that are one group (masked products: eight), by all ways."""
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs
    from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig

    context, clock = begin(job)
    dtype, device, E = PRECISIONS[job["precision"]], context.device, job["experts"]
    with torch.device(device):
        specs = [
            shape(E, dropout=0.0, router=SwitchRouter(capacity_factor=1.25, group_sequences=n)) for n in (BATCH, 1)
        ]
        ours, grouped = (SwitchLayer(spec, "encoder", D_MODEL) for spec in specs)
        dense = FeedForward(specs[0])
        config = SwitchTransformersConfig(
            d_model=D_MODEL, d_ff=D_FF, num_experts=E, dropout_rate=0.0, expert_capacity=max(4, int(SOURCE * 1.25 / E))
        )
        loop = theirs.SwitchTransformersSparseMLP(config)
        x_BSD = torch.randn(BATCH, SOURCE, D_MODEL)
    with torch.no_grad():
        for parameter in [*ours.parameters(), *dense.parameters(), *loop.parameters()]:
            parameter.normal_(0.0, 0.01)
        loop.router.classifier.weight.copy_(ours.router.weight)
        for name, parameter in grouped.named_parameters():
            parameter.set_(ours.get_parameter(name).detach())
    x_BSD.requires_grad_()
    real_BS = torch.ones(BATCH, SOURCE, dtype=torch.bool, device=device)
    gradient_BSD = torch.randn_like(x_BSD)

    def both_ways(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            for tensor in (x_BSD, *ours.parameters(), *grouped.parameters(), *dense.parameters(), *loop.parameters()):
                tensor.grad = None
            with context.autocast():
                y = forward()
            y.backward(gradient_BSD.to(y.dtype).expand(y.shape) if y.shape == x_BSD.shape else torch.ones_like(y))

        return call

    ways = {
        "dense": both_ways(lambda: dense(x_BSD)),
        "this layer": both_ways(lambda: ours(x_BSD, real_BS).y_BSO),
        "padded batches": both_ways(lambda: padded(ours, x_BSD, dtype)),
        "one-hot products": both_ways(lambda: one_hot(grouped, x_BSD, dtype)),
        "loop over experts": both_ways(lambda: loop(x_BSD.clone())),
        "its products alone": products_alone(ours.experts, dtype),
    }
    seconds = clock.in_turn(ways, job["rounds"])
    report = ours(x_BSD, real_BS).stats
    moved = 2 * 4 * sum(parameter.numel() for parameter in ours.experts.parameters())
    return {
        "seconds": seconds,
        "kept": 1 - float(report.dropped / report.tokens),
        "floor": statistics.median(seconds["dense"]) + moved / bandwidth(device, clock),
    }


def layer_against_others(job: Job) -> Contestant:
    """Forward and backward of one contestant's layer, whose tokens are the same and go to the same experts.

    A sequence is a group, and capacities, router weights and jitter (none) are equal, so every contestant with a
    capacity keeps the same tokens.
    """
    device, _, context = prepare(job)
    sizes, low = sizes_of(job), job["precision"] == "bfloat16"
    module, forward, kept = layer_of(job, sizes)
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
        ours = context is not None and job["who"] in ("switchcli", "dense")
        return context.autocast() if ours else torch.autocast(device.type, torch.bfloat16, enabled=low)

    def turn() -> None:
        for tensor in (x_BSD, *module.parameters()):
            tensor.grad = None
        with autocast():
            y = forward(x_BSD)
        y.backward(gradient_BSD.to(y.dtype).reshape(y.shape))

    return Contestant(turn, {"parameters": sum(weight.numel() for weight in module.parameters()), "kept": share})


def layer_of(
    job: Job, sizes: Sizes
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], float]]:
    """The layer of a contestant, its output for x_BSD, and the share of the tokens that an expert takes."""
    tokens = sizes.batch * sizes.source
    if job["who"] == "transformers":
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        config = SwitchTransformersConfig(
            d_model=sizes.d_model,
            d_ff=sizes.d_ff,
            num_experts=job["experts"],
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            expert_capacity=max(4, int(sizes.source * 1.25 / job["experts"])),
        )
        loop = SwitchTransformersSparseMLP(config)
        return loop, lambda x_BSD: loop(x_BSD.clone()), lambda x_BSD: float(loop.router(x_BSD)[0].sum()) / tokens
    if job["who"] == "switch-transformers":
        package = switch_transformers_layer(job)
        return package, lambda x_BSD: package(x_BSD.flatten(0, 1))[0], lambda x_BSD: 1.0
    if job["who"] == "st-moe-pytorch":
        moe = st_moe_layer(job)
        return moe, lambda x_BSD: moe(x_BSD).outputs, lambda x_BSD: float(moe.gate(x_BSD)[0].sum()) / tokens
    router = SwitchRouter(capacity_factor=job.get("capacity_factor", 1.25), group_sequences=1, jitter=0.0)
    spec = shape(job["experts"], sizes, dropout=0.0, router=router)
    if job["who"] == "dense":
        dense = FeedForward(spec)
        return dense, dense, lambda x_BSD: 1.0
    ours, real_BS = SwitchLayer(spec, "encoder", sizes.d_model), torch.ones(sizes.batch, sizes.source, dtype=torch.bool)

    def kept(x_BSD: torch.Tensor) -> float:
        stats = ours(x_BSD, real_BS.to(x_BSD.device)).stats
        return 1 - float(stats.dropped / stats.tokens)

    return ours, lambda x_BSD: ours(x_BSD, real_BS.to(x_BSD.device)).y_BSO, kept
