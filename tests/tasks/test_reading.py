"""Reading tasks: folders of JSON Lines as on the hub, carved validation, files of one's own; every fault in place."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from switchcli.data import corpus
from switchcli.data.digests import Digests
from switchcli.errors import DataError
from switchcli.tasks import reading
from switchcli.tasks.library import TASKS
from switchcli.tasks.spec import Own


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_is_laid_out_as_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "glue/cola/train.jsonl", [{"sentence": "It is.", "label": 1, "idx": 0}])
    (found,) = reading.examples(TASKS["cola"], "train", "training", str(tmp_path))
    assert (found.input, found.targets) == ("cola sentence: It is.", ("acceptable",))
    with pytest.raises(
        DataError, match=r"glue/cola/validation.jsonl: no such file: data.folder holds a set as FOLDER/"
    ):
        reading.examples(TASKS["cola"], "validation", "scoring", str(tmp_path))


@pytest.mark.parametrize(("rows", "kept"), [(10, 9), (25, 22), (4000, 3417)])
def test_validation_is_carved_off_the_end_of_training(rows: int, kept: int, tmp_path: Path) -> None:
    """T5 trains on 3,417 of WebQuestions' 3,778; of a smaller set nine tenths are left."""
    questions = [{"question": f"q{n}", "answers": [f"a{n}"]} for n in range(rows)]
    write(tmp_path / "web_questions/train.jsonl", questions)
    task = TASKS["web_questions"]
    train = reading.examples(task, "train", "training", str(tmp_path))
    validation = reading.examples(task, "validation", "scoring", str(tmp_path))
    assert [one.targets[0] for one in train + validation] == [f"a{n}" for n in range(rows)]
    assert len(train) == kept


def test_evaluation_alone(tmp_path: Path) -> None:
    assert not reading.has(TASKS["ax"], "train")
    assert reading.has(TASKS["ax"], "validation")
    assert not reading.has(TASKS["python_modules"], "test")
    with pytest.raises(DataError, match="wnli has no train split"):
        reading.examples(TASKS["wnli"], "train", "training", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"label": 1, "text": "a"}', "sst2 reads the column 'sentence', and this row has 'label', 'text'"),
        ('{"label": 7, "sentence": "a"}', "label: 7 is none of 0 to 1"),
        ('{"label": "positive", "sentence": "a"}', "label: 'positive' is none of 0 to 1"),
        ('{"label": 1, "sentence": 5}', "sentence: "),
        ('{"label": 1, "sentence": null}', "sentence: "),
        ('{"label": [1], "sentence": "a"}', "label: "),
        ("[1]", "a JSON object is needed"),
        ('{"label": 1', "not JSON"),
    ],
)
def test_a_bad_row_is_told_with_its_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "glue/sst2/train.jsonl"
    write(path, [{"sentence": "fine", "label": 0}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: ") as error:
        reading.examples(TASKS["sst2"], "train", "training", str(tmp_path))
    assert message in str(error.value)


def test_an_empty_split(tmp_path: Path) -> None:
    write(tmp_path / "glue/sst2/train.jsonl", [])
    with pytest.raises(DataError, match="sst2: no examples in train"):
        reading.examples(TASKS["sst2"], "train", "training", str(tmp_path))


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "glue/sst2/train.jsonl"
    write(path, [{"sentence": "fine", "label": 0}])
    before = reading.fingerprint(TASKS["sst2"], "train", str(tmp_path), Digests())
    assert before == reading.fingerprint(TASKS["sst2"], "train", str(tmp_path), Digests())
    stat = path.stat()
    write(path, [{"sentence": "FINE", "label": 0}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert before != reading.fingerprint(TASKS["sst2"], "train", str(tmp_path), Digests())


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, name, options["split"]))
        return [{"sentence": "fine", "label": 0}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert reading.examples(TASKS["sst2"], "validation", "scoring", None)[0].targets == ("negative",)
    assert asked == [("nyu-mll/glue", "sst2", "validation")]

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        DataError, match=r"tasks: sst2: nyu-mll/glue: the dataset cannot be opened \(no route\): .*data.folder"
    ):
        reading.examples(TASKS["sst2"], "validation", "scoring", None)
    assert corpus.hub_rows is reading.hub_rows


def own(**changes: Any) -> Own:
    settings = {"name": "mine", "train": ("rows.jsonl",), "input": "say {a} of {b}!", "target": "c"}
    return Own(**{**settings, **changes})


@pytest.mark.parametrize(
    ("row", "labels", "asked", "targets"),
    [
        ({"a": "x", "b": "y", "c": "z"}, (), "say x of y!", ("z",)),
        ({"a": "{b}", "b": 3, "c": 4.5}, (), "say {b} of 3!", ("4.5",)),  # what a field holds is no template
        ({"a": "x", "b": True, "c": ["p", "q"]}, (), "say x of True!", ("p", "q")),
        ({"a": "x", "b": "y", "c": 1}, ("no", "yes"), "say x of y!", ("yes",)),
        ({"a": "x", "b": "y", "c": "no"}, ("no", "yes"), "say x of y!", ("no",)),
        ({"a": "x", "b": "y", "c": None}, (), "say x of y!", ()),
    ],
)
def test_a_task_of_ones_own(row: dict[str, Any], labels: tuple[str, ...], asked: str, targets: tuple[str, ...]) -> None:
    (task,) = own(labels=labels).tasks()
    (example,) = task.examples(row, "scoring")
    assert (example.input, example.targets) == (asked, targets)
    assert task.columns == ("a", "b", "c")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": None, "b": "y", "c": 1}, "a: holds None"),
        ({"a": {"x": 1}, "b": "y", "c": 1}, "a: holds "),
        ({"a": "x", "b": "y", "c": 2}, "c: 2 is none of the labels no, yes"),
        ({"a": "x", "b": "y", "c": -1}, "c: -1 is none of the labels no, yes"),
        ({"a": "x", "b": "y", "c": "maybe"}, "c: 'maybe' is none of the labels no, yes"),
    ],
)
def test_its_bad_rows(row: dict[str, Any], message: str) -> None:
    (task,) = own(labels=("no", "yes")).tasks()
    with pytest.raises(ValueError, match=message):
        list(task.examples(row, "training"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rte"}, "a task or suite of that name ships"),
        ({"name": "a/b"}, "pattern"),
        ({"input": "no field"}, "must hold a field"),
        ({"metrics": ("bleuu",)}, "Did you mean bleu"),
        ({"metrics": ("f1",)}, "needs 2 labels"),
        ({"metrics": ("matthews",), "labels": ("one",)}, "needs two or more labels"),
    ],
)
def test_its_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(**changes)
