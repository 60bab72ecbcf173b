"""The embedded corpus."""

from pathlib import Path

import pytest

from switchcli.data.sources import python_stdlib
from switchcli.data.sources.corpus import PythonStdlib


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
    assert [document[:2] for document in PythonStdlib().documents()] == [
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


def test_a_module_is_held_out_by_its_name(library: Path) -> None:
    for sources in (False, True):
        corpus = PythonStdlib(sources=sources)
        found = list(corpus.documents())
        assert [document.identity for document in found] == [document.name for document in found]
        (piece,) = corpus.source_shards()
        assert all(next(corpus.read(piece, one.row)) == one for one in found)


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


def test_the_running_python_has_text() -> None:
    names = set()
    for document in PythonStdlib(sources=True).documents():
        names.add(document.name)
        assert document.text.strip()
    assert {"module ast.py", "module json/decoder.py"} < names
    assert not any("site-packages" in name or "/test/" in name for name in names)
