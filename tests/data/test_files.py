"""Text from files: how it is parted and named, and one line for every fault."""

import bz2
import gzip
import json
import lzma
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from messages import lacking, naming_words
from pyarrow import parquet

from switchcli import spec
from switchcli.data.sources import files
from switchcli.data.sources.document import is_held_out
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.sources.paths import SourceFile
from switchcli.errors import DataError


def texts(path: Path | str, **options: Any) -> list[str]:
    corpus = FilesCorpus.model_validate({"paths": (str(path),), **options})
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
    names = [document.name for document in FilesCorpus(paths=("*.txt",)).documents()]
    assert names == ["prose.txt:1", "prose.txt:5"]


def test_json_lines_and_gzip(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "body": text.upper()}) for text in ("a", "b\nc")]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(("\n\n".join(lines) + "\n").encode()))
    assert texts(path) == ["a", "b\nc"]
    assert texts(path, field="body") == ["A", "B\nC"]
    names = [document.name for document in FilesCorpus(paths=(str(path),)).documents()]
    assert names == [f"{path}:1", f"{path}:3"]


def test_globs_go_down_in_order_and_give_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/deeper/c.txt"):
        (tmp_path / name).write_text(name)
    for everything in ("**/*.txt", "**"):
        corpus = FilesCorpus(paths=(str(tmp_path / "b.txt"), str(tmp_path / everything)))
        assert [document.text for document in corpus.documents()] == ["b.txt", "a.txt", "deep/deeper/c.txt"]


def test_globs_leave_out_hidden_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in ("a.txt", "._a.txt", ".cache/b.txt"):
        (tmp_path / name).write_text(name)
    assert [texts(tmp_path / everything) for everything in ("*.txt", "**/*.txt", "**")] == [["a.txt"]] * 3
    assert texts(tmp_path / ".*.txt") == ["._a.txt"]


@pytest.mark.parametrize(("name", "words"), [("a.csv", "JSON Lines"), ("a.tsv.gz", "JSON Lines"), ("a.PDF", "text")])
def test_what_is_no_text_is_refused_by_its_name(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"a,b\n") if name.endswith(".gz") else b"a,b\n")
    with pytest.raises(DataError) as raised:
        texts(tmp_path / name)
    assert not lacking(str(raised.value), f"data.corpora {name} {words}")


def test_a_name_with_brackets_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracketed")
    assert texts(tmp_path / "a[1].txt") == ["bracketed"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "data.corpora empty.txt text"),
        ("blank.txt", b"\n \n\t\n", "data.corpora blank.txt text"),
        ("latin.txt", b"fine\ncaf\xe9\n", "latin.txt:2 0xe9 8 UTF-8 iconv"),
        ("nul.txt", b"fine\nx\0y\n", "nul.txt:2 NUL 6"),
        ("zipped.txt", gzip.compress(b"text", mtime=0), "zipped.txt:1 .gz"),
        ("table.txt", b"PAR1\0\0", "table.txt:1 .parquet"),
        ("broken.txt.gz", b"not gzip", "broken.txt.gz gzipped"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "cut.txt.gz end-of-stream"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2 JSON object"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1 JSON object"),
        ("list.jsonl", b'["a"]\n', "list.jsonl:1 JSON object list"),
        ("other.jsonl", b'{"body": "a"}\n', "other.jsonl:1 'text' body `field`"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl:1 'text' int `field`"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl:1 'text' surrogate"),
        ("null.jsonl", b'{"text": "\\u0000"}\n', "null.jsonl:1 NUL 0"),
    ],
)
def test_faults_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=naming_words(words)) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_globs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=naming_words(f"data.corpora {tmp_path}/none.txt path")):
        texts(tmp_path / "none.txt")
    with pytest.raises(DataError, match=naming_words(f"data.corpora {tmp_path}/*.txt pattern")):
        texts(tmp_path / "*.txt")
    with pytest.raises(DataError, match=naming_words(f"data.corpora {tmp_path} folder {tmp_path}/*.txt")):
        texts(tmp_path)


