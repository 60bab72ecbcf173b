"""Digests of sources: a change of content shows whatever the file's times say, but for very large files."""

import os
import shutil
from pathlib import Path

import pytest

from switchcli.data.sources import paths as module
from switchcli.data.sources.corpus import HubCorpus, PythonStdlib
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.sources.paths import digests_of


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    return path


def change_quietly(path: Path, content: bytes) -> None:
    """Change the content of a file, in place; its size and its time of modification stay."""
    stat = path.stat()
    assert len(content) == stat.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_other_content_of_the_same_size_and_time_has_another_digest(text: Path) -> None:
    before = digests_of([text])
    change_quietly(text, b"one two THREE")
    assert digests_of([text]) != before


@pytest.mark.parametrize("how", ["touch", "copy", "link"])
def test_the_same_content_keeps_its_digest(text: Path, tmp_path: Path, how: str) -> None:
    before = digests_of([text])
    if how == "touch":
        text.touch()
    elif how == "copy":
        text.rename(tmp_path / "other")
        shutil.copy(tmp_path / "other", text)
    else:
        os.link(text, tmp_path / "link")
    assert digests_of([text]) == before


def test_of_very_large_files_size_and_times_count(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTENT_BYTES", 20)
    assert digests_of([text])[0].startswith("sha256:")
    other = tmp_path / "other.txt"
    other.write_text("four five")
    before = digests_of([text, other])
    assert before == digests_of([text, other])
    for change in (lambda: other.write_text("four five\n"), lambda: change_quietly(other, b"four FIVE\n"), text.touch):
        os.utime(other, ns=(0, 0))
        before = digests_of([text, other])
        change()
        assert digests_of([text, other]) != before


def test_where_a_corpus_lies_and_when_it_was_written_does_not_count(text: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Path(shutil.copy(text, tmp_path / "elsewhere/copy.txt"))
    before = FilesCorpus(paths=(str(text),)).fingerprint()
    assert FilesCorpus(paths=(str(other),)).fingerprint() == before
    assert FilesCorpus(paths=(f"file://{other}",)).fingerprint() == before
    lines = other.rename(other.with_suffix(".jsonl"))
    assert FilesCorpus(paths=(str(lines),)).fingerprint() != before, "its kind says how it is read"


def test_local_data_files_of_a_dataset_count_by_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    for corpus in (
        HubCorpus(path="json", data_files=str(path)),
        HubCorpus(path="json", data_files=(str(tmp_path / "*.jsonl"),)),
    ):
        before = corpus.fingerprint()
        change_quietly(path, b'{"text": "two"}\n')
        assert corpus.fingerprint() != before
        change_quietly(path, b'{"text": "one"}\n')
        assert corpus.fingerprint() == before


def test_a_library_edited_in_place_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ast.py").write_text("'''Trees.'''\n")
    monkeypatch.setattr("switchcli.data.sources.python_stdlib.library_root", lambda: tmp_path)
    before = PythonStdlib().fingerprint()
    change_quietly(tmp_path / "ast.py", b"'''TREES.'''\n")
    assert PythonStdlib().fingerprint() != before
