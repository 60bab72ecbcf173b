"""DistillationLoss: a student learns from a teacher's probabilities beside the targets (section 4.2).

    loss = (1 - f) hard + f T**2 soft       soft = -sum over the vocabulary of q log p, a sum over targets as hard is

hard is the targets' cross-entropy, q the teacher's probabilities and p the student's, both at temperature T; f is the
soft fraction. Padding counts in neither. The balance and z-losses of a sparse student stay beside it.

# Deviates: Mesh-TensorFlow (StudentTeacher) adds an output z-loss to both parts, which is in no loss here.

Legend: B batch, T target, V vocabulary (of a student the part of it that is here), D model, N targets of all sequences,
C those of a chunk, K kept probabilities.
"""

from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from switchcli.data.batch import AnyBatch, DistillBatch, TeacherTopK
from switchcli.metric_names import NEG_LOG_PERPLEXITY, SOFT_CROSS_ENTROPY, TEACHER_DIVERGENCE
from switchcli.model.axis import ModelAxis, local_slice
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import MOST, PAD, Place, Spec
from switchcli.train.config import Precision
from switchcli.train.loss import StepLoss, batch_segment_ids, step_loss, sum_in_chunks
from switchcli.train.teacher_cache import TeacherCacheSpec


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
    cache: TeacherCacheSpec | None = None
    """Absent: the teacher is asked in every step. Given: once, and its answers are kept on disk."""
    baseline: float | Place | None = None
    """The dense model that student and teacher are compared with: its checkpoint, or its figure; `--baseline`."""

    @model_validator(mode="after")
    def _answers_repeat(self) -> Self:
        if self.cache is not None and self.mode == "training":
            raise ValueError("mode (training): its noise is new in each step, and answers are kept: take evaluation")
        return self


class TeacherProbs(NamedTuple):
    """A teacher's probabilities of the tokens here for a chunk of targets, at T; float32 or float64."""

    q_CV: torch.Tensor
    entropy_C: torch.Tensor
    """-sum over the tokens here of q log q, in nats."""


class FullTeacherProbs:
    """A teacher's probabilities of all tokens, from its hidden states, chunk by chunk: [N, V] is never held."""

    def __init__(self, hidden_ND: torch.Tensor, vocabulary: VocabularyShard, temperature: float) -> None:
        """`vocabulary` is whole: a teacher is not split over ranks."""
        dtype = compute_dtype(hidden_ND)
        self._hidden_ND, self._temperature = hidden_ND.to(dtype), temperature
        self._vocabulary = VocabularyShard(vocabulary.weight_VD.to(dtype))

    @torch.no_grad()
    def log_probs(self, chunk: slice) -> torch.Tensor:
        """Return log q of the whole vocabulary for the targets `chunk`: [C, V], float32 or float64."""
        logits_CV = self._hidden_ND[chunk] @ self._vocabulary.weight_VD.mT
        return self._vocabulary.log_softmax(logits_CV, self._temperature)

    def here(self, chunk: slice, axis: ModelAxis) -> TeacherProbs:
        """Return q of this rank's part of the vocabulary for the targets `chunk`."""
        log_q_CV = local_slice(self.log_probs(chunk), axis, 1)
        q_CV = log_q_CV.exp()
        return TeacherProbs(q_CV, -_dot(q_CV, log_q_CV))


class Teacher:
    """A frozen model that is asked in every step, in its own precision and by its own capacity."""

    def __init__(self, model: SwitchTransformer, precision: Precision, temperature: float) -> None:
        """`model` is in the mode that it is to be asked in, on the device of the batches."""
        self.model = model.requires_grad_(False)
        self._precision, self._temperature = precision, temperature

    @torch.no_grad()
    def predict(self, batch: AnyBatch, packed: bool) -> FullTeacherProbs:
        """Its probabilities of every target. The student's noise is drawn before the teacher's, if that has any."""
        with torch.autocast(batch.inputs_BS.device.type, torch.bfloat16, enabled=self._precision != "float32"):
            output = self.model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, packed))
            return FullTeacherProbs(output.hidden_BTD.flatten(0, 1), output.vocabulary, self._temperature)


