"""Pruning: a trained model with fewer experts in each sparse layer, for serving (beyond the paper).

The experts that most tokens choose are kept. A token whose expert is removed goes to the most probable kept one. Gates
are then a softmax over fewer experts, so that of a kept expert rises to p_i / (sum of p over the kept experts). The
output therefore changes even where no token loses its expert, unless gates are divided by their own sum (top_k with
renormalize). Only the mean of this change can be corrected: see `LayerPruning.wo`.

Legend: E experts, N kept experts, B batch, S positions, D model, A tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.moe.layer import SwitchLayer, observing, sparse_layers, sublayer_name
from switchcli.model.moe.router import Router
from switchcli.model.transformer import SwitchTransformer, named_weights

By = Literal["drop", "merge"]
Gate = Literal["scaled", "raw"]


class LayerPruning(NamedTuple):
    """How one sparse layer is pruned."""

    load: Sequence[float]
    """Number of tokens that chose each expert."""
    kept: list[int]
    """The kept experts, in ascending order: those with the largest load, of equal loads the first."""
    lost_fraction: float
    """Fraction of the load that fell on the removed experts."""
    wo: float
    """Factor of the kept experts' last matrix. It keeps the mean gate of tokens that keep their expert."""
    bias: float
    """Factor of the kept experts' biases of choices, by which gates rise as well, on average."""


def plan_pruning(
    model: SwitchTransformer,
    loads: Mapping[str, Sequence[float]],
    mass: Mapping[str, torch.Tensor],
    num_kept: int,
    gate: Gate,
) -> dict[str, LayerPruning]:
    """Plan the pruning of each sparse layer, keyed by layer.

    Args:
        model: the model to prune.
        loads: the number of tokens that chose each expert, by layer.
        mass: float64 [E, E] by layer, from `probability_mass`.
        num_kept: the number of experts to keep in each layer.
        gate: whether the last matrices of the kept experts are `scaled` by `LayerPruning.wo`, or `raw`.
    """
    return {
        name: _plan_layer(layer.router_spec, loads[name], mass[name], num_kept, gate)
        for name, layer in sparse_layers(model).items()
    }


def _plan_layer(
    router: Router, load_E: Sequence[float], mass_EE: torch.Tensor, num_kept: int, gate: Gate
) -> LayerPruning:
    by_load = sorted(range(len(load_E)), key=lambda expert: -load_E[expert])  # stable: of equal loads the first
    kept = sorted(by_load[:num_kept])
    total_load = sum(load_E)
    lost_load = total_load - sum(load_E[expert] for expert in kept)
    # The tokens that keep their expert are in the rows of the kept experts. Each has a probability sum of 1 over all
    # experts; the mean over the kept ones is how much the new softmax divides by, on average. Sigmoids stay.
    mass_NE = mass_EE[kept]
    kept_mass = 1.0
    if mass_NE.any() and not router.has_sigmoid_gates:
        kept_mass = float(mass_NE[:, kept].sum() / mass_NE.sum())
    wo = 1.0 if gate == "raw" or router.gates_sum_to_one else kept_mass
    return LayerPruning(load_E, kept, lost_load / max(1, total_load), wo, 1 / kept_mass)


@contextmanager
def probability_mass(model: SwitchTransformer) -> Iterator[dict[str, torch.Tensor]]:
    """Sum router probabilities over the forward passes within the context: float64 [E, E], by sparse layer.

    Row i is the sum of p(x) over the tokens whose most probable expert is i.
    """
    mass: dict[str, torch.Tensor] = {}

    def add(name: str, layer: SwitchLayer, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> None:
        probability_AE = layer.router_spec.gates(layer.router(x_BSD[real_BS]).double())
        score_AE = probability_AE if layer.router.bias is None else probability_AE + layer.router.bias
        first_AE = F.one_hot(score_AE.argmax(-1), probability_AE.shape[-1]).double()
        # [E, A] @ [A, E] sums the probabilities of the tokens with the same first expert.
        mass[name] = first_AE.mT @ probability_AE + mass.get(name, 0.0)

    with observing(model, add):
        yield mass


@torch.no_grad()
def prune(
    model: SwitchTransformer,
    prunings: Mapping[str, LayerPruning],
    pruned: SwitchTransformer,
    by: By,
) -> None:
    """Fill `pruned`, which differs from `model` only by having fewer experts, from the weights of `model`.

    The routers keep the rows and biases of the kept experts. With `drop` the kept experts stay as they are. With
    `merge` each is averaged with the removed experts whose router rows are most similar to its own (`merge_weights`).
    """
    weights = named_weights(model)
    for name, pruned_weight in named_weights(pruned).items():
        weight = weights[name].detach()
        layer, _, expert = name.partition(".experts.")
        pruning = prunings.get(sublayer_name(name))
        if pruning is not None and (expert or ".router." in name):
            if by == "merge" and expert:
                merge_NE = merge_weights(weights[f"{layer}.router.weight"], pruning)
                weight = torch.tensordot(merge_NE.to(weight.dtype), weight, dims=1)  # [N, E] . [E, ...] -> [N, ...]
            else:
                weight = weight[pruning.kept]
            if name.endswith(".wo"):
                weight = weight * pruning.wo
            elif name.endswith(".router.bias"):
                weight = weight * pruning.bias
        pruned_weight.copy_(weight)


def merge_weights(router_ED: torch.Tensor, pruning: LayerPruning) -> torch.Tensor:
    """Return the weight of each expert in each merged one: float64 [N, E]; rows add up to 1.

    Each removed expert is merged into the kept one whose router row has the largest cosine with its own. Experts are
    weighted by their loads. A kept expert stays as it is if neither it nor the experts merged into it have any load.
    """
    E, N = len(router_ED), len(pruning.kept)
    row_ED = F.normalize(router_ED.double(), dim=1)
    target_E = (row_ED @ row_ED[pruning.kept].mT).argmax(1)  # the index of an expert's merged one, from 0 to N - 1
    target_E[pruning.kept] = torch.arange(N, device=target_E.device)  # two kept experts may have equal rows
    load_NE = F.one_hot(target_E, N).mT * target_E.new_tensor(pruning.load).double()
    total_N1 = load_NE.sum(1, keepdim=True)
    unmerged_NE = F.one_hot(target_E.new_tensor(pruning.kept), E).double()
    return torch.where(total_N1 > 0, load_NE / total_N1, unmerged_NE)
