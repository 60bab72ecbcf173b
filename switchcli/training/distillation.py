"""DistillationLoss: a student learns from a teacher's probabilities and from the targets (section 4.2).

    loss = (1 - f) hard + f T**2 soft

`hard` is the cross-entropy of the targets, summed over targets. q are the teacher's probabilities and p the student's,
both at temperature T. f is the soft fraction. `soft` is, summed over targets (beyond the paper for b > 0; Agarwal et
al. 2024, with the values at b = 0 and b = 1 of TRL):

    b = 0       -sum q log p                                      forward KL plus the teacher's entropy: the paper's
    b = 1       sum p log(p / q)                                  reverse KL
    between     b sum q log(q / m) + (1 - b) sum p log(p / m)     generalized Jensen-Shannon, m = b q + (1 - b) p

Padding counts in neither sum. The load-balancing and z-losses of a sparse student are added unchanged.

# Deviates: Mesh-TensorFlow (StudentTeacher) adds an output z-loss to both parts, which is in no loss here.

Legend: B batch, T target, V vocabulary (for the student this rank's rows of it), D model, N targets of all sequences,
C targets of a chunk, M sums.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.metric_names import NEG_LOG_PERPLEXITY, SOFT_CROSS_ENTROPY, TEACHER_DIVERGENCE
from switchcli.model.config import Precision
from switchcli.model.kernels.cpu_products import matmul
from switchcli.model.layers import compute_dtype, local_slice
from switchcli.model.transformer import SwitchTransformer
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import PAD
from switchcli.training.config import DistillSpec
from switchcli.training.loss import StepLoss, batch_segment_ids, step_loss, sum_in_chunks


class SoftLoss(NamedTuple):
    """What a student learns from its teacher's probabilities, for each target: this rank's terms of the sums."""

    loss_C: torch.Tensor
    """The soft part of the loss."""
    cross_entropy_C: torch.Tensor
    """-sum q log p, whichever loss is minimized."""
    entropy_C: torch.Tensor
    """The teacher's entropy, which is the smallest possible cross-entropy."""
    gradient_CV: torch.Tensor | None
    """Gradient of the soft part with respect to the logits over T. None if not needed."""


class TeacherProbs:
    """A teacher's probabilities q at temperature T of N targets, float32 or float64, and the loss against them.

    They are computed from its hidden states chunk by chunk, so [N, V] is never in memory.
    """

    def __init__(
        self, hidden_ND: torch.Tensor, vocabulary: VocabularyShard, temperature: float, beta: float = 0.0
    ) -> None:
        """`vocabulary` must have all rows: a teacher is not sharded. `beta` is the b of the soft part."""
        dtype = compute_dtype(hidden_ND)
        self._hidden_ND, self.temperature, self._beta = hidden_ND.to(dtype), temperature, beta
        self._vocabulary = VocabularyShard(vocabulary.weight_VD.to(dtype))

    @torch.no_grad()
    def log_probs(self, chunk: slice) -> torch.Tensor:
        """Return log q of the whole vocabulary for the targets `chunk`: [C, V], float32 or float64."""
        logits_CV = matmul(self._hidden_ND[chunk], self._vocabulary.weight_VD.mT)
        return self._vocabulary.log_softmax(logits_CV, self.temperature)

    def soft(self, log_p_CV: torch.Tensor, chunk: slice, vocabulary: VocabularyShard, needs_gradient: bool) -> SoftLoss:
        """Return the soft part of the loss for the targets `chunk`, over this rank's rows of the vocabulary.

        `log_p_CV` is the student's log p at temperature T, [C, V].

        The gradient is p - q for beta = 0. Otherwise it is w p (log(p / m) - sum p log(p / m)), with w = 1 - beta, or
        m = q and w = 1 for beta = 1.
        """
        beta = self._beta
        log_q_CV = local_slice(self.log_probs(chunk), vocabulary.axis, 1)
        q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
        cross_entropy_C, entropy_C = -_dot(q_CV, log_p_CV), -_dot(q_CV, log_q_CV)
        if beta == 0.0:
            return SoftLoss(cross_entropy_C, cross_entropy_C, entropy_C, p_CV.sub_(q_CV) if needs_gradient else None)
        if beta == 1.0:
            log_ratio_CV, weight = log_p_CV - log_q_CV, 1.0
            loss_C = student_C = _dot(p_CV, log_ratio_CV)
        else:
            # A fifth of logaddexp's time. Where p and q are 0 as floats, so are their terms, whatever the finite log m.
            log_m_CV = p_CV.lerp(q_CV, beta).clamp_(min=torch.finfo(p_CV.dtype).tiny).log_()
            log_ratio_CV, weight = log_p_CV - log_m_CV, 1.0 - beta
            student_C = _dot(p_CV, log_ratio_CV)
            loss_C = beta * _dot(q_CV, log_q_CV.sub_(log_m_CV)) + weight * student_C
        gradient_CV = None
        if needs_gradient:
            mean_C = vocabulary.axis.all_reduce(student_C)  # over the whole vocabulary
            gradient_CV = log_ratio_CV.sub_(mean_C.unsqueeze(1)).mul_(p_CV).mul_(weight)
        return SoftLoss(loss_C, cross_entropy_C, entropy_C, gradient_CV)


