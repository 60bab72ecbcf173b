"""Validation: the metrics of a model on held-out batches. Training and the verbs `eval` and `distill` share it."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import BITS_PER_BYTE, NEG_LOG_PERPLEXITY
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.spec import PAD
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.training.state import Mean, Metrics, flatten, merge, unflatten

Rows = Callable[[int, int], Batch]


class HeldOutText(NamedTuple):
    """The rows of one held-out text."""

    rows: Rows
    """`rows(first, count)`: a batch of these rows, the same ones in each call."""
    num_rows: int
    num_bytes: int | None = None
    """Bytes of text that the targets of all rows stand for; None if unknown."""
    objective: Objective = cross_entropy
    """The loss on its rows."""

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples."""
        return self.objective is packed_cross_entropy

    def metrics(self, metrics: Metrics) -> dict[str, float]:
        """Return neg. log perplexity of this text and, if known, bits per byte."""
        values = {NEG_LOG_PERPLEXITY: float(metrics[NEG_LOG_PERPLEXITY].value())}
        bits = bits_per_byte([(self, metrics)])
        if bits is not None:
            values[BITS_PER_BYTE] = bits
        return values


def bits_per_byte(results: Iterable[tuple[HeldOutText, Metrics]]) -> float | None:
    """Return the cross-entropy of all targets in bits, over the bytes of text that they hide: lower is better.

    It can be compared between vocabularies. All targets count, also sentinels and EOS. None if the bytes of a text are
    unknown, or without any text.
    """
    nats, num_bytes = 0.0, 0
    for text, metrics in results:
        if text.num_bytes is None:
            return None
        nats -= float(metrics[NEG_LOG_PERPLEXITY].total)
        num_bytes += text.num_bytes
    return nats / math.log(2) / num_bytes if num_bytes else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    context: DistributedContext,
    policy: Policy = "paper",
) -> Metrics:
    """Return the metrics of `objective` over the batches of all ranks. The mode of the model is restored afterwards.

    Args:
        model: the model itself, not one wrapped for training.
        objective: the loss whose metrics are returned.
        batches: this rank's batches, at least one and equally many on each rank.
        context: the device, the precision and the other ranks.
        policy: how routers count capacity.
    """
    metrics: Metrics = {}
    with evaluating(model, policy):
        for batch in batches:
            with context.autocast():
                loss = objective(model, context.to_device(batch))
            metrics = merge(metrics, exact(loss.metrics))
    return reduce(metrics, context)


def reduce(metrics: Metrics, context: DistributedContext) -> Metrics:
    """Return the metrics summed over the data-parallel ranks. All ranks have the same names, possibly none."""
    if not metrics:
        return {}
    return unflatten(context.all_reduce(flatten(metrics)), metrics)


def exact(metrics: Metrics) -> Metrics:
    """Return the metrics in float64: sums of many stay exact, and JSON stores them exactly."""
    return {name: Mean(mean.total.double(), mean.weight.double()) for name, mean in metrics.items()}


def rank_batches(text: HeldOutText, rows_each: int, rank: int, world: int) -> list[Batch]:
    """Return this rank's batches of `text`: equally many on each rank, all of `rows_each` rows.

    Missing rows at the end are padding, which is neither routed nor counted. So every batch has one shape.
    """
    num_batches = -(-text.num_rows // (rows_each * world))  # of each rank, rounded up
    # Rank r takes the consecutive rows [r * num_batches * rows_each, (r + 1) * num_batches * rows_each).
    start, stop = (index * num_batches * rows_each for index in (rank, rank + 1))
    batches = []
    for first in range(start, stop, rows_each):
        # Rows of the text in this batch: fewer than rows_each at its end, and none beyond it.
        count = max(0, min(rows_each, text.num_rows - first))
        # Without a row of its own the batch takes the shapes and types of row 0, and then none of its rows.
        batch = text.rows(first, count) if count else text.rows(0, 1)
        missing = rows_each - count
        inputs_BS, targets_BT = (F.pad(ids[:count], (0, 0, 0, missing), value=PAD) for ids in batch[:2])
        batches.append(Batch(inputs_BS, targets_BT))
    return batches
