"""A sparse model made of a dense or a smaller one begins with its very loss, whatever its router, or is said not to."""

from typing import Any

import pytest
import torch
from tiny_model import SHAPE, rows

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import unsharded_weights
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.layer import evaluating, sparse_layers
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, RouterSpec, SwitchRouter, TopKRouter
from switchcli.model.surgery.upcycle import CopyNoise, Gate, UpcycledWeights, correction_of, gate_correction
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.checkpointer import load_weights, logical_tensors
from switchcli.training.loss import cross_entropy
from switchcli.training.metrics import Metrics
from switchcli.training.validation import evaluate

LARGE = {**SHAPE, "num_layers": 4, "init_scale": 8.0}
"""Weights at which every feed-forward matters."""
NO_NOISE = CopyNoise()
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


def upcycled(spec: ModelSpec, gate: Gate = "scaled", noise: CopyNoise = NO_NOISE) -> SwitchTransformer:
    return made_of(dense(spec), spec, gate, noise)


def in_dtype(model: SwitchTransformer, dtype: torch.dtype) -> SwitchTransformer:
    """The model with its routers in that dtype too."""
    for layer in sparse_layers(model).values():
        layer.router.dtype = dtype
    return model.to(dtype)


def made_of(
    source: SwitchTransformer, spec: ModelSpec, gate: Gate = "scaled", noise: CopyNoise = NO_NOISE
) -> SwitchTransformer:
    model = in_dtype(SwitchTransformer(spec), source.embedding.dtype)
    weights = UpcycledWeights(logical_tensors(source), source.spec, logical_tensors(model), spec, gate, noise)
    load_weights(unsharded_weights(model), weights)
    return model


def measured(model: SwitchTransformer, context: DistributedContext) -> Metrics:
    return evaluate(model, cross_entropy, [rows(0, 0, 8)], context, "dropless")


def loss(model: SwitchTransformer, context: DistributedContext) -> float:
    return float(measured(model, context)["neg_log_perplexity"].value())


@pytest.mark.parametrize("case", EXACT)
def test_it_begins_with_the_loss_of_the_dense_model(case: str, context: DistributedContext) -> None:
    spec = ModelSpec(**{**LARGE, **EXACT[case]})
    source = spec.model_copy(update={"num_experts": 1})
    assert all(correction_of(source, spec, stack, "scaled").exact for stack in STACKS)
    assert loss(upcycled(spec), context) == pytest.approx(loss(dense(spec), context), abs=1e-5)


@pytest.mark.parametrize(
    ("router", "gate", "wo"),
    [
        (SwitchRouter(), "raw", 1.0),
        (TopKRouter(renormalize=False), "raw", 1.0),
        (ExpertChoiceRouter(capacity_factor=2.0), "scaled", 2.0),
    ],
)
def test_what_does_not_begin_so_is_known(
    router: RouterSpec, gate: Gate, wo: float, context: DistributedContext
) -> None:
    spec = ModelSpec(**LARGE, num_experts=4, router=router, decoder_router=TopKRouter())
    one = gate_correction(router, 4, gate)
    assert (one.exact, one.wo) == (False, wo)
    assert abs(loss(upcycled(spec, gate), context) - loss(dense(spec), context)) > 1e-3


def test_gates_that_add_up_to_1_need_nothing() -> None:
    for gate in ("scaled", "raw"):
        assert gate_correction(TopKRouter(), 8, gate) == (1.0, 1.0, True)


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
    first, raw = (measured(one, context)["layer_load"].total[0] for one in (model, upcycled(spec, "raw")))
    assert torch.equal(first, raw)  # as a router of the usual size has it
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
        {name: weight.detach() for name, weight in upcycled(spec, noise=noise).named_parameters()}
        for noise in (CopyNoise(), CopyNoise(0.1))
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
    spec = ModelSpec(**LARGE, num_experts=3)
    first, again, other = (logical_tensors(upcycled(spec, "raw", CopyNoise(seed=seed))) for seed in (0, 0, 1))
    differing = {name for name, weight in first.items() if not torch.equal(weight, other[name])}
    assert differing == {name for name in first if name.endswith("router.weight")}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    fresh = SwitchTransformer(spec)
    initialize(fresh, 0)
    assert all(torch.equal(logical_tensors(fresh)[name], first[name]) for name in differing)


