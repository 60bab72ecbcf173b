"""Text from files: how it is parted and named, and one line for every fault."""

import gzip
import json
import os
from pathlib import Path

import pytest

from switchcli.data.document import is_held_out
from switchcli.data.files import Files
from switchcli.errors import DataError


def texts(path: Path | str, **options: str) -> list[str]:
    corpus = Files.model_validate({"paths": (str(path),), **options})
    return [document.text for document in corpus.documents()]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n")
    return path


def test_text_is_parted_as_asked(prose: Path) -> None:
    assert texts(prose) == ["one\ntwo", "three"]
    assert texts(prose, sample_by="line") == ["one", "two", "three"]
    assert texts(prose, sample_by="document") == ["one\ntwo\n\n \nthree"]


def test_documents_are_named_by_the_path_as_given_and_the_line(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prose.parent)
    names = [document.name for document in Files(paths=("*.txt",)).documents()]
    assert names == ["prose.txt:1", "prose.txt:5"]


def test_json_lines_and_gzip(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "body": text.upper()}) for text in ("a", "b\nc")]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(("\n\n".join(lines) + "\n").encode()))
    assert texts(path) == ["a", "b\nc"]
    assert texts(path, field="body") == ["A", "B\nC"]
    names = [document.name for document in Files(paths=(str(path),)).documents()]
    assert names == [f"{path}:1", f"{path}:3"]


def test_globs_go_down_in_order_and_give_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/deeper/c.txt"):
        (tmp_path / name).write_text(name)
    corpus = Files(paths=(str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt")))
    assert [document.text for document in corpus.documents()] == ["b.txt", "a.txt", "deep/deeper/c.txt"]


def test_a_name_with_brackets_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracketed")
    assert texts(tmp_path / "a[1].txt") == ["bracketed"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text in these files"),
        ("blank.txt", b"\n \n\t\n", "no text in these files"),
        ("latin.txt", b"fine\ncaf\xe9\n", r"latin.txt:2: byte 0xe9 at offset 8 is not UTF-8.*iconv"),
        ("nul.txt", b"fine\nx\0y\n", r"nul.txt:2: a NUL byte at offset 6"),
        ("broken.txt.gz", b"not gzip", "cannot be read.*gzip"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken.jsonl:2: not JSON .*one whole JSON object a line"),
        ("deep.jsonl", b"[" * 200_000, r"deep.jsonl:1: not JSON"),
        ("list.jsonl", b'["a"]\n', r"list.jsonl:1: a JSON object is needed in each line, this is a list"),
        ("other.jsonl", b'{"body": "a"}\n', r"other.jsonl:1: no field 'text' \(fields here: body\)"),
        ("number.jsonl", b'{"text": 3}\n', r"number.jsonl:1: field 'text' is a int, text is needed"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', r"half.jsonl:1: field 'text' holds half a surrogate pair"),
        ("null.jsonl", b'{"text": "\\u0000"}\n', r"null.jsonl:1: a NUL byte"),
    ],
)
def test_faults_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_globs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: no such file .*mend the path"):
        texts(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"\*.txt: no file matches .*mend the pattern"):
        texts(tmp_path / "*.txt")
    with pytest.raises(DataError, match="is a folder: name the files in it"):
        texts(tmp_path)


def test_the_fingerprint_follows_content_and_options(prose: Path) -> None:
    def fingerprint(**options: str) -> str:
        return Files.model_validate({"paths": (str(prose),), **options}).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    assert first != fingerprint(sample_by="line")
    os.utime(prose, ns=(0, 0))
    assert first != fingerprint()


def test_held_out_documents_are_a_fixed_share_of_the_names() -> None:
    names = [f"document {index}" for index in range(20_000)]
    few = {name for name in names if is_held_out(name, 0.02)}
    more = {name for name in names if is_held_out(name, 0.05)}
    assert few < more
    assert 340 < len(few) < 460
    assert few == {name for name in reversed(names) if is_held_out(name, 0.02)}


def test_the_fingerprint_follows_the_path_as_given(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the documents, and their names say which are held out."""
    monkeypatch.chdir(prose.parent)
    given = [Files(paths=(path,)).fingerprint() for path in (str(prose), prose.name, prose.name)]
    assert given[0] != given[1] == given[2]
