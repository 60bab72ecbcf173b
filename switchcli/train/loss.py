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
from switchcli.model.packing import Segments, segments_of
from switchcli.model.transformer import ModelOutput
from switchcli.model.vocabulary import Vocabulary, at_least_float32
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


class Always(LossSchedule):
    """One loss at every step."""

    def __init__(self, loss: Objective) -> None:
        self._loss = loss

    def loss_at(self, step: int) -> Objective:
        return self._loss


def segments(batch: AnyBatch, packed: bool) -> Segments | None:
    """Return which examples share a row of a packed batch (model/packing.py); None where each has its own row."""
    return segments_of(batch.inputs_BS, batch.targets_BT) if packed else None


def cross_entropy(model: nn.Module, batch: AnyBatch) -> StepLoss:
    """Cross-entropy of each real target given the inputs and the targets before it, in float32."""
    return _loss_of(model(batch.inputs_BS, batch.targets_BT), batch.targets_BT)


def packed_cross_entropy(model: nn.Module, batch: AnyBatch) -> StepLoss:
    """The same where rows are packed: of each example as if it were alone in its row."""
    return _loss_of(model(batch.inputs_BS, batch.targets_BT, segments(batch, packed=True)), batch.targets_BT)


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


def summed_cross_entropy(hidden_ND: torch.Tensor, vocabulary: Vocabulary, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum over real targets of -log softmax(hidden vocabulary^T)[target]; products in the precision of autocast.

    Softmax and sum are float32 at least, as is the gradient of the vocabulary until all chunks are in it.
    """

    def of_chunk(logits_CV: torch.Tensor, chunk: slice, learns: bool) -> ChunkLoss:
        target_C1 = targets_N[chunk, None]
        real_C1 = target_C1 != PAD
        place = vocabulary.place(target_C1)
        log_CV = vocabulary.log_softmax(logits_CV)
        log_C1 = log_CV.gather(1, place.row)
        total_1 = -(place.only_here(log_C1) * real_C1).sum().unsqueeze(0)
        if not learns:
            return ChunkLoss(total_1, None)
        # Softmax minus one at the target; nothing at padding.
        at_target_C1 = log_C1.expm1()
        if place.is_here is not None:
            at_target_C1 = at_target_C1.where(place.is_here, log_C1.exp())
        return ChunkLoss(total_1, log_CV.exp_().scatter_(1, place.row, at_target_C1).mul_(real_C1))

    return summed_over_vocabulary(hidden_ND, vocabulary, of_chunk, num_sums=1)[0]


class ChunkLoss(NamedTuple):
    """Of the logits of a chunk of targets."""

    sums_M: torch.Tensor
    """Sums over the chunk's targets and the vocabulary that is here, float32 at least; the first is minimised."""
    gradient_CV: torch.Tensor | None
    """Of the first with respect to the logits, where it is wanted."""


OfChunk = Callable[[torch.Tensor, slice, bool], ChunkLoss]
"""`(logits_CV, chunk, learns)`: logits in the precision of the products, the targets that they are of, and whether the
gradient is wanted."""


def summed_over_vocabulary(
    hidden_ND: torch.Tensor, vocabulary: Vocabulary, of_chunk: OfChunk, num_sums: int
) -> torch.Tensor:
    """The `num_sums` sums of a loss of the logits hidden vocabulary^T over all chunks; the first has a gradient."""
    learns = torch.is_grad_enabled()
    weight_VD, axis = vocabulary.weight_VD, vocabulary.axis
    entered_ND = axis.enter(hidden_ND)
    sums_M: torch.Tensor = _SummedOverVocabulary.apply(entered_ND, weight_VD, of_chunk, num_sums, learns)  # type: ignore[no-untyped-call]
    return axis.leave(sums_M)


class _SummedOverVocabulary(torch.autograd.Function):
    """Makes the gradients on the way forward, chunk by chunk: [N, V] is never held, and no product is done twice.

    Only those that are wanted: `learns` says whether any is, as within here torch always says that it makes none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, vocabulary_VD: torch.Tensor, of_chunk: OfChunk, num_sums: int, learns: bool
    ) -> torch.Tensor:
        dtype = compute_dtype(hidden_ND)
        exact = at_least_float32(hidden_ND)
        weight_VD = vocabulary_VD.to(dtype)
        sums_M = hidden_ND.new_zeros(num_sums, dtype=exact)
        for_hidden, for_weight = (learns and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_gradient_ND = torch.empty_like(hidden_ND) if for_hidden else None
        weight_gradient_VD = torch.zeros_like(vocabulary_VD, dtype=exact) if for_weight else None
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), CHUNK):
                chunk = slice(start, start + CHUNK)
                hidden_CD = hidden_ND[chunk].to(dtype)
                loss = of_chunk(hidden_CD @ weight_VD.mT, chunk, for_hidden or for_weight)
                sums_M += loss.sums_M
                if loss.gradient_CV is None:
                    continue
                gradient_CV = loss.gradient_CV.to(dtype)
                if hidden_gradient_ND is not None:
                    hidden_gradient_ND[chunk] = gradient_CV @ weight_VD
                if weight_gradient_VD is not None:
                    weight_gradient_VD += gradient_CV.mT @ hidden_CD
        return sums_M

    @staticmethod
    def backward(ctx: Any, scale_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * scale_M[0] for gradient in ctx.saved_tensors)
        return *scaled, None, None, None
