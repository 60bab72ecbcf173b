"""The objective against its definition, target by target, and what it says of the routing."""

import pytest
import torch
from tiny import DENSE, SPARSE, TARGET, a_model, rows

from switchcli.data.batch import Batch
from switchcli.model.spec import ModelSpec
from switchcli.train.objective import cross_entropy


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
    assert loss.metrics["neg_log_perplexity"].value().item() == pytest.approx(-total / count, rel=1e-6)


def test_the_auxiliary_loss_is_the_models_own_and_the_routing_is_told() -> None:
    model, batch = a_model().train(), rows(0, 0, 8)
    loss = cross_entropy(model, batch)
    output = model(*batch)
    reports = output.reports
    assert len(reports) == 2  # one sparse layer in each stack
    assert loss.auxiliary.item() == output.auxiliary.item()
    assert loss.metrics["auxiliary_loss"].value().item() == pytest.approx(loss.auxiliary.item())
    assert loss.metrics["balance"].value().item() == pytest.approx(sum(report.balance.item() for report in reports) / 2)
    dropped = sum(report.dropped.item() for report in reports)
    assert dropped > 0
    tokens = int((batch.inputs_BS != 0).sum() + (batch.targets_BT != 0).sum())
    assert loss.metrics["dropped_fraction"].value().item() == pytest.approx(dropped / tokens)
    assert loss.metrics["layer_load"].total.shape == (2, SPARSE.num_experts)
    assert loss.metrics["layer_load"].total.sum() == tokens
    assert not any(part.requires_grad for mean in loss.metrics.values() for part in mean)


def test_a_dense_model_has_no_auxiliary_loss_and_no_routing_to_tell() -> None:
    loss = cross_entropy(a_model(DENSE), rows(0, 0, 4))
    assert loss.auxiliary.item() == 0.0
    assert loss.metrics.keys() == {"neg_log_perplexity"}


def test_a_batch_without_targets_costs_nothing_and_its_gradient_is_zero() -> None:
    model = a_model(DENSE)
    inputs_BS, targets_BT = rows(0, 0, 2)
    loss = cross_entropy(model, Batch(inputs_BS, torch.zeros_like(targets_BT)))
    assert loss.target_sum.item() == 0.0
    assert loss.metrics["neg_log_perplexity"].value().item() == 0.0
    loss.target_sum.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
