"""What is minimised: the cross-entropy of the targets, and the losses that the sparse layers return.

Legend: B batch, T target, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.data.batch import Batch
from switchcli.model.transformer import ModelOutput
from switchcli.spec import PAD
from switchcli.train.health import routing_metrics
from switchcli.train.metrics import Mean, Metrics


class StepLoss(NamedTuple):
    """The loss of one microbatch as sums, so that it can be weighed by the targets of the whole step."""

    target_sum: torch.Tensor
    """Sum over real targets, in nats, float32."""
    auxiliary: torch.Tensor
    """Balance and z-losses of the sparse layers with their coefficients; a mean over the microbatch's groups."""
    metrics: Metrics


class Objective(Protocol):
    """A loss of a model on a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepLoss: ...


def cross_entropy(model: nn.Module, batch: Batch) -> StepLoss:
    """Cross-entropy of each real target given the inputs and the targets before it, in float32."""
    output: ModelOutput = model(batch.inputs_BS, batch.targets_BT)
    logits_BTV = output.logits_BTV.float()
    target_sum = F.cross_entropy(
        logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=PAD, reduction="sum"
    )
    num_targets = (batch.targets_BT != PAD).sum()
    auxiliary = target_sum.new_zeros(()) if output.auxiliary is None else output.auxiliary
    metrics = {"neg_log_perplexity": Mean(-target_sum.detach(), num_targets), **routing_metrics(output)}
    return StepLoss(target_sum, auxiliary, metrics)
