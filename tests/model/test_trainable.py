"""Groups of parameters: each where its module is; what is frozen has no gradient, and no work is done for one."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from test_flops import on_meta, shapes
from tiny_model import DENSE, SPARSE, a_model, rows, step_total
from torch.utils.flop_counter import FlopCounterMode

from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.trainable import freeze, trainable, trainable_members
from switchcli.model.trainable_sets import TrainableSet, check
from switchcli.training.loss import cross_entropy

GROUPS: tuple[TrainableSet, ...] = ("all", "non_expert", "expert", "dense_feed_forward")
BOTH = SPARSE.model_copy(update={"sparse": "both", "num_layers": 4, "activation": "geglu", "tie_embeddings": False})
NAMES = {
    "all": r".*",
    "expert": r".*\.(experts\..+|shared\..+|router\.weight)",
    "non_expert": r"(?!.*\.(experts\.|shared\.|router\.weight)).*",
    "dense_feed_forward": r".*\.feed_forward\.layer\.(wi|wi_gate|wo)\.weight",
}


@given(shapes)
def test_every_parameter_is_of_the_experts_or_not_and_of_a_dense_feed_forward_or_not(shape: dict[str, object]) -> None:
    spec = ModelSpec(**shape)
    model = on_meta(spec)
    names = [name for name, _ in model.named_parameters()]
    for group in GROUPS:
        found = trainable_members(model, group)
        assert list(found) == [name for name in names if re.fullmatch(NAMES[group], name)]
        if found:
            check(spec, group)
        else:
            with pytest.raises(ValueError, match=r"\ball\b"):
                check(spec, group)
    counts = {group: sum(weight.numel() for weight in trainable_members(model, group).values()) for group in GROUPS}
    assert counts["non_expert"] + counts["expert"] == counts["all"]
    beside = sum(  # routers, and paths for all tokens
        weight.numel() for name, weight in model.named_parameters() if re.search(r"router\.weight|\.shared\.", name)
    )
    assert counts["all"] == count(spec).parameters
    assert counts["expert"] == count(spec).expert + beside
    assert counts["non_expert"] == count(spec).dense - beside
    assert counts["dense_feed_forward"] <= counts["non_expert"]


def test_a_group_that_is_empty_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"num_experts: 1\b.*\ball\b.*\bdense_feed_forward\b"):
        freeze(a_model(DENSE), "expert")
    everywhere = SPARSE.model_copy(update={"sparse_every": 1})
    with pytest.raises(ValueError, match=r"\ball\b.*\bnon_expert\b.*\bexpert\b"):
        freeze(a_model(everywhere), "dense_feed_forward")
    for group in ("all", "non_expert", "dense_feed_forward"):
        freeze(a_model(DENSE), group)


def gradients(spec: ModelSpec, group: TrainableSet) -> dict[str, torch.Tensor | None]:
    model = a_model(spec).train()
    freeze(model, "expert" if group == "all" else "all")  # what was chosen before does not count
    freeze(model, group)
    loss = cross_entropy(model, rows(0, 0, 8))
    step_total(loss).backward()
    assert set(trainable(model)) == set(trainable_members(model, group))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("group", GROUPS[1:])
def test_what_learns_has_the_gradient_that_it_has_when_all_learns(group: TrainableSet) -> None:
    """Equal within 4e-6 of the largest entry: where fewer gradients are wanted torch takes other kernels, whose sums of
    some hundred float32 terms, each rounded by 6e-8, have another order; which ones depends on the processor."""
    whole = gradients(BOTH, "all")
    for name, gradient in gradients(BOTH, group).items():
        if re.fullmatch(NAMES[group], name):
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=4e-6 * float(whole[name].abs().max()))
        else:
            assert gradient is None, name


def flops(group: TrainableSet) -> int:
    """Return the FLOPs of a step, without grouped products, which torch does not count."""
    model = a_model(SPARSE).train()
    freeze(model, group)
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(model, rows(0, 0, 8))
        step_total(loss).backward()
    return counter.get_total_flops()


def test_frozen_weights_have_no_products_for_their_gradients() -> None:
    vocabulary = 2 * 8 * rows(0, 0, 8).targets_BT.shape[1] * SPARSE.d_model * SPARSE.vocab_size
    assert flops("all") - flops("dense_feed_forward") > vocabulary
    assert flops("all") - flops("expert") > vocabulary


@pytest.mark.parametrize(("group", "fused"), [("all", 2), ("non_expert", 2), ("expert", 6), ("dense_feed_forward", 6)])
def test_attention_is_fused_where_positions_do_not_learn(
    group: TrainableSet, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    model = a_model(SPARSE)
    freeze(model, group)
    model(*rows(0, 0, 2))
    assert len(calls) == fused  # of 2 blocks a stack: all six, or cross-attention alone
