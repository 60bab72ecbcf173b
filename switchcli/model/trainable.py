"""The parameters of a model that a fine-tuning updates, by the sets of trainable_sets.py."""

from torch import nn

from switchcli.model.layers import FeedForward
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.trainable_sets import TrainableSet, check
from switchcli.model.transformer import FeedForwardSublayer, SwitchTransformer


def trainable_members(model: SwitchTransformer, trainable_set: TrainableSet) -> dict[str, nn.Parameter]:
    """Return the parameters of a set by name, in the model's order."""
    parameters = dict(model.named_parameters())
    if trainable_set == "all":
        return parameters
    if trainable_set == "dense_feed_forward":
        layers = [module.layer for module in model.modules() if isinstance(module, FeedForwardSublayer)]
        modules: list[nn.Module] = [layer for layer in layers if isinstance(layer, FeedForward)]
    else:
        modules = [*sparse_layers(model).values()]
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