def hidden_units(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weights of one expert's matrix, a row for each hidden unit."""
    return weight.mT if name.endswith("wo") else weight


@pytest.mark.parametrize(("share", "redrawn"), [(0.0, 0), (1e-9, 1), (0.5, 12), (1.0, 24)])
def test_redrawn_units_are_the_same_in_all_matrices_of_an_expert_and_others_in_another(
    share: float, redrawn: int
) -> None:
    spec = ModelSpec(**LARGE, num_experts=3, router=TopKRouter(), activation="geglu")
    plain, drawn = (logical_tensors(upcycled(spec, noise=noise)) for noise in (CopyNoise(), CopyNoise(redraw=share)))
    again, other = (logical_tensors(upcycled(spec, noise=CopyNoise(redraw=share, seed=seed))) for seed in (0, 1))
    units: dict[str, set[tuple[int, ...]]] = {}
    for name, weight in plain.items():
        assert torch.equal(drawn[name], again[name])
        expert = name.rpartition(".")[0]
        if ".experts." not in name:
            assert torch.equal(drawn[name], weight) or name.endswith("router.weight")
            continue
        changed = hidden_units(drawn[name] != weight, name)
        assert torch.equal(changed.any(1), changed.all(1)), "a unit is drawn anew as a whole"
        assert int(changed.all(1).sum()) == redrawn
        units.setdefault(expert, set()).add(tuple(changed.all(1).nonzero().flatten().tolist()))
        assert torch.equal(drawn[name], other[name]) == (not share)
    assert all(len(chosen) == 1 for chosen in units.values())
    if share == 0.5:
        assert len(set.union(*units.values())) == len(units)


def test_redrawn_weights_have_the_mean_and_deviation_of_those_that_they_replace() -> None:
    """Against a loop that takes the units from what changed: one matrix has other figures than the next."""
    spec = ModelSpec(**{**SHAPE, "d_model": 64, "d_ff": 400, "num_layers": 1, "sparse_every": 1}, num_experts=2)
    spec = spec.model_copy(update={"router": TopKRouter(), "activation": "geglu"})
    source = dense(spec)
    figures = {"wi": (3.0, 0.2), "wi_gate": (-1.0, 2.0), "wo": (0.5, 0.05)}
    matrices = source.encoder.blocks[0].feed_forward.layer
    for matrix, (mean, deviation) in figures.items():
        weight = getattr(matrices, matrix).weight
        torch.nn.init.normal_(weight, mean, deviation, generator=torch.Generator().manual_seed(3))
        weight.data[..., :8] *= 1.5  # so that what is replaced differs from the matrix
    drawn = logical_tensors(made_of(source, spec, noise=CopyNoise(redraw=0.25)))
    for matrix in figures:
        name = f"encoder.blocks.0.feed_forward.layer.experts.1.{matrix}"
        before, after = (hidden_units(w, name) for w in (getattr(matrices, matrix).weight.detach(), drawn[name]))
        changed = (before != after).all(1)
        assert int(changed.sum()) == 100
        replaced, new = before[changed], after[changed]
        assert not torch.allclose(replaced.sort().values, new.sort().values)
        spread = float(replaced.std())
        assert float(new.mean()) == pytest.approx(float(replaced.mean()), abs=5 * spread / len(new.flatten()) ** 0.5)
        assert float(new.std()) == pytest.approx(spread, rel=0.05)


GROWN: dict[str, tuple[dict[str, Any], int, dict[str, Any], float]] = {
    "switch": ({"num_experts": 4}, 8, {}, 2.0),
    "three of each": ({"num_experts": 3, **UNTIED}, 9, {}, 3.0),
    "attention too": ({"num_experts": 4, "sparse": "both"}, 8, {}, 2.0),
    "fine-grained and shared": (
        {"num_experts": 4, "expert_d_ff": 6, "shared_d_ff": 9, "expert_scale": 0.7},
        8,
        {},
        2.0,
    ),
    "biases": ({"num_experts": 4, "router": SwitchRouter(balance="bias")}, 8, {}, 2.0),
    "sigmoid": ({"num_experts": 4, "router": SwitchRouter(gate="sigmoid", balance="bias")}, 8, {}, 1.0),
    "no token left behind": ({"num_experts": 4, "router": NoTokenLeftBehindRouter()}, 8, {}, 2.0),
    "top-2, all copies": ({"num_experts": 4, "router": TopKRouter()}, 8, {"router": TopKRouter(k=4)}, 1.0),
    "raw top-2, all copies": (
        {"num_experts": 4, "router": TopKRouter(renormalize=False)},
        8,
        {"router": TopKRouter(k=4, renormalize=False)},
        1.0,
    ),
    "sigmoid top-2, all copies": (
        {"num_experts": 4, "router": TopKRouter(renormalize=False, gate="sigmoid", balance="bias")},
        8,
        {"router": TopKRouter(k=4, renormalize=False, gate="sigmoid", balance="bias")},
        0.5,
    ),
}
"""A sparse model, the number of experts it grows to, what else changes, and the factor of wo."""


def sparse_source(settings: dict[str, Any]) -> SwitchTransformer:
    """A sparse model with biases that change choices."""
    model = SwitchTransformer(ModelSpec(**{**LARGE, **settings}))
    initialize(model, 1)
    for layer in sparse_layers(model).values():
        if layer.router.bias is not None:
            layer.router.bias.copy_(torch.linspace(-0.4, 0.4, len(layer.router.bias)))
    return model


def grown_spec(source: SwitchTransformer, experts: int, changes: dict[str, Any] | None = None) -> ModelSpec:
    return source.spec.model_copy(update={"num_experts": experts, **(changes or {})})


def logits(model: SwitchTransformer) -> torch.Tensor:
    batch = rows(0, 0, 8)
    with torch.no_grad(), evaluating(model, "dropless"):
        return model(batch.inputs_BS, batch.targets_BT).logits_BTV[batch.targets_BT != 0]


@pytest.mark.parametrize("case", GROWN)
def test_a_grown_model_without_noise_gives_what_it_gave(case: str) -> None:
    settings, experts, changes, wo = GROWN[case]
    source = in_dtype(sparse_source(settings), torch.float64)
    spec = grown_spec(source, experts, changes)
    assert correction_of(source.spec, spec, "encoder", "scaled") == (wo, 1.0, True)
    torch.testing.assert_close(logits(made_of(source, spec)), logits(source), rtol=1e-12, atol=1e-12)
    exact = correction_of(source.spec, spec, "encoder", "raw")
    assert (exact.wo, exact.exact) == (1.0, wo == 1.0)
    for name, layer in sparse_layers(made_of(source, spec)).items():
        before = sparse_layers(source)[name]
        for expert in range(experts):
            origin = expert % source.spec.num_experts
            assert torch.equal(layer.router.weight[expert], before.router.weight[origin])
            assert torch.equal(layer.experts.wi[expert], before.experts.wi[origin])
            torch.testing.assert_close(layer.experts.wo[expert], before.experts.wo[origin] * wo)


@pytest.mark.parametrize(
    ("router", "after", "wo"),
    [
        (TopKRouter(), TopKRouter(), 1.0),
        (TopKRouter(renormalize=False), TopKRouter(renormalize=False), 2.0),
        (SwitchRouter(), TopKRouter(), 0.25),
        (ExpertChoiceRouter(), ExpertChoiceRouter(), 2.0),
        (ExpertChoiceRouter(), ExpertChoiceRouter(capacity_factor=2.5, eval_capacity_factor=2.5), 1.0),
    ],
)
def test_choices_that_are_no_longer_the_same_are_known(router: RouterSpec, after: RouterSpec, wo: float) -> None:
    source = sparse_source({"num_experts": 4, "router": router, "decoder_router": SwitchRouter()})
    spec = grown_spec(source, 8, {"router": after})
    assert correction_of(source.spec, spec, "encoder", "scaled") == (wo, 1.0, False)
    assert correction_of(source.spec, spec, "decoder", "scaled") == (2.0, 1.0, True)


def test_without_noise_no_token_reaches_a_copy_and_with_it_about_half_do() -> None:
    source = sparse_source({"num_experts": 8, "num_layers": 2, "router": SwitchRouter(jitter=0.0)})
    x_ND = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    for noise, low, high in ((0.0, 0.0, 0.0), (0.01, 0.45, 0.55)):
        grown = made_of(source, grown_spec(source, 16), noise=CopyNoise(router=noise))
        for name, layer in sparse_layers(grown).items():
            expert_N = layer.router(x_ND).argmax(-1)
            assert low <= float((expert_N >= 8).float().mean()) <= high
            kept = expert_N % 8 == sparse_layers(source)[name].router(x_ND).argmax(-1)
            share = float(kept.float().mean())
            assert share > 0.97 if noise else share == 1, "a token goes to its expert or to a copy of it"


def test_with_noise_the_output_differs_by_no_more_than_the_logits_do() -> None:
    """With logits moved by up to d, a gate is multiplied by e**-2d to e**2d, where the expert is the same."""
    source = sparse_source({"num_experts": 4, "num_layers": 2})
    grown = made_of(source, grown_spec(source, 12), noise=CopyNoise(router=0.01))
    x_BSD = torch.randn(16, 64, 16, generator=torch.Generator().manual_seed(0))
    real_BS = torch.ones(16, 64, dtype=torch.bool)
    for name, layer in sparse_layers(source).items():
        larger = sparse_layers(grown)[name]
        with torch.no_grad(), evaluating(source, "dropless"), evaluating(grown, "dropless"):
            before, after = (part(x_BSD, real_BS).y_BSO.flatten(0, 1) for part in (layer, larger))
            logits_AE = layer.router(x_BSD).flatten(0, 1)
            moved_A = (larger.router(x_BSD).flatten(0, 1) - logits_AE.repeat(1, 3)).abs().amax(1)
        first, second = logits_AE.topk(2).values.unbind(1)
        is_same = first - second > 2 * moved_A  # no noise can make another expert the first
        assert float(is_same.float().mean()) > 0.95
        bound = torch.expm1(2 * moved_A) * before.norm(dim=1) + 1e-5
        distance = (after - before).norm(dim=1)
        assert (distance <= bound)[is_same].all()
        assert (distance[is_same] > bound[is_same] / 100).any(), "the bound is of their size"


def test_the_experts_that_were_there_stay_and_each_copy_differs() -> None:
    source = sparse_source({"num_experts": 2, "num_layers": 2})
    noise = CopyNoise(experts=0.1, redraw=0.25, router=0.01)
    grown = logical_tensors(made_of(source, grown_spec(source, 6), noise=noise))
    layer = "encoder.blocks.1.feed_forward.layer"
    for matrix, wo in (("wi", 1.0), ("wo", 3.0)):
        old, new = ([tensors[f"{layer}.experts.{e}.{matrix}"] for e in range(count)] for tensors, count in (
            (logical_tensors(source), 2), (grown, 6)))  # fmt: skip
        for expert in range(2):
            assert torch.equal(new[expert], old[expert] * wo)
        for expert in range(2, 6):
            added = new[expert] / wo - old[expert % 2]
            calm = hidden_units(added, matrix).norm(dim=1).sort().values[:18]  # three quarters have the noise alone
            assert 0.05 < float(calm.mean() / hidden_units(old[expert % 2], matrix).norm(dim=1).mean()) < 0.15
        assert not torch.equal(new[2], new[4])
    rows_before, rows_after = (tensors[f"{layer}.router.weight"] for tensors in (logical_tensors(source), grown))
    added = rows_after - rows_before.repeat(3, 1)
    assert not added[:2].any()
    assert float(added[2:].std() / rows_before.std()) == pytest.approx(0.01, rel=0.3)
    assert not torch.equal(added[2], added[4])
