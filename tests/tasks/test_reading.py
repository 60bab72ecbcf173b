"""Reading tasks: folders of JSON Lines as on the hub, carved validation, files of one's own; every fault in place."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from switchcli.data.sources import corpus
from switchcli.errors import DataError
from switchcli.tasks import reading
from switchcli.tasks.config import CustomTask
from switchcli.tasks.registry import TASKS


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_is_laid_out_as_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "glue/cola/train.jsonl", [{"sentence": "It is.", "label": 1, "idx": 0}])
    (found,) = reading.read_examples(TASKS["cola"], "train", "training", str(tmp_path))
    assert (found.input, found.targets) == ("cola sentence: It is.", ("acceptable",))
    with pytest.raises(
        DataError, match=r"glue/cola/validation\.jsonl: .*data\.folder.*FOLDER/glue/cola/validation\.jsonl"
    ):
        reading.read_examples(TASKS["cola"], "validation", "scoring", str(tmp_path))


@pytest.mark.parametrize(("rows", "kept"), [(10, 9), (25, 22), (4000, 3417)])
def test_validation_is_carved_off_the_end_of_training(rows: int, kept: int, tmp_path: Path) -> None:
    """T5 trains on 3,417 of WebQuestions' 3,778; of a smaller set nine tenths are left."""
    questions = [{"question": f"q{n}", "answers": [f"a{n}"]} for n in range(rows)]
    write(tmp_path / "web_questions/train.jsonl", questions)
    task = TASKS["web_questions"]
    train = reading.read_examples(task, "train", "training", str(tmp_path))
    validation = reading.read_examples(task, "validation", "scoring", str(tmp_path))
    assert [one.targets[0] for one in train + validation] == [f"a{n}" for n in range(rows)]
    assert len(train) == kept


