"""On-policy distillation (Agarwal et al. 2024): the student generates the targets of a step, the teacher scores them.

A step's inputs are those of its batch. For each example, the student's answer takes the place of the target. Answers
are sampled anew in each step, so none is stored.

Legend: B rows, S source, T target, X examples of all rows, L longest inputs of an example, A longest answer.
"""

from itertools import count
from typing import Final

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe.layer import evaluating
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training.config import DistillSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loss import StepLoss

_SAMPLING: Final = Decoding(temperature=1.0)
"""How a student answers."""


class OnPolicyLoss:
    """The soft part of the distillation loss, on answers that the student generates in the step.

    There is no hard part: to repeat its own samples teaches a student nothing. The result is the mean over the answers'
    tokens times the number of the batch's own targets, by which the step divides. So unlike other losses it depends a
    little on how the step is divided into microbatches.
    """

    def __init__(self, settings: DistillSpec, teacher: Teacher, context: DistributedContext) -> None:
        """The rows of a batch hold one example or several, each with inputs and targets that end in EOS."""
        self._soft = DistillationLoss(settings.model_copy(update={"soft_fraction": 1.0}), teacher, packed=True)
        self._context = context

    def __call__(self, model: nn.Module, batch: Batch) -> StepLoss:
        student = next(module for module in model.modules() if isinstance(module, SwitchTransformer))
        answered = answered_by(student, batch, self._context)
        loss = self._soft(model, answered)
        metrics = {name: mean for name, mean in loss.metrics.items() if name != NEG_LOG_PERPLEXITY}
        scale = (batch.targets_BT != PAD).sum() / (answered.targets_BT != PAD).sum()
        auxiliary = loss.auxiliary
        if auxiliary is not None:
            decoder = auxiliary.decoder
            auxiliary = auxiliary._replace(decoder=decoder._replace(total=decoder.total * scale))
        return loss._replace(target_sum=loss.target_sum * scale, auxiliary=auxiliary, metrics=metrics)


def answered_by(student: SwitchTransformer, batch: Batch, context: DistributedContext) -> Batch:
    """Return the batch with the student's answer to each example in the place of its target. Collective.

    Answers are sampled at a temperature of 1. One may be as long as the target and an equal share of the row's padding,
    and at most 128 tokens; an answer that does not end within that is cut off by an EOS. The draws follow from torch's
    seed, which the loop sets for each microbatch: the answers of a step are the same when it is repeated.
    """
    inputs_XL, row_X = _unpacked(batch.inputs_BS)
    targets_XT, target_row_X = _unpacked(batch.targets_BT)
    assert len(row_X) == len(target_row_X), "each example has inputs and targets"
    B, T = batch.targets_BT.shape
    padding_B = (batch.targets_BT == PAD).sum(1)
    length_X = (targets_XT != PAD).sum(1)
    limit_X = length_X + (padding_B // row_X.bincount(minlength=B).clamp(min=1))[row_X]
    answers_XA = _generate(student, inputs_XL, limit_X, context)

    # The length up to EOS: its position and 1, or the length of all, and never above the limit.
    position_A = torch.arange(answers_XA.shape[1], device=answers_XA.device)
    end_X = position_A.where(answers_XA == EOS, answers_XA.shape[1] - 1).amin(1)
    length_X = (end_X + 1).minimum(limit_X)
    answers_XA = answers_XA.masked_fill(position_A == (length_X - 1).unsqueeze(1), EOS)
    # An answer starts in its row where the one before it ends: the sum of all lengths before it, less those of the rows
    # before its own.
    before_X = length_X.cumsum(0) - length_X
    length_B = length_X.new_zeros(B).index_add_(0, row_X, length_X)
    start_X = before_X - (length_B.cumsum(0) - length_B)[row_X]
    is_answer_XA = position_A < length_X.unsqueeze(1)
    place_XA = (row_X * T + start_X).unsqueeze(1) + position_A  # in the flattened rows
    targets_BT = torch.full_like(batch.targets_BT, PAD)
    targets_BT.view(-1)[place_XA[is_answer_XA]] = answers_XA[is_answer_XA]
    return Batch(batch.inputs_BS, targets_BT)


def _generate(
    student: SwitchTransformer, inputs_XL: torch.Tensor, limit_X: torch.Tensor, context: DistributedContext
) -> torch.Tensor:
    """Return the answers [X, A]; decoding ends when each on every rank has ended or reached its limit.

    Padding is never chosen. As a target it teaches nothing, so a student that prefers it would not unlearn that.
    """
    lengths = count(1)

    def all_done(done_X: torch.Tensor) -> bool:
        length = next(lengths)
        is_unfinished = (~done_X[: len(limit_X)] & (limit_X > length)).any()
        return not context.any_rank(bool(is_unfinished))

    decoding = _SAMPLING.model_copy(update={"seed": torch.initial_seed()})
    with evaluating(student, "dropless"), context.eager():
        return generate(student, inputs_XL, decoding, all_done=all_done, may_pad=False)


def _unpacked(ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the examples of packed rows, a row each and padded [X, L], and the row that each is in [X]."""
    row_X, end_X = (ids_BT == EOS).nonzero(as_tuple=True)
    # An example starts behind the one before it, or at the start of its row.
    is_first_X = torch.ones_like(row_X, dtype=torch.bool)
    is_first_X[1:] = row_X[1:] != row_X[:-1]
    start_X = (end_X.roll(1) + 1).masked_fill(is_first_X, 0)
    length_X = end_X + 1 - start_X
    position_L = torch.arange(int(length_X.max()), device=ids_BT.device)
    index_XL = (start_X.unsqueeze(1) + position_L).clamp(max=ids_BT.shape[1] - 1)
    examples_XL = ids_BT[row_X.unsqueeze(1), index_XL]
    return examples_XL.masked_fill(position_L >= length_X.unsqueeze(1), PAD), row_X
