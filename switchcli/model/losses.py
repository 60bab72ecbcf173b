"""The losses that a model's forward pass returns besides its logits: those of its sparse layers.

Legend: V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from switchcli.model.reports import Reports, RoutingReport
from switchcli.model.routing import RouterSpec

Reduction = Literal["sum", "mean", "pooled"]


def auxiliary_loss(stacks: Sequence[tuple[RouterSpec, Reports]], reduction: Reduction) -> torch.Tensor | None:
    """Balance and z-losses of the sparse layers with their coefficients; None when there is no sparse layer.

    Args:
        stacks: encoder and decoder, each with its router and the reports of its sparse layers.
        reduction: `sum` over layers (Mesh-TensorFlow), their `mean` (T5X), or `pooled`: f and P are averaged over the
            layers of a stack before they are multiplied, and the stacks are added (transformers).
    """
    losses = []
    for router, reports in stacks:
        counted = _pooled(reports) if reduction == "pooled" and reports else reports
        losses += [router.balance_loss_coef * report.balance + router.z_loss_coef * report.z for report in counted]
    if not losses:
        return None
    return torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses).sum()


def _pooled(reports: Reports) -> Reports:
    return (RoutingReport(*(torch.stack(field).mean(0) for field in zip(*reports, strict=True))),)