class Teacher:
    """A frozen model that runs on every batch, with a precision of its own."""

    def __init__(self, model: SwitchTransformer, precision: Precision) -> None:
        """`model` must be on the device of the batches, in the mode and with the capacity that it is to run with."""
        self.model = model.requires_grad_(False)
        self._precision = precision

    @torch.no_grad()
    def predict(self, batch: Batch, packed: bool, settings: DistillSpec) -> TeacherProbs:
        """Return the probabilities of the targets of a batch at the temperature of `settings`."""
        with torch.autocast(batch.inputs_BS.device.type, torch.bfloat16, enabled=self._precision != "float32"):
            output = self.model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, packed))
            return TeacherProbs(
                output.hidden_BTD.flatten(0, 1), output.vocabulary, settings.temperature, settings.mixture
            )


class DistillationLoss:
    """The objective of a student: it learns from the targets and from a teacher that runs in each step."""

    def __init__(self, settings: DistillSpec, teacher: Teacher, packed: bool) -> None:
        """`packed`: several examples share a row of a batch."""
        self._settings, self._teacher, self._packed = settings, teacher, packed

    def __call__(self, model: nn.Module, batch: Batch) -> StepLoss:
        output = model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, self._packed))
        sums_M = distilled_cross_entropy(
            output.hidden_BTD.flatten(0, 1),
            output.vocabulary,
            batch.targets_BT.flatten(),
            self._teacher.predict(batch, self._packed, self._settings),
            self._settings.soft_fraction,
        )
        target_sum = sums_M[0]
        _, hard, soft, divergence = sums_M.detach()
        sums = {NEG_LOG_PERPLEXITY: -hard, SOFT_CROSS_ENTROPY: soft, TEACHER_DIVERGENCE: divergence}
        return step_loss(output, batch.targets_BT, target_sum, sums)


