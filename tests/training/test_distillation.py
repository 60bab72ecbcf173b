"""The loss of distillation against the formula written out, by autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import DENSE, SPARSE, a_model, rows
from torch.utils.flop_counter import FlopCounterMode

from switchcli.data.batch import Batch
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import PAD
from switchcli.training.config import DistillSpec
from switchcli.training.distillation import (
    DistillationLoss,
    Teacher,
    TeacherProbs,
    compression,
    distilled_cross_entropy,
    gain_kept,
)
from switchcli.training.loss import cross_entropy

V, D, TEACHER_D = 11, 6, 4


def settings(**changed: object) -> DistillSpec:
    return DistillSpec(teacher="t", **changed)


def a_case(rows: int, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """Factors of a student's and a teacher's logits, of other widths, and targets of which some are padding."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    student = draw(rows, D).requires_grad_(), draw(V, D).requires_grad_()
    return student, (draw(rows, TEACHER_D), draw(V, TEACHER_D)), torch.randint(0, V, (rows,), generator=generator)


def factors(pair) -> tuple[torch.Tensor, VocabularyShard]:
    return pair[0], VocabularyShard(pair[1])


def naive(
    student, log_q_NV: torch.Tensor, targets_N: torch.Tensor, f: float, T: float, beta: float = 0.0
) -> torch.Tensor:
    """Section 4.2 as one reads it: all logits at once, autograd for the rest."""
    hidden_ND, vocabulary_VD = student
    logits_NV = hidden_ND @ vocabulary_VD.mT
    real_N = targets_N != PAD
    hard = F.cross_entropy(logits_NV[real_N], targets_N[real_N], reduction="sum")
    soft = soft_loss((logits_NV / T).log_softmax(-1)[real_N], log_q_NV[real_N], beta)
    return (1 - f) * hard + f * T**2 * soft


def soft_loss(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, beta: float) -> torch.Tensor:
    """Cross-entropy at beta 0, reverse KL at 1, and between them the mean of both divergences from the mixture."""
    if beta == 0.0:
        return -(log_q_NV.exp() * log_p_NV).sum()
    if beta == 1.0:
        return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
    log_m_NV = (beta * log_q_NV.exp() + (1 - beta) * log_p_NV.exp()).log()
    from_teacher, from_student = (
        F.kl_div(log_m_NV, log_NV, reduction="sum", log_target=True) for log_NV in (log_q_NV, log_p_NV)
    )
    return beta * from_teacher + (1 - beta) * from_student


