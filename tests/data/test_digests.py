"""Content digests: a change of content shows whatever the file's times say, and an unchanged file is not read again."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from switchcli.data.sources import digests as module
from switchcli.data.sources.corpus import HubCorpus, PythonStdlib
from switchcli.data.sources.digests import Digests
from switchcli.data.sources.files import FilesCorpus


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read."""
    found: list[Path] = []
    digest = module._digest

    def noted(path: Path, kind: str) -> Any:
        found.append(path)
        return digest(path, kind)

    monkeypatch.setattr(module, "_digest", noted)
    return found


def change_quietly(path: Path, content: bytes) -> None:
    """Change the content of a file, in place; its size and its time of modification stay."""
    stat = path.stat()
    assert len(content) == stat.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files seem to have been changed long ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)


def test_an_unchanged_file_is_read_once(
    text: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = Digests(tmp_path / "cache").of([text])
    assert Digests(tmp_path / "cache").of([text]) == first
    assert reads == [text]
    assert Digests(tmp_path / "cache", check=True).of([text]) == first
    assert reads == [text, text], "a check reads every file"


def test_a_file_that_was_just_written_is_read_again(text: Path, tmp_path: Path, reads: list[Path]) -> None:
    """Its next change could show the same time, on a file system with coarse times."""
    for _ in range(2):
        Digests(tmp_path / "cache").of([text])
    assert reads == [text, text]


def test_a_change_that_keeps_size_and_time_is_found_and_told(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = Digests(tmp_path / "cache").of([text])
    change_quietly(text, b"one two THREE")
    told: list[str] = []
    assert Digests(tmp_path / "cache", warn=told.append).of([text]) != first
    (line,) = told
    assert line.startswith(f"{text}: ")
    again: list[str] = []
    Digests(tmp_path / "cache", warn=again.append).of([text])
    assert again == [], "it is told once"


@pytest.mark.parametrize("how", ["touch", "copy", "link"])
def test_the_same_content_keeps_its_digest(
    text: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    settle(monkeypatch)
    told: list[str] = []
    first = Digests(tmp_path / "cache").of([text])
    if how == "touch":
        text.touch()
    elif how == "copy":
        text.rename(tmp_path / "other")
        shutil.copy(tmp_path / "other", text)
    else:
        os.link(text, tmp_path / "link")
    for _ in range(2):
        assert Digests(tmp_path / "cache", warn=told.append).of([text]) == first
    assert told == []
    assert reads == [text, text], "the new stat is recorded"


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"sha256:x": 1}', b"\xff", None])
def test_a_damaged_record_is_made_anew(
    text: Path, tmp_path: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = Digests(tmp_path / "cache").of([text])
    record = tmp_path / "cache/sources.json"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert Digests(tmp_path / "cache").of([text]) == first
    assert record.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_no_harm(text: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert Digests(tmp_path / "cache").of([text]) == Digests().of([text])


def test_samples_of_a_large_stream_see_what_they_cover_and_no_time(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 4)
    (whole,), (sampled,) = Digests().of([text]), Digests(sampled=True).of([text])
    assert whole.split(":")[0] != sampled.split(":")[0]
    text.touch()
    assert Digests(sampled=True).of([text]) == [sampled]  # of copies
    change_quietly(text, b"one two THREE")
    assert Digests(sampled=True).of([text]) != [sampled]
    text.write_bytes(b"one two three\n")
    assert Digests(sampled=True).of([text]) != [sampled]


def test_where_a_corpus_lies_and_when_it_was_written_does_not_count(text: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Path(shutil.copy(text, tmp_path / "elsewhere/copy.txt"))
    before = FilesCorpus(paths=(str(text),)).fingerprint(Digests())
    assert FilesCorpus(paths=(str(other),)).fingerprint(Digests()) == before
    assert FilesCorpus(paths=(f"file://{other}",)).fingerprint(Digests()) == before
    lines = other.rename(other.with_suffix(".jsonl"))
    assert FilesCorpus(paths=(str(lines),)).fingerprint(Digests()) != before, "its kind says how it is read"


def test_local_data_files_of_a_dataset_count_by_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    for corpus in (
        HubCorpus(path="json", data_files=str(path)),
        HubCorpus(path="json", data_files=(str(tmp_path / "*.jsonl"),)),
    ):
        before = corpus.fingerprint(Digests())
        change_quietly(path, b'{"text": "two"}\n')
        assert corpus.fingerprint(Digests()) != before
        change_quietly(path, b'{"text": "one"}\n')
        assert corpus.fingerprint(Digests()) == before


def test_a_library_edited_in_place_counts_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ast.py").write_text("'''Trees.'''\n")
    monkeypatch.setattr("switchcli.data.sources.python_stdlib.library_root", lambda: tmp_path)
    before = PythonStdlib().fingerprint(Digests())
    change_quietly(tmp_path / "ast.py", b"'''TREES.'''\n")
    assert PythonStdlib().fingerprint(Digests()) != before
