"""Expert pruning: a trained model with fewer experts in each sparse layer, for serving (beyond the paper).

Those that the tokens ask for most stay. A token whose expert is gone goes to the most probable one that is left. Gates
are a softmax over fewer experts then, and that of one that stays rises: p_i / (sum of p over those kept). So the output
is another even where no token loses its expert, unless gates are divided by their own sum (top_k, renormalise). What
can be made up for is the mean: `Cut.wo`.

Legend: E experts, N those kept, B batch, S positions, D model, A tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.moe.layer import SwitchLayer, SwitchOutput, sparse_layers
from switchcli.model.moe.router import Router
from switchcli.model.transformer import SwitchTransformer

By = Literal["drop", "merge"]
Gate = Literal["scaled", "raw"]


class LayerPruning(NamedTuple):
    """What is done to one sparse layer."""

    load: Sequence[int]
    """How many tokens asked for each expert."""
    kept: list[int]
    """The experts that stay: those with the largest load, of equal ones the first, in the order of their numbers."""
    lost_fraction: float
    """Share of the load that fell on the others."""
    wo: torch.Tensor
    """Factor of the last matrix of those that stay: a token that keeps its expert gets on average what it got."""


def plan_pruning(
    model: SwitchTransformer,
    loads: Mapping[str, Sequence[int]],
    mass: Mapping[str, torch.Tensor],
    num_kept: int,
    gate: Gate,
) -> dict[str, LayerPruning]:
    """How each layer is cut, from its load and its `probability_mass`; with `raw` gates weights stay as they are."""
    return {
        name: _cut(layer.rule, loads[name], mass[name], num_kept, gate) for name, layer in sparse_layers(model).items()
    }


def _cut(rule: Router, load_E: Sequence[int], mass_EE: torch.Tensor, num_kept: int, gate: Gate) -> LayerPruning:
    kept = sorted(sorted(range(len(load_E)), key=lambda expert: -load_E[expert])[:num_kept])
    lost = sum(load_E) - sum(load_E[expert] for expert in kept)
    mass_NE = mass_EE[kept]
    wo = mass_NE[:, kept].sum() / mass_NE.sum()
    if gate == "raw" or rule.gates_sum_to_one or not mass_NE.any():
        wo = torch.ones_like(wo)
    return LayerPruning(load_E, kept, lost / max(1, sum(load_E)), wo)


@contextmanager
def probability_mass(model: SwitchTransformer) -> Iterator[dict[str, torch.Tensor]]:
    """Within, forward passes fill float64 [E, E] for each sparse layer, by its name.

    Row i is the sum of p(x) over the tokens whose most probable expert is i.
    """
    mass: dict[str, torch.Tensor] = {}

    def add(name: str, layer: SwitchLayer, inputs: tuple[torch.Tensor, torch.Tensor], output: SwitchOutput) -> None:
        x_BSD, real_BS = inputs
        probability_AE = layer.router(x_BSD[real_BS]).double().softmax(-1)
        first_AE = F.one_hot(probability_AE.argmax(-1), probability_AE.shape[-1]).double()
        mass[name] = first_AE.mT @ probability_AE + mass.get(name, 0.0)

    hooks = [layer.register_forward_hook(partial(add, name)) for name, layer in sparse_layers(model).items()]
    try:
        yield mass
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def prune(model: SwitchTransformer, cuts: Mapping[str, LayerPruning], into: SwitchTransformer, by: By) -> None:
    """Fill `into`, which has fewer experts and is else of the same shape, from the weights of `model`.

    The routers keep the rows of the experts that stay. `drop` takes those experts as they are; `merge` averages each
    with the experts removed whose router rows are most like its own (`shares`).
    """
    whole = dict(model.named_parameters())
    for name, parameter in into.named_parameters():
        weight = whole[name].detach()
        layer = name.partition(".experts.")[0].removesuffix(".router.weight")
        if found := cuts.get(layer.removesuffix(".switch")):
            if by == "merge" and ".experts." in name:
                share_NE = merge_shares(whole[f"{layer}.router.weight"], found)
                weight = torch.tensordot(share_NE.to(weight.dtype), weight, dims=1)
            else:
                weight = weight[found.kept]
            if name.endswith(".wo"):
                weight = weight * found.wo.to(weight.dtype)
        parameter.copy_(weight)


def merge_shares(router_ED: torch.Tensor, found: LayerPruning) -> torch.Tensor:
    """float64 [N, E]: the part that each expert has in the one which it is merged into; rows add up to 1.

    Each goes to the kept expert whose router row has the largest cosine with its own, weighed by its load; one without
    any load stays as it is where it is kept, and counts for nothing where it is not.
    """
    E, N = len(router_ED), len(found.kept)
    row_ED = F.normalize(router_ED.double(), dim=1)
    place_E = (row_ED @ row_ED[found.kept].mT).argmax(1)
    place_E[found.kept] = torch.arange(N, device=place_E.device)  # two rows may be the same
    load_NE = F.one_hot(place_E, N).mT * place_E.new_tensor(found.load).double()
    total_N1 = load_NE.sum(1, keepdim=True)
    return torch.where(total_N1 > 0, load_NE / total_N1, F.one_hot(place_E.new_tensor(found.kept), E).double())
