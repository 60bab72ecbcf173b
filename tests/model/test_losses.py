"""Balance and z-losses: of one report, and over layers and stacks by each reduction."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import SPARSE, a_model, rows

from switchcli.model.config import Reduction
from switchcli.model.moe.losses import auxiliary_loss
from switchcli.model.moe.router import ExpertChoiceRouter, SwitchRouter, TopKRouter
from switchcli.model.moe.stats import RouterStats, log_softmax_over_experts, softmax_over_experts

E, N = 4, 32


def report(logits_GNE: torch.Tensor, real_GN: torch.Tensor | None = None) -> RouterStats:
    real_GN = torch.ones(logits_GNE.shape[:2], dtype=torch.bool) if real_GN is None else real_GN
    return SwitchRouter().assign(logits_GNE, real_GN, "training").stats


def towards(expert_N: torch.Tensor, strength: float) -> torch.Tensor:
    """Logits of one group whose tokens prefer the experts given."""
    return strength * F.one_hot(expert_N, E).float().unsqueeze(0)


@pytest.mark.parametrize("num_experts", [1, 15, 16, 17])
def test_softmaxes_over_few_experts_and_their_gradients_are_those_of_torch(num_experts: int) -> None:
    torch.manual_seed(0)
    logits_GNE = (4 * torch.randn(3, 21, num_experts)).requires_grad_()
    gradient_GNE = torch.randn(3, 21, num_experts)
    for ours, torchs in ((softmax_over_experts, torch.softmax), (log_softmax_over_experts, torch.log_softmax)):
        one, other = ours(logits_GNE), torchs(logits_GNE, -1)
        torch.testing.assert_close(one, other)
        gradients = (torch.autograd.grad(y, logits_GNE, gradient_GNE) for y in (one, other))
        torch.testing.assert_close(*gradients)


def test_its_gradient_makes_the_crowded_expert_less_probable_and_f_has_none() -> None:
    logits_GNE = towards(torch.tensor([0] * 24 + [1] * 8), 1.0).requires_grad_()
    found = report(logits_GNE)
    assert not found.fraction_GE.requires_grad
    (gradient_GNE,) = torch.autograd.grad(found.load_balancing_loss, logits_GNE)
    assert (gradient_GNE[..., 0] > 0).all()
    assert (gradient_GNE[..., 2:] < 0).all()


def test_a_group_counts_by_its_real_tokens() -> None:
    """Equal weights would let a row of two tokens pull each of them 57 times as hard as a row of 114."""
    generator = torch.Generator().manual_seed(0)
    logits_GNE = (2 * torch.randn(3, 114, 128, generator=generator)).requires_grad_()
    counts = [114, 2, 0]
    real_GN = torch.arange(114) < torch.tensor(counts)[:, None]
    found = SwitchRouter().assign(logits_GNE, real_GN, "training").stats

    probability_GNE = logits_GNE.softmax(-1)
    naive_balance, naive_z = torch.zeros(()), torch.zeros(())
    for group, count in enumerate(counts):
        for expert in range(128):
            chosen = sum(int(logits_GNE[group, token].argmax()) == expert for token in range(count))
            mean = sum((probability_GNE[group, token, expert] for token in range(count)), torch.zeros(())) / max(
                1, count
            )
            naive_balance = naive_balance + count * 128 * (chosen / max(1, count)) * mean
        for token in range(count):
            naive_z = naive_z + logits_GNE[group, token].logsumexp(-1) ** 2
    torch.testing.assert_close(found.load_balancing_loss, naive_balance / 116)
    torch.testing.assert_close(found.z_loss, naive_z / 116)
    for ours, theirs in ((found.load_balancing_loss, naive_balance / 116), (found.z_loss, naive_z / 116)):
        gradients = (torch.autograd.grad(loss, logits_GNE, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["sum", "mean", "pooled"])
def test_the_losses_of_a_batch_are_the_sums_of_those_of_its_microbatches(reduction: Reduction) -> None:
    """Otherwise they would depend on the number of ranks and microbatches: groups differ in their real tokens."""
    router = SPARSE.router.model_copy(update={"balance_loss_coef": 0.5, "z_loss_coef": 0.25})
    model = a_model(SPARSE.model_copy(update={"router": router, "balance_reduction": reduction, "sparse": "both"}))
    whole = model(*rows(0, 0, 8)).auxiliary
    parts = [model(*rows(0, first, 2)).auxiliary for first in range(0, 8, 2)]
    for stack in ("encoder", "decoder"):
        for field in ("total", "tokens"):
            summed = sum(getattr(getattr(part, stack), field).item() for part in parts)
            assert getattr(getattr(whole, stack), field).item() == pytest.approx(summed, rel=1e-5)


def naive(stacks: list[tuple[float, float, list[RouterStats]]], reduction: Reduction) -> float:
    """Sums of plain numbers: (alpha, coefficient of z, reports) of each stack."""
    layers = []
    for alpha, c, reports in stacks:
        if reduction == "pooled" and reports:
            total = 0.0
            groups, experts = reports[0].fraction_GE.shape
            tokens = reports[0].tokens_G.tolist()
            for group in range(groups):
                for expert in range(experts):
                    f = sum(one.fraction_GE[group, expert].item() for one in reports) / len(reports)
                    p = sum(one.probability_GE[group, expert].item() for one in reports) / len(reports)
                    total += experts * f * p * tokens[group] / sum(tokens)
            layers.append(alpha * total + c * sum(one.z_loss.item() for one in reports) / len(reports))
        else:
            layers += [alpha * one.load_balancing_loss.item() + c * one.z_loss.item() for one in reports]
    return sum(layers) / len(layers) if reduction == "mean" else sum(layers)


@given(
    reduction=st.sampled_from(["sum", "mean", "pooled"]),
    encoder=st.integers(0, 3),
    decoder=st.integers(0, 3),
    coefficients=st.tuples(*[st.floats(0.0, 1.0)] * 4),
    seed=st.integers(0, 2**20),
)
def test_each_reduction_equals_the_naive_one_with_coefficients_of_each_stack(
    reduction: Reduction, encoder: int, decoder: int, coefficients: tuple[float, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    alpha, z, decoder_alpha, decoder_z = coefficients
    # The stacks see sequences of other lengths.
    real_GN, other_GN = (torch.arange(length) < torch.tensor([[4], [1], [length]]) for length in (9, 5))
    reports = [report(torch.randn(3, 9, E, generator=generator), real_GN) for _ in range(encoder)]
    others = [report(torch.randn(3, 5, E, generator=generator), other_GN) for _ in range(decoder)]
    found = auxiliary_loss(
        [
            (SwitchRouter(balance_loss_coef=alpha, z_loss_coef=z), tuple(reports)),
            (TopKRouter(balance_loss_coef=decoder_alpha, z_loss_coef=decoder_z), tuple(others)),
        ],
        reduction,
    )
    if not reports and not others:
        assert found is None
        return
    assert found is not None
    expected = naive([(alpha, z, reports), (decoder_alpha, decoder_z, others)], reduction)
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)


def test_layers_that_collapse_into_different_experts_show_but_for_pooling() -> None:
    """Pooled over as many layers as experts, each collapsed into another one, routing looks uniform."""
    collapsed = tuple(report(towards(torch.full((N,), expert), 20.0)) for expert in range(E))
    uniform = tuple(report(towards(torch.arange(N) % E, 1e-4)) for _ in range(E))

    def loss(reports: tuple[RouterStats, ...], reduction: Reduction) -> float:
        found = auxiliary_loss([(SwitchRouter(balance_loss_coef=1.0), reports), (SwitchRouter(), ())], reduction)
        assert found is not None
        return found.mean().item()

    assert loss(uniform, "sum") == pytest.approx(E, rel=1e-4)
    assert loss(uniform, "mean") == loss(uniform, "pooled") == pytest.approx(1.0, rel=1e-4)
    assert loss(collapsed, "sum") == pytest.approx(E * E, rel=1e-4)
    assert loss(collapsed, "mean") == pytest.approx(E, rel=1e-4)
    assert loss(collapsed, "pooled") == pytest.approx(1.0, rel=1e-4)
    assert loss(collapsed[:2], "pooled") == pytest.approx(E / 2, rel=1e-4)


def test_an_expert_choice_layer_has_a_z_loss_alone() -> None:
    found = report(torch.randn(1, 9, E))
    loss = auxiliary_loss([(ExpertChoiceRouter(z_loss_coef=0.5), (found,)), (SwitchRouter(), ())], "sum")
    assert loss is not None
    assert loss.mean().item() == pytest.approx(0.5 * found.z_loss.item())


@pytest.mark.parametrize("reduction", ["sum", "mean", "pooled"])
def test_the_model_adds_the_losses_of_its_stacks_with_the_coefficients_of_their_routers(reduction: Reduction) -> None:
    router = SPARSE.router.model_copy(update={"balance_loss_coef": 0.5, "z_loss_coef": 0.25})
    other = SPARSE.router.model_copy(update={"balance_loss_coef": 0.125, "z_loss_coef": 2.0})
    changes = {"router": router, "decoder_router": other, "sparse": "both", "balance_reduction": reduction}
    model = a_model(SPARSE.model_copy(update=changes))
    output = model(*rows(0, 0, 4))
    assert len(output.encoder_stats) == len(output.decoder_stats) == 2
    expected = naive([(0.5, 0.25, output.encoder_stats), (0.125, 2.0, output.decoder_stats)], reduction)
    assert output.auxiliary.mean().item() == pytest.approx(expected, rel=1e-5)
    output.auxiliary.mean().backward()
    for name, parameter in model.named_parameters():
        if ".router." in name:
            assert parameter.grad.abs().max() > 0, name