def distilled_cross_entropy(
    hidden_ND: torch.Tensor,
    vocabulary: VocabularyShard,
    targets_N: torch.Tensor,
    teacher: TeacherProbs,
    soft_fraction: float,
) -> torch.Tensor:
    """Return four sums over real targets, [4], in nats, float32 or float64, computed in chunks; see `sum_in_chunks`.

    They are the loss, its hard part, and, whichever soft part is minimized, the cross-entropy of the student with its
    teacher and its forward Kullback-Leibler divergence, both at temperature T. Only
    the loss has a gradient, which can be taken only once. Where the vocabulary is sharded, the sums are over all ranks.
    """

    def loss(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        sums_M: torch.Tensor = _DistillationLoss.apply(
            logits_CV, targets_N[chunk], teacher, chunk, soft_fraction, vocabulary
        )
        return sums_M

    return sum_in_chunks(loss, hidden_ND, vocabulary)


class _DistillationLoss(torch.autograd.Function):
    """This rank's terms of the sums of `distilled_cross_entropy` for a chunk of targets.

    The gradient of the loss is with respect to the logits z.

    The derivative of log softmax(z / T) has the factor 1 / T, so

        d loss / d z = (1 - f) (p at 1 - target) + f T g

    where g is the gradient of the soft part with respect to z / T: p at T minus q for forward KL.
    The gradient is written by hand because autograd's takes longer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: torch.Tensor,
        targets_C: torch.Tensor,
        teacher: TeacherProbs,
        chunk: slice,
        soft_fraction: float,
        vocabulary: VocabularyShard,
    ) -> torch.Tensor:
        real_C1 = (targets_C != PAD).unsqueeze(1)
        # [C, 1]: the row of each target among this rank's rows, or any row for a target on another rank.
        target = vocabulary.locate(targets_C.unsqueeze(1))
        temperature = teacher.temperature

        log_p_CV = vocabulary.log_softmax(logits_CV)
        hard = -(target.zero_others(log_p_CV.gather(1, target.row)) * real_C1).sum()
        tempered_CV = log_p_CV if temperature == 1.0 else vocabulary.log_softmax(logits_CV, temperature)
        soft = teacher.soft(tempered_CV, chunk, vocabulary, needs_gradient=ctx.needs_input_grad[0])
        real_C = real_C1.squeeze(1)
        sums = ((values_C * real_C).sum() for values_C in (soft.loss_C, soft.cross_entropy_C, soft.entropy_C))
        soft_loss, cross_entropy, entropy = sums
        loss = (1.0 - soft_fraction) * hard + soft_fraction * temperature**2 * soft_loss

        if soft.gradient_CV is not None:
            # soft.gradient_CV is with respect to z / T: T**2 / T leaves the factor f T. The steps are in place, because
            # a new [C, V] takes time to allocate. log_p_CV is not needed after this and becomes p.
            hard_fraction = 1.0 - soft_fraction
            gradient_CV = soft.gradient_CV.mul_(soft_fraction * temperature).add_(log_p_CV.exp_(), alpha=hard_fraction)
            # Minus (1 - f) at the target; 0 is added where the target is on another rank.
            at_target_C1 = target.zero_others(gradient_CV.new_full(target.row.shape, -hard_fraction))
            ctx.gradient_CV, ctx.real_C1 = gradient_CV.scatter_add_(1, target.row, at_target_C1), real_C1
        return torch.stack([loss, hard, cross_entropy, cross_entropy - entropy])

    @staticmethod
    def backward(ctx: Any, scale_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_CV, ctx.gradient_CV = ctx.gradient_CV, None  # overwritten below: no second backward pass
        assert gradient_CV is not None, "the gradient can be taken once"
        # The gradient is 0 for padding.
        return gradient_CV.mul_(ctx.real_C1 * scale_M[0]), None, None, None, None, None


def _dot(x_CV: torch.Tensor, y_CV: torch.Tensor) -> torch.Tensor:
    """Return the dot products of rows, [C], without a [C, V] of products: [C, 1, V] @ [C, V, 1]."""
    return torch.bmm(x_CV.unsqueeze(1), y_CV.unsqueeze(2)).flatten()


def gain_kept(student: float, teacher: float, baseline: float) -> float | None:
    """Return the fraction of the teacher's gain over the dense baseline that the student keeps (Tables 6 to 8).

    None if the teacher has no gain.
    """
    return (student - baseline) / (teacher - baseline) if teacher > baseline else None


def compression(student: int, teacher: int) -> float:
    """Return the fraction of the teacher's parameters that the student saves (Table 7)."""
    return 1 - student / teacher
