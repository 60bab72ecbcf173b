"""A sparse model made of a dense one begins with its very loss, whatever its router, or is said not to."""

from typing import Any

import pytest
import torch
from tiny_model import SHAPE, rows

from switchcli.checkpoint.model_weights import load_weights, logical_tensors
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import unsharded_weights
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.surgery.upcycle import RANKED, UpcycledWeights, gate_correction
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import cross_entropy
from switchcli.training.state import Metrics
from switchcli.training.validation import evaluate

LARGE = {**SHAPE, "num_layers": 4, "init_scale": 8.0}
"""Weights at which every feed-forward matters."""
UNTIED = {"activation": "geglu", "tie_embeddings": False}
EXACT: dict[str, dict[str, Any]] = {
    "switch of 2": {"num_experts": 2},
    "switch of 7": {"num_experts": 7, **UNTIED},
    "every block": {"num_experts": 4, "sparse_every": 1, "activation": "geglu"},
    "some blocks": {"num_experts": 4, "sparse_encoder_layers": (0, 3), "sparse_decoder_layers": (1,)},
    "encoder alone": {"num_experts": 4, "sparse_decoder_layers": (), "tie_embeddings": False},
    "top-2": {"num_experts": 5, "router": TopKRouter(), **UNTIED},
    "top-3, raw gates": {"num_experts": 5, "router": TopKRouter(k=3, renormalize=False)},
    "no token left behind": {"num_experts": 5, "router": NoTokenLeftBehindRouter(), **UNTIED},
    "sigmoid": {"num_experts": 5, "router": TopKRouter(renormalize=False, gate="sigmoid", balance="bias")},
    "two routers": {"num_experts": 4, "router": TopKRouter(), "decoder_router": SwitchRouter()},
    "parts": {"num_experts": 12, "expert_d_ff": 6, "router": TopKRouter(k=4), **UNTIED},
    "parts of two copies": {"num_experts": 8, "expert_d_ff": 12, "router": TopKRouter(k=4)},
    "parts, sigmoid": {
        "num_experts": 24,
        "expert_d_ff": 3,
        "router": TopKRouter(k=8, gate="sigmoid", balance="bias"),
        "expert_scale": 0.7,
    },
}


@pytest.fixture(scope="module")
def context() -> DistributedContext:
    return DistributedContext("cpu", "float32")


def dense(spec: ModelSpec) -> SwitchTransformer:
    model = SwitchTransformer(spec.model_copy(update={"num_experts": 1}))
    initialize(model, 1)
    return model


def upcycled(spec: ModelSpec, noise: float = 0.0, seed: int = 0) -> SwitchTransformer:
    model = SwitchTransformer(spec)
    weights = UpcycledWeights(logical_tensors(dense(spec)), logical_tensors(model), spec, noise, seed)
    load_weights(unsharded_weights(model), weights)
    return model


def measured(model: SwitchTransformer, context: DistributedContext) -> Metrics:
    return evaluate(model, cross_entropy, [rows(0, 0, 8)], context, "dropless")


def loss(model: SwitchTransformer, context: DistributedContext) -> float:
    return float(measured(model, context)["neg_log_perplexity"].value())


@pytest.mark.parametrize("case", EXACT)
def test_it_begins_with_the_loss_of_the_dense_model(case: str, context: DistributedContext) -> None:
    spec = ModelSpec(**{**LARGE, **EXACT[case]})
    assert all(gate_correction(spec, stack).exact for stack in STACKS)
    assert loss(upcycled(spec), context) == pytest.approx(loss(dense(spec), context), abs=1e-5)


def test_expert_choice_does_not_begin_so_and_gates_that_add_up_to_1_need_nothing(context: DistributedContext) -> None:
    router = ExpertChoiceRouter(capacity_factor=2.0)
    spec = ModelSpec(**LARGE, num_experts=4, router=router, decoder_router=TopKRouter())
    assert gate_correction(spec, "encoder") == (2.0, RANKED, False)
    assert gate_correction(spec, "decoder") == (1.0, 1.0, True)
    assert abs(loss(upcycled(spec), context) - loss(dense(spec), context)) > 1e-3


def test_a_token_chooses_all_parts_of_a_copy_which_differ(context: DistributedContext) -> None:
    spec = ModelSpec(**LARGE, **EXACT["parts"])
    model = upcycled(spec)
    load = measured(model, context)["layer_load"].total[0].unflatten(0, (3, 4))  # [copies, parts]
    assert torch.equal(load, load[:, :1].expand(-1, 4))
    assert len(set(load[:, 0].tolist())) > 1, "tokens choose among the copies"
    source, parts = logical_tensors(dense(spec)), logical_tensors(model)
    layer = "encoder.blocks.1.feed_forward.layer"
    for matrix, hidden_dim, factor in (("wi", 0, 1.0), ("wi_gate", 0, 1.0), ("wo", 1, 2.0)):
        second_copy = torch.cat([parts[f"{layer}.experts.{4 + part}.{matrix}"] for part in range(4)], hidden_dim)
        assert torch.equal(second_copy, source[f"{layer}.{matrix}.weight"] * factor)


def test_tokens_spread_over_the_copies_and_routers_learn(context: DistributedContext) -> None:
    spec = ModelSpec(**LARGE, num_experts=4)
    model = upcycled(spec)
    first = measured(model, context)["layer_load"].total[0]
    assert (first > 0).all()
    cross_entropy(model, rows(0, 0, 8)).target_sum.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(".router.weight"):
            assert parameter.abs().max() < 1e-6
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-3


def test_expert_choice_ranks_by_more_than_the_position(context: DistributedContext) -> None:
    spec = ModelSpec(**LARGE, num_experts=4, router=ExpertChoiceRouter(min_capacity=1), decoder_router=SwitchRouter())
    dropped = measured(upcycled(spec), context)["encoder_dropped_fraction"].value()
    assert dropped < 0.6  # with ties all experts would take the same quarter of the tokens


def test_noise_is_relative_and_each_experts_own() -> None:
    spec = ModelSpec(**LARGE, num_experts=3, router=TopKRouter())
    plain, noisy = (
        {name: weight.detach() for name, weight in upcycled(spec, noise).named_parameters()} for noise in (0.0, 0.1)
    )
    for name, weight in plain.items():
        added = noisy[name] - weight
        if ".experts." not in name:
            assert not added.any()
            continue
        assert torch.equal(weight[0], weight[1])
        assert not torch.equal(added[0], added[1])
        assert float(added[0].std() / weight[0].square().mean().sqrt()) == pytest.approx(0.1, rel=0.2)


def test_the_seed_is_that_of_the_routers() -> None:
    spec = ModelSpec(**LARGE, num_experts=3, router=TopKRouter())
    first, again, other = (logical_tensors(upcycled(spec, seed=seed)) for seed in (0, 0, 1))
    differing = {name for name, weight in first.items() if not torch.equal(weight, other[name])}
    assert differing == {name for name in first if name.endswith("router.weight")}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    fresh = SwitchTransformer(spec)
    initialize(fresh, 0)
    assert all(torch.equal(logical_tensors(fresh)[name], first[name]) for name in differing)
