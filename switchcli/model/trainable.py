"""Which parameters a fine-tuning updates: sets of them, by the module that a parameter is in (beyond the paper).

ST-MoE finds that updating all parameters, all but the experts, or only the dense feed-forwards gives about equal
quality, and updating only the experts gives much worse quality. A router belongs to the set of its experts: it is of no
use without them, and only they learn from its loss.
"""

from typing import Literal

from torch import nn

from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.layers import FeedForward
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import SwitchTransformer

TrainableSet = Literal["all", "non_expert", "expert", "dense_feed_forward"]
"""`expert`: the sparse layers with their routers, in feed-forwards and attentions; `non_expert`: all else;
`dense_feed_forward`: the feed-forwards without experts, but not the norms before them."""


def check(spec: ModelSpec, trainable_set: TrainableSet) -> None:
    """Raise ValueError, with the fix, if a model of this spec has no parameter in the set."""
    if trainable_set == "expert" and spec.num_experts == 1:
        raise ValueError(
            "a dense model (num_experts: 1) has no experts to update: choose all or dense_feed_forward, or a sparse "
            "model"
        )
    blocks = [(stack, layer) for stack in STACKS for layer in range(spec.num_blocks(stack))]
    if trainable_set == "dense_feed_forward" and all(spec.is_sparse(*block, "feed_forward") for block in blocks):
        raise ValueError(
            "every feed-forward of this model has experts, so there is no dense one to update: choose all, non_expert "
            "or expert"
        )


def trainable_members(model: SwitchTransformer, trainable_set: TrainableSet) -> dict[str, nn.Parameter]:
    """Return the parameters of a set by name, in the model's order."""
    parameters = dict(model.named_parameters())
    if trainable_set == "all":
        return parameters
    module_type = FeedForward if trainable_set == "dense_feed_forward" else SwitchLayer
    modules = [module for module in model.modules() if isinstance(module, module_type)]
    inside = {id(weight) for module in modules for weight in module.parameters()}
    wants_inside = trainable_set != "non_expert"
    return {name: weight for name, weight in parameters.items() if (id(weight) in inside) == wants_inside}


def freeze(model: SwitchTransformer, trainable_set: TrainableSet) -> None:
    """Make only the parameters of the set trainable. Call it before the model is wrapped and the optimizer is built.

    Raises:
        ValueError: the model has no parameter in the set.
    """
    check(model.spec, trainable_set)
    members = trainable_members(model, trainable_set)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in members)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, for the optimizer."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
