"""DistillationLoss: a student learns from a teacher's probabilities and from the targets (section 4.2).

    loss = (1 - f) hard + f T**2 soft       soft = -sum over targets and vocabulary of q log p

`hard` is the cross-entropy of the targets, summed over targets. q are the teacher's probabilities and p the student's,
both at temperature T. f is the soft fraction. Padding counts in neither sum. The load-balancing and z-losses of a
sparse student are added unchanged.

# Deviates: Mesh-TensorFlow (StudentTeacher) adds an output z-loss to both parts, which is in no loss here.

Legend: B batch, T target, V vocabulary (for the student this rank's rows of it), D model, N targets of all sequences,
C targets of a chunk, K cached probabilities of a target, M sums.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from switchcli.data.batch import AnyBatch, DistillBatch, TeacherTopK
from switchcli.metric_names import NEG_LOG_PERPLEXITY, SOFT_CROSS_ENTROPY, TEACHER_DIVERGENCE
from switchcli.model.axis import local_slice
from switchcli.model.kernels.cpu_products import matmul
from switchcli.model.layers import compute_dtype
from switchcli.model.transformer import SwitchTransformer
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import PAD
from switchcli.training.config import Precision
from switchcli.training.distillation_specs import DistillSpec
from switchcli.training.loss import StepLoss, batch_segment_ids, step_loss, sum_in_chunks


class SoftLoss(NamedTuple):
    """The cross-entropy of the student with its teacher for each target, over this rank's rows of the vocabulary."""

    cross_entropy_C: torch.Tensor
    entropy_C: torch.Tensor
    """The teacher's entropy, which is the smallest possible cross-entropy."""
    gradient_CV: torch.Tensor | None
    """Gradient of the cross-entropy with respect to the logits over T. None if not needed."""


class TeacherProbs(ABC):
    """A teacher's probabilities q at temperature T of N targets, float32 or float64."""

    @abstractmethod
    def soft(self, log_p_CV: torch.Tensor, chunk: slice, vocabulary: VocabularyShard, needs_gradient: bool) -> SoftLoss:
        """Return the soft part of the loss for the targets `chunk`, given the student's log p at T: [C, V]."""


class FullTeacherProbs(TeacherProbs):
    """A teacher's probabilities of the whole vocabulary for N targets.

    They are computed from its hidden states chunk by chunk, so [N, V] is never in memory.
    """

    def __init__(self, hidden_ND: torch.Tensor, vocabulary: VocabularyShard, temperature: float) -> None:
        """`vocabulary` must have all rows: a teacher is not sharded."""
        dtype = compute_dtype(hidden_ND)
        self._hidden_ND, self._temperature = hidden_ND.to(dtype), temperature
        self._vocabulary = VocabularyShard(vocabulary.weight_VD.to(dtype))

    @torch.no_grad()
    def log_probs(self, chunk: slice) -> torch.Tensor:
        """Return log q of the whole vocabulary for the targets `chunk`: [C, V], float32 or float64."""
        logits_CV = matmul(self._hidden_ND[chunk], self._vocabulary.weight_VD.mT)
        return self._vocabulary.log_softmax(logits_CV, self._temperature)

    def soft(self, log_p_CV: torch.Tensor, chunk: slice, vocabulary: VocabularyShard, needs_gradient: bool) -> SoftLoss:
        """Return -sum q log p over this rank's rows of the vocabulary, with the gradient p - q."""
        log_q_CV = local_slice(self.log_probs(chunk), vocabulary.axis, 1)
        q_CV = log_q_CV.exp()
        gradient_CV = log_p_CV.exp().sub_(q_CV) if needs_gradient else None
        return SoftLoss(-_dot(q_CV, log_p_CV), -_dot(q_CV, log_q_CV), gradient_CV)


class CachedTeacherProbs(TeacherProbs):
    """The K largest probabilities of each target, with their ids, and the sum of the others."""

    def __init__(self, kept: TeacherTopK) -> None:
        """The tensors of `kept` are [N, K] and [N]; the ids are of the whole vocabulary."""
        self._kept = kept

    def soft(self, log_p_CV: torch.Tensor, chunk: slice, vocabulary: VocabularyShard, needs_gradient: bool) -> SoftLoss:
        """Return the soft part for q of K tokens, with all other tokens as one outcome of probability r.

            -sum over the K tokens of q log p - r log(1 - sum over the K tokens of p)

        How the student divides its probability among the other tokens does not matter. With K the whole vocabulary
        there is no such outcome, and the result is that of `FullTeacherProbs`.

        Example: four tokens, of which the teacher gives the first two q = [0.6, 0.3] and the rest r = 0.1. For a
        student with p = [0.5, 0.2, 0.2, 0.1] the result is -0.6 log 0.5 - 0.3 log 0.2 - 0.1 log 0.3. Its gradient is
        p - [0.6, 0.3, 0.0667, 0.0333]: the other tokens share r as the student shares 0.3 among them, 2 to 1.
        """
        teacher = TeacherTopK(*(tensor[chunk] for tensor in self._kept))
        # [C, K]: the row of each token among this rank's rows, or any row, with q 0, for a token on another rank.
        token = vocabulary.locate(teacher.ids.long())
        q_CK, rest_C = teacher.probability.to(log_p_CV.dtype), teacher.rest.to(log_p_CV.dtype)
        total_C1 = (q_CK.sum(1) + rest_C).unsqueeze(1)  # not exactly 1, because cached probabilities are rounded
        q_CK = token.zero_others(q_CK)
        counts_rest = float(vocabulary.axis.rank == 0)  # the sum over ranks must contain the rest once
        cross_entropy_C = -(q_CK * log_p_CV.gather(1, token.row)).sum(1)
        entropy_C = -(torch.xlogy(q_CK, q_CK).sum(1) + counts_rest * torch.xlogy(rest_C, rest_C))
        # Terms of the gradient: the sum of all q times p, minus q at the K tokens, minus the gradient of the rest
        # below.
        gradient_CV = log_p_CV.exp().mul_(total_C1).scatter_add_(1, token.row, -q_CK) if needs_gradient else None
        num_tokens = log_p_CV.shape[1] * vocabulary.axis.size
        if token.row.shape[1] < num_tokens:  # K < V: there are other tokens
            # log p of the other tokens alone: -inf is added at the K tokens (0 where a row only stands in for another
            # rank's), so that they drop out of the logsumexp.
            removed_CK = torch.full_like(q_CK, -torch.inf)
            if token.is_local is not None:
                removed_CK = removed_CK.where(token.is_local, 0.0)
            others_CV = log_p_CV.scatter_add(1, token.row, removed_CK)
            log_rest_C = vocabulary.logsumexp(others_CV)
            cross_entropy_C = cross_entropy_C - counts_rest * rest_C * log_rest_C
            if gradient_CV is not None:
                # The gradient of log_rest_C is the softmax over the other tokens, minus p. The term with p is above.
                gradient_CV -= others_CV.sub_(log_rest_C.unsqueeze(1)).exp_().mul_(rest_C.unsqueeze(1))
        return SoftLoss(cross_entropy_C, entropy_C, gradient_CV)


