"""Losses: the cross-entropy of the targets, and the losses that the sparse layers return.

Legend: B batch, T target, V vocabulary (the part of it that is here), D model, N targets of all sequences, C those of a
chunk, M sums.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from switchcli.data.batch import AnyBatch
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.losses import AuxiliaryLoss
from switchcli.model.packing import SegmentIds, segment_ids
from switchcli.model.transformer import ModelOutput
from switchcli.model.vocabulary import VocabularyShard, at_least_float32
from switchcli.spec import PAD
from switchcli.train.metrics import Mean, Metrics
from switchcli.train.router_health import routing_metrics

CHUNK = 1024
"""Targets whose logits are held at a time: 130 MB in float32 with T5's vocabulary."""


class StepLoss(NamedTuple):
    """The loss of one microbatch as sums, so that it can be divided by the real tokens of the whole step."""

    target_sum: torch.Tensor
    """Sum over real targets, in nats, float32."""
    auxiliary: AuxiliaryLoss | None
    """Load-balancing and z-losses of the sparse layers, as sums over real tokens; None for a dense model."""
    metrics: Metrics


class Objective(Protocol):
    """A loss of a model on a batch."""

    def __call__(self, model: nn.Module, batch: AnyBatch) -> StepLoss: ...


class LossSchedule(ABC):
    """Which loss a run minimizes at each step."""

    @abstractmethod
    def loss_at(self, step: int) -> Objective:
        """Return the loss of `step`, counted from 0."""


class FixedLoss(LossSchedule):
    """One loss at every step."""

    def __init__(self, loss: Objective) -> None:
        self._loss = loss

    def loss_at(self, step: int) -> Objective:
        return self._loss


def batch_segment_ids(batch: AnyBatch, packed: bool) -> SegmentIds | None:
    """Return which examples share a row of a packed batch (model/packing.py); None where each has its own row."""
    return segment_ids(batch.inputs_BS, batch.targets_BT) if packed else None


def cross_entropy(model: nn.Module, batch: AnyBatch) -> StepLoss:
    """Cross-entropy of each real target given the inputs and the targets before it, in float32."""
    return _loss_of(model(batch.inputs_BS, batch.targets_BT), batch.targets_BT)


def packed_cross_entropy(model: nn.Module, batch: AnyBatch) -> StepLoss:
    """The same where rows are packed: of each example as if it were alone in its row."""
    return _loss_of(model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, packed=True)), batch.targets_BT)


def _loss_of(output: ModelOutput, targets_BT: torch.Tensor) -> StepLoss:
    target_sum = summed_cross_entropy(output.hidden_BTD.flatten(0, 1), output.vocabulary, targets_BT.flatten())
    return step_loss(output, targets_BT, target_sum, {NEG_LOG_PERPLEXITY: -target_sum.detach()})


def step_loss(
    output: ModelOutput, targets_BT: torch.Tensor, target_sum: torch.Tensor, sums: Mapping[str, torch.Tensor]
) -> StepLoss:
    """The loss with the model's own, and the metrics: `sums` over real targets, and the routing's."""
    num_targets = (targets_BT != PAD).sum()
    metrics = {name: Mean(total, num_targets) for name, total in sums.items()}
    return StepLoss(target_sum, output.auxiliary, {**metrics, **routing_metrics(output)})


