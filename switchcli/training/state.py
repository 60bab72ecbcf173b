"""TrainState: what a run needs to resume, besides tensors and settings.

Metrics are sums and weights (`Mean`), which add up over microbatches, steps and ranks. The division comes last.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import ConfigDict, Field

from switchcli.checkpoint.saved_state import Best, RunState, SavedState
from switchcli.metric_names import HELD_OUT_BITS


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


class TrainState(RunState):
    """The progress of a run. Besides weights and optimizer state, it is all that changes in training."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    metrics_since_log: Metrics = Field(default_factory=dict)
    """This rank's metrics since the last logged step, in float64, which JSON stores exactly."""

    @property
    def is_at_start(self) -> bool:
        """Whether the run has taken no step of its own."""
        return self.step == self.branch.step

    def input_tokens(self, batch_tokens: int) -> int:
        """Return the input tokens of all steps, padding included, if a step of this run has `batch_tokens`."""
        return self.branch.input_tokens + (self.step - self.branch.step) * batch_tokens

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Record evaluation metrics of the current weights. All calls at one step belong to one evaluation."""
        if self.evaluated_step != self.step:
            self.eval_metrics = {}
        self.evaluated_step = self.step
        for name, value in metrics.items():
            self.eval_metrics[name] = value
            self.first_eval_metrics.setdefault(name, value)
            if name not in self.best or value >= self.best[name].value:
                self.best[name] = Best(value, self.step)

    def bits(self) -> dict[str, float]:
        """Return bits per byte under its metric name, or {} if unknown."""
        return {} if self.bits_per_byte is None else {HELD_OUT_BITS: self.bits_per_byte}

    def to_json(self, metrics_since_log: Metrics) -> bytes:
        """Return the state as JSON, with the `metrics_since_log` of all ranks in place of this rank's.

        Raises:
            ValueError: a number is not finite, which JSON cannot store.
        """
        state = {name: getattr(self, name) for name in RunState.model_fields}
        state["metrics_since_log"] = {
            name: [tensor.tolist() for tensor in mean] for name, mean in metrics_since_log.items()
        }
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()

    def restore(self, text: bytes, device: torch.device, with_metrics: bool) -> None:
        """Replace this state by a saved one.

        Metrics since the last log are summed over the data-parallel ranks when they are logged, so exactly one of these
        must take the saved ones (`with_metrics`). The others start from zero.
        """
        saved = SavedState.read(text)
        for name in RunState.model_fields:
            setattr(self, name, getattr(saved, name))
        self.metrics_since_log = {}
        for name, (total, weight) in saved.metrics_since_log.items():
            tensors = (torch.tensor(values, dtype=torch.float64, device=device) for values in (total, weight))
            self.metrics_since_log[name] = Mean(*(tensor * with_metrics for tensor in tensors))
