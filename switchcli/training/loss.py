"""Training losses: the cross-entropy of the targets, and the auxiliary losses of the sparse layers.

Legend: B batch, T target, V vocabulary (this rank's rows of it), D model, N targets of all sequences, C targets of a
chunk, M sums.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.attention import SegmentIds, segment_ids
from switchcli.model.kernels.cpu_products import matmul, matmul_over_rows
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.losses import AuxiliaryLoss
from switchcli.model.transformer import ModelOutput
from switchcli.model.vocabulary import VocabularyShard, at_least_float32
from switchcli.spec import PAD
from switchcli.training.router_health import routing_metrics
from switchcli.training.state import Mean, Metrics

CHUNK = 1024
"""Targets whose logits are in memory at the same time: 130 MB in float32 with T5's vocabulary."""


class StepLoss(NamedTuple):
    """The loss of one microbatch as sums over tokens, to be divided by the real tokens of the whole step."""

    target_sum: torch.Tensor
    """float32 scalar with a gradient: the sum over real targets, in nats."""
    auxiliary: AuxiliaryLoss | None
    """Load-balancing and z-losses of the sparse layers, as sums over real tokens. None for a dense model."""
    metrics: Metrics
    """Sums without a gradient."""
    choices: tuple[torch.Tensor, ...] = ()
    """float32 [E] for each sparse layer: `RouterStats.choice_E`."""


Objective = Callable[[nn.Module, Batch], StepLoss]
"""A function that computes the loss of a model on a batch."""


def batch_segment_ids(batch: Batch, packed: bool) -> SegmentIds | None:
    """Return the example of each position of a packed batch (model/packing.py); None if each row is one example."""
    return segment_ids(batch.inputs_BS, batch.targets_BT) if packed else None


def cross_entropy(model: nn.Module, batch: Batch) -> StepLoss:
    """Return the cross-entropy of each real target, given the inputs and the targets before it, in float32."""
    return _target_loss(model(batch.inputs_BS, batch.targets_BT), batch.targets_BT)


def packed_cross_entropy(model: nn.Module, batch: Batch) -> StepLoss:
    """Return `cross_entropy` of packed rows: each example is computed as if it were alone in its row."""
    output = model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, packed=True))
    return _target_loss(output, batch.targets_BT)


def _target_loss(output: ModelOutput, targets_BT: torch.Tensor) -> StepLoss:
    target_sum = summed_cross_entropy(output.hidden_BTD.flatten(0, 1), output.vocabulary, targets_BT.flatten())
    return step_loss(output, targets_BT, target_sum, {NEG_LOG_PERPLEXITY: -target_sum.detach()})


def step_loss(
    output: ModelOutput, targets_BT: torch.Tensor, target_sum: torch.Tensor, sums: Mapping[str, torch.Tensor]
) -> StepLoss:
    """Return the loss of a microbatch: `target_sum`, and the auxiliary losses of the model.

    Its metrics are `sums`, by name and over real targets, and those of the routing.
    """
    num_targets = (targets_BT != PAD).sum()
    metrics = {name: Mean(total, num_targets) for name, total in sums.items()}
    choices = tuple(layer.choice_E for layer in output.router_stats)
    return StepLoss(target_sum, output.auxiliary, {**metrics, **routing_metrics(output)}, choices)


def summed_cross_entropy(hidden_ND: torch.Tensor, vocabulary: VocabularyShard, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the sum over real targets of -log softmax(hidden vocabulary^T)[target], in chunks; see `sum_in_chunks`."""

    def loss(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        return cross_entropy_sum(logits_CV, targets_N[chunk], vocabulary).unsqueeze(0)

    return sum_in_chunks(loss, hidden_ND, vocabulary)[0]


def cross_entropy_sum(logits_CV: torch.Tensor, targets_C: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
    """Return the sum over real targets of -log softmax(logits)[target]: a scalar, in nats, float32 or float64.

    `targets_C` is int64, `PAD` where there is no target. Where the vocabulary is sharded, the result is this rank's
    term of the sum. The gradient can be taken only once.
    """
    log_p_C: torch.Tensor = _TargetLogProbability.apply(logits_CV, targets_C, vocabulary)
    return -(log_p_C * (targets_C != PAD)).sum()


class _TargetLogProbability(torch.autograd.Function):
    """log softmax(logits)[target] of each target, [C]; 0 for a target whose row is on another rank.

    The gradient of the logits is (1 at the target if it is on this rank) - softmax(logits), times the gradient of the
    result, which must be equal on all ranks. It is written by hand because autograd's takes longer. It also rounds
    p - 1 at the target only once, with expm1.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: torch.Tensor, targets_C: torch.Tensor, vocabulary: VocabularyShard
    ) -> torch.Tensor:
        # [C, 1]: the row of each target among this rank's rows, or any row for a target on another rank.
        target = vocabulary.locate(targets_C.unsqueeze(1))
        log_p_CV = vocabulary.log_softmax(logits_CV)
        log_p_C1 = log_p_CV.gather(1, target.row)
        ctx.log_p_CV, ctx.log_p_C1, ctx.target = log_p_CV, log_p_C1, target
        return target.zero_others(log_p_C1).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient_C: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_p_CV, log_p_C1, target = ctx.log_p_CV, ctx.log_p_C1, ctx.target
        assert log_p_CV is not None, "the gradient can be taken once"
        ctx.log_p_CV = None  # overwritten below, so a second backward pass is impossible
        # p - 1 at the target; where the target is on another rank, p unchanged at the row that stands in for it.
        at_target_C1 = log_p_C1.expm1()
        if target.is_local is not None:
            at_target_C1 = at_target_C1.where(target.is_local, log_p_C1.exp())
        # (softmax - 1[target]) * -gradient, in the memory of log_p_CV: a new [C, V] takes time to allocate.
        return log_p_CV.exp_().scatter_(1, target.row, at_target_C1).mul_(-gradient_C.unsqueeze(1)), None, None


LogitsLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""`loss(logits_CV, chunk)`: the sums [M] of a loss over the targets `chunk`, float32 or float64.

The first sum is minimized. The logits have the dtype of matrix products. Where the vocabulary is sharded, logits and
sums are this rank's part.
"""


def sum_in_chunks(loss: LogitsLoss, hidden_ND: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
    """Return the sums [M] of `loss` over the logits hidden vocabulary^T of all N targets; the first has a gradient.

    Only `CHUNK` targets at a time have logits, never all [N, V] of them, in the precision of autocast. The sums and the
    gradient of the vocabulary are accumulated in float32 or float64.
    """
    axis = vocabulary.axis
    grad_enabled = torch.is_grad_enabled()
    # Each rank of the model axis computes with its rows of the vocabulary. The sums over ranks are taken of the results
    # below, and of the gradient of the hidden states, which `enter_region` does in the backward pass.
    region_ND = axis.enter_region(hidden_ND)
    sums_M: torch.Tensor = _SumInChunks.apply(region_ND, vocabulary.weight_VD, loss, grad_enabled)
    return axis.all_reduce(sums_M)


class _SumInChunks(torch.autograd.Function):
    """The sums of a loss with the gradients of its two factors, which are computed in the forward pass.

    So each chunk's logits exist once and are computed once. An unneeded gradient is not computed. `grad_enabled` says
    whether gradients are enabled for the caller, because torch disables them in `forward`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, loss: LogitsLoss, grad_enabled: bool
    ) -> torch.Tensor:
        assert len(hidden_ND), "no targets"
        dtype = compute_dtype(hidden_ND)
        exact = at_least_float32(hidden_ND)
        weight_VD = vocabulary_VD.to(dtype)
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_gradient_VD = torch.zeros_like(vocabulary_VD, dtype=exact) if needs_weight else None
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)  # filled in place below
        sums_M = hidden_ND.new_zeros((), dtype=exact)  # a scalar, which the first chunk broadcasts to [M]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), CHUNK):
                chunk = slice(start, start + CHUNK)  # the last one may reach beyond N
                hidden_CD = hidden_ND[chunk].to(dtype)
                if not (needs_hidden or needs_weight):
                    sums_M = sums_M + loss(matmul(hidden_CD, weight_VD.mT), chunk)
                    continue
                chunk_sums_M, gradient_CV = _value_and_gradient(loss, matmul(hidden_CD, weight_VD.mT), chunk)
                sums_M = sums_M + chunk_sums_M
                # With logits = hidden weight^T and G the gradient of the logits: G weight, and G^T hidden.
                if hidden_gradient_ND is not None:
                    hidden_gradient_ND[chunk] = matmul(gradient_CV, weight_VD)
                if weight_gradient_VD is not None:
                    weight_gradient_VD += matmul_over_rows(gradient_CV, hidden_CD)
                del gradient_CV  # before the next chunk allocates its own
        return sums_M

    @staticmethod
    def backward(ctx: Any, scale_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * scale_M[0] for gradient in ctx.saved_tensors)
        return *scaled, None, None


def _value_and_gradient(loss: LogitsLoss, logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums [M], and the gradient [C, V] of the first sum in the dtype of the logits."""
    with torch.enable_grad():
        sums_M = loss(logits_CV.requires_grad_(), chunk)
        (gradient_CV,) = torch.autograd.grad(sums_M[0], logits_CV)
    return sums_M.detach(), gradient_CV