def summed_cross_entropy(hidden_ND: torch.Tensor, vocabulary: VocabularyShard, targets_N: torch.Tensor) -> torch.Tensor:
    """Return the sum over real targets of -log softmax(hidden vocabulary^T)[target], in chunks; see `sum_in_chunks`."""

    def loss(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        return cross_entropy_sum(logits_CV, targets_N[chunk], vocabulary).unsqueeze(0)

    return sum_in_chunks(loss, hidden_ND, vocabulary)[0]


def cross_entropy_sum(logits_CV: torch.Tensor, targets_C: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
    """Return the sum over real targets of -log softmax(logits)[target]: a scalar, in nats, float32 or float64.

    `targets_C` is int64; `PAD` is no target. Where the vocabulary is split over ranks, the result is this rank's part.
    The gradient can be taken once.
    """
    log_p_C: torch.Tensor = _TargetLogProbability.apply(logits_CV, targets_C, vocabulary)  # type: ignore[no-untyped-call]
    return -(log_p_C * (targets_C != PAD)).sum()


class _TargetLogProbability(torch.autograd.Function):
    """log softmax(logits)[target] of each target, 0 for a target on another rank: [C].

    The gradient of the logits is (target is here) - softmax, times that of the result, which all ranks must have alike.

    It is written by hand because autograd's takes longer, 1.20 times (1.13 to 1.30) the CPU time of the loss with its
    products: median and range of 7 pairs on one CPU thread, in float32, with N=8192, D=64 and V=1024. It also rounds
    p - 1 at the target only once, by expm1.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: torch.Tensor, targets_C: torch.Tensor, vocabulary: VocabularyShard
    ) -> torch.Tensor:
        place = vocabulary.locate(targets_C.unsqueeze(1))
        log_p_CV = vocabulary.log_softmax(logits_CV)
        log_p_C1 = log_p_CV.gather(1, place.row)
        ctx.log_p_CV, ctx.log_p_C1, ctx.place = log_p_CV, log_p_C1, place
        return place.zero_others(log_p_C1).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient_C: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_p_CV, log_p_C1, place = ctx.log_p_CV, ctx.log_p_C1, ctx.place
        assert log_p_CV is not None, "the gradient can be taken once"
        ctx.log_p_CV = None  # overwritten below: there is no second backward pass
        at_target_C1 = log_p_C1.expm1()
        if place.is_local is not None:
            at_target_C1 = at_target_C1.where(place.is_local, log_p_C1.exp())
        return log_p_CV.exp_().scatter_(1, place.row, at_target_C1).mul_(-gradient_C.unsqueeze(1)), None, None


LogitsLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""`loss(logits_CV, chunk)`: the sums [M], float32 or float64, of a loss of the targets `chunk`; the first is minimized.
The logits are in the precision of the products. Where the vocabulary is split over ranks, both are this rank's part."""


def sum_in_chunks(loss: LogitsLoss, hidden_ND: torch.Tensor, vocabulary: VocabularyShard) -> torch.Tensor:
    """Return the sums [M] of `loss` over the logits hidden vocabulary^T of all N targets; the first has a gradient.

    Logits are made `CHUNK` targets at a time, in the precision of autocast; [N, V] is never held. The sums and the
    gradient of the vocabulary are accumulated in float32 or float64.
    """
    axis = vocabulary.axis
    entered_ND, learns = axis.enter_region(hidden_ND), torch.is_grad_enabled()
    sums_M: torch.Tensor = _SumInChunks.apply(entered_ND, vocabulary.weight_VD, loss, learns)  # type: ignore[no-untyped-call]
    return axis.all_reduce(sums_M)


class _SumInChunks(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that no logits are kept and none computed twice.

    A gradient that nobody needs is not computed. `learns` says whether gradients were enabled: torch disables them in
    `forward`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, loss: LogitsLoss, learns: bool
    ) -> torch.Tensor:
        assert len(hidden_ND), "no targets"
        dtype = compute_dtype(hidden_ND)
        exact = at_least_float32(hidden_ND)
        weight_VD = vocabulary_VD.to(dtype)
        for_hidden, for_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        weight_gradient_VD = torch.zeros_like(vocabulary_VD, dtype=exact) if for_weight else None
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        sums_M = hidden_ND.new_zeros((), dtype=exact)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), CHUNK):
                chunk = slice(start, start + CHUNK)
                hidden_CD = hidden_ND[chunk].to(dtype)
                if not (for_hidden or for_weight):
                    sums_M = sums_M + loss(hidden_CD @ weight_VD.mT, chunk)
                    continue
                chunk_sums_M, gradient_CV = _value_and_gradient(loss, hidden_CD @ weight_VD.mT, chunk)
                sums_M = sums_M + chunk_sums_M
                if hidden_gradient_ND is not None:
                    hidden_gradient_ND[chunk] = gradient_CV @ weight_VD
                if weight_gradient_VD is not None:
                    weight_gradient_VD += gradient_CV.mT @ hidden_CD
                del gradient_CV  # before the next chunk needs memory
        return sums_M

    @staticmethod
    def backward(ctx: Any, scale_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * scale_M[0] for gradient in ctx.saved_tensors)
        return *scaled, None, None


def _value_and_gradient(loss: LogitsLoss, logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums [M] and the gradient [C, V] of the first, in the type of the logits."""
    with torch.enable_grad():
        sums_M = loss(logits_CV.requires_grad_(), chunk)
        (gradient_CV,) = torch.autograd.grad(sums_M[0], logits_CV)
    return sums_M.detach(), gradient_CV