def test_the_fingerprint_follows_content_and_options(prose: Path) -> None:
    def fingerprint(**options: str) -> str:
        return FilesCorpus.model_validate({"paths": (str(prose),), **options}).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    assert first != fingerprint(sample_by="line")
    stat = prose.stat()
    prose.touch()
    assert first == fingerprint()
    prose.write_bytes(prose.read_bytes().swapcase())
    os.utime(prose, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert first != fingerprint()


def test_held_out_documents_are_a_fixed_share_of_the_names() -> None:
    names = [f"document {index}" for index in range(20_000)]
    few = {name for name in names if is_held_out(name, 0.02)}
    more = {name for name in names if is_held_out(name, 0.05)}
    assert few < more
    assert 340 < len(few) < 460
    assert few == {name for name in reversed(names) if is_held_out(name, 0.02)}


def test_how_a_path_is_written_changes_neither_fingerprint_nor_split(
    prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prose.parent)
    ways = [
        FilesCorpus(paths=(path,)) for path in (str(prose), prose.name, f"../{prose.parent.name}/{prose.name}", "*.txt")
    ]
    assert len({corpus.fingerprint() for corpus in ways}) == 1
    assert len({tuple(document.identity for document in corpus.documents()) for corpus in ways}) == 1
    (document,) = FilesCorpus(paths=(str(prose), prose.name), sample_by="document").documents()  # each file once
    assert document.identity == document.text


# Pieces

LINES = st.lists(st.sampled_from(["", " ", "\u3000", "a", "bc def", "\u00e4\u00f6\u00fc", "x" * 30]), max_size=12)


@given(
    lines=LINES,
    end=st.sampled_from(["\n", "\r\n"]),
    last_end=st.booleans(),
    bom=st.booleans(),
    piece_bytes=st.integers(1, 40),
    sample_by=st.sampled_from(["line", "paragraph", "document"]),
)
@example(lines=["a", "b"], end="\n", last_end=False, bom=False, piece_bytes=2, sample_by="paragraph")
def test_pieces_of_any_size_hold_what_the_file_does(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    end: str,
    last_end: bool,
    bom: bool,
    piece_bytes: int,
    sample_by: str,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "text.txt"
    path.write_bytes(("\ufeff" * bom + end.join(lines) + end * last_end).encode())
    corpus = FilesCorpus.model_validate({"paths": (str(path),), "sample_by": sample_by})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", piece_bytes)
        pieces = corpus.source_shards()
        cut = [list(corpus.read(piece)) for piece in pieces]
        for piece, documents in zip(pieces, cut, strict=True):
            for document in documents:
                assert next(corpus.read(piece, document.row)) == document
    (whole,) = corpus.source_shards()
    assert [one.text for documents in cut for one in documents] == [one.text for one in corpus.read(whole)]
    assert sum(piece.size or 0 for piece in pieces) == whole.size == path.stat().st_size
    assert len({piece.name for piece in pieces}) == len(pieces)
    if sample_by == "document":
        assert len(pieces) == 1


def test_a_later_piece_names_bytes_and_its_faults_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 10)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n\n{"text": \n')
    corpus = FilesCorpus(paths=(str(path),))
    first, second, *later = corpus.source_shards()
    assert [piece.name for piece in corpus.source_shards()][:2] == [f"{path}#0", f"{path}#1"]
    assert [document.name for document in corpus.read(first)] == [f"{path}:1"]
    assert [document.name for document in corpus.read(second)] == [f"{path}@14"]
    with pytest.raises(DataError, match=naming_words("x.jsonl:4 JSON")):
        [list(corpus.read(piece)) for piece in later]


# Compression, other places


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_read_whole_and_damage_is_told(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 10)
    content = "".join(f'{{"text": "line {index * index}"}}\n' for index in range(5000)).encode()
    path = tmp_path / f"x.jsonl{ending}"
    packed = COMPRESS[ending](content[:40000]) + COMPRESS[ending](content[40000:])
    path.write_bytes(packed)
    assert len(FilesCorpus(paths=(str(path),)).source_shards()) == 1
    assert texts(path) == [f"line {index * index}" for index in range(5000)]
    for damaged in (packed[: len(packed) // 3], b"not packed at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"x\.jsonl\{ending}: .*\(.+\)"):
            texts(path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(spec, "PROTOCOLS", {**spec.PROTOCOLS, "memory": ""})
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_files_elsewhere_are_read_as_those_here(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe(
        {"/c/a.txt": b"one\n\ntwo\n", "/c/b.jsonl.gz": gzip.compress(b'{"text": "three"}\n'), "/c/d/e.txt": b"4"}
    )
    assert texts("memory://c/a.txt") == ["one", "two"]
    assert texts("memory://c/*") == ["one", "two", "three"]
    corpus = FilesCorpus(paths=("memory://c/**/*.txt",), sample_by="line")
    assert [(one.text, one.name) for one in corpus.documents()] == [
        ("one", "memory:///c/a.txt:1"), ("two", "memory:///c/a.txt:3"), ("4", "memory:///c/d/e.txt:1")
    ]  # fmt: skip
    monkeypatch.setattr(files, "SHARD_BYTES", 5)
    assert [piece.name for piece in corpus.source_shards()] == [
        "memory:///c/a.txt#0",
        "memory:///c/a.txt#1",
        "memory:///c/d/e.txt",
    ]
    assert [one.text for piece in corpus.source_shards() for one in corpus.read(piece)] == ["one", "two", "4"]
    before = corpus.fingerprint()
    assert before == corpus.fingerprint()
    store.pipe("/c/a.txt", b"one\n\nTWO\n")
    assert before != corpus.fingerprint()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://c", "data.corpora memory://c folder memory://c/*.txt"),
        ("memory://c/none.txt", "data.corpora memory://c/none.txt address"),
        ("memory://c/*.none", "data.corpora memory://c/*.none pattern"),
        ("s3://bucket/*.txt", "s3://bucket/*.txt pip install s3fs"),
        ("https://example.com/a.txt", "https://example.com/a.txt pip install 'fsspec[http]'"),
        ("zip://a.txt::https://example.com/b.zip", "https://example.com/b.zip pip install 'fsspec[http]'"),
        ("zip://a.txt::memory://c/a.txt", "data.corpora memory://c/a.txt zip"),
    ],
)
def test_what_is_not_to_be_had_elsewhere(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, url: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    store.pipe("/c/a.txt", b"one")
    with pytest.raises(DataError, match=naming_words(words)) as caught:
        FilesCorpus(paths=(url,)).source_shards()
    assert "\n" not in str(caught.value)


def test_files_of_an_archive_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def archive(one: str) -> FilesCorpus:
        with zipfile.ZipFile("texts.zip", "w") as opened:
            opened.writestr("one.txt", one)
            opened.writestr("d/two.jsonl.gz", gzip.compress(b'{"text": "two"}\n'))
        return FilesCorpus(paths=("zip://one.txt::texts.zip", f"zip://d/*::file://{tmp_path}/texts.zip"))

    corpus = archive("one\n\nmore\n")
    assert [(one.text, one.name) for one in corpus.documents()] == [
        ("one", "zip://one.txt::texts.zip:1"),
        ("more", "zip://one.txt::texts.zip:3"),
        ("two", f"zip://d/two.jsonl.gz::file://{tmp_path}/texts.zip:1"),
    ]
    before = corpus.fingerprint()
    assert archive("one\n\nmore\n").fingerprint() == before
    assert archive("one\n\nMORE\n").fingerprint() != before


# Parquet


def table(path: Path, columns: dict[str, Any], **options: Any) -> str:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


@pytest.mark.integration
@given(piece_bytes=st.integers(100, 3000), group=st.integers(1, 40))
def test_row_groups_are_shared_out(tmp_path_factory: pytest.TempPathFactory, piece_bytes: int, group: int) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    written = [f"text {index * index}" for index in range(50)]
    path = table(folder / "x.parquet", {"text": written, "more": list(range(50))}, row_group_size=group)
    corpus = FilesCorpus(paths=(path,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", piece_bytes)
        found = [(piece, list(corpus.read(piece))) for piece in corpus.source_shards()]
        for piece, documents in found:
            assert [one.row for one in documents] == list(range(len(documents)))
            assert list(corpus.read(piece, 3)) == documents[3:]
    documents = [one for _, documents in found for one in documents]
    assert [one.text for one in documents] == written
    assert [one.name for one in documents] == [f"{path}:{number}" for number in range(1, 51)]


def test_parquet_columns(tmp_path: Path) -> None:
    columns = {"body": ["a", "b", "c"], "lang": pyarrow.array(["de", "fr", "de"]).dictionary_encode(), "n": [1, 1, 2]}
    path = table(tmp_path / "x.parquet", columns)
    assert texts(path, field="body") == ["a", "b", "c"]
    assert texts(path, field="body", where={"lang": ("de",), "n": (1,)}) == ["a"]
    with pytest.raises(DataError, match=naming_words("x.parquet:1 'text' body lang n `field`")):
        texts(path)
    with pytest.raises(DataError, match=naming_words("x.parquet:1 'n' int `field`")):
        texts(path, field="n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 is not all there is")
    with pytest.raises(DataError, match=r"x\.parquet: .*\(.+\)"):
        texts(path)


def test_a_table_without_columns_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}).select([]), path)
    with pytest.raises(DataError, match=naming_words("x.parquet data.corpora")):
        texts(path)


def test_a_missing_column_is_told_whatever_the_others_hold(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"image": [b"\xff\xd8", b"\0"], "lang": ["de", "fr"]})
    with pytest.raises(DataError, match=naming_words("x.parquet:1 'text' image lang `field`")):
        texts(path)
    with pytest.raises(DataError, match=naming_words("x.parquet:2 'text' image lang `field`")):
        texts(path, where={"lang": ("fr",)})
    with pytest.raises(DataError, match=naming_words("x.parquet:1 'n' image lang `where`")):
        texts(path, field="lang", where={"n": (1,)})
    assert counted(Path(path), unreadable="skip") == ([], {"no field": 2})
    assert texts(path, field="lang") == ["de", "fr"]


# What is unreadable, and what is not wanted

BAD_JSON = (
    b'{"text": "a"}\n{"text": \n[1]\n{"body": "b"}\n{"text": 3}\ncaf\xe9\n'
    b'{"text": "\\u0000"}\n{"text": "\\ud800"}\n{"text": "z"}\n'
)


def counted(path: Path, **options: Any) -> tuple[list[str], Counter[str]]:
    corpus, dropped = FilesCorpus.model_validate({"paths": (str(path),), **options}), Counter[str]()
    return [one.text for piece in corpus.source_shards() for one in corpus.read(piece, dropped=dropped)], dropped


def test_unreadable_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(BAD_JSON)
    assert counted(tmp_path / "x.jsonl", unreadable="skip") == (
        ["a", "z"],
        {"not JSON": 2, "no field": 1, "no text": 1, "not UTF-8": 1, "a NUL byte": 1, "half a surrogate pair": 1},
    )
    (tmp_path / "x.txt").write_bytes(b"fine\n\ncaf\xe9\nof here\n\nx\0y\n\nend\n")
    assert counted(tmp_path / "x.txt", unreadable="skip") == (["fine", "end"], {"not UTF-8": 1, "a NUL byte": 1})
    binary = pyarrow.array([b"a", b"caf\xe9", None, b"z"], pyarrow.binary())
    path = table(tmp_path / "x.parquet", {"text": pyarrow.Array.from_buffers(pyarrow.string(), 4, binary.buffers())})
    assert counted(Path(path), unreadable="skip") == (["a", "z"], {"not UTF-8": 1, "no text": 1})
    with pytest.raises(DataError, match=naming_words("x.parquet:2 0xe9 3 UTF-8")):
        texts(path)


def test_rows_are_wanted_by_a_column(tmp_path: Path) -> None:
    rows = [("a", "de", 1), ("b", "fr", 1), ("c", "de", True), ("d", ["de"], 1)]
    lines = [json.dumps({"text": text, "lang": lang, "n": n}) for text, lang, n in rows]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    assert counted(path, where={"lang": ("de", "it"), "n": (1,)}) == (["a"], {"where lang": 2, "where n": 1})
    with pytest.raises(DataError, match=naming_words("x.jsonl:1 'other' text lang n `where`")):
        texts(path, where={"other": ("de",)})
    (tmp_path / "x.txt").write_text("plain")
    with pytest.raises(DataError, match=naming_words("data.corpora where x.txt columns")):
        texts(tmp_path / "x.txt", where={"lang": ("de",)})


# Languages


def test_a_corpus_of_each_language(tmp_path: Path) -> None:
    for language in ("de", "fr"):
        (tmp_path / f"{language}.txt").write_text(f"in {language}")
    corpus = FilesCorpus(paths=(f"{tmp_path}/{{language}}.txt",), languages=("fr", "de"), weight=2.0)
    assert corpus.per_language() == tuple(
        FilesCorpus(paths=(f"{tmp_path}/{language}.txt",), language=language, weight=2.0) for language in ("fr", "de")
    )
    assert [one.text for one in corpus.documents()] == ["in fr", "in de"]
    plain = FilesCorpus(paths=(f"{tmp_path}/de.txt",))
    assert plain.per_language() == (plain,)
    assert plain.fingerprint() == corpus.per_language()[1].fingerprint()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"paths": ("a.txt",), "languages": ("de",)}, "languages {language} path"),
        ({"paths": ("{language}.txt",)}, "languages {language}"),
        ({"paths": ("{language}.txt",), "language": "de", "languages": ("de",)}, "language languages one"),
        ({"paths": ("{language}.txt",), "languages": ("de", "fr", "de")}, "languages de fr de"),
        ({"paths": ("a.txt",), "weight": 0.0}, "weight 0"),
        ({"paths": ("s3://host/a@b:c/x.txt", "FTP://me:secret@host/a.txt")}, "paths.1 @"),
    ],
)
def test_languages_and_weights_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=naming_words(words)):
        FilesCorpus.model_validate(options)


def test_values_keep_their_types_from_a_recipe() -> None:
    corpus = FilesCorpus.model_validate_json('{"paths": ["a"], "where": {"n": [1, true, "1"]}}')
    assert [(type(one), one) for one in corpus.where["n"]] == [(int, 1), (bool, True), (str, "1")]


@pytest.mark.parametrize(
    ("name", "kind", "is_compressed"),
    [
        ("https://host/a.jsonl?download=true", ".jsonl", False),
        ("https://host/a.jsonl.gz?download=true#top", ".jsonl", True),
        ("a.JSONL.GZ", ".jsonl", True),
        ("a?b.txt", ".txt", False),
    ],
)
def test_the_kind_of_a_file_is_that_of_its_path_in_any_case(name: str, kind: str, is_compressed: bool) -> None:
    file = SourceFile(name, 1, "")
    assert (file.kind, file.is_compressed) == (kind, is_compressed)
