"""Answering: every example gets the answer that the model gives it alone, whole; figures and averages."""

import json
from pathlib import Path

import pytest
import torch
from doubles import StopAfter
from tiny import SPARSE, a_model

from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopTraining
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe.layer import evaluating
from switchcli.model.transformer import SwitchTransformer
from switchcli.tasks.config import CustomTask
from switchcli.tasks.scores import Score, Scores
from switchcli.tasks.tokens import ScoredExamples, scored_examples
from switchcli.train.scoring import ScoringSpec, TaskPredictor, score_metrics, suite_scores


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_unigram(["one two three four five six"], VocabSize(128)), "here")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> SwitchTransformer:
    return a_model(SPARSE.model_copy(update={"vocab_size": 128}), seed=3)


@pytest.fixture
def exam(tokenizer: Tokenizer, tmp_path: Path) -> ScoredExamples:
    rows = [{"n": " ".join(["one", "two", "three", "four"][: 1 + n % 4]), "m": "five"} for n in range(11)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = CustomTask(name="mine", input="{n}", target="m", validation=(str(tmp_path / "v.jsonl"),)).tasks()
    return scored_examples(task, "validation", None, tokenizer, RowLengths(32, 16), None)


@pytest.mark.fast("1-11", "3-4")
@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_answer_is_the_one_it_has_alone(
    size: int, beams: int, model: SwitchTransformer, tokenizer: Tokenizer, exam: ScoredExamples
) -> None:
    settings = ScoringSpec(batch_examples=size, decoding=Decoding(max_tokens=9, beams=beams))
    answered = TaskPredictor(model, tokenizer, DistributedContext("cpu", "float32"), settings, "dropless")(exam)
    assert [one.example for one in answered] == list(exam.examples)
    for number, one in enumerate(answered):
        ids = torch.from_numpy(exam.padded(torch.tensor([number]).numpy()))
        with evaluating(model, "dropless"):
            alone = generate(model, ids, settings.decoding)[0]
        assert len(alone) > 1  # not cut off at the first token
        assert one.prediction == tokenizer.decode(alone.tolist())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 4, 12])
def test_a_stop_ends_an_exam_between_two_tokens(
    tokens: int, beams: int, model: SwitchTransformer, tokenizer: Tokenizer, exam: ScoredExamples
) -> None:
    stop = StopAfter(tokens)
    settings = ScoringSpec(batch_examples=11, decoding=Decoding(max_tokens=20, beams=beams))
    with pytest.raises(StopTraining):
        TaskPredictor(model, tokenizer, DistributedContext("cpu", "float32"), settings, "dropless")(exam, stop)
    assert stop.looked == tokens + 1 + (tokens > 0)  # it looks again at the end of a batch


def scores(name: str, value: float | None) -> Scores:
    score = None if value is None else Score(value, value, value)
    return Scores(name, score, {}, {}, 1, 1, 0, None, 0.0, 0.0)


def test_figures_leave_out_secret_answers_and_average_the_rest() -> None:
    named = {name: scores(name, value) for name, value in {"rte": 50.0, "ax": None, "cola": 20.0}.items()}
    assert score_metrics(named) == {"tasks/rte": 50.0, "tasks/cola": 20.0, "tasks/average": 35.0}
    assert score_metrics({"ax": scores("ax", None)}) == {}


def test_a_suite_is_averaged_when_all_of_it_was_scored() -> None:
    named = {name: scores(name, 30.0) for name in ("trivia_qa", "natural_questions", "web_questions")}
    assert suite_scores(named) == {"closed_book_qa": 30.0}
    del named["trivia_qa"]
    assert suite_scores(named) == {}