class DistillationLoss:
    """The objective of a student: of `teacher`'s answers to the batch, or of those that the batch brings."""

    def __init__(self, settings: DistillSpec, teacher: Teacher | None, packed: bool) -> None:
        """`packed`: several examples share a row of a batch."""
        self._settings, self._teacher, self._packed = settings, teacher, packed

    def __call__(self, model: nn.Module, batch: AnyBatch) -> StepLoss:
        output = model(batch.inputs_BS, batch.targets_BT, batch_segment_ids(batch, self._packed))
        targets_N = batch.targets_BT.flatten()
        sums_M = distilled_cross_entropy(
            output.hidden_BTD.flatten(0, 1),
            output.vocabulary,
            targets_N,
            self._answers(batch),
            self._settings.soft_fraction,
            self._settings.temperature,
        )
        target_sum = sums_M[0]
        _, hard, soft, divergence = sums_M.detach()
        sums = {NEG_LOG_PERPLEXITY: -hard, SOFT_CROSS_ENTROPY: soft, TEACHER_DIVERGENCE: divergence}
        return step_loss(output, batch.targets_BT, target_sum, sums)

    def _answers(self, batch: AnyBatch) -> FullTeacherProbs | TeacherTopK:
        if self._teacher is not None:
            return self._teacher.predict(batch, self._packed)
        assert isinstance(batch, DistillBatch), "without a teacher the batch brings its answers"
        return TeacherTopK(*(kept.flatten(0, 1) for kept in batch.teacher))


