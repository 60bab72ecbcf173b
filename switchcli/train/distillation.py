"""DistillationLoss: a student learns from a teacher's probabilities beside the targets (section 4.2).

    loss = (1 - f) hard + f T**2 soft       soft = -sum over the vocabulary of q log p, a sum over targets as hard is

hard is the targets' cross-entropy, q the teacher's probabilities and p the student's, both at temperature T; f is the
soft fraction. Padding counts in neither. The balance and z-losses of a sparse student stay beside it.

# Deviates: Mesh-TensorFlow (StudentTeacher) adds an output z-loss to both parts, which is in no loss here.

Legend: B batch, T target, V vocabulary (of a student the part of it that is here), D model, N targets of all sequences,
C those of a chunk, K kept probabilities.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from switchcli.data.batch import AnyBatch, Lesson
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.axis import part_of
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.model.vocabulary import Vocabulary
from switchcli.spec import MOST, PAD, Place, Spec
from switchcli.train.config import Precision
from switchcli.train.loss import ChunkLoss, StepLoss, segments, step_loss, summed_over_vocabulary
from switchcli.train.teacher_cache import AnswersSpec

NUM_SUMS = 4  # of a chunk: what is minimised, hard, soft, and how far the student is from its teacher


class DistillSpec(Spec):
    """Whose probabilities, and how much they count."""

    teacher: Place
    """A run's folder (its newest is taken), one checkpoint's, or a folder in the Hugging Face layout; `--teacher`."""
    soft_fraction: float = Field(default=0.25, ge=0.0, le=1.0)
    """f: 0.25 in the paper's best row of Table 6, 1 where it has no mixture; 0 is training without a teacher."""
    temperature: float = Field(default=1.0, gt=0.0)
    """T. The paper gives none, and Mesh-TensorFlow has no default."""
    start_step: int = Field(default=0, ge=0, le=MOST["steps"])
    """The teacher is asked from this step on; before it the loss is hard alone."""
    capacity: Policy = "dropless"
    """How the teacher's routers count capacity: `dropless`, `paper`, or a factor."""
    mode: Literal["evaluation", "training"] = "evaluation"
    """`training`: with its dropout and jitter, as in Mesh-TensorFlow; then by its training capacity."""
    answers: AnswersSpec | None = None
    """Absent: the teacher is asked in every step. Given: once, and its answers are kept on disk."""
    baseline: float | Place | None = None
    """The dense model that student and teacher are compared with: its checkpoint, or its figure; `--baseline`."""

    @model_validator(mode="after")
    def _answers_repeat(self) -> Self:
        if self.answers is not None and self.mode == "training":
            raise ValueError("mode (training): its noise is new in each step, and answers are kept: take evaluation")
        return self


class SoftLoss(NamedTuple):
    """Of a chunk, summed over real targets and the student's part of the vocabulary."""

    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    """The teacher's own: what the cross-entropy comes to when the student has its probabilities."""
    gradient_CV: torch.Tensor | None
    """Of the cross-entropy with respect to the logits over T."""


SoftTargets = Callable[[Vocabulary, torch.Tensor, torch.Tensor, slice, bool], SoftLoss]
"""`(vocabulary, log_CV, real_C, chunk, learns)`: the student's vocabulary and its log p, which targets are real, which
of all they are, and whether the gradient is wanted."""


