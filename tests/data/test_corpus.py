"""The embedded corpus, and the hub's without a network."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from switchcli.data import python_stdlib
from switchcli.data.corpus import Hub, PythonStdlib
from switchcli.errors import DataError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little standard library in place of the real one."""
    files = {
        "ast.py": '"""Trees."""\nclass A:\n  """A class."""\n  def f(self): """A method."""\ndef g(): """G."""\n',
        "pydoc_data/topics.py": "topics = {'with': 'The with statement', 'assert': 'The assert statement'}\n",
        "silent.py": "x = 1\n",
        "latin.py": "# coding: latin-1\n'''caf\u00e9'''\n",
        "broken.py": "def\n",
        "half.py": "'''\\ud800 half'''\n",
        "test/test_a.py": '"""A test."""\n',
        "json/tests/t.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not ours."""\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(python_stdlib, "library_root", lambda: tmp_path)
    return tmp_path


def test_topics_and_docstrings_in_order(library: Path) -> None:
    assert [tuple(document) for document in PythonStdlib().documents()] == [
        ("topic assert", "The assert statement"),
        ("topic with", "The with statement"),
        ("module ast.py", "Trees.\n\nA class.\n\nA method.\n\nG."),
        ("module half.py", "? half"),
        ("module latin.py", "caf\u00e9"),
    ]


def test_sources_take_the_place_of_docstrings_under_the_same_names(library: Path) -> None:
    found = {document.name: document.text for document in PythonStdlib(sources=True).documents()}
    assert found["module silent.py"] == "x = 1\n"
    assert found["module latin.py"].endswith("'''caf\u00e9'''\n")
    assert {"topic with", "module ast.py", "module broken.py"} < set(found)
    assert not any("test" in name or "other" in name for name in found)


def test_a_python_without_topics_has_the_modules(library: Path) -> None:
    before = PythonStdlib().fingerprint()
    (library / "pydoc_data" / "topics.py").unlink()
    assert next(PythonStdlib().documents()).name == "module ast.py"
    assert PythonStdlib().fingerprint() != before


def test_the_fingerprint_follows_options_and_files(library: Path) -> None:
    first = PythonStdlib().fingerprint()
    assert first == PythonStdlib().fingerprint() != PythonStdlib(sources=True).fingerprint()
    (library / "more.py").write_text("'''More.'''")
    assert first != PythonStdlib().fingerprint()


def test_what_is_left_out_is_not_walked(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[str] = []
    scan = os.scandir

    def scandir(path: str | os.PathLike[str]) -> Any:
        visited.append(Path(path).name)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    PythonStdlib().fingerprint()
    assert "pydoc_data" in visited
    assert not python_stdlib.LEFT_OUT & set(visited)


def test_the_running_python_has_text() -> None:
    names = set()
    for document in PythonStdlib(sources=True).documents():
        names.add(document.name)
        assert document.text.strip()
    assert {"module ast.py", "module json/decoder.py"} < names
    assert not any("site-packages" in name or "/test/" in name for name in names)


def test_docstrings_are_those_of_the_module() -> None:
    path = Path(ast.__file__)
    text = python_stdlib._docstrings(path)
    assert (ast.get_docstring(ast.parse(path.read_bytes())) or "")[:40] == text[:40]


class _Rows:
    """A stand-in for `datasets.load_dataset`: remembers its arguments, gives rows or raises."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error, self.calls = rows, error, list[tuple[Any, ...]]()

    def __call__(
        self, path: str, name: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> list[dict[str, Any]]:
        self.calls.append((path, name, split, revision, streaming))
        if self.error:
            raise self.error
        return self.rows


def test_hub_asks_datasets_and_names_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _Rows([{"text": "a"}, {"text": " "}, {"text": "b"}, {"text": "c"}])
    monkeypatch.setattr("datasets.load_dataset", rows)
    corpus = Hub(path="allenai/c4", name="en", revision="abc", streaming=True, max_documents=3)
    assert [tuple(document) for document in corpus.documents()] == [
        ("allenai/c4/en/train:0", "a"),
        ("allenai/c4/en/train:2", "b"),
    ]
    assert rows.calls == [("allenai/c4", "en", "train", "abc", True)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            _Rows([], ConnectionError("Couldn't reach the hub\nlong story")),
            r"cannot be opened \(Couldn't reach the hub\)",
        ),
        (_Rows([], ValueError("Unknown split")), r"Unknown split.*check path, name, split, revision and the network"),
        (_Rows([]), "no text in column 'text' of split train"),
        (_Rows([{"body": "a"}]), r"column 'text' holds no text \(columns: body\)"),
    ],
)
def test_hub_faults(monkeypatch: pytest.MonkeyPatch, rows: _Rows, message: str) -> None:
    monkeypatch.setattr("datasets.load_dataset", rows)
    with pytest.raises(DataError, match=message) as caught:
        list(Hub(path="some/name").documents())
    assert "\n" not in str(caught.value)


def test_hub_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    corpus = Hub(path=str(folder), streaming=True)
    assert [document.text for document in corpus.documents()] == ["one", "two"]
    before = corpus.fingerprint()
    assert before == Hub(path=str(folder)).fingerprint()
    (folder / "train.jsonl").write_text('{"text": "three"}\n')
    assert corpus.fingerprint() != before
