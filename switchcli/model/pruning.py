"""Expert pruning: a trained model with fewer experts in each sparse layer, for serving (beyond the paper).

Those that the tokens ask for most stay. A token whose expert is gone goes to the most probable one that is left. Gates
are a softmax over fewer experts then, so that of one that stays rises too: p_i / (sum of p over those kept). The output
is thus another even where no token loses its expert, unless gates are divided by their sum (top_k, renormalise).

Legend: E experts, N those kept, D model.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from switchcli.model.transformer import SwitchTransformer

By = Literal["drop", "merge"]
Loads = Mapping[str, Sequence[int]]
"""Of each sparse layer, by its name in `ModelSpec.routed_parts`, how many tokens asked for each expert."""


def kept(load_E: Sequence[int], num_kept: int) -> list[int]:
    """The experts with the largest load, in the order of their numbers; of equal ones the first."""
    return sorted(sorted(range(len(load_E)), key=lambda expert: -load_E[expert])[:num_kept])


def lost(load_E: Sequence[int], num_kept: int) -> float:
    """Share of the load that fell on experts which are not kept."""
    total = sum(load_E)
    return (total - sum(load_E[expert] for expert in kept(load_E, num_kept))) / max(1, total)


@torch.no_grad()
def prune(model: SwitchTransformer, loads: Loads, into: SwitchTransformer, by: By) -> None:
    """Fill `into`, which has fewer experts and is else of the same shape, from the weights of `model`.

    The routers keep the rows of the experts that stay. `drop` takes those experts as they are; `merge` averages each
    with the experts removed whose router rows are most like its own (`shares`).
    """
    whole = dict(model.named_parameters())
    for name, parameter in into.named_parameters():
        weight = whole[name].detach()
        layer = name.partition(".experts.")[0].removesuffix(".router.weight")
        load_E = loads.get(layer.removesuffix(".switch"))
        if load_E is not None:
            kept_N = torch.tensor(kept(load_E, len(parameter)), device=weight.device)
            if by == "merge" and ".experts." in name:
                share_NE = shares(whole[f"{layer}.router.weight"], kept_N, load_E)
                weight = torch.tensordot(share_NE.to(weight.dtype), weight, dims=1)
            else:
                weight = weight.index_select(0, kept_N)
        parameter.copy_(weight)


def shares(router_ED: torch.Tensor, kept_N: torch.Tensor, load_E: Sequence[int]) -> torch.Tensor:
    """float64 [N, E]: the part that each expert has in the one which it is merged into; rows add up to 1.

    Each goes to the kept expert whose router row has the largest cosine with its own, weighed by its load; one without
    any load stays as it is where it is kept, and counts for nothing where it is not.
    """
    E, N = len(router_ED), len(kept_N)
    row_ED = F.normalize(router_ED.double(), dim=1)
    place_E = (row_ED @ row_ED[kept_N].mT).argmax(1)
    place_E[kept_N] = torch.arange(N, device=place_E.device)  # two rows may be the same
    load_NE = F.one_hot(place_E, N).mT * torch.tensor(load_E, dtype=torch.float64, device=place_E.device)
    total_N1 = load_NE.sum(1, keepdim=True)
    return torch.where(total_N1 > 0, load_NE / total_N1, F.one_hot(kept_N, E).double())
