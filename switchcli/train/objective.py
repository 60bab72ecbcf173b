"""What is minimised: the cross-entropy of the targets, and the losses that the sparse layers return.

Legend: B batch, T target, V vocabulary, D model, N targets of all sequences, C those of a chunk.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.model.layers import compute_dtype
from switchcli.model.packing import segments_of
from switchcli.model.transformer import ModelOutput
from switchcli.spec import PAD
from switchcli.train.health import routing_metrics
from switchcli.train.metrics import Mean, Metrics

CHUNK = 1024
"""Targets whose logits are held at a time: 130 MB in float32 with T5's vocabulary."""


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
    return _loss_of(model(batch.inputs_BS, batch.targets_BT), batch.targets_BT)


def packed_cross_entropy(model: nn.Module, batch: Batch) -> StepLoss:
    """The same where rows are packed (model/packing.py): of each example as if it were alone in its row."""
    return _loss_of(model(*batch, segments_of(*batch)), batch.targets_BT)


def _loss_of(output: ModelOutput, targets_BT: torch.Tensor) -> StepLoss:
    target_sum = summed_cross_entropy(output.hidden_BTD.flatten(0, 1), output.vocabulary_VD, targets_BT.flatten())
    num_targets = (targets_BT != PAD).sum()
    auxiliary = target_sum.new_zeros(()) if output.auxiliary is None else output.auxiliary
    metrics = {"neg_log_perplexity": Mean(-target_sum.detach(), num_targets), **routing_metrics(output)}
    return StepLoss(target_sum, auxiliary, metrics)


def summed_cross_entropy(hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum over real targets of -log softmax(hidden vocabulary^T)[target]; products in the precision of autocast.

    Softmax and sum are float32 at least, as is the gradient of the vocabulary until all chunks are in it.
    """
    learns = torch.is_grad_enabled()
    return _SummedCrossEntropy.apply(hidden_ND, vocabulary_VD, targets_N, learns)  # type: ignore[no-untyped-call]


class _SummedCrossEntropy(torch.autograd.Function):
    """Makes the gradients on the way forward, chunk by chunk: [N, V] is never held, and no product is done twice.

    Only those that are wanted: `learns` says whether any is, as within here torch always says that it makes none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, targets_N: torch.Tensor, learns: bool
    ) -> torch.Tensor:
        device = hidden_ND.device.type
        dtype = compute_dtype(hidden_ND)
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight_VD = vocabulary_VD.to(dtype)
        total = hidden_ND.new_zeros((), dtype=exact)
        for_hidden, for_weight = (learns and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        weight_gradient_VD = torch.zeros_like(vocabulary_VD, dtype=exact) if for_weight else None
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden_ND), CHUNK):
                hidden_CD = hidden_ND[start : start + CHUNK].to(dtype)
                target_C1 = targets_N[start : start + CHUNK, None]
                log_CV = torch.log_softmax(hidden_CD @ weight_VD.mT, -1, dtype=exact)
                log_C1 = log_CV.gather(1, target_C1)
                real_C1 = target_C1 != PAD
                total -= (log_C1 * real_C1).sum()
                if for_hidden or for_weight:  # softmax minus one at the target; nothing at padding
                    gradient_CV = log_CV.exp_().scatter_(1, target_C1, log_C1.expm1()).mul_(real_C1).to(dtype)
                if hidden_gradient_ND is not None:
                    hidden_gradient_ND[start : start + CHUNK] = gradient_CV @ weight_VD
                if weight_gradient_VD is not None:
                    weight_gradient_VD += gradient_CV.mT @ hidden_CD
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None, None