class Teacher:
    """A frozen model that runs on every batch, with a precision of its own."""

    def __init__(self, model: SwitchTransformer, precision: Precision) -> None:
        """`model` must be on the device of the batches, in the mode and with the capacity that it is to run with."""
        self.model = model.requires_grad_(False)
        self._precision = precision

    @torch.no_grad()
    def predict(self, batch: AnyBatch, packed: bool, temperature: float) -> FullTeacherProbs:
        """Return the probabilities of the targets of a batch at a temperature.

        Call it after the student's forward pass: a teacher in training mode draws from the same random generator.
        """
        with torch.autocast(batch.inputs_BS.device.type, torch.bfloat16, enabled=self._precision != "float32"):
            output = self.model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, packed))
            return FullTeacherProbs(output.hidden_BTD.flatten(0, 1), output.vocabulary, temperature)


class DistillationLoss:
    """The objective of a student: it learns from a teacher that runs in each step, or from its cached probabilities."""

    def __init__(self, settings: DistillSpec, teacher: Teacher | None, packed: bool) -> None:
        """Without a teacher, batches must be a `DistillBatch`. `packed`: several examples share a row of a batch."""
        self._settings, self._teacher, self._packed = settings, teacher, packed

    def __call__(self, model: nn.Module, batch: AnyBatch) -> StepLoss:
        output = model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, self._packed))
        soft_fraction, temperature = self._settings.soft_fraction, self._settings.temperature
        teacher: TeacherProbs
        if self._teacher is not None:
            teacher = self._teacher.predict(batch, self._packed, temperature)
        else:
            assert isinstance(batch, DistillBatch), "without a teacher the batch brings its probabilities"
            # [B, T, K] and [B, T] to [N, K] and [N], in the order of targets_N.
            teacher = CachedTeacherProbs(TeacherTopK(*(tensor.flatten(0, 1) for tensor in batch.teacher)))
        hidden_ND, targets_N = output.hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
        sums_M = distilled_cross_entropy(hidden_ND, output.vocabulary, targets_N, teacher, soft_fraction, temperature)
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
    temperature: float,
) -> torch.Tensor:
    """Return four sums over real targets, [4], in nats, float32 or float64, computed in chunks; see `sum_in_chunks`.

    They are the loss, its hard part, its soft part (without the factor f T**2), and the Kullback-Leibler divergence of
    the student from its teacher at temperature T. Only the loss has a gradient, which can be taken only once. Where the
    vocabulary is sharded, the sums are over all ranks.
    """

    def loss(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        sums_M: torch.Tensor = _DistillationLoss.apply(  # type: ignore[no-untyped-call]
            logits_CV, targets_N[chunk], teacher, chunk, soft_fraction, temperature, vocabulary
        )
        return sums_M

    return sum_in_chunks(loss, hidden_ND, vocabulary)


class _DistillationLoss(torch.autograd.Function):
    """This rank's terms of the sums of `distilled_cross_entropy` for a chunk of targets.

    The gradient of the loss is with respect to the logits z.

    The derivative of log softmax(z / T) has the factor 1 / T, so

        d loss / d z = (1 - f) (p at 1 - target) + f T (p at T - q)

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
        temperature: float,
        vocabulary: VocabularyShard,
    ) -> torch.Tensor:
        real_C1 = (targets_C != PAD).unsqueeze(1)
        # [C, 1]: the row of each target among this rank's rows, or any row for a target on another rank.
        target = vocabulary.locate(targets_C.unsqueeze(1))
        needs_gradient = ctx.needs_input_grad[0]

        log_p_CV = vocabulary.log_softmax(logits_CV)
        hard = -(target.zero_others(log_p_CV.gather(1, target.row)) * real_C1).sum()
        tempered_CV = log_p_CV if temperature == 1.0 else vocabulary.log_softmax(logits_CV, temperature)
        soft = teacher.soft(tempered_CV, chunk, vocabulary, needs_gradient)
        real_C = real_C1.squeeze(1)
        cross_entropy, entropy = (soft.cross_entropy_C * real_C).sum(), (soft.entropy_C * real_C).sum()
        loss = (1.0 - soft_fraction) * hard + soft_fraction * temperature**2 * cross_entropy

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
        return gradient_CV.mul_(ctx.real_C1 * scale_M[0]), None, None, None, None, None, None


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
