"""Mean: the one type of metric. Totals and weights add up over microbatches, steps and ranks; division comes last."""

from collections.abc import Mapping
from typing import NamedTuple

import torch


class Mean(NamedTuple):
    """A sum and what to divide it by; float32 or float64 tensors on the model's device, `weight` a scalar or alike."""

    total: torch.Tensor
    weight: torch.Tensor

    def __add__(self, other: object) -> "Mean":
        assert isinstance(other, Mean)
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> torch.Tensor:
        """total / weight, shaped like the total; 0 where the weight is 0."""
        return self.total / self.weight.clamp(min=1)


Metrics = dict[str, Mean]


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> Metrics:
    """Metric by metric sum; one that only one side has is kept as it is."""
    return {**left, **right, **{name: left[name] + right[name] for name in left.keys() & right.keys()}}


def flatten(metrics: Mapping[str, Mean]) -> torch.Tensor:
    """All totals and weights as one float64 vector, so that one all-reduce sums them."""
    parts = [part.reshape(-1).double() for name in sorted(metrics) for part in metrics[name]]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def unflatten(flat: torch.Tensor, like: Mapping[str, Mean]) -> Metrics:
    """The metrics of a vector that `flatten` made of metrics with the shapes of `like`."""
    metrics: Metrics = {}
    start = 0
    for name in sorted(like):
        parts = []
        for part in like[name]:
            parts.append(flat[start : start + part.numel()].view(part.shape))
            start += part.numel()
        metrics[name] = Mean(*parts)
    return metrics
