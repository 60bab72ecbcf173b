"""Slot-major routing against the masked products of Appendix F, as the authors' code does them, and by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from switchcli.model.dispatch import Local
from switchcli.model.moe import SwitchFeedForward
from switchcli.model.routing import Switch
from switchcli.model.spec import ModelSpec


def reference(
    layer: SwitchFeedForward, x_BSD: torch.Tensor, real_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, balance loss and number dropped by one-hot products: float dispatch and combine masks [G, N, E, C]."""
    spec = layer.spec
    B, S, D = x_BSD.shape
    x_GND = x_BSD.reshape(B // spec.group_sequences, -1, D)
    real_GN = real_BS.reshape(x_GND.shape[:2])
    E, N = layer.router.weight.shape[0], x_GND.shape[1]
    C = spec.capacity(N, E, layer.training)
    probability_GNE = (x_GND @ layer.router.weight.T).softmax(-1)
    mask_GNE = F.one_hot(probability_GNE.argmax(-1), E) * real_GN.unsqueeze(-1)
    position_GNE = (mask_GNE.cumsum(1) - mask_GNE) * mask_GNE  # exclusive, along the tokens
    kept_GNE = mask_GNE * (position_GNE < C)
    slot_GNEC = F.one_hot(position_GNE.clamp(max=C - 1), C) * kept_GNE.unsqueeze(-1)
    combine_GNEC = probability_GNE.unsqueeze(-1) * slot_GNEC
    sent_GECD = torch.einsum("gnd,gnec->gecd", x_GND, slot_GNEC.to(x_GND.dtype))
    hidden = torch.einsum("gecd,efd->gecf", sent_GECD, layer.experts.wi)
    if layer.experts.wi_gate is None:
        hidden = hidden.relu()
    else:
        gate = torch.einsum("gecd,efd->gecf", sent_GECD, layer.experts.wi_gate)
        hidden = F.gelu(gate, approximate="tanh") * hidden
    y_GECD = torch.einsum("gecf,edf->gecd", hidden, layer.experts.wo)
    y_GND = torch.einsum("gecd,gnec->gnd", y_GECD, combine_GNEC)
    tokens_G1 = real_GN.sum(1, keepdim=True).clamp(min=1)
    density_GE = mask_GNE.sum(1) / tokens_G1
    proxy_GE = (probability_GNE * real_GN.unsqueeze(-1)).sum(1) / tokens_G1
    balance = spec.balance_loss_coef * E * (density_GE * proxy_GE).sum(1).mean()
    return y_GND.reshape(B, S, D), balance, (mask_GNE - kept_GNE).sum()


def a_layer(num_experts: int, activation: str, router: Switch, seed: int, d_model: int = 6) -> SwitchFeedForward:
    spec = ModelSpec(
        d_model=d_model,
        d_ff=5,
        num_heads=2,
        num_layers=2,
        num_experts=num_experts,
        activation=activation,
        sparse_every=1,
        router=router,
    )
    layer = SwitchFeedForward(spec).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


@given(
    num_experts=st.integers(2, 7),
    groups=st.integers(1, 3),
    group_sequences=st.integers(1, 3),
    length=st.integers(1, 9),
    factor=st.floats(0.1, 4.0),
    min_capacity=st.integers(1, 4),
    padding=st.integers(0, 9),
    left=st.booleans(),
    activation=st.sampled_from(["relu", "geglu"]),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_output_and_every_gradient_equal_the_masked_products(
    num_experts: int,
    groups: int,
    group_sequences: int,
    length: int,
    factor: float,
    min_capacity: int,
    padding: int,
    left: bool,
    activation: str,
    training: bool,
    seed: int,
) -> None:
    router = Switch(
        capacity_factor=factor,
        eval_capacity_factor=2 * factor,
        min_capacity=min_capacity,
        group_sequences=group_sequences,
        jitter=0.0,
    )
    # float64 inputs would be rounded by the router's float32 island, and near ties would then part ways: the reference
    # gets the same float32 logits through a router in float32 on inputs that float32 holds exactly.
    layer = a_layer(num_experts, activation, router, seed).float().train(training)
    generator = torch.Generator().manual_seed(seed + 1)
    x_BSD = torch.randn(groups * group_sequences, length, 6, generator=generator).requires_grad_()
    real_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool)
    real_BS[0, : min(padding, length)] = False
    if not left:
        real_BS = real_BS.flip(1)
    weight_BSD = torch.randn(x_BSD.shape, generator=generator)

    def gradients(y: torch.Tensor, balance: torch.Tensor) -> list[torch.Tensor]:
        loss = (y * weight_BSD).sum() + 7 * balance
        return list(torch.autograd.grad(loss, [x_BSD, *layer.parameters()]))

    y_BSD, report = layer(x_BSD, real_BS)
    expected_BSD, balance, dropped = reference(layer, x_BSD, real_BS)
    torch.testing.assert_close(y_BSD, expected_BSD)
    torch.testing.assert_close(report.balance, balance)
    assert report.dropped == dropped
    assert report.tokens == real_BS.sum()
    assert report.load_E.sum() == real_BS.sum()
    assert (y_BSD[~real_BS] == 0).all()
    for ours, theirs in zip(gradients(y_BSD, report.balance), gradients(expected_BSD, balance), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 sums of up to 200 terms, reordered


def routed(logits: list[list[float]], real: list[bool] | None = None, **settings: float) -> tuple[list, list, object]:
    logits_GNE = torch.tensor([logits])
    real_GN = torch.tensor([real or [True] * len(logits)])
    routing = Switch(**{"min_capacity": 1, **settings}).assign(logits_GNE, real_GN, training=True)
    return routing.token_GEC[0].tolist(), routing.weight_GEC[0].tolist(), routing.report


def test_earlier_tokens_take_the_slots_and_the_gate_is_the_raw_probability() -> None:
    # Tokens 0, 2, 3 choose expert 1; token 1 expert 0. Capacity int(4 * 1.0 / 2) = 2: token 3 is dropped.
    tokens, weights, report = routed([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]], capacity_factor=1.0)
    assert tokens == [[1, 4], [0, 2]]
    sigmoid = torch.tensor([2.0, 1.0, 3.0]).sigmoid().tolist()
    assert weights[0] == pytest.approx([sigmoid[0], 0.0])
    assert weights[1] == pytest.approx([sigmoid[1], sigmoid[2]])
    assert report.load_E.tolist() == [1, 3]
    assert report.dropped == 1


def test_padding_takes_no_slot_on_either_side() -> None:
    logits = [[0.0, 1.0]] * 4
    assert routed(logits, [False, False, True, True], capacity_factor=1.0)[0] == [[4, 4], [2, 3]]
    assert routed(logits, [True, True, False, False], capacity_factor=1.0)[0] == [[4, 4], [0, 1]]


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "capacity"),
    [(512, 8, 1.25, 4, 80), (512, 128, 1.0, 4, 4), (100, 8, 1.25, 4, 15), (3, 8, 1.25, 4, 3), (1, 2, 0.1, 1, 1)],
)
def test_capacity_is_equation_3(tokens: int, experts: int, factor: float, least: int, capacity: int) -> None:
    router = Switch(capacity_factor=factor, min_capacity=least)
    assert router.capacity(tokens, experts, training=True) == capacity


