"""Auxiliary losses of the sparse layers: load balancing (eq. 4) and router z-loss (ST-MoE)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from switchcli.model.moe.router import RouterSpec
from switchcli.model.moe.stats import RouterStats, StackStats

Reduction = Literal["sum", "mean", "pooled"]


class StackLoss(NamedTuple):
    """Auxiliary losses of one stack with their coefficients; float32 scalars."""

    total: torch.Tensor
    """Sum over layers and real tokens. It carries the gradient."""
    tokens: torch.Tensor
    """Real tokens that the stack saw: those of the inputs, or the targets."""

    def mean(self) -> torch.Tensor:
        """The loss per real token; 0 without tokens."""
        return self.total / self.tokens.clamp(min=1)


class AuxiliaryLoss(NamedTuple):
    """Load-balancing and z-losses of all sparse layers.

    The loss of a step is the encoder's total over the step's real input tokens plus the decoder's total over its real
    targets, both counted over all microbatches and ranks.
    """

    encoder: StackLoss
    decoder: StackLoss

    def mean(self) -> torch.Tensor:
        """The loss of a step that has this batch alone."""
        return self.encoder.mean() + self.decoder.mean()


def auxiliary_loss(stacks: Sequence[tuple[RouterSpec, StackStats]], reduction: Reduction) -> AuxiliaryLoss | None:
    """Return the auxiliary losses of encoder and decoder, or None when there is no sparse layer.

    Each group of tokens is weighted by its real tokens.

    # Deviates: Mesh-TensorFlow and T5X average over groups of equal size, padding included, so that a group's loss is
    # scaled by the share of its tokens that are real (T5X: by its square). Nothing differs where no token is padding.

    Args:
        stacks: encoder and decoder, each with its router and the reports of its sparse layers.
        reduction: `sum` over layers (Mesh-TensorFlow), their `mean` (T5X), or `pooled`: f and P are averaged over the
            layers of a stack before they are multiplied, and the stacks are added (transformers).
    """
    num_layers = sum(len(reports) for _, reports in stacks)
    if num_layers == 0:
        return None
    zero = next(reports[0].z_sum for _, reports in stacks if reports).new_zeros(())
    encoder, decoder = (
        _stack_loss(router, reports, reduction, num_layers) if reports else StackLoss(zero, zero)
        for router, reports in stacks
    )
    return AuxiliaryLoss(encoder, decoder)


def _stack_loss(router: RouterSpec, reports: StackStats, reduction: Reduction, num_layers: int) -> StackLoss:
    """`num_layers` are the sparse layers of both stacks."""
    counted = _pooled(reports) if reduction == "pooled" else reports
    losses = [router.balance_loss_coef * one.load_balancing_sum + router.z_loss_coef * one.z_sum for one in counted]
    total = torch.stack(losses).sum()
    return StackLoss(total / num_layers if reduction == "mean" else total, reports[0].tokens)


def _pooled(reports: StackStats) -> StackStats:
    """One report with the mean of every field over the layers of a stack."""
    return (RouterStats(*(torch.stack(field).mean(0) for field in zip(*reports, strict=True))),)
