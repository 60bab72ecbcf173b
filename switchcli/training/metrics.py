"""Metrics as sums and weights, which add up over microbatches, steps and ranks. The division comes last."""

from collections.abc import Mapping
from typing import NamedTuple

import torch


class Mean(NamedTuple):
    """A sum and its weight: float32 or float64 tensors on the model's device.

    The weight is a scalar, or has the shape of the total.
    """

    total: torch.Tensor
    weight: torch.Tensor

    def __add__(self, other: object) -> "Mean":
        assert isinstance(other, Mean)
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> torch.Tensor:
        """Return total / weight, with the shape of the total; 0 where the weight is 0."""
        return self.total / self.weight.clamp(min=1)


Metrics = dict[str, Mean]


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> Metrics:
    """Return the sum of each metric; a metric of only one side is unchanged."""
    return {**left, **right, **{name: left[name] + right[name] for name in left.keys() & right.keys()}}


def flatten(metrics: Mapping[str, Mean]) -> torch.Tensor:
    """Return all totals and weights, by sorted name, as one float64 vector, so that one all-reduce sums them."""
    tensors = [tensor.reshape(-1).double() for name in sorted(metrics) for tensor in metrics[name]]
    return torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.float64)


def unflatten(flat: torch.Tensor, like: Mapping[str, Mean]) -> Metrics:
    """Return the metrics in a vector that `flatten` made of metrics with the names and shapes of `like`."""
    metrics: Metrics = {}
    start = 0
    for name in sorted(like):
        tensors = []
        for tensor in like[name]:  # total, then weight, as in `flatten`
            tensors.append(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        metrics[name] = Mean(*tensors)
    return metrics