def test_balance_loss_is_alpha_when_uniform_and_grows_with_collapse() -> None:
    E, N = 4, 32
    even_GNE = 1e-4 * F.one_hot(torch.arange(N) % E, E).float().unsqueeze(0)
    real_GN = torch.ones(1, N, dtype=torch.bool)
    router = Switch(balance_loss_coef=0.01)
    assert router.assign(even_GNE, real_GN, True).report.balance.item() == pytest.approx(0.01, rel=1e-5)
    collapsed_GNE = torch.tensor([3.0, 0.0, 0.0, 0.0]).expand(1, N, E)
    most = collapsed_GNE.softmax(-1)[0, 0, 0].item()
    assert router.assign(collapsed_GNE, real_GN, True).report.balance.item() == pytest.approx(0.01 * E * most)


def test_gradient_reaches_the_router_through_the_gate_and_through_the_balance_loss() -> None:
    layer = a_layer(4, "relu", Switch(capacity_factor=4.0), seed=0).float()
    x_BSD = torch.randn(2, 8, 6)
    y_BSD, report = layer(x_BSD, torch.ones(2, 8, dtype=torch.bool))
    for loss in (y_BSD.square().sum(), report.balance):
        (gradient,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_a_dropped_token_is_exactly_zero_and_an_expert_without_tokens_still_has_a_gradient() -> None:
    layer = a_layer(3, "relu", Switch(capacity_factor=0.1, min_capacity=1, jitter=0.0), seed=1).float()
    with torch.no_grad():
        layer.router.weight.zero_()  # all tokens tie, and the first expert takes them
    x_BSD = torch.randn(1, 5, 6)
    y_BSD, _ = layer(x_BSD, torch.ones(1, 5, dtype=torch.bool))
    assert (y_BSD[0, 1:] == 0).all()
    assert (y_BSD[0, 0] != 0).any()
    y_BSD.sum().backward()
    assert layer.experts.wi.grad is not None
    assert (layer.experts.wi.grad[1:] == 0).all()


def test_jitter_falls_on_the_routers_copy_alone_and_only_in_training() -> None:
    layer = a_layer(3, "relu", Switch(jitter=0.5, capacity_factor=9.0), seed=2).float()
    x_BSD = torch.randn(1, 6, 6)
    kept_BSD = x_BSD.clone()
    torch.manual_seed(0)
    first = layer.router(x_BSD)
    assert not torch.equal(first, layer.router(x_BSD))
    assert torch.equal(x_BSD, kept_BSD)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    layer(x_BSD, torch.ones(1, 6, dtype=torch.bool))
    rows = {tuple(row) for row in seen[0].flatten(0, 1).tolist()} - {(0.0,) * 6}
    assert rows == {tuple(row) for row in x_BSD[0].tolist()}
    layer.eval()
    assert torch.equal(layer.router(x_BSD), layer.router(x_BSD))


def test_dispatch_is_a_gather_and_combine_its_transpose() -> None:
    routing = Switch(capacity_factor=2.0, min_capacity=1).assign(torch.randn(2, 5, 3), torch.ones(2, 5).bool(), True)
    x_GND = torch.randn(2, 5, 4)
    sent_ESD = Local().send(x_GND, routing)
    token_EGC = routing.token_GEC.transpose(0, 1)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in token_EGC.shape)).tolist():
        e, g, c = place
        token = int(token_EGC[e, g, c])
        row = sent_ESD.view(*token_EGC.shape, 4)[e, g, c]
        assert torch.equal(row, torch.zeros(4) if token == 5 else x_GND[g, token])
    assert Local().receive(sent_ESD, routing, x_GND).shape == x_GND.shape
