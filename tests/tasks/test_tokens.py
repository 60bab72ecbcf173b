"""Tasks as ids: the cache, what is cut, and batches that do not depend on who reads them."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.errors import DataError
from switchcli.spec import EOS, PAD
from switchcli.tasks import tokens
from switchcli.tasks.config import CustomTask
from switchcli.tasks.registry import TASKS
from switchcli.tasks.task import Task

T = TypeVar("T")
LENGTHS = RowLengths(32, 16)


def quietly(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    return iter(items)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "task says one two three four five a b c d e </s> and <extra_id_0> are no words here"
    return Tokenizer(train_unigram([text], VocabSize(256)), "here")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    rows = [
        {"n": " ".join(["one", "two", "three"][: 1 + n % 3] * (1 + n % 7)), "m": f"a {'b ' * (n % 4)}"}
        for n in range(40)
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: (str(tmp_path / f"{split}.jsonl"),) for split in ("train", "validation")}
    return CustomTask(name="mine", input="task says {n}", target="m", **files).tasks()[0]


def test_training_examples_come_from_the_cache(
    task: Task, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    ids = first.packed.inputs.tokens
    assert (ids == EOS).sum() == 40
    monkeypatch.setattr(tokens, "read_examples", lambda *arguments: pytest.fail("read again"))
    again = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    assert again.identity == first.identity
    np.testing.assert_array_equal(again.packed.example_X, first.packed.example_X)


def test_other_rows_are_another_cache(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + '{"n": "four", "m": "c"}\n')
    other = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    assert other.identity != first.identity
    assert len(other.packed.example_X) == 41


def test_another_template_or_tokenizer_is_another_cache(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    (other,) = CustomTask(name="mine", input="says {n}", target="m", train=(str(tmp_path / "train.jsonl"),)).tasks()
    again = tokens.packed_task(other, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)
    assert again.identity != first.identity
    smaller = Tokenizer(train_unigram(["task says a b c one two three"], VocabSize(150)), "here")
    again = tokens.packed_task(task, None, smaller, LENGTHS, 0, tmp_path / "cache", quietly)
    assert again.identity != first.identity


def test_special_tokens_spelt_out_in_a_text_are_none(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"n": "</s> <extra_id_0> <pad>", "m": "</s>"}) + "\n")
    found = tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly).packed
    for store in (found.inputs, found.targets):
        assert (store.tokens == EOS).sum() == 1
        assert not np.isin(store.tokens, [PAD, *tokenizer.sentinels]).any()


def test_an_answer_is_needed_to_train(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"n": "one", "m": null}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: tasks: mine: m: .*answer"):
        tokens.packed_task(task, None, tokenizer, LENGTHS, 0, tmp_path / "cache", quietly)


def test_batches_hold_every_example_once_the_longest_first(task: Task, tokenizer: Tokenizer) -> None:
    exam = tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS, None)
    batches = list(exam.batches(7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5]
    assert sorted(np.concatenate(batches).tolist()) == list(range(40))
    for batch in batches:
        rows = exam.padded_inputs(batch)
        assert rows.shape[1] % tokens.BUCKET == 0
        assert rows.shape[1] <= LENGTHS.inputs
        for number, row in zip(batch, rows, strict=True):
            ids = tokenizer.encode_batch([exam.examples[number].input])[0]
            wanted = [*ids[: LENGTHS.inputs - 1], EOS]
            assert row.tolist() == wanted + [PAD] * (len(row) - len(wanted))
    sizes = [len(tokenizer.encode_batch([exam.examples[number].input])[0]) + 1 for number in np.concatenate(batches)]
    assert sizes == sorted(sizes, reverse=True)
    for limit in (LENGTHS.inputs, sizes[0], sizes[0] - 1):
        exam = tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS._replace(inputs=limit), None)
        assert exam.num_truncated == sum(size > limit for size in sizes)
    assert sizes[0] > LENGTHS.inputs


def test_a_limit_draws_the_same_examples_each_time(task: Task, tokenizer: Tokenizer) -> None:
    few = [tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS, 9).examples for _ in range(2)]
    every = tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS, None).examples
    assert few[0] == few[1]
    assert len(few[0]) == 9
    assert few[0] != every[:9]  # by lot: a set may be sorted


def test_a_limit_draws_all_answers_to_a_question_together(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Else a question with one of its answers left would be right more easily (MultiRC)."""
    multirc = TASKS["multirc"]
    rows = [
        {"paragraph": "p", "question": f"q{n // 5}", "answer": f"a{n}", "label": 1,
         "idx": {"paragraph": 0, "question": n // 5, "answer": n}}
        for n in range(100)
    ]  # fmt: skip
    path = tmp_path / "super_glue/multirc/validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = tokens.scored_examples(multirc, "validation", str(tmp_path), tokenizer, LENGTHS, 23)
    assert len(exam.examples) == 20
    counts = Counter(one.unit for one in exam.examples)
    assert set(counts.values()) == {5}


def test_secret_answers_have_no_cross_entropy(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"n": "one", "m": null}\n{"n": "two", "m": "b"}\n')
    exam = tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS, None)
    assert (len(exam.examples), len(exam.packed.example_X)) == (2, 1)
    (tmp_path / "validation.jsonl").write_text('{"n": "one", "m": null}\n')
    assert tokens.scored_examples(task, "validation", None, tokenizer, LENGTHS, None).packed.num_rows == 0
