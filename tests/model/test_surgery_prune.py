"""Pruning against a reference: the whole model, to whose routers the experts taken out are impossible."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import SHAPE, rows

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.layer import RouterWeights, SwitchLayer, evaluating, sparse_layers, sublayer_name
from switchcli.model.moe.router import NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.surgery.prune import LayerPruning, plan_pruning, probability_mass, prune
from switchcli.model.transformer import SwitchTransformer

LARGE = {**SHAPE, "num_layers": 2, "init_scale": 8.0, "num_experts": 5}
SPECS: dict[str, dict[str, Any]] = {
    "switch": {},
    "geglu, every block": {"sparse_every": 1, "activation": "geglu", "tie_embeddings": False},
    "both": {"sparse": "both", "router": TopKRouter()},
    "raw top-2": {"router": TopKRouter(renormalize=False)},
    "no token left behind": {"router": NoTokenLeftBehindRouter(k=2)},
    "sigmoid": {"router": SwitchRouter(gate="sigmoid")},
}
LOAD = [3, 0, 9, 4, 4]


def model_of(spec: ModelSpec, seed: int = 0) -> SwitchTransformer:
    model = SwitchTransformer(spec)
    initialize(model, seed)
    return model


Loads = Mapping[str, list[int]]


def loads_of(spec: ModelSpec) -> Loads:
    """Other experts in each layer."""
    parts = spec.sparse_layer_names()
    return {part: LOAD[place % 5 :] + LOAD[: place % 5] for place, part in enumerate(parts)}


def cuts_of(model: SwitchTransformer, loads: Loads, experts: int) -> dict[str, LayerPruning]:
    with probability_mass(model) as mass:
        logits(model)
    return plan_pruning(model, loads, mass, experts)


def pruned(model: SwitchTransformer, loads: Loads, experts: int) -> SwitchTransformer:
    into = model_of(model.spec.model_copy(update={"num_experts": experts}), seed=1)
    prune(model, cuts_of(model, loads, experts), into)
    return into


def only(kept_N: list[int]) -> Callable[..., torch.Tensor]:
    """A hook of a router that hides all other experts."""

    def hide(router: torch.nn.Module, inputs: Any, logits_GNE: torch.Tensor) -> torch.Tensor:
        hidden_E = torch.ones(logits_GNE.shape[-1], dtype=torch.bool)
        hidden_E[kept_N] = False
        return logits_GNE.masked_fill(hidden_E, -torch.inf)

    return hide


@torch.no_grad()
def logits(model: SwitchTransformer) -> torch.Tensor:
    with evaluating(model, "dropless"):
        return model(*rows(0, 0, 8)).logits_BTV


@pytest.mark.parametrize("case", SPECS)
def test_dropping_is_hiding_from_the_router(case: str) -> None:
    model = model_of(ModelSpec(**{**LARGE, **SPECS[case]}))
    before, loads = logits(model), loads_of(model.spec)
    stay = cuts_of(model, loads, 3)
    smaller = logits(pruned(model, loads, 3))
    routers = {name: module for name, module in model.named_modules() if isinstance(module, RouterWeights)}
    assert len(routers) == len(loads)
    for name, router in routers.items():
        router.register_forward_hook(only(stay[sublayer_name(name)].kept))
    for name, layer in sparse_layers(model).items():
        layer.experts.wo.data *= stay[name].wo
    assert torch.allclose(smaller, logits(model), rtol=1e-5, atol=1e-5)
    assert (before - smaller).abs().max() > 1e-2


def test_kept_experts_keep_their_biases_and_independent_gates_need_no_factor() -> None:
    router = SwitchRouter(gate="sigmoid", balance="bias")
    model = model_of(ModelSpec(**LARGE, router=router))
    for layer in sparse_layers(model).values():
        layer.router.bias.copy_(torch.arange(5.0))
    loads = loads_of(model.spec)
    cuts, smaller = cuts_of(model, loads, 3), pruned(model, loads, 3)
    for name, layer in sparse_layers(smaller).items():
        assert layer.router.bias.tolist() == cuts[name].kept
        assert cuts[name].wo == 1


def test_biases_rise_as_softmax_gates_do() -> None:
    """Routers of zeros: every gate is 1/5, and 1/3 where three experts are left."""
    model = model_of(ModelSpec(**LARGE, router=SwitchRouter(balance="bias")))
    loads = loads_of(model.spec)
    for name, layer in sparse_layers(model).items():
        torch.nn.init.zeros_(layer.router.weight)
        layer.router.bias.copy_(torch.tensor(loads[name]))
    cuts, smaller = cuts_of(model, loads, 3), pruned(model, loads, 3)
    for name, layer in sparse_layers(smaller).items():
        expected = [loads[name][expert] * 5 / 3 for expert in cuts[name].kept]
        assert layer.router.bias.tolist() == pytest.approx(expected)
        assert cuts[name].wo == pytest.approx(3 / 5)


@given(load=st.lists(st.integers(0, 9), min_size=3, max_size=3), count=st.integers(1, 2))
def test_the_most_loaded_are_kept_in_order_and_of_equals_the_first(load: list[int], count: int) -> None:
    model = model_of(ModelSpec(**{**LARGE, "num_experts": 3, "sparse_decoder_layers": ()}))
    (part,) = model.spec.sparse_layer_names()
    (found,) = plan_pruning(model, {part: load}, {part: torch.ones(3, 3)}, count).values()
    gone = [expert for expert in range(3) if expert not in found.kept]
    assert found.kept == sorted(set(found.kept))
    assert all((load[stays], -stays) >= (load[goes], -goes) for stays in found.kept for goes in gone)
    assert found.lost_fraction == pytest.approx(sum(load[expert] for expert in gone) / max(1, sum(load)))
    assert found.wo == pytest.approx(count / 3)


@pytest.mark.parametrize("case", SPECS)
def test_a_token_that_keeps_its_expert_gets_on_average_what_it_got(case: str) -> None:
    model = model_of(ModelSpec(**{**LARGE, **SPECS[case]}))
    loads = loads_of(model.spec)
    seen: dict[str, torch.Tensor] = {}  # of each layer, p(x) of its real tokens

    def see(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: seen.update({name: layer.router(inputs[0])[inputs[1]].softmax(-1)})

    for name, module in model.named_modules():
        if isinstance(module, SwitchLayer):
            module.register_forward_hook(see(sublayer_name(name)))
    for name, found in cuts_of(model, loads, 3).items():
        if model.spec.router.gates_are_independent or model.spec.router.gates_sum_to_one:
            assert found.wo == 1
            continue
        keep_A = torch.isin(seen[name].argmax(-1), torch.tensor(found.kept))
        assert found.wo == pytest.approx(float(seen[name][keep_A][:, found.kept].sum(-1).mean()), rel=1e-5)
    cuts, whole = cuts_of(model, loads, 3), dict(model.named_parameters())
    for name, weight in pruned(model, loads, 3).named_parameters():
        if name.endswith("experts.wo"):
            cut = cuts[sublayer_name(name)]
            assert torch.allclose(weight, whole[name][cut.kept] * cut.wo)
