"""The weights of a model by their logical names, which do not depend on the number of ranks: to save and to load."""

from collections.abc import Mapping

import torch

from switchcli.checkpoint import tensor_file, tensor_names
from switchcli.distributed.layout import LocalPart, ModelWeights, local_values, unsharded_weights
from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer


def meta_model(spec: ModelSpec) -> SwitchTransformer:
    """Return the model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return SwitchTransformer(spec)


def logical_tensors(model: SwitchTransformer) -> dict[str, torch.Tensor]:
    """Return views of the weights of an unsharded model, keyed by logical name."""
    return {name: part.tensor for name, part in weight_parts(unsharded_weights(model)).items()}


def weight_parts(weights: ModelWeights) -> dict[str, LocalPart]:
    """Return views of this rank's part of every weight, keyed by logical name."""
    named = {name: local_values(weight) for name, weight in weights.tensors.items()}
    return tensor_names.logical_parts(named, weights.layouts, weights.experts)


def load_weights(weights: ModelWeights, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the weights, in place, from full tensors by logical name, one after another.

    Biases of routers that another run balanced by its loss begin at 0.
    """
    parts = weight_parts(weights)
    for name in weights.buffers.keys() - tensors.keys():
        parts.pop(name).tensor.zero_()
    load_parts(parts, tensors)


def load_parts(parts: Mapping[str, LocalPart], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill each part, in place, from the full tensor of its name."""
    for name, part in parts.items():
        if isinstance(tensors, tensor_file.LazyTensors):  # read no more of the file than this rank's slice
            LocalPart(part.tensor).copy_from(tensors.read_slice(name, part.slices))
        else:
            part.copy_from(tensors[name])
