"""What is minimised: the cross-entropy of the targets and the balance losses of the sparse layers.

Legend: B batch, T target, V vocabulary, L sparse layers, E experts.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.data.batch import Batch
from switchcli.model.routing import RoutingReport
from switchcli.model.transformer import ModelOutput
from switchcli.spec import PAD
from switchcli.train.metrics import Mean, Metrics


class StepLoss(NamedTuple):
    """The loss of one microbatch as sums, so that it can be weighed by the targets of the whole step."""

    target_sum: torch.Tensor
    """Sum over real targets, in nats, float32."""
    auxiliary: torch.Tensor
    """Sum over sparse layers of the balance loss, alpha included; a mean over the microbatch's groups."""
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
    auxiliary = torch.stack([report.balance for report in output.reports]).sum() if output.reports else None
    metrics = {"neg_log_perplexity": Mean(-target_sum.detach(), num_targets), **_routing(output.reports)}
    return StepLoss(target_sum, target_sum.new_zeros(()) if auxiliary is None else auxiliary, metrics)


def _routing(reports: tuple[RoutingReport, ...]) -> Metrics:
    """Health of the sparse layers: sums over layers, the load of each expert apart."""
    if not reports:
        return {}
    balance_L, load_LE, dropped_L, tokens_L = (torch.stack(field).detach() for field in zip(*reports, strict=True))
    one = torch.ones_like(balance_L[0])
    return {
        "balance_loss": Mean(balance_L.sum(), one),
        "dropped_fraction": Mean(dropped_L.sum(), tokens_L.sum()),
        "expert_load": Mean(load_LE, one),
    }