def distilled_cross_entropy(
    hidden_ND: torch.Tensor,
    vocabulary: VocabularyShard,
    targets_N: torch.Tensor,
    teacher: FullTeacherProbs | TeacherTopK,
    soft_fraction: float,
    temperature: float,
) -> torch.Tensor:
    """Return the sums [4] of `distillation_loss` over all N targets, in chunks; see `sum_in_chunks`. The first has a
    gradient. `Answers` are [N, K]."""

    def loss(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        if isinstance(teacher, TeacherTopK):
            answers = TeacherTopK(*(kept[chunk] for kept in teacher))
            return distillation_loss(logits_CV, targets_N[chunk], answers, soft_fraction, temperature, vocabulary)
        q = teacher.here(chunk, vocabulary.axis)
        return distillation_loss(logits_CV, targets_N[chunk], q, soft_fraction, temperature, vocabulary)

    return sum_in_chunks(loss, hidden_ND, vocabulary)


def distillation_loss(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    teacher: TeacherProbs | TeacherTopK,
    soft_fraction: float,
    temperature: float,
    vocabulary: VocabularyShard,
) -> torch.Tensor:
    """Return four sums over real targets: the loss, its hard part, its soft part (without f and T**2), and the
    Kullback-Leibler divergence of the student from its teacher at T. [4], in nats, float32 or float64.

    `teacher` has q of all tokens, [C, V], or of the K most probable ones, [C, K]. Where the vocabulary is split over
    ranks, logits and q are of the rows here, `Answers` of all rows, and the sums are this rank's part. Only the loss
    has a gradient, and only of the logits; it can be taken once.
    """
    sums_M: torch.Tensor = _DistillationLoss.apply(  # type: ignore[no-untyped-call]
        logits_CV, targets_C, teacher, soft_fraction, temperature, vocabulary
    )
    return sums_M


class _DistillationLoss(torch.autograd.Function):
    """The formula, and next to it the gradient of the logits z. Softmax of z / T has the gradient factor 1 / T, so

        d loss / d z = (1 - f) (p at 1 - target) + f T (p at T - q)

    The gradient is written by hand because autograd's takes longer: with all probabilities 1.11 times
    (1.02 to 1.19) the CPU time of the loss with its products, with 64 kept ones 1.16 times (1.08 to 1.21): medians and
    ranges of 7 and 5 pairs at T=1, on one CPU thread, in float32, with N=1024, D=512 and V=32128.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: torch.Tensor,
        targets_C: torch.Tensor,
        teacher: TeacherProbs | TeacherTopK,
        soft_fraction: float,
        temperature: float,
        vocabulary: VocabularyShard,
    ) -> torch.Tensor:
        real_C1 = (targets_C != PAD).unsqueeze(1)
        target = vocabulary.locate(targets_C.unsqueeze(1))
        learns = ctx.needs_input_grad[0]

        log_p_CV = vocabulary.log_softmax(logits_CV)
        hard = -(target.zero_others(log_p_CV.gather(1, target.row)) * real_C1).sum()
        tempered_CV = log_p_CV if temperature == 1.0 else vocabulary.log_softmax(logits_CV, temperature)
        if isinstance(teacher, TeacherTopK):
            soft = _soft_top_k(tempered_CV, teacher, vocabulary, learns)
        else:
            soft = _soft(tempered_CV, teacher, learns)
        real_C = real_C1.squeeze(1)
        cross_entropy, entropy = (soft.cross_entropy_C * real_C).sum(), (soft.entropy_C * real_C).sum()
        loss = (1.0 - soft_fraction) * hard + soft_fraction * temperature**2 * cross_entropy

        if soft.gradient_CV is not None:
            # In place: another [C, V] takes time to allocate. Padding is removed in backward.
            hard_share = 1.0 - soft_fraction
            gradient_CV = soft.gradient_CV.mul_(soft_fraction * temperature).add_(log_p_CV.exp_(), alpha=hard_share)
            at_target_C1 = target.zero_others(gradient_CV.new_full(target.row.shape, -hard_share))
            ctx.gradient_CV, ctx.real_C1 = gradient_CV.scatter_add_(1, target.row, at_target_C1), real_C1
        return torch.stack([loss, hard, cross_entropy, cross_entropy - entropy])

    @staticmethod
    def backward(ctx: Any, scale_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_CV, ctx.gradient_CV = ctx.gradient_CV, None  # overwritten: there is no second backward pass
        assert gradient_CV is not None, "the gradient can be taken once"
        return gradient_CV.mul_(ctx.real_C1 * scale_M[0]), None, None, None, None, None


class _Soft(NamedTuple):
    """Cross-entropy of a student with its teacher for each target, over the rows of the vocabulary here."""

    cross_entropy_C: torch.Tensor
    entropy_C: torch.Tensor
    """The teacher's own entropy: the least that the cross-entropy can be."""
    gradient_CV: torch.Tensor | None
    """Gradient of the cross-entropy with respect to the logits over T; None where it is not needed."""


def _soft(log_p_CV: torch.Tensor, teacher: TeacherProbs, learns: bool) -> _Soft:
    """Return the part of all tokens: -sum q log p, gradient p - q."""
    gradient_CV = log_p_CV.exp().sub_(teacher.q_CV) if learns else None
    return _Soft(-_dot(teacher.q_CV, log_p_CV), teacher.entropy_C, gradient_CV)


def _soft_top_k(log_p_CV: torch.Tensor, answers: TeacherTopK, vocabulary: VocabularyShard, learns: bool) -> _Soft:
    """Return the part of K tokens and one outcome for all others, which the student may divide among them as it likes.

    With K the whole vocabulary there is no such outcome, and the result is that of all tokens.
    """
    place = vocabulary.locate(answers.ids_BTK.long())
    q_CK, rest_C = answers.probability_BTK.to(log_p_CV.dtype), answers.rest_BT.to(log_p_CV.dtype)
    total_C1 = (q_CK.sum(1) + rest_C).unsqueeze(1)  # probabilities that were rounded need not add up to 1
    q_CK = place.zero_others(q_CK)
    counts = float(vocabulary.axis.rank == 0)  # only one rank counts the rest
    cross_entropy_C = -(q_CK * log_p_CV.gather(1, place.row)).sum(1)
    entropy_C = -(torch.xlogy(q_CK, q_CK).sum(1) + counts * torch.xlogy(rest_C, rest_C))
    gradient_CV = log_p_CV.exp().mul_(total_C1).scatter_add_(1, place.row, -q_CK) if learns else None
    if place.row.shape[1] < log_p_CV.shape[1] * vocabulary.axis.size:
        removed_CK = torch.full_like(q_CK, -torch.inf)
        if place.is_local is not None:
            removed_CK = removed_CK.where(place.is_local, 0.0)
        others_CV = log_p_CV.scatter_add(1, place.row, removed_CK)
        log_rest_C = vocabulary.logsumexp(others_CV)
        cross_entropy_C = cross_entropy_C - counts * rest_C * log_rest_C
        if gradient_CV is not None:  # of log_rest_C: the probability of each among the others
            gradient_CV -= others_CV.sub_(log_rest_C.unsqueeze(1)).exp_().mul_(rest_C.unsqueeze(1))
    return _Soft(cross_entropy_C, entropy_C, gradient_CV)


def _dot(x_CV: torch.Tensor, y_CV: torch.Tensor) -> torch.Tensor:
    """Return the dot products of rows, [C], without a [C, V] of products."""
    return torch.bmm(x_CV.unsqueeze(1), y_CV.unsqueeze(2)).flatten()


def gain_kept(student: float, teacher: float, baseline: float) -> float | None:
    """The share of the teacher's gain over the dense baseline that the student keeps (Tables 6 to 8); None where the
    teacher has none."""
    return (student - baseline) / (teacher - baseline) if teacher > baseline else None


def compression(student: int, teacher: int) -> float:
    """The share of the teacher's parameters that the student does without (Table 7)."""
    return 1 - student / teacher
