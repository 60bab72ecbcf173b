"""Auxiliary losses of the sparse layers: load balancing (eq. 4) and router z-loss (ST-MoE)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from switchcli.model.config import Reduction
from switchcli.model.moe.router import RouterSpec
from switchcli.model.moe.stats import RouterStats, StackStats


class StackLoss(NamedTuple):
    """Auxiliary losses of one stack, multiplied by their coefficients; float32 scalars."""

    total: torch.Tensor
    """Sum over layers and real tokens; it carries the gradient."""
    tokens: torch.Tensor
    """Number of real tokens of the stack: those of the inputs, or of the targets."""

    def mean(self) -> torch.Tensor:
        """Return the loss per real token; 0 without tokens."""
        return self.total / self.tokens.clamp(min=1)


class AuxiliaryLoss(NamedTuple):
    """Load-balancing and z-losses of all sparse layers.

    The loss of a step is the encoder's total over the step's real input tokens plus the decoder's total over its real
    targets, both counted over all microbatches and ranks.
    """

    encoder: StackLoss
    decoder: StackLoss

    def mean(self) -> torch.Tensor:
        """Return the loss of a step that consists of this batch only."""
        return self.encoder.mean() + self.decoder.mean()


def auxiliary_loss(stacks: Sequence[tuple[RouterSpec, StackStats]], reduction: Reduction) -> AuxiliaryLoss | None:
    """Return the auxiliary losses of encoder and decoder, or None when there is no sparse layer.

    Each group of tokens is weighted by its real tokens.

    # Deviates: Mesh-TensorFlow and T5X average over groups of equal size, padding included, so that a group's loss is
    # scaled by the fraction of its tokens that are real (T5X: by its square). Without padding there is no difference.

    Args:
        stacks: encoder and decoder, each with its router and the statistics of its sparse layers.
        reduction: `sum` over layers (Mesh-TensorFlow), their `mean` (T5X), or `pooled`: f and P are averaged over the
            layers of a stack before they are multiplied, and the stacks are added (transformers).
    """
    num_layers = sum(len(stats) for _, stats in stacks)
    if num_layers == 0:
        return None
    zero = next(stats[0].z_sum for _, stats in stacks if stats).new_zeros(())  # on the device of the model
    encoder, decoder = (
        _stack_loss(router, stats, reduction, num_layers) if stats else StackLoss(zero, zero)
        for router, stats in stacks
    )
    return AuxiliaryLoss(encoder, decoder)


def _stack_loss(router: RouterSpec, stats: StackStats, reduction: Reduction, num_layers: int) -> StackLoss:
    """Return the loss of one stack; `num_layers` is the number of sparse layers of both stacks."""
    reduced = stats
    if reduction == "pooled":
        reduced = (RouterStats(*(torch.stack(field).mean(0) for field in zip(*stats, strict=True))),)
    losses = [router.balance_coef * layer.load_balancing_sum + router.z_loss_coef * layer.z_sum for layer in reduced]
    total = torch.stack(losses).sum()
    return StackLoss(total / num_layers if reduction == "mean" else total, stats[0].tokens)
