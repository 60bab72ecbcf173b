"""One sparse layer of a Switch-Base on a GPU: against a dense feed-forward of equal FLOPs, and by other ways.

Forward and backward in bfloat16 with float32 weights, 65,536 tokens, groups of 16 x 512. The libraries of others keep
weights in bfloat16 and drop no token; their rows include a router.
"""

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import gpu_device
import torch
import torch.nn.functional as F
from layer import both_ways, padded
from models import their_layer
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.layers import FeedForward
from switchcli.model.moe.experts import grouped_product
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.router import SwitchRouter

Call = Callable[[], object]
Build = Callable[["Shape"], Call]
DENSE = "dense feed-forward"


class Shape:
    """Sizes, device and inputs that all ways share."""

    def __init__(self, experts: int, device: torch.device, tiny: bool) -> None:
        self.experts, self.device = experts, device
        self.d_model, self.d_ff = (32, 64) if tiny else (768, 3072)
        self.sequences, self.length, self.group = (4, 24, 2) if tiny else (128, 512, 16)
        self.tokens = self.sequences * self.length
        router = SwitchRouter(group_sequences=self.group, jitter=0.0)
        self.spec = ModelSpec(
            d_model=self.d_model, d_ff=self.d_ff, num_heads=4, num_layers=2, num_experts=experts, dropout=0.0,
            router=router,
        )  # fmt: skip
        x_BSD = torch.randn(self.sequences, self.length, self.d_model, device=device, dtype=torch.bfloat16)
        self.x_BSD = x_BSD.requires_grad_()
        self.gradient_BSD = torch.randn_like(x_BSD)
        self.real_BS = torch.ones(self.sequences, self.length, dtype=torch.bool, device=device)

    @property
    def flops(self) -> int:
        """Six products of each token with one expert: two forward, four backward."""
        return 12 * self.tokens * self.d_model * self.d_ff

    def made(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module on the device with small random weights."""
        module = module.to(self.device, dtype)
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_(0.0, 0.02)
        return module

    def both_ways(self, module: nn.Module, forward: Callable[[], torch.Tensor], autocast: bool = True) -> Call:
        """Return a call of forward and backward that leaves gradients of the input and of every weight of `module`."""

        def context() -> torch.autocast:
            return torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)

        return both_ways([self.x_BSD, *module.parameters()], self.gradient_BSD, forward, context)


def layer(job: dict[str, Any]) -> dict[str, Any]:
    """Time each way after the other, the dense feed-forward first and last; a way that cannot run says why."""
    device = gpu_device.device_of(job)
    machine, ceiling = gpu_device.machine(device), gpu_device.ceiling(device, 256 if job["tiny"] else 8192)
    shape = Shape(job["experts"], device, job["tiny"])
    rounds, calls = (2, 1) if job["tiny"] else (7, 10)
    rows: dict[str, Any] = {}
    for name, build in {**WAYS, f"{DENSE} again": dense}.items():
        try:
            call = build(shape)
            gpu_device.reset_peak(device)
            seconds = gpu_device.windows(call, device, rounds, calls, warm_up=3)
        except ImportError as error:
            rows[name] = {"absent": f"not installed: {error}"}
        except Exception as error:  # noqa: BLE001  # one way that fails must not cost the others their figures
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            rows[name] = {"seconds": seconds, "peak": gpu_device.peak(device)}
            rows[name]["flops_per_second"] = shape.flops / statistics.median(seconds)
        call = None
        shape.x_BSD.grad = None
        with contextlib.suppress(RuntimeError):  # after an illegal access every call of CUDA fails; the rows are kept
            gpu_device.free(device)
    if "seconds" not in rows[DENSE]:
        return {"status": "failed", "reason": rows[DENSE]["failed"]}
    reference = statistics.median(rows[DENSE]["seconds"])
    for row in rows.values():
        if "seconds" in row:
            row["over_dense"] = gpu_device.spread([each / reference for each in row["seconds"]])
    return {
        "status": "done",
        "tokens": shape.tokens,
        "ways": rows,
        "ceiling_flops_per_second": ceiling,
        "machine": machine,
    }


def dense(shape: Shape) -> Call:
    module = shape.made(FeedForward(shape.spec, shape.spec.d_ff))
    return shape.both_ways(module, lambda: module(shape.x_BSD))


def ours(shape: Shape) -> Call:
    module = shape.made(SwitchLayer(shape.spec, "encoder", shape.d_model))
    return shape.both_ways(module, lambda: module(shape.x_BSD, shape.real_BS).y_BSO)


def ours_dropless(shape: Shape) -> Call:
    free = shape.spec.router.model_copy(update={"capacity_factor": "dropless"})
    spec = shape.spec.model_copy(update={"router": free})
    module = shape.made(SwitchLayer(spec, "encoder", shape.d_model))
    return shape.both_ways(module, lambda: module(shape.x_BSD, shape.real_BS).y_BSO)


def batched(shape: Shape) -> Call:
    """Rows gathered into [E, capacity, D]: empty slots are computed too."""
    module = shape.made(SwitchLayer(shape.spec, "encoder", shape.d_model))
    return shape.both_ways(module, lambda: padded(module, shape.x_BSD, torch.bfloat16))


def grouped_alone(shape: Shape) -> Call:
    """grouped_mm of the experts' rows, which lie in order and are as many for each: no router, no gather."""
    module = shape.made(SwitchLayer(shape.spec, "encoder", shape.d_model)).experts
    each = shape.tokens // shape.experts
    assert each, "fewer tokens than experts"
    end_E = torch.arange(each, each * shape.experts + 1, each, device=shape.device, dtype=torch.int32)
    end_E[-1] = shape.tokens

    def forward() -> torch.Tensor:
        x_AD = shape.x_BSD.flatten(0, 1)
        return grouped_product(grouped_product(x_AD, module.wi, end_E).relu(), module.wo, end_E)

    return shape.both_ways(module, forward)


def scattermoe(shape: Shape) -> Call:
    from scattermoe.mlp import MLP

    module = nn.ModuleDict(
        {
            "router": nn.Linear(shape.d_model, shape.experts, bias=False),
            "experts": MLP(shape.d_model, shape.d_ff, shape.experts, 1, activation=nn.ReLU()),
        }
    )
    module = shape.made(module, torch.bfloat16)

    def forward() -> torch.Tensor:
        x_TD = shape.x_BSD.flatten(0, 1)
        probability_T1, expert_T1 = module["router"](x_TD).float().softmax(-1).topk(1)
        return module["experts"](x_TD, probability_T1.to(x_TD.dtype), expert_T1)

    return shape.both_ways(module, forward, autocast=False)


def sonicmoe(shape: Shape) -> Call:
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    module = MoE(
        num_experts=shape.experts,
        num_experts_per_tok=1,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        activation_function=ActivationType.RELU,
        add_bias=False,
        std=0.02,
    )
    module = shape.made(module, torch.bfloat16)
    return shape.both_ways(module, lambda: module(shape.x_BSD.flatten(0, 1))[0], autocast=False)


def megablocks(shape: Shape) -> Call:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE
    from megablocks.layers.moe import clear_load_balancing_loss

    arguments = Arguments(
        hidden_size=shape.d_model,
        ffn_hidden_size=shape.d_ff,
        moe_num_experts=shape.experts,
        moe_top_k=1,
        activation_fn=F.relu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=shape.device,
    )
    module = shape.made(dMoE(arguments), torch.bfloat16)

    def forward() -> torch.Tensor:
        clear_load_balancing_loss()  # a list that grows with every call
        y = module(shape.x_BSD)
        return y[0] if isinstance(y, tuple) else y

    return shape.both_ways(module, forward, autocast=False)


def transformers_loop(shape: Shape) -> Call:
    capacity = max(1, int(1.25 * shape.length / shape.experts))
    module = shape.made(their_layer(shape.d_model, shape.d_ff, shape.experts, capacity))
    return shape.both_ways(module, lambda: module(shape.x_BSD.clone()))


WAYS: dict[str, Build] = {
    DENSE: dense,
    "this layer": ours,
    "this layer, dropless": ours_dropless,
    "grouped_mm alone": grouped_alone,
    "batched products": batched,
    "transformers": transformers_loop,
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
    "MegaBlocks": megablocks,
}