class AllProbabilities:
    """q from a teacher's hidden states, chunk by chunk: [N, V] is never held."""

    def __init__(self, hidden_ND: torch.Tensor, vocabulary: Vocabulary, temperature: float) -> None:
        """`vocabulary` is whole: a teacher is not divided."""
        dtype = compute_dtype(hidden_ND)
        self._hidden_ND, self._temperature = hidden_ND.to(dtype), temperature
        self._vocabulary = Vocabulary(vocabulary.weight_VD.to(dtype))

    def log(self, chunk: slice) -> torch.Tensor:
        """log q_CV of the whole vocabulary, float32 at least."""
        logits_CV = self._hidden_ND[chunk] @ self._vocabulary.weight_VD.mT
        return self._vocabulary.log_softmax(logits_CV, self._temperature)

    def __call__(
        self, vocabulary: Vocabulary, log_CV: torch.Tensor, real_C: torch.Tensor, chunk: slice, learns: bool
    ) -> SoftLoss:
        log_q_CV = part_of(self.log(chunk), vocabulary.axis, 1)
        q_CV = log_q_CV.exp()
        entropy = -(_dot(q_CV, log_q_CV) * real_C).sum()
        del log_q_CV
        cross_entropy = -(_dot(q_CV, log_CV) * real_C).sum()
        return SoftLoss(cross_entropy, entropy, log_CV.exp().sub_(q_CV) if learns else None)


class TopProbabilities:
    """q of K tokens, and of all others together: the student may share that out as it likes.

    The loss is the cross-entropy of K + 1 outcomes; with K the whole vocabulary that of all of them.
    """

    def __init__(self, ids_NK: torch.Tensor, probability_NK: torch.Tensor, rest_N: torch.Tensor) -> None:
        self._ids_NK, self._probability_NK, self._rest_N = ids_NK, probability_NK, rest_N

    def __call__(
        self, vocabulary: Vocabulary, log_CV: torch.Tensor, real_C: torch.Tensor, chunk: slice, learns: bool
    ) -> SoftLoss:
        place = vocabulary.place(self._ids_NK[chunk].long())
        q_CK, rest_C = (kept[chunk].to(log_CV.dtype) for kept in (self._probability_NK, self._rest_N))
        total_C1 = (q_CK.sum(1) + rest_C).unsqueeze(1)  # probabilities that were rounded need not add up to 1
        q_CK = place.only_here(q_CK)
        counts = float(vocabulary.axis.place == 0)  # the rest is counted once
        cross_entropy_C = -(q_CK * log_CV.gather(1, place.row)).sum(1)
        entropy_C = -(torch.xlogy(q_CK, q_CK).sum(1) + counts * torch.xlogy(rest_C, rest_C))
        gradient_CV = log_CV.exp().mul_(total_C1).scatter_add_(1, place.row, -q_CK) if learns else None
        if place.row.shape[1] < log_CV.shape[1] * vocabulary.axis.size:
            gone_CK = torch.full_like(q_CK, -torch.inf)
            if place.is_here is not None:
                gone_CK = gone_CK.where(place.is_here, 0.0)
            others_CV = log_CV.scatter_add(1, place.row, gone_CK)
            log_rest_C = vocabulary.logsumexp(others_CV)
            cross_entropy_C = cross_entropy_C - counts * rest_C * log_rest_C
            if gradient_CV is not None:  # of log sum over others p: their shares among themselves
                gradient_CV -= others_CV.sub_(log_rest_C.unsqueeze(1)).exp_().mul_(rest_C.unsqueeze(1))
        return SoftLoss((cross_entropy_C * real_C).sum(), (entropy_C * real_C).sum(), gradient_CV)


class Teacher:
    """A frozen model that is asked in every step, in its own precision and by its own capacity."""

    def __init__(self, model: SwitchTransformer, precision: Precision, temperature: float) -> None:
        """`model` is in the mode that it is to be asked in, on the device of the batches."""
        self.model = model.requires_grad_(False)
        self._precision, self._temperature = precision, temperature

    @torch.no_grad()
    def ask(self, batch: AnyBatch, packed: bool) -> AllProbabilities:
        """Its probabilities of every target. The student's noise is drawn before the teacher's, if that has any."""
        with torch.autocast(batch.inputs_BS.device.type, torch.bfloat16, enabled=self._precision != "float32"):
            output = self.model(batch.inputs_BS, batch.targets_BT, segments(batch, packed))
            return AllProbabilities(output.hidden_BTD.flatten(0, 1), output.vocabulary, self._temperature)


