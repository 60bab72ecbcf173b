"""The sparse layer on a CUDA device, where nobody counts the rows of the experts, against the CPU."""

import pytest
import torch

from switchcli.model.moe import SwitchLayer
from switchcli.model.routing import ExpertChoice, NoTokenLeftBehind, RouterSpec, Switch, TopK
from switchcli.model.spec import ModelSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BARE = {"jitter": 0.0, "min_capacity": 1, "capacity_factor": 0.7}
ROUTERS = (
    Switch(**BARE),
    Switch(jitter=0.0, capacity_factor="dropless"),
    TopK(**BARE, keep_threshold=0.0),
    NoTokenLeftBehind(**BARE),
    ExpertChoice(**BARE),
)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.kind)
@pytest.mark.parametrize("d_model", [64, 6])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_every_gradient_are_the_cpus(router: RouterSpec, d_model: int, autocast: bool) -> None:
    spec = ModelSpec(
        d_model=d_model, d_ff=40, num_heads=2, num_layers=1, num_experts=5, router=router, decoder_router=Switch(),
        sparse_every=1,
    )  # fmt: skip
    layer = SwitchLayer(spec, "encoder", d_model)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    x_BSD = torch.randn(4, 23, d_model, generator=generator)
    real_BS = torch.arange(23) < torch.tensor([[23], [9], [0], [17]])
    found = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        layer.zero_grad()
        x = x_BSD.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = layer(x, real_BS.to(device)).y_BSO
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        scale = float(ours.float().abs().max())  # bfloat16 keeps 2**-9 of a number, through two products and back
        torch.testing.assert_close(
            theirs.float().cpu(), ours.float(), rtol=0, atol=scale * (0.05 if autocast else 1e-4)
        )
