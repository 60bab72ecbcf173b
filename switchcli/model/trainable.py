"""Which parameters learn: groups of them, by the module that a parameter sits in (fine-tuning, beyond the paper).

ST-MoE finds that to update all, all but the experts, or the dense feed-forwards alone is about equal, and the experts
alone much worse. A router goes with its experts: it is of no use without them, and nothing else learns from its loss.
"""

from typing import Literal

from torch import nn

from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.layers import FeedForward
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import SwitchTransformer

TrainableSet = Literal["all", "non_expert", "expert", "dense_feed_forward"]
"""`expert`: the sparse layers, routers included, whatever they route; `non_expert`: all else; `dense_feed_forward`: the
feed-forwards without experts, but not the norms before them."""


def check(spec: ModelSpec, group: TrainableSet) -> None:
    """Raises ValueError, with the way out, when such a model has no parameter of the group."""
    if group == "expert" and spec.num_experts == 1:
        raise ValueError(
            "a dense model (num_experts: 1) has no experts to update: take all or dense_feed_forward, or a sparse model"
        )
    blocks = [(stack, layer) for stack in STACKS for layer in range(spec.num_blocks(stack))]
    if group == "dense_feed_forward" and all(spec.is_sparse(*block, "feed_forward") for block in blocks):
        raise ValueError(
            "every feed-forward of this model has experts, so that no dense one is left to update: take all, "
            "non_expert or expert"
        )


def trainable_members(model: SwitchTransformer, group: TrainableSet) -> dict[str, nn.Parameter]:
    """The parameters of a group by name, in the model's order."""
    named = dict(model.named_parameters())
    kind = FeedForward if group == "dense_feed_forward" else SwitchLayer
    inside = {id(weight) for part in model.modules() if isinstance(part, kind) for weight in part.parameters()}
    if group == "all":
        return named
    return {name: weight for name, weight in named.items() if (id(weight) in inside) != (group == "non_expert")}


def freeze(model: SwitchTransformer, group: TrainableSet) -> None:
    """Let the parameters of `group` learn, and no others. Before an optimizer is built and the model is wrapped.

    Raises:
        ValueError: as `check`.
    """
    check(model.spec, group)
    learning = trainable_members(model, group)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in learning)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: what an optimizer is built over."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
