"""Dispatch and combine by index against the one-hot products of the paper's Appendix F.

Legend: G groups (the paper's cores), N tokens a group, E experts, C slots an expert, D model, F hidden.
"""

import pytest
import torch
import torch.nn.functional as F

from switchcli.model.config import ModelSpec
from switchcli.model.moe import dispatch
from switchcli.model.moe.dispatch import LocalDispatcher, filled_slots
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.router import NoTokenLeftBehindRouter, RouterSpec, SwitchRouter, TopKRouter

NUM_GROUPS, NUM_TOKENS, NUM_EXPERTS, WIDTH, HIDDEN = 3, 10, 4, 6, 7


def a_layer(factor: float) -> SwitchLayer:
    router = SwitchRouter(capacity_factor=factor, min_capacity=1, jitter=0.0, group_sequences=2)
    shape = {"d_model": WIDTH, "d_ff": HIDDEN, "num_heads": 2, "num_layers": 2, "num_experts": NUM_EXPERTS}
    layer = SwitchLayer(ModelSpec(**shape, router=router), "encoder", WIDTH)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def some_tokens() -> torch.Tensor:
    return torch.randn(2 * NUM_GROUPS, NUM_TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(1))


def appendix_f(layer: SwitchLayer, x_GND: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and balance loss as the pseudo-code has them, with the exclusive sum of the released code."""
    probability_GNE = (x_GND @ layer.router.weight.T).softmax(-1)
    gate_GN, expert_GN = probability_GNE.max(-1)
    mask_GNE = F.one_hot(expert_GN, NUM_EXPERTS).float()
    density_GE, proxy_GE = mask_GNE.mean(1), probability_GNE.mean(1)
    balance = (density_GE * proxy_GE).mean() * NUM_EXPERTS**2
    position_GNE = (mask_GNE.cumsum(1) - mask_GNE) * mask_GNE
    mask_GNE = mask_GNE * (position_GNE < capacity)
    slot_GNC = F.one_hot(position_GNE.sum(-1).long(), NUM_TOKENS).float()[..., :capacity]
    combine_GNEC = torch.einsum("gn,gne,gnc->gnec", gate_GN, mask_GNE, slot_GNC)
    dispatch_GNEC = (combine_GNEC != 0).float()
    assert combine_GNEC.shape == (NUM_GROUPS, NUM_TOKENS, NUM_EXPERTS, capacity)
    inputs_EGCD = torch.einsum("gnd,gnec->egcd", x_GND, dispatch_GNEC)
    assert inputs_EGCD.shape == (NUM_EXPERTS, NUM_GROUPS, capacity, WIDTH)
    hidden_EGCF = torch.einsum("egcd,efd->egcf", inputs_EGCD, layer.experts.wi).relu()
    outputs_EGCD = torch.einsum("egcf,edf->egcd", hidden_EGCF, layer.experts.wo)
    return torch.einsum("egcd,gnec->gnd", outputs_EGCD, combine_GNEC), balance


@pytest.mark.parametrize("rows", ["filled", "foreseen", "all"])
@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 1), (1.25, 3), (4.0, 10)])
def test_the_layer_is_appendix_f_with_every_gradient(
    factor: float, capacity: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many rows as filled slots, and with the numbers that are known without looking, as off the CPU."""
    exact = rows == "filled"
    monkeypatch.setattr(dispatch, "filled_slots", lambda routing, size, **_: filled_slots(routing, size, exact=exact))
    layer, x_BSD = a_layer(factor), some_tokens().requires_grad_()
    monkeypatch.setattr(dispatch, "products_wait", lambda x_GND: rows == "all")
    y_BSD, report = layer(x_BSD, torch.ones(x_BSD.shape[:2], dtype=torch.bool))
    expected_GND, balance = appendix_f(layer, x_BSD.reshape(NUM_GROUPS, NUM_TOKENS, WIDTH), capacity)
    assert (report.dropped > 0) == (factor < 4.0)
    torch.testing.assert_close(y_BSD, expected_GND.reshape(y_BSD.shape))
    torch.testing.assert_close(report.load_balancing_loss, balance)
    places = [x_BSD, *layer.parameters()]
    ours, theirs = (
        torch.autograd.grad(y.square().sum() + 3 * loss, places)
        for y, loss in ((y_BSD, report.load_balancing_loss), (expected_GND, balance))
    )
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_empty_slots_are_not_sent_and_tokens_travel_in_the_precision_of_the_products() -> None:
    layer, x_GND = a_layer(4.0), some_tokens().view(NUM_GROUPS, NUM_TOKENS, WIDTH)
    real_GN = torch.ones(NUM_GROUPS, NUM_TOKENS, dtype=torch.bool)
    routing = layer.router_spec.assign(layer.router(x_GND), real_GN, "training")
    sent_AD, rows = LocalDispatcher().dispatch(x_GND, routing, equal_batches=True)
    assert sent_AD.dtype == torch.float32
    assert len(sent_AD) == NUM_GROUPS * NUM_TOKENS < routing.token_GEC.numel()
    with torch.autocast("cpu", torch.bfloat16):
        rounded_AD, rows = LocalDispatcher().dispatch(x_GND, routing, equal_batches=True)
        y_GND = LocalDispatcher().combine(rounded_AD, rows, x_GND)
    assert rounded_AD.dtype == y_GND.dtype == torch.bfloat16
    assert rows.weight_A.dtype == torch.float32
    assert torch.equal(rounded_AD, sent_AD.bfloat16())


def test_rows_beyond_the_filled_slots_belong_to_the_last_expert_and_have_no_weight() -> None:
    """Off the CPU the filled slots are not counted. A grouped product leaves rows of no expert uninitialized."""
    layer, x_GND = a_layer(1.25), some_tokens().view(NUM_GROUPS, NUM_TOKENS, WIDTH)
    routing = layer.router_spec.assign(
        layer.router(x_GND), torch.ones(NUM_GROUPS, NUM_TOKENS, dtype=torch.bool), "training"
    )
    counted, foreseen = (filled_slots(routing, NUM_TOKENS, exact=exact) for exact in (True, False))
    num_rows = len(counted.source_A)
    assert num_rows < len(foreseen.source_A) == foreseen.end_E[-1]
    assert torch.equal(foreseen.end_E[:-1], counted.end_E[:-1])
    assert torch.equal(foreseen.weight_A[:num_rows], counted.weight_A)
    assert not foreseen.weight_A[num_rows:].any()


@pytest.mark.parametrize(
    ("router", "places"), [(SwitchRouter(), 1), (TopKRouter(k=2), 2), (NoTokenLeftBehindRouter(k=4), 1)], ids=str
)
def test_no_more_rows_are_foreseen_than_tokens_can_fill(router: RouterSpec, places: int) -> None:
    """Where rows are not counted, those foreseen are computed."""
    logits_GNE, real_GN = torch.randn(3, 20, 8), torch.ones(3, 20, dtype=torch.bool)
    for mode in ("training", "paper", "dropless"):
        routing = router.assign(logits_GNE, real_GN, mode)
        assert routing.max_filled_slots == 3 * min(8 * routing.token_GEC.shape[2], 20 * places)
        assert (routing.token_GEC < 20).sum() <= routing.max_filled_slots
