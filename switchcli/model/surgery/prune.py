"""Pruning: a trained model with fewer experts in each sparse layer, for serving (beyond the paper).

The experts that most tokens choose are kept. A token whose expert is removed goes to the most probable kept one. Gates
are then a softmax over fewer experts, so that of a kept expert rises to p_i / (sum of p over the kept experts). The
output therefore changes even where no token loses its expert, unless gates are divided by their own sum (top_k with
renormalize). Only the mean of this change can be corrected: see `LayerPruning.wo`.

Legend: E experts, N kept experts, B batch, S positions, D model, A tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.moe.layer import SwitchLayer, observing, sparse_layers, sublayer_name
from switchcli.model.moe.router import Router
from switchcli.model.transformer import SwitchTransformer, named_weights


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
) -> dict[str, LayerPruning]:
    """Plan the pruning of each sparse layer, keyed by layer.

    Args:
        model: the model to prune.
        loads: the number of tokens that chose each expert, by layer.
        mass: float64 [E, E] by layer, from `probability_mass`.
        num_kept: the number of experts to keep in each layer.
    """
    return {
        name: _plan_layer(layer.router_spec, loads[name], mass[name], num_kept)
        for name, layer in sparse_layers(model).items()
    }


def _plan_layer(router: Router, load_E: Sequence[float], mass_EE: torch.Tensor, num_kept: int) -> LayerPruning:
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
    wo = 1.0 if router.gates_sum_to_one else kept_mass
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
def prune(model: SwitchTransformer, prunings: Mapping[str, LayerPruning], pruned: SwitchTransformer) -> None:
    """Fill `pruned`, which differs from `model` only by having fewer experts, from the weights of `model`.

    The kept experts keep their rows and biases of the routers. Their last matrices and biases are multiplied as
    `LayerPruning` says.
    """
    weights = named_weights(model)
    for name, pruned_weight in named_weights(pruned).items():
        weight = weights[name].detach()
        pruning = prunings.get(sublayer_name(name))
        if pruning is not None and (".experts." in name or ".router." in name):
            weight = weight[pruning.kept]
            if name.endswith(".wo"):
                weight = weight * pruning.wo
            elif name.endswith(".router.bias"):
                weight = weight * pruning.bias
        pruned_weight.copy_(weight)
