"""Answering: every example gets the answer that the model gives it alone, whole; figures and averages."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from doubles import StopAfter
from ranks import MESHES, model_of, on_ranks
from tiny_model import SPARSE, a_model

from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate, label_log_likelihoods
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.runs.evaluate.eval_data import labeled_rows
from switchcli.spec import EOS
from switchcli.system.signals import StopTraining
from switchcli.tasks.config import CustomTask
from switchcli.tasks.scores import Score, Scores
from switchcli.tasks.suites import MNLI, PAPER
from switchcli.tasks.tokens import ScoredExamples, scored_examples
from switchcli.terminal.console import silent
from switchcli.training import scoring
from switchcli.training.config import ScoringSpec
from switchcli.training.measure import Evaluator
from switchcli.training.scoring import TaskPredictor, score_metrics, suite_scores


def on_cpu() -> DistributedContext:
    return DistributedContext("cpu", "float32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_unigram(["one two three four five six"], VocabSize(128)), "here")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> SwitchTransformer:
    return a_model(SPARSE.model_copy(update={"vocab_size": 128}), seed=3)


LABELS = ("five", "six", "one two three", "four")
"""Labels of different lengths."""


def the_examples(folder: Path, tokenizer: Tokenizer, labels: tuple[str, ...]) -> ScoredExamples:
    """Eleven examples with texts of one to four words and one of four targets, to answer freely or by labels."""
    rows = [{"n": " ".join(["one", "two", "three", "four"][: 1 + n % 4]), "m": LABELS[n % 4]} for n in range(11)]
    folder.mkdir(exist_ok=True)
    (folder / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = CustomTask(name="mine", input="{n}", target="m", labels=labels, validation=(str(folder / "v.jsonl"),))
    return scored_examples(spec.tasks()[0], "validation", None, tokenizer, RowLengths(32, 16), None)


@pytest.fixture
def exam(tokenizer: Tokenizer, tmp_path: Path) -> ScoredExamples:
    return the_examples(tmp_path, tokenizer, ())


@pytest.fixture
def choice(tokenizer: Tokenizer, tmp_path: Path) -> ScoredExamples:
    return the_examples(tmp_path, tokenizer, LABELS)


@pytest.mark.parametrize(("beams", "size"), [(1, 11), (3, 4), pytest.param(1, 50, marks=pytest.mark.integration)])
def test_each_answer_is_the_one_it_has_alone(
    size: int, beams: int, model: SwitchTransformer, tokenizer: Tokenizer, exam: ScoredExamples
) -> None:
    settings = ScoringSpec(batch_examples=size, decoding=Decoding(max_tokens=5, beams=beams))
    answered = TaskPredictor(model, tokenizer, on_cpu(), settings)(exam)
    assert [one.example for one in answered] == list(exam.examples)
    for number, one in list(enumerate(answered))[::3]:
        ids = torch.from_numpy(exam.padded_inputs(torch.tensor([number]).numpy()))
        with evaluating(model, "dropless"):
            alone = generate(model, ids, settings.decoding)[0]
        assert len(alone) > 1  # not cut off at the first token
        assert one.prediction == tokenizer.decode(alone.tolist())


@pytest.mark.parametrize(
    ("capacity", "text", "tasks"),
    [(None, "paper", "dropless"), ("dropless", "dropless", "dropless"), (0.01, 0.01, 0.01)],
)
def test_a_capacity_is_that_of_texts_and_answers_and_without_one_answers_are_dropless(
    capacity: Policy | None,
    text: Policy,
    tasks: Policy,
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    exam: ScoredExamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered_by = set()

    def answered(model: SwitchTransformer, inputs_BS: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        answered_by.update(layer.policy for layer in model.modules() if isinstance(layer, SwitchLayer))
        return torch.full((len(inputs_BS), 1), EOS)

    monkeypatch.setattr(scoring, "generate", answered)
    settings, targets = ScoringSpec(), {"mine": labeled_rows(exam)}
    found = Evaluator(tokenizer, {}, (exam,), settings, capacity, 2, on_cpu(), silent(), targets)(model)
    assert answered_by == {tasks}
    assert (found.target_records()["mine"]["dropped_fraction"] > 0) == (text != "dropless")
    assert found.capacity == {"text": text, "tasks": tasks}


@pytest.mark.parametrize(("beams", "tokens"), [(1, 0), (1, 4), (3, 4)])
def test_a_stop_ends_an_exam_between_two_tokens(
    tokens: int, beams: int, model: SwitchTransformer, tokenizer: Tokenizer, exam: ScoredExamples
) -> None:
    stop = StopAfter(tokens)
    settings = ScoringSpec(batch_examples=11, decoding=Decoding(max_tokens=20, beams=beams))
    with pytest.raises(StopTraining):
        TaskPredictor(model, tokenizer, on_cpu(), settings)(exam, stop)
    assert stop.looked == tokens + 1 + (tokens > 0)  # it looks again at the end of a batch


def log_p(model: SwitchTransformer, tokenizer: Tokenizer, text: str, label: str) -> float:
    """log p(label, EOS | text), one token at a time."""
    source = torch.tensor([[*tokenizer.encode(text), EOS]])
    ids = [*tokenizer.encode(label), EOS]
    total = 0.0
    with evaluating(model, "dropless"), torch.no_grad():
        for position, token in enumerate(ids):
            output = model(source, torch.tensor([ids[: position + 1]]))
            logits = output.hidden_BTD[0, position] @ output.vocabulary.weight_VD.T
            total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("size", [4, 50])
def test_by_likelihood_an_answer_is_the_most_probable_label(
    size: int, model: SwitchTransformer, tokenizer: Tokenizer, choice: ScoredExamples
) -> None:
    settings = ScoringSpec(batch_examples=size, by="likelihood")
    shown: list[int] = []
    answered = TaskPredictor(model, tokenizer, on_cpu(), settings)(choice, show=shown.append)
    assert shown[-1] == len(choice.examples)
    assert shown == sorted(shown)
    texts = {one.input for one in choice.examples}
    by_text = {text: {label: log_p(model, tokenizer, text, label) for label in LABELS} for text in texts}
    naive = [by_text[one.input] for one in choice.examples]
    assert [one.prediction for one in answered] == [max(by_label, key=by_label.__getitem__) for by_label in naive]

    inputs = torch.tensor([[*tokenizer.encode(choice.examples[3].input), EOS]])
    labels = [torch.tensor([*tokenizer.encode(label), EOS]) for label in LABELS]
    with evaluating(model, "dropless"):
        table = label_log_likelihoods(model, inputs, labels)
    assert table[0].tolist() == pytest.approx(list(naive[3].values()), abs=1e-4)


def test_of_equal_labels_the_first_one_is_the_answer(
    tokenizer: Tokenizer, choice: ScoredExamples, monkeypatch: pytest.MonkeyPatch, model: SwitchTransformer
) -> None:
    def equal(model: SwitchTransformer, inputs_BS: torch.Tensor, labels: list[torch.Tensor]) -> torch.Tensor:
        assert all(label[-1] == EOS for label in labels)
        return torch.zeros(len(inputs_BS), len(labels))

    monkeypatch.setattr(scoring, "label_log_likelihoods", equal)
    settings = ScoringSpec(by="likelihood")
    answered = TaskPredictor(model, tokenizer, on_cpu(), settings)(choice)
    assert {one.prediction for one in answered} == {"five"}


def test_a_stop_ends_a_choice_between_two_batches(
    model: SwitchTransformer, tokenizer: Tokenizer, choice: ScoredExamples
) -> None:
    settings = ScoringSpec(batch_examples=4, by="likelihood")
    was_training = model.training
    with pytest.raises(StopTraining):
        TaskPredictor(model, tokenizer, on_cpu(), settings)(choice, StopAfter(1))
    assert model.training is was_training


class OneOfTwo(DistributedContext):
    """A rank of two that run one after another: the sum over ranks is that of the tables so far."""

    def __init__(self, rank: int, tables: list[torch.Tensor]) -> None:
        super().__init__("cpu", "float32")
        self._of_two, self._tables = rank, tables

    dp_rank = property(lambda self: self._of_two)
    dp_size = property(lambda self: 2)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tables.append(tensor)
        return torch.stack(self._tables).sum(0)


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_two_ranks_share_the_batches_and_each_has_all_answers(
    by: Literal["generation", "likelihood"], model: SwitchTransformer, tokenizer: Tokenizer, choice: ScoredExamples
) -> None:
    """The second rank has one of three batches, and in the last round none of its own."""
    settings = ScoringSpec(batch_examples=4, by=by, decoding=Decoding(max_tokens=5))
    tables: list[torch.Tensor] = []
    alone, _, both = (
        TaskPredictor(model, tokenizer, context, settings)(choice)
        for context in (on_cpu(), OneOfTwo(0, tables), OneOfTwo(1, tables))
    )
    assert both == alone


BY_LIKELIHOOD = ScoringSpec(batch_examples=4, by="likelihood")


def _chosen(folder: Path, mesh: ParallelSpec, tokenizer_json: str) -> list[str]:
    context = DistributedContext("cpu", "float32", mesh)
    model, _ = model_of(SPARSE.model_copy(update={"vocab_size": 128}), context)
    tokenizer = Tokenizer.from_json(tokenizer_json)
    predictor = TaskPredictor(model, tokenizer, context, BY_LIKELIHOOD)
    return [one.prediction for one in predictor(the_examples(folder / str(context.rank), tokenizer, LABELS))]


@pytest.mark.integration
@pytest.mark.parametrize(
    "mesh", ["model 2", *(pytest.param(mesh, marks=pytest.mark.nightly) for mesh in ("data 2", "expert 2", "zero3 2"))]
)
def test_ranks_choose_the_same_labels(mesh: str, choice: ScoredExamples, tokenizer: Tokenizer, tmp_path: Path) -> None:
    world, parallel = MESHES[mesh]
    model = a_model(SPARSE.model_copy(update={"vocab_size": 128}))
    alone = TaskPredictor(model, tokenizer, on_cpu(), BY_LIKELIHOOD)(choice)
    for chosen in on_ranks(world, _chosen, tmp_path, parallel, tokenizer.to_json()):
        assert chosen == [one.prediction for one in alone]


def scores(name: str, value: float | None) -> Scores:
    score = None if value is None else Score(value, value, value)
    return Scores(name, score, {}, {}, 1, 1, 0, None, 0.0, 0.0, {})


def test_figures_leave_out_secret_answers_and_average_the_rest() -> None:
    named = {name: scores(name, value) for name, value in {"rte": 50.0, "ax": None, "cola": 20.0}.items()}
    assert score_metrics(named) == {"tasks/rte": 50.0, "tasks/cola": 20.0, "tasks/average": 35.0}
    assert score_metrics({"ax": scores("ax", None)}) == {}


def test_the_two_sets_of_mnli_count_once() -> None:
    named = {name: scores(name, value) for name, value in zip((*MNLI.tasks(), "cola"), (40.0, 60.0, 20.0), strict=True)}
    assert score_metrics(named)["tasks/average"] == (50.0 + 20.0) / 2


def test_a_suite_is_averaged_when_all_of_it_was_scored() -> None:
    named = {name: scores(name, 30.0) for name in ("trivia_qa", "natural_questions", "web_questions")}
    assert suite_scores(named) == {"closed_book_qa": 30.0}
    assert PAPER.name not in suite_scores({name: scores(name, 30.0) for name in PAPER.tasks()})
    del named["trivia_qa"]
    assert suite_scores(named) == {}
