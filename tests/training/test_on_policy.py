"""Targets that a student generates in the step: answers as of each example alone, and the teacher's loss on them."""

import pytest
import torch
from tiny_model import DENSE, SPARSE, a_model

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.attention import segment_ids
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe.layer import evaluate_by, evaluating
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training.config import DistillSpec
from switchcli.training.distillation import Teacher
from switchcli.training.on_policy import OnPolicyLoss, answered_by

LENGTHS = [[(5, 2), (3, 3), (4, 1)], [(7, 4)], [(1, 1), (6, 5)], [(2, 12), (9, 2)], [(12, 14)]]
"""The tokens of inputs and targets, EOS included, of the examples of each row. The last row has no padding."""
SOURCE, TARGET = 14, 14
CPU = DistributedContext("cpu", "float32")


def packed(number: int = 0) -> tuple[Batch, list[list[list[int]]]]:
    """Rows of several examples, and the inputs of each example of each row."""
    generator = torch.Generator().manual_seed(number)

    def draw(length: int) -> list[int]:
        return [*torch.randint(2, SPARSE.vocab_size, (length - 1,), generator=generator).tolist(), EOS]

    def padded(examples: list[list[int]], length: int) -> list[int]:
        ids = [token for example in examples for token in example]
        return ids + [PAD] * (length - len(ids))

    inputs = [[draw(source) for source, _ in row] for row in LENGTHS]
    targets = [[draw(target) for _, target in row] for row in LENGTHS]
    rows = [[padded(row, length) for row in part] for part, length in ((inputs, SOURCE), (targets, TARGET))]
    return Batch(*map(torch.tensor, rows)), inputs


@pytest.fixture
def student() -> SwitchTransformer:
    """Its answers end after three tokens on average."""
    model = a_model(SPARSE, seed=1).train()
    with torch.no_grad():
        model.embedding[EOS] *= 4
    return model


def test_each_answer_is_the_one_it_has_alone_cut_off_where_its_share_of_the_row_ends(
    student: SwitchTransformer,
) -> None:
    batch, inputs = packed()
    torch.manual_seed(7)
    answered = answered_by(student, batch, CPU)
    assert student.training
    assert torch.equal(answered.inputs_BS, batch.inputs_BS)
    cut = number = 0
    for row, (examples, lengths) in enumerate(zip(inputs, LENGTHS, strict=True)):
        expected: list[int] = []
        share = (TARGET - sum(target for _, target in lengths)) // len(lengths)
        for example, (_, target) in zip(examples, lengths, strict=True):
            with evaluating(student, "dropless"):
                seeded = Decoding(temperature=1.0, seed=7, max_tokens=TARGET)
                example_1S = torch.tensor([example])
                answer = generate(student, example_1S, seeded, first=number, may_pad=False)[0].tolist()
            number += 1
            limit = target + share
            if EOS not in answer[:limit]:
                answer, cut = [*answer[: limit - 1], EOS], cut + 1
            expected += answer[: answer.index(EOS) + 1]
        assert answered.targets_BT[row].tolist() == expected + [PAD] * (TARGET - len(expected))
    assert 0 < cut < number, "answers of both kinds"


def test_a_student_that_prefers_padding_answers_with_tokens(student: SwitchTransformer) -> None:
    """The decoder starts with padding: with tied embeddings a fresh student repeats it."""
    with torch.no_grad():
        student.embedding[PAD] *= 30
    batch, _ = packed()
    answered = answered_by(student, batch, CPU)
    for row in answered.targets_BT.tolist():
        end = len(row) - row[::-1].index(EOS)
        assert PAD not in row[:end]


def test_answers_follow_from_the_seed_of_the_step(student: SwitchTransformer) -> None:
    batch, _ = packed()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(answered_by(student, batch, CPU).targets_BT)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_the_loss_is_the_teachers_alone_on_the_answers_weighed_as_the_batchs_own_targets(loss: str) -> None:
    spec = DistillSpec(teacher="t", soft_fraction=0.25, temperature=2.0, loss=loss, targets="student")
    student, model = a_model(DENSE, seed=1).train(), a_model(SPARSE, seed=2)
    evaluate_by(model, "dropless")
    batch, _ = packed(3)
    torch.manual_seed(5)
    answered = answered_by(student, batch, CPU)
    torch.manual_seed(5)
    found = OnPolicyLoss(spec, Teacher(model, "float32"), CPU)(student, batch)
    gradients = torch.autograd.grad(found.target_sum, [*student.parameters()])

    segments = segment_ids(*answered)
    log_p, log_q = ((one(*answered, segments).logits_BTV / 2).log_softmax(-1) for one in (student, model))
    summand = -log_q.exp() * log_p if loss == "forward_kl" else log_p.exp() * (log_p - log_q)
    real_BT = answered.targets_BT != PAD
    mean = 4 * summand[real_BT].sum() / real_BT.sum()
    expected = mean * (batch.targets_BT != PAD).sum()
    torch.testing.assert_close(found.target_sum, expected)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, [*student.parameters()]), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-4)
    assert "neg_log_perplexity" not in found.metrics, "of its own samples, it says nothing"
    divergence = (log_q.exp() * (log_q - log_p))[real_BT].sum() / real_BT.sum()
    assert found.metrics["teacher_divergence"].value().item() == pytest.approx(divergence.item(), rel=1e-4)


def test_answers_that_the_teacher_does_not_score_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets \(student\)[^\[]*soft_fraction"):
        DistillSpec(teacher="t", targets="student", soft_fraction=0.0)
