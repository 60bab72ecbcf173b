"""Evaluation: the mode is put back, padding rows change nothing, and ranks share a set however it divides."""

import math

import pytest
import torch
from doubles import text_evaluator
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import GROUPED, NOISY, a_model, rows

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.router import Policy
from switchcli.spec import PAD
from switchcli.training.loss import cross_entropy
from switchcli.training.state import Mean
from switchcli.training.validation import (
    HeldOutText,
    bits_per_byte,
    evaluate,
    exact,
    rank_batches,
    reduce,
)


@pytest.fixture(scope="module")
def context() -> DistributedContext:
    return DistributedContext("cpu", "float32")


@pytest.mark.parametrize("training", [True, False])
def test_it_runs_without_noise_or_gradients_and_puts_the_mode_back(context: DistributedContext, training: bool) -> None:
    model = a_model(NOISY).train(training)
    one, other = (evaluate(model, cross_entropy, [rows(0, 0, 4)], context) for _ in range(2))
    assert one["neg_log_perplexity"].value() == other["neg_log_perplexity"].value()
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_figure_is_a_mean_over_targets_not_over_batches(context: DistributedContext) -> None:
    model = a_model().eval()
    batches = [rows(0, 0, 3), rows(0, 3, 1), rows(0, 4, 4)]
    found = evaluate(model, cross_entropy, batches, context)["neg_log_perplexity"]
    with torch.no_grad():
        means = [cross_entropy(model, batch).metrics["neg_log_perplexity"] for batch in batches]
    total, weight = (sum(float(part) for part in parts) for parts in zip(*means, strict=True))
    assert found.value().item() == pytest.approx(total / weight, rel=1e-7)
    assert found.weight == int((rows(0, 0, 8).targets_BT != PAD).sum())
    assert found.total.dtype == torch.float64


@pytest.mark.parametrize(("policy", "drops"), [("paper", True), ("dropless", False)])
def test_tokens_are_dropped_as_the_policy_says(context: DistributedContext, policy: Policy, drops: bool) -> None:
    found = evaluate(a_model(), cross_entropy, [rows(0, 0, 8)], context, policy)
    assert (found["dropped_fraction"].value() > 0) == drops


@given(sequences=st.integers(1, 40), rows_each=st.integers(1, 5), world=st.integers(1, 5))
def test_ranks_share_every_row_once_in_batches_of_one_shape(sequences: int, rows_each: int, world: int) -> None:
    def numbered(first: int, count: int) -> Batch:
        assert first + count <= max(sequences, 1)
        rows_B1 = torch.arange(first + 1, first + count + 1).unsqueeze(1)
        return Batch(rows_B1, rows_B1.expand(-1, 2))

    each = [rank_batches(HeldOutText(numbered, sequences), rows_each, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in each}) == 1
    assert all(batch.inputs_BS.shape == (rows_each, 1) for batches in each for batch in batches)
    assert all(batch.targets_BT.shape == (rows_each, 2) for batches in each for batch in batches)
    seen = torch.cat([batch.inputs_BS.flatten() for batches in each for batch in batches])
    assert seen[seen != PAD].tolist() == list(range(1, sequences + 1))


def test_rows_of_padding_change_no_reported_figure(context: DistributedContext) -> None:
    model = a_model()
    exactly, padded = (
        evaluate(model, cross_entropy, rank_batches(HeldOutText(lambda f, c: rows(0, f, c), 6), each, 0, 1), context)
        for each in (6, 4)
    )
    for name in ("neg_log_perplexity", "dropped_fraction"):
        assert padded[name].value().item() == pytest.approx(exactly[name].value().item(), rel=1e-6)


@pytest.mark.parametrize(("num_rows", "sizes"), [(1, [2]), (3, [4]), (4, [4]), (5, [4, 4])])
def test_a_small_text_makes_a_small_batch_of_whole_groups(
    context: DistributedContext, num_rows: int, sizes: list[int]
) -> None:
    text = HeldOutText(lambda first, count: rows(0, first, count), num_rows)
    batches = text_evaluator(context, {}, rows_each=4).batches(a_model(GROUPED), text)
    assert [len(batch.inputs_BS) for batch in batches] == sizes


def test_rows_of_a_text_are_evaluated_in_whole_groups(context: DistributedContext) -> None:
    model = a_model(GROUPED)
    counts: list[int] = []
    text = HeldOutText(lambda first, count: counts.append(count) or rows(0, first, count), 5)
    found = text_evaluator(context, {"": text}, rows_each=3)(model).total["neg_log_perplexity"]
    assert counts == [4, 1]  # of three rows each, rounded up to groups of two
    wanted = evaluate(model, cross_entropy, rank_batches(text._replace(num_rows=5), 4, 0, 1), context)[
        "neg_log_perplexity"
    ]
    assert torch.equal(found.total, wanted.total)
    assert found.weight == int((rows(0, 0, 5).targets_BT != PAD).sum())


def test_bits_a_byte_are_those_of_all_targets_over_the_bytes_that_they_hide() -> None:
    # 24 targets, each worth 2 nats, that hide 40 bytes.
    text = HeldOutText(lambda first, count: rows(0, first, count), 1, num_bytes=40)
    found = {"neg_log_perplexity": Mean(torch.tensor(-48.0), torch.tensor(24))}
    assert bits_per_byte([(text, found)]) == pytest.approx(24 * 2 / math.log(2) / 40)
    # Beside it 10 targets that are worth 5 nats in all, and hide 100 bytes.
    other = {"neg_log_perplexity": Mean(torch.tensor(-5.0), torch.tensor(10))}
    both = [(text, found), (text._replace(num_bytes=100), other)]
    assert bits_per_byte(both) == pytest.approx((48 + 5) / math.log(2) / (40 + 100))
    assert bits_per_byte([*both, (text._replace(num_bytes=None), other)]) is None
    assert bits_per_byte([]) is None


def test_metrics_become_float64() -> None:
    mean = exact({"a": Mean(torch.tensor(1.5), torch.tensor(2))})["a"]
    assert (mean.total.dtype, mean.weight.dtype) == (torch.float64, torch.float64)


def test_no_metrics_need_no_collective(monkeypatch: pytest.MonkeyPatch, context: DistributedContext) -> None:
    """A save right after a logged step has an empty window, which is on no device."""
    monkeypatch.setattr(DistributedContext, "all_reduce", lambda self, tensor: pytest.fail("a collective of nothing"))
    assert reduce({}, context) == {}