def test_evaluation_alone(tmp_path: Path) -> None:
    assert not reading.has_split(TASKS["ax"], "train")
    assert reading.has_split(TASKS["ax"], "validation")
    assert not reading.has_split(TASKS["python_modules"], "test")
    with pytest.raises(DataError, match=r"tasks: wnli\b.*\btrain\b"):
        reading.read_examples(TASKS["wnli"], "train", "training", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ('{"label": 1, "text": "a"}', r"\bsst2\b.*'sentence'.*'label', 'text'"),
        ('{"label": 7, "sentence": "a"}', r"label: is 7\b.*\b0\b.*\b1\b"),
        ('{"label": "positive", "sentence": "a"}', r"label: is 'positive'.*\b0\b.*\b1\b"),
        ('{"label": 1, "sentence": 5}', "sentence: "),
        ('{"label": 1, "sentence": null}', "sentence: "),
        ('{"label": [1], "sentence": "a"}', "label: "),
        ("[1]", r"JSON object\b.*\blist\b"),
        ('{"label": 1', r"\bJSON\b.*line 1 column 12\b"),
    ],
)
def test_a_bad_row_is_told_with_its_file_and_line(line: str, pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "glue/sst2/train.jsonl"
    write(path, [{"sentence": "fine", "label": 0}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{pattern}"):
        reading.read_examples(TASKS["sst2"], "train", "training", str(tmp_path))


def test_an_empty_split(tmp_path: Path) -> None:
    write(tmp_path / "glue/sst2/train.jsonl", [])
    with pytest.raises(DataError, match=r"tasks: sst2: .*\btrain\b"):
        reading.read_examples(TASKS["sst2"], "train", "training", str(tmp_path))


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "glue/sst2/train.jsonl"
    write(path, [{"sentence": "fine", "label": 0}])
    before = reading.fingerprint(TASKS["sst2"], "train", str(tmp_path))
    assert before == reading.fingerprint(TASKS["sst2"], "train", str(tmp_path))
    stat = path.stat()
    write(path, [{"sentence": "FINE", "label": 0}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert before != reading.fingerprint(TASKS["sst2"], "train", str(tmp_path))


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, name, options["split"]))
        return [{"sentence": "fine", "label": 0}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert reading.read_examples(TASKS["sst2"], "validation", "scoring", None)[0].targets == ("negative",)
    assert asked == [("nyu-mll/glue", "sst2", "validation")]

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"tasks: sst2: nyu-mll/glue: .*\(no route\).*\bnetwork\b.*data\.folder\b"):
        reading.read_examples(TASKS["sst2"], "validation", "scoring", None)
    assert corpus.hub_rows is reading.hub_rows


def own(**changes: Any) -> CustomTask:
    settings = {"name": "mine", "train": ("rows.jsonl",), "input": "say {a} of {b}!", "target": "c"}
    return CustomTask(**{**settings, **changes})


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
    ("row", "pattern"),
    [
        ({"a": None, "b": "y", "c": 1}, r"^a: .*\bNone\b"),
        ({"a": {"x": 1}, "b": "y", "c": 1}, r"^a: .*\{'x': 1\}"),
        ({"a": "x", "b": "y", "c": 2}, r"^c: .*\b2\b.*\bno, yes\b"),
        ({"a": "x", "b": "y", "c": -1}, r"^c: .*-1\b.*\bno, yes\b"),
        ({"a": "x", "b": "y", "c": ["no", 2]}, r"^c: .*\b2\b.*\bno, yes\b"),
        ({"a": "x", "b": "y", "c": "maybe"}, r"^c: .*'maybe'.*\bno, yes\b"),
    ],
)
def test_its_bad_rows(row: dict[str, Any], pattern: str) -> None:
    (task,) = own(labels=("no", "yes")).tasks()
    with pytest.raises(ValueError, match=pattern):
        list(task.examples(row, "training"))


@pytest.mark.parametrize(
    ("labels", "are_indexed"),
    [
        (("no", "yes"), True),
        (("0", "1", "2"), True),
        (("one", "1st", "-", "0x1", "nan"), True),
        (("1", "2", "3", "4", "5"), False),
        (("1", "0"), False),
        (("0", "1", "3"), False),
        (("0", "01"), False),
        (("-1", "0", "1"), False),
        (("other", "2"), False),
        (("0.5", "1.0"), False),
    ],
)
def test_an_integer_answer_is_an_index_unless_it_may_be_a_label(labels: tuple[str, ...], are_indexed: bool) -> None:
    (task,) = own(labels=labels).tasks()

    def targets(answer: object) -> tuple[str, ...]:
        (example,) = task.examples({"a": "x", "b": "y", "c": answer}, "training")
        return example.targets

    fixes = r".*\bwrite the label\b" if are_indexed else r".*\bquote the number\b.*\bwrite the label\b"
    for number in range(-2, len(labels) + 2):
        if are_indexed and 0 <= number < len(labels):
            assert targets(number) == (labels[number],)
        else:
            with pytest.raises(ValueError, match=rf"^c: .*(?<!\d){number}\b{fixes}"):
                targets(number)
    assert [targets(label) for label in labels] == [(label,) for label in labels]
    with pytest.raises(ValueError, match=r"^c: True\b.*\blabels\b"):  # which Python takes for 1
        targets(True)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"name": "rte"}, r"\bname\b.*\brte\b"),
        ({"name": "a/b"}, r"\bname\n.*\bpattern\b"),
        ({"input": "no field"}, r"\binput\b.*'no field'.*\{text\}"),
        ({"metrics": ("bleuu",)}, r"\bmetrics\b.*\bbleuu\b.*\bbleu\b"),
        ({"metrics": ("f1",)}, r"\bmetrics\b.*\bf1\b.*\b2 labels\b.*\b0\b"),
        ({"metrics": ("matthews",), "labels": ("one",)}, r"\bmetrics\b.*\bmatthews\b.*\blabels\b.*\b1\b"),
    ],
)
def test_its_settings(changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        own(**changes)
