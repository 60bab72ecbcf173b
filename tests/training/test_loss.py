"""The objective against its definition, target by target, and what it says of the routing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import DENSE, SPARSE, TARGET, a_model, rows
from torch.utils.flop_counter import FlopCounterMode

from switchcli.data.batch import Batch
from switchcli.model.config import ModelSpec
from switchcli.model.vocabulary import VocabularyShard
from switchcli.training.loss import cross_entropy, cross_entropy_sum, sum_in_chunks, summed_cross_entropy


@pytest.mark.parametrize("spec", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_the_sum_runs_over_real_targets_alone(spec: ModelSpec) -> None:
    model, batch = a_model(spec).train(), rows(0, 0, 8)
    loss = cross_entropy(model, batch)
    probability_BTV = model(*batch).logits_BTV.detach().double().softmax(-1)
    total, count = 0.0, 0
    for row, targets in enumerate(batch.targets_BT.tolist()):
        for position, target in enumerate(targets):
            if target != 0:
                total -= float(probability_BTV[row, position, target].log())
                count += 1
    assert 0 < count < 8 * TARGET
    assert loss.target_sum.item() == pytest.approx(total, rel=1e-6)
    assert loss.target_sum.dtype == torch.float32
    assert (loss.auxiliary is None) == (spec is DENSE)
    assert loss.metrics["neg_log_perplexity"].value().item() == pytest.approx(-total / count, rel=1e-6)


def test_the_auxiliary_loss_is_the_models_own_and_the_routing_is_told() -> None:
    model, batch = a_model().train(), rows(0, 0, 8)
    loss = cross_entropy(model, batch)
    output = model(*batch)
    reports = output.router_stats
    assert len(reports) == 2  # one sparse layer in each stack
    assert loss.auxiliary.mean().item() == output.auxiliary.mean().item()
    for stack, part in zip(("encoder", "decoder"), loss.auxiliary, strict=True):
        assert loss.metrics[f"auxiliary_loss/{stack}"].value().item() == pytest.approx(part.mean().item())
    sums, counts = ([getattr(one, name).item() for one in reports] for name in ("load_balancing_sum", "tokens"))
    assert loss.metrics["balance"].value().item() == pytest.approx(sum(sums) / sum(counts))
    dropped = sum(report.dropped.item() for report in reports)
    assert dropped > 0
    tokens = int((batch.inputs_BS != 0).sum() + (batch.targets_BT != 0).sum())
    assert loss.metrics["dropped_fraction"].value().item() == pytest.approx(dropped / tokens)
    assert loss.metrics["layer_load"].total.shape == (2, SPARSE.num_experts)
    assert loss.metrics["layer_load"].total.sum() == tokens
    assert not any(part.requires_grad for mean in loss.metrics.values() for part in mean)


def test_a_batch_without_targets_costs_nothing_and_its_gradient_is_zero() -> None:
    model = a_model(DENSE)
    inputs_BS, targets_BT = rows(0, 0, 2)
    loss = cross_entropy(model, Batch(inputs_BS, torch.zeros_like(targets_BT)))
    assert loss.target_sum.item() == 0.0
    assert loss.metrics["neg_log_perplexity"].value().item() == 0.0
    loss.target_sum.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def factors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden_ND = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    vocabulary_VD = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, vocabulary_VD, torch.randint(0, 11, (rows,), generator=generator)


def plain(hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden_ND @ vocabulary_VD.mT, targets_N, ignore_index=0, reduction="sum")


@given(rows=st.integers(1, 17), chunk=st.integers(1, 18))
def test_in_chunks_of_any_size_loss_and_gradients_are_those_of_the_plain_formula(rows: int, chunk: int) -> None:
    hidden_ND, vocabulary_VD, targets_N = factors(rows, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchcli.training.loss.CHUNK", chunk)
        found = summed_cross_entropy(hidden_ND, VocabularyShard(vocabulary_VD), targets_N)
    expected = plain(hidden_ND, vocabulary_VD, targets_N)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(0.3 * loss, (hidden_ND, vocabulary_VD)) for loss in (found, expected))
    torch.testing.assert_close(*gradients)


def test_the_gradient_of_the_logits_is_that_of_a_multiple_of_the_loss() -> None:
    hidden_ND, vocabulary_VD, targets_N = factors(8, torch.float64)
    logits_NV = (hidden_ND @ vocabulary_VD.mT).detach().requires_grad_()
    found = cross_entropy_sum(logits_NV, targets_N, VocabularyShard(vocabulary_VD))
    expected = F.cross_entropy(logits_NV, targets_N, ignore_index=0, reduction="sum")
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(0.3 * loss, logits_NV) for loss in (found, expected))
    torch.testing.assert_close(*gradients)


def test_of_several_sums_the_first_alone_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.training.loss.CHUNK", 3)
    hidden_ND, vocabulary_VD, _ = factors(8, torch.float64)

    def squares_and_sum(logits_CV: torch.Tensor, _: slice) -> torch.Tensor:
        return torch.stack([logits_CV.square().sum(), logits_CV.sum()])

    found = sum_in_chunks(squares_and_sum, hidden_ND, VocabularyShard(vocabulary_VD))
    expected = squares_and_sum(hidden_ND @ vocabulary_VD.mT, slice(None))
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(one, (hidden_ND, vocabulary_VD)) for one in (found.sum(), expected[0]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_factor_alone_is_as_with_both_and_the_other_is_not_made(wanted: int) -> None:
    *both, targets_N = factors(8, torch.float32)
    loss = summed_cross_entropy(both[0], VocabularyShard(both[1]), targets_N)
    expected = torch.autograd.grad(loss, both)[wanted]
    alone = [tensor.detach().requires_grad_(place == wanted) for place, tensor in enumerate(both)]
    with FlopCounterMode(display=False) as counter:
        loss = summed_cross_entropy(alone[0], VocabularyShard(alone[1]), targets_N)
        loss.backward()
    assert torch.equal(alone[wanted].grad, expected)
    assert alone[1 - wanted].grad is None
    assert counter.get_total_flops() == 2 * 2 * 8 * 6 * 11  # the logits, and the gradient of one factor


def test_in_float32_and_under_autocast_it_is_exact_within_the_rounding_of_the_products() -> None:
    """bfloat16 keeps 2**-9 of a number: what is summed of a few such products is off by 2**-6 of the largest."""
    hidden_ND, vocabulary_VD, targets_N = factors(200, torch.float32)
    wrt = (hidden_ND, vocabulary_VD)
    exact = [tensor.detach().double().requires_grad_() for tensor in wrt]
    expected = plain(*exact, targets_N)
    expected_gradients = torch.autograd.grad(expected, exact)
    for enabled, tolerance in ((False, 1e-6), (True, 2**-6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = summed_cross_entropy(hidden_ND, VocabularyShard(vocabulary_VD), targets_N)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        for gradient, right in zip(torch.autograd.grad(found, wrt), expected_gradients, strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - right).abs().max() <= tolerance * right.abs().max()


def test_under_autocast_the_logits_are_rounded_and_the_products_of_a_loss_are_not() -> None:
    hidden_ND, vocabulary_VD, _ = factors(8, torch.float32)

    def squares(logits_CV: torch.Tensor, _: slice) -> torch.Tensor:
        return (logits_CV.float().square() @ torch.ones(11, 1)).sum(0)

    with torch.autocast("cpu", torch.bfloat16):
        found = sum_in_chunks(squares, hidden_ND, VocabularyShard(vocabulary_VD))
    expected = squares(hidden_ND.bfloat16() @ vocabulary_VD.bfloat16().mT, slice(None))
    torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_bfloat16_vocabulary_is_rounded_once_and_not_with_every_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All chunks add up in float32: an entry is off by the roundings of its products, about 2**-9 of each."""
    monkeypatch.setattr("switchcli.training.loss.CHUNK", 2)
    hidden_ND, vocabulary_VD, targets_N = factors(2000, torch.bfloat16)
    found = torch.autograd.grad(
        summed_cross_entropy(hidden_ND, VocabularyShard(vocabulary_VD), targets_N), vocabulary_VD
    )[0]
    assert found.dtype == torch.bfloat16
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, vocabulary_VD)]
    right = torch.autograd.grad(plain(*exact, targets_N), exact[1])[0]
    assert (found.double() - right).abs().max() <= 2**-8 * right.abs().max()


def test_without_gradients_it_only_sums() -> None:
    hidden_ND, vocabulary_VD, targets_N = factors(8, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = summed_cross_entropy(hidden_ND, VocabularyShard(vocabulary_VD), targets_N)
    assert not found.requires_grad
    assert counter.get_total_flops() == 2 * 8 * 6 * 11  # the logits alone
    torch.testing.assert_close(found, plain(hidden_ND, vocabulary_VD, targets_N).detach())
