"""Evaluation: a function of model, objective and batches; training and the verbs share it."""

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
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.train.loss import Objective
from switchcli.train.metrics import Mean, Metrics, flatten, merge, unflatten


class HeldOutText(NamedTuple):
    """Rows of one text that a run is evaluated on."""

    rows: Callable[[int, int], Batch]
    """`rows(first, count)`: the same ones each time."""
    num_rows: int
    bytes_per_target: float | None = None
    """Bytes of text that a target token stands for, on average; None where that is not known."""

    def metrics(self, metrics: Metrics) -> dict[str, float]:
        """What is said of it: its neg. log perplexity and, where that is known, bits a byte."""
        figure, bits = float(metrics[NEG_LOG_PERPLEXITY].value()), bits_per_byte([(self, metrics)])
        return {NEG_LOG_PERPLEXITY: figure, **({} if bits is None else {BITS_PER_BYTE: bits})}


def bits_per_byte(found: Iterable[tuple[HeldOutText, Metrics]]) -> float | None:
    """What the model pays for the hidden text of all, whatever vocabulary it is cut by: lower is better.

    All targets are paid for, sentinels and EOS too. None where the bytes of one are not known, or none is there.
    """
    nats = size = 0.0
    for text, metrics in found:
        total, weight = metrics[NEG_LOG_PERPLEXITY]
        if text.bytes_per_target is None:
            return None
        nats -= float(total)
        size += float(weight) * text.bytes_per_target
    return nats / math.log(2) / size if size else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    context: DistributedContext,
    policy: Policy = "paper",
) -> Metrics:
    """The objective's metrics over all ranks' batches; the model's mode is put back afterwards.

    `model` is the plain one, not the wrapped; each rank has at least one batch. `policy` says how capacity is counted.
    """
    metrics: Metrics = {}
    with evaluating(model, policy):
        for batch in batches:
            with context.autocast():
                loss = objective(model, context.to_device(batch))
            metrics = merge(metrics, exact(loss.metrics))
    return reduce(metrics, context)


def evaluate_rows(
    model: SwitchTransformer,
    objective: Objective,
    text: HeldOutText,
    rows_each: int,
    context: DistributedContext,
    policy: Policy = "paper",
) -> Metrics:
    """The same on a text that the ranks share, at least `rows_each` a batch: in whole groups of this very model."""
    group = model.spec.group_sequences
    batches = rank_batches(text, -(-rows_each // group) * group, context.dp_rank, context.dp_size)
    return evaluate(model, objective, batches, context, policy)


def reduce(metrics: Metrics, context: DistributedContext) -> Metrics:
    """The metrics summed over the shares of a batch; each rank has the same ones, perhaps none."""
    if not metrics:
        return {}
    return unflatten(context.all_reduce(flatten(metrics)), metrics)


def exact(metrics: Metrics) -> Metrics:
    """The metrics in float64, so that sums of many do not drift and JSON keeps them exactly."""
    return {name: Mean(mean.total.double(), mean.weight.double()) for name, mean in metrics.items()}


def rank_batches(text: HeldOutText, rows_each: int, rank: int, world: int) -> list[Batch]:
    """This rank's batches of an evaluation on `text`, `rows_each` rows a batch, the same number on every rank.

    What is missing at the end is filled with padding: it is neither routed nor
    counted, and every batch has one shape.
    """
    each = -(-text.num_rows // (rows_each * world))
    batches = []
    for first in range(rank * each * rows_each, (rank + 1) * each * rows_each, rows_each):
        count = max(0, min(rows_each, text.num_rows - first))
        batch = text.rows(first, count) if count else text.rows(0, 1)
        inputs_BS, targets_BT = (F.pad(ids[:count], (0, 0, 0, rows_each - count), value=PAD) for ids in batch[:2])
        batches.append(Batch(inputs_BS, targets_BT))
    return batches