class DistillationLoss:
    """The objective of a student: of `teacher`'s answers to the batch, or of those that the batch brings."""

    def __init__(self, settings: DistillSpec, teacher: Teacher | None, packed: bool) -> None:
        """`packed`: several examples share a row of a batch."""
        self._settings, self._teacher, self._packed = settings, teacher, packed

    def __call__(self, model: nn.Module, batch: AnyBatch) -> StepLoss:
        output = model(batch.inputs_BS, batch.targets_BT, segments(batch, self._packed))
        targets_N = batch.targets_BT.flatten()
        sums_M = distilled_cross_entropy(
            output.hidden_BTD.flatten(0, 1),
            output.vocabulary,
            targets_N,
            self._soft_targets(batch),
            self._settings.soft_fraction,
            self._settings.temperature,
        )
        target_sum = sums_M[0]
        _, hard, soft, divergence = sums_M.detach()
        sums = {NEG_LOG_PERPLEXITY: -hard, "soft_cross_entropy": soft, "teacher_divergence": divergence}
        return step_loss(output, batch.targets_BT, target_sum, sums)

    def _soft_targets(self, batch: AnyBatch) -> SoftTargets:
        if self._teacher is not None:
            return self._teacher.ask(batch, self._packed)
        assert isinstance(batch, Lesson), "without a teacher the batch brings its answers"
        return TopProbabilities(*(kept.flatten(0, 1) for kept in batch.answers))


def distilled_cross_entropy(
    hidden_ND: torch.Tensor,
    vocabulary: Vocabulary,
    targets_N: torch.Tensor,
    soft_targets: SoftTargets,
    soft_fraction: float,
    temperature: float,
) -> torch.Tensor:
    """float32 [4], each a sum over real targets: the loss, its hard part, its soft part (without f and T**2), and the
    Kullback-Leibler divergence of the student from its teacher at T. The first has a gradient.

    The products are in the precision of autocast, all else is float32 at least.
    """

    def of_chunk(logits_CV: torch.Tensor, chunk: slice, learns: bool) -> ChunkLoss:
        target_C1 = targets_N[chunk, None]
        real_C1 = target_C1 != PAD
        place = vocabulary.place(target_C1)
        log_CV = vocabulary.log_softmax(logits_CV)
        hard = -(place.only_here(log_CV.gather(1, place.row)) * real_C1).sum()
        tempered_CV = log_CV if temperature == 1.0 else vocabulary.log_softmax(logits_CV, temperature)
        soft = soft_targets(vocabulary, tempered_CV, real_C1.squeeze(1), chunk, learns)
        loss = (1.0 - soft_fraction) * hard + soft_fraction * temperature**2 * soft.cross_entropy
        sums_M = torch.stack([loss, hard, soft.cross_entropy, soft.cross_entropy - soft.entropy])
        if soft.gradient_CV is None:
            return ChunkLoss(sums_M, None)
        hard_share = 1.0 - soft_fraction
        gradient_CV = soft.gradient_CV.mul_(soft_fraction * temperature).add_(log_CV.exp_(), alpha=hard_share)
        at_target_C1 = place.only_here(gradient_CV.new_full(target_C1.shape, -hard_share))
        gradient_CV.scatter_add_(1, place.row, at_target_C1)
        return ChunkLoss(sums_M, gradient_CV.mul_(real_C1))

    return summed_over_vocabulary(hidden_ND, vocabulary, of_chunk, NUM_SUMS)


def gain_kept(student: float, teacher: float, baseline: float) -> float | None:
    """The share of the teacher's gain over the dense baseline that the student keeps (Tables 6 to 8); None where the
    teacher has none."""
    return (student - baseline) / (teacher - baseline) if teacher > baseline else None


def compression(student: int, teacher: int) -> float:
    """The share of the teacher's parameters that the student does without (Table 7)."""
    return 1 - student / teacher


def _dot(x_CV: torch.Tensor, y_CV: torch.Tensor) -> torch.Tensor:
    """The products of rows, [C]; their elements are not held."""
    return torch.bmm(x_CV.unsqueeze(1), y_CV.unsqueeze(2)).flatten()
