"""The sparse layer on a CUDA device, where the number of an expert's rows is not waited for, against the CPU.

Rows for `cpu` compare the CPU with itself (tests/devices.py). Bounds, relative to the largest entry of a tensor:
float32 1e-4, as sums of 64 products in another order differ by about 1e-6 of their terms, and a gradient of the weights
is a sum over 90 tokens of products of such sums. Under autocast 0.05: bfloat16 keeps 2**-9 of a number, and an entry of
a gradient has passed through two products and back, each rounded.
"""

import pytest
import torch
from devices import on_devices

from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer, evaluate_by
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    NoTokenLeftBehindRouter,
    Policy,
    RouterSpec,
    SwitchRouter,
    TopKRouter,
)

BARE = {"jitter": 0.0, "min_capacity": 1, "capacity_factor": 0.7}
DROPLESS = {"jitter": 0.0, "capacity_factor": "dropless", "eval_capacity_factor": "dropless"}
ROUTERS = {
    "switch": SwitchRouter(**BARE),
    "switch dropless": SwitchRouter(**DROPLESS),
    "top_k": TopKRouter(**BARE, keep_threshold=0.0),
    "top_k dropless": TopKRouter(**DROPLESS, keep_threshold=0.0),
    "no_token_left_behind": NoTokenLeftBehindRouter(**BARE),
    "no_token_left_behind dropless": NoTokenLeftBehindRouter(**DROPLESS),
    "expert_choice": ExpertChoiceRouter(**BARE),
    "groups of two": SwitchRouter(**BARE, group_sequences=2),
}
RELATIVE = {False: 1e-4, True: 0.05}


def a_layer(router: RouterSpec, d_model: int, activation: str = "relu") -> SwitchLayer:
    spec = ModelSpec(
        d_model=d_model, d_ff=40, num_heads=2, num_layers=1, num_experts=5, router=router,
        decoder_router=SwitchRouter(), sparse_every=1, activation=activation, dropout=0.0,
    )  # fmt: skip
    layer = SwitchLayer(spec, "encoder", d_model)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def some_tokens(d_model: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 23, 9, 0 and 17 tokens."""
    x_BSD = torch.randn(4, 23, d_model, generator=torch.Generator().manual_seed(1))
    return x_BSD, torch.arange(23) < torch.tensor([[23], [9], [0], [17]])


def assert_equal_within(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.float().abs().max())
        torch.testing.assert_close(ours.float().cpu(), theirs.float(), rtol=0, atol=scale * relative)


@pytest.mark.parametrize(("device", "router"), on_devices(ROUTERS, on_cpu=["groups of two"]))
@pytest.mark.parametrize(("d_model", "activation"), [(64, "relu"), (6, "relu"), (64, "geglu")])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_every_gradient_are_the_cpus(
    device: str, router: str, d_model: int, activation: str, autocast: bool
) -> None:
    """A width of 6 is padded to the alignment of the grouped product."""
    layer = a_layer(ROUTERS[router], d_model, activation)
    x_BSD, real_BS = some_tokens(d_model)
    found = []
    for where in ("cpu", device):
        layer = layer.to(where)
        layer.zero_grad()
        x = x_BSD.to(where).requires_grad_()
        with torch.autocast(where, torch.bfloat16, enabled=autocast):
            y = layer(x, real_BS.to(where)).y_BSO
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert_equal_within(found[1], found[0], RELATIVE[autocast])


@pytest.mark.parametrize(("device", "router"), on_devices(ROUTERS, on_cpu=["groups of two"]))
@pytest.mark.parametrize("policy", ["paper", "dropless", 0.5])
def test_evaluation_is_the_cpus(device: str, router: str, policy: Policy) -> None:
    """Outputs within the bound; what each expert got and what was dropped exactly."""
    layer = a_layer(ROUTERS[router], 64)
    evaluate_by(layer, policy)
    x_BSD, real_BS = some_tokens(64)
    with torch.no_grad():
        expected = layer(x_BSD, real_BS)
        found = layer.to(device)(x_BSD.to(device), real_BS.to(device))
    assert_equal_within([found.y_BSO], [expected.y_BSO], RELATIVE[False])
    for name in ("load_E", "dropped", "tokens"):
        assert torch.equal(getattr(found.stats, name).cpu(), getattr(expected.stats, name)), name
    for name in ("entropy", "confidence", "z_loss", "load_balancing_loss"):
        torch.testing.assert_close(getattr(found.stats, name).cpu(), getattr(expected.stats, name), rtol=1e-4, atol=0)