@given(
    rows=st.integers(1, 17),
    chunk=st.integers(1, 18),
    f=st.sampled_from([0.0, 0.25, 1.0]),
    T=st.sampled_from([1.0, 0.5, 3.0]),
    scale=st.sampled_from([1.0, 5.0]),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_loss_and_gradients_are_those_of_the_formula(
    rows: int, chunk: int, f: float, T: float, scale: float, beta: float
) -> None:
    student, teacher, targets_N = a_case(rows, scale=scale)
    log_q_NV = (teacher[0] @ teacher[1].mT / T).log_softmax(-1)
    expected = naive(student, log_q_NV, targets_N, f, T, beta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchcli.training.loss.CHUNK", chunk)
        soft_targets = TeacherProbs(*factors(teacher), T, beta)
        found = distilled_cross_entropy(*factors(student), targets_N, soft_targets, f)
    torch.testing.assert_close(found[0], expected)
    gradients = (torch.autograd.grad(0.3 * loss, student) for loss in (found[0], expected))
    torch.testing.assert_close(*gradients)
    log_NV = (student[0] @ student[1].mT / T).log_softmax(-1)
    real_N = targets_N != PAD
    torch.testing.assert_close(found[3], soft_loss(log_q_NV[real_N], log_NV[real_N], 1.0))
    torch.testing.assert_close(found[1], naive(student, log_q_NV, targets_N, 0.0, 1.0))


def test_tokens_that_both_models_exclude_leave_jsd_and_its_gradient_finite() -> None:
    """Their probabilities are 0 in float32; in float64 they are not."""
    logits_CV, of_teacher_CV = (
        torch.tensor([row], dtype=torch.float64) for row in ([0.0, 1, -500, -120], [1.0, 0, -400, -90])
    )

    def loss(student_CV: torch.Tensor) -> torch.Tensor:
        vocabulary = VocabularyShard(torch.eye(4, dtype=student_CV.dtype))
        teacher = TeacherProbs(of_teacher_CV.to(student_CV.dtype), vocabulary, 1.0, 0.5)
        return distilled_cross_entropy(student_CV, vocabulary, torch.tensor([1]), teacher, 1.0)[0]

    found, expected = (logits_CV.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    pairs = [(loss(x), torch.autograd.grad(loss(x), x)[0]) for x in (found, expected)]
    for single, double in zip(*pairs, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-7)


def test_a_student_in_bfloat16_and_a_teacher_in_float32_keep_their_precisions() -> None:
    """bfloat16 keeps 2**-9 of a number: what is summed of a few such products is off by 2**-6 of the largest."""
    student, teacher, targets_N = a_case(200, torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    q_NV = (teacher[0].double() @ teacher[1].double().mT).softmax(-1)
    expected = naive(exact, q_NV.log(), targets_N, 0.25, 1.0)
    soft_targets = TeacherProbs(*factors(teacher), 1.0)
    for enabled, tolerance in ((False, 1e-5), (True, 2**-6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = distilled_cross_entropy(*factors(student), targets_N, soft_targets, 0.25)
        assert found.dtype == torch.float32
        assert found[0].item() == pytest.approx(expected.item(), rel=tolerance)
        rights = torch.autograd.grad(expected, exact, retain_graph=True)
        for gradient, right in zip(torch.autograd.grad(found[0], student), rights, strict=True):
            assert (gradient - right).abs().max() <= tolerance * right.abs().max()
    log_q_NV = soft_targets.log_probs(slice(None))
    assert log_q_NV.dtype == torch.float32
    torch.testing.assert_close(log_q_NV.exp().double(), q_NV, rtol=1e-5, atol=1e-7)


def test_a_model_learns_from_a_teacher_that_stays_as_it_is() -> None:
    """Loss and gradients of every weight are autograd's on both models' logits; the teacher has none, and no noise."""
    spec = settings(soft_fraction=0.4, temperature=2.0)
    student, model = a_model(DENSE, seed=1), a_model(SPARSE, seed=2)
    evaluate_by(model, "paper")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch = rows(0, 0, 4)
    loss = DistillationLoss(spec, Teacher(model, "float32"), packed=False)(student, batch)
    loss.target_sum.backward()
    found = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    real_BT = batch.targets_BT != PAD
    with torch.no_grad():
        q_BTV = (model(*batch).logits_BTV / 2).softmax(-1)
    logits_BTV = student(*batch).logits_BTV
    hard = F.cross_entropy(logits_BTV[real_BT], batch.targets_BT[real_BT], reduction="sum")
    soft = -(q_BTV * (logits_BTV / 2).log_softmax(-1))[real_BT].sum()
    expected = 0.6 * hard + 0.4 * 4 * soft
    expected.backward()
    torch.testing.assert_close(loss.target_sum, expected)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    divergence = soft + torch.xlogy(q_BTV, q_BTV)[real_BT].sum()
    sums = {"neg_log_perplexity": -hard, "soft_cross_entropy": soft, "teacher_divergence": divergence}
    for name, total in sums.items():
        assert loss.metrics[name].value().item() == pytest.approx(total.item() / int(real_BT.sum()), rel=1e-5), name


def test_a_teacher_is_asked_in_its_own_precision() -> None:
    model, batch = a_model(DENSE, seed=2).eval(), rows(0, 0, 4)
    exact, rounded = (
        Teacher(model, precision).predict(batch, packed=False, settings=settings()).log_probs(slice(None))
        for precision in ("float32", "selective")
    )
    assert 2**-12 < (rounded - exact).abs().max() < 2**-4


def test_padding_and_what_is_behind_it_count_in_neither_part() -> None:
    spec = settings()
    student, teacher = a_model(DENSE, seed=1), Teacher(a_model(SPARSE.model_copy(), seed=2).eval(), "float32")
    evaluate_by(teacher.model, "dropless")
    one, both = rows(0, 0, 1), rows(0, 0, 4)
    empty = Batch(both.inputs_BS, torch.cat([both.targets_BT[:1], torch.zeros_like(both.targets_BT[1:])]))
    losses = [DistillationLoss(spec, teacher, packed=False)(student, batch) for batch in (one, empty)]
    torch.testing.assert_close(losses[0].target_sum, losses[1].target_sum)


def test_the_teacher_costs_its_forward_pass_and_its_products_with_the_vocabulary() -> None:
    """FLOPs of a step: the student's own, and one pass of the teacher. Nothing of either is computed twice."""

    def flops(objective) -> int:
        with FlopCounterMode(display=False) as counter:
            objective(student, batch).target_sum.backward()
        return counter.get_total_flops()

    batch, model, student = rows(0, 0, 4), a_model(SPARSE, seed=2).eval(), a_model(DENSE, seed=1)
    teacher = Teacher(model, "float32")
    num_targets, V = batch.targets_BT.numel(), DENSE.vocab_size
    alone, both = flops(cross_entropy), flops(DistillationLoss(settings(), teacher, packed=False))
    with FlopCounterMode(display=False) as counter:
        teacher.predict(batch, packed=False, settings=settings()).log_probs(slice(None))
    forward = counter.get_total_flops()
    dots = 2 * 2 * num_targets * V  # the cross-entropy's and the entropy's sums over the vocabulary
    assert both == alone + forward + dots


def test_each_divergence_weighs_the_teacher_in_the_mixture() -> None:
    assert [settings(loss=loss).mixture for loss in ("forward_kl", "jsd", "reverse_kl")] == [0.0, 0.5, 1.0]
    assert settings(loss="jsd", beta=0.25).mixture == 0.25
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="beta"):
            settings(loss="jsd", beta=beta)


def test_the_share_of_the_gain_is_that_of_table_6() -> None:
    """-1.636 dense, -1.444 the teacher, -1.580 the best student: 29 %."""
    assert gain_kept(-1.580, -1.444, -1.636) == pytest.approx(0.292, abs=5e-4)
    assert gain_kept(-1.639, -1.444, -1.636) == pytest.approx(-0.016, abs=5e-4)
    assert gain_kept(-1.5, -1.636, -1.636) is None
    assert compression(223, 3800) == pytest.approx(0.94, abs=5e-3)
