"""Datasets of the hub without a network: by stand-ins, and by `datasets` itself on folders."""

import gzip
import json
from collections import Counter
from multiprocessing.reduction import ForkingPickler  # by which corpora travel to the processes that prepare them
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from messages import naming_words
from pydantic import ValidationError

from switchcli.data.sources import corpus as module
from switchcli.data.sources.corpus import HubCorpus, SourceShard
from switchcli.data.sources.files import FilesCorpus
from switchcli.errors import DataError

TOKEN = "hf_SecretOfTheUser0123456789"


@pytest.fixture(autouse=True)
def nothing_opened() -> None:
    module._open_dataset.cache_clear()


class _Dataset:
    """A stand-in for `datasets.load_dataset` and what it gives: remembers its arguments, gives rows or raises."""

    def __init__(self, *shards: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.shards, self.error, self.calls, self.skipped = shards, error, list[dict[str, Any]](), 0

    def __call__(self, path: str, name: str | None, **options: Any) -> Self:
        self.calls.append({"path": path, "name": name, **options})
        if self.error:
            raise self.error
        return self

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard(self, num_shards: int, index: int, contiguous: bool) -> "_Dataset":
        assert contiguous
        size, more = divmod(len(self.shards), num_shards)
        first = index * size + min(index, more)
        return _Dataset(*self.shards[first : first + size + (index < more)])

    def skip(self, count: int) -> "_Dataset":
        rows = [row for shard in self.shards for row in shard]
        return _Dataset(rows[count:])

    def __iter__(self) -> Any:
        return iter([row for shard in self.shards for row in shard])


def rows(*texts: object) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def test_it_asks_datasets_and_numbers_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _Dataset(rows("a", " ", "b"))
    monkeypatch.setattr("datasets.load_dataset", dataset)
    corpus = HubCorpus(path="allenai/c4", name="en", revision="abc", data_files=("en/*.gz",))
    found = list(corpus.documents())
    assert [(document.text, document.identity, document.row) for document in found] == [("a", "a", 0), ("b", "b", 2)]
    assert found[1].name == "allenai/c4/en/train, shard 0:2"
    (call,) = dataset.calls
    assert call == {
        "path": "allenai/c4", "name": "en", "split": "train", "data_files": ["en/*.gz"], "revision": "abc",
        "streaming": True,
    }  # fmt: skip
    (piece,) = corpus.source_shards()
    assert [document.text for document in corpus.read(piece, 1)] == ["b"]
    assert [document.text for document in corpus.read(piece, 3)] == []


@pytest.mark.parametrize("most", [1, 3, 7, 4096])
def test_pieces_share_out_the_shards(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    shards = [rows(*(f"{shard} {row}" for row in range(3))) for shard in range(7)]
    monkeypatch.setattr("datasets.load_dataset", _Dataset(*shards))
    monkeypatch.setattr(module, "MAX_SHARDS", most)
    corpus = HubCorpus(path="some/name")
    pieces = corpus.source_shards()
    assert len({piece.name for piece in pieces}) == len(pieces) == min(most, 7)
    found = [list(corpus.read(piece)) for piece in pieces]
    assert [document.text for piece in found for document in piece] == [
        row["text"] for shard in shards for row in shard
    ]
    for piece, documents in zip(pieces, found, strict=True):
        assert [document.row for document in documents] == list(range(len(documents)))
        assert list(corpus.read(piece, 2)) == documents[2:]
    if most == 3:
        assert [piece.name for piece in pieces] == ["shards 0-2", "shards 3-4", "shards 5-6"]
    with pytest.raises(DataError, match=naming_words("data.corpora some/name 9 `revision`")):
        list(corpus.read(SourceShard("shard 9", None)))


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (GatedRepoError(f"401 {TOKEN}", response=answer(401)), r"\bgated\b.*`hf auth login`.*/some/name"),
        (RepositoryNotFoundError(f"404 {TOKEN}", response=answer(404)), r"doesn't exist .*\bpath\b.*`hf auth login`"),
        (
            RevisionNotFoundError(f"404 {TOKEN}", response=answer(404)),
            r"Revision 'abc' doesn't exist.*\brevision\b",
        ),
        (HfHubHTTPError(f"500 for Bearer {TOKEN}", response=answer(500)), r"\(500 for Bearer \[token\]\).*\bnetwork\b"),
        (
            HTTPError(f"no route, {TOKEN}"),
            r"\(no route, \[token\]\).*\bpath, name, split, revision\b.*\bnetwork\b",
        ),
        (OfflineModeIsEnabled("offline"), r"\(Couldn't reach 'some/name' on the Hub .*\).*\bnetwork\b"),
    ],
)
def test_what_the_hub_answers_to_datasets(monkeypatch: pytest.MonkeyPatch, error: Exception, pattern: str) -> None:
    """`datasets` itself, with a client of the hub that is refused: what it makes of that is its own."""

    class Client:
        def __init__(self, **settings: object) -> None:
            pass

        def hf_hub_download(self, **asked: object) -> None:
            raise error

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("datasets.load._raise_if_offline_mode_is_enabled", lambda *_: None)
    monkeypatch.setattr("datasets.load.HfApi", Client)
    with pytest.raises(DataError, match=pattern) as caught:
        HubCorpus(path="some/name", revision="abc").source_shards()
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (
            ConnectionError("Couldn't reach the hub\nlong story"),
            r"some/name: .*\(Couldn't reach the hub\).*\bnetwork\b",
        ),
        (ValueError("Unknown split"), r"\(Unknown split\).*\bpath, name, split, revision\b.*\bnetwork\b"),
        (ValueError("what hf_AnotherOnesToken1 says"), r"\(what \[token\] says\)"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: Exception, pattern: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("datasets.load_dataset", _Dataset(error=error))
    with pytest.raises(DataError, match=pattern) as caught:
        list(HubCorpus(path="some/name").documents())
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_token_of_any_look_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-no-known-look")
    monkeypatch.setattr("datasets.load_dataset", _Dataset(error=OSError("of-no-known-look is no good")))
    with pytest.raises(DataError, match=r"\(\[token\] is no good\)"):
        HubCorpus(path="some/name").source_shards()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "data.corpora some/name 'text' train"),
        (rows(" "), "data.corpora some/name 'text' train"),
        ([{"body": "a"}], "some/name/train 0:0 'text' body `field`"),
        (rows(3), "some/name/train 0:0 'text' int `field`"),
    ],
)
def test_rows_without_text(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], words: str) -> None:
    monkeypatch.setattr("datasets.load_dataset", _Dataset(found))
    with pytest.raises(DataError, match=naming_words(words)):
        list(HubCorpus(path="some/name").documents())


def test_rows_of_a_language_and_rows_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = [{"text": text, "lang": lang} for text, lang in (("a", "de"), ("b", "fr"), (None, "de"), ("c", "de"))]
    monkeypatch.setattr("datasets.load_dataset", _Dataset(shard))
    corpus, dropped = HubCorpus(path="x/y", where={"lang": ("de",)}, unreadable="skip"), Counter[str]()
    (piece,) = corpus.source_shards()
    assert [(document.text, document.row) for document in corpus.read(piece, dropped=dropped)] == [("a", 0), ("c", 3)]
    assert dropped == {"where lang": 1, "no text": 1}


def write(folder: Path, shards: int, lines: int = 2) -> None:
    (folder / "en").mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        texts = [json.dumps({"text": f"{shard} {line}", "url": "u"}) + "\n" for line in range(lines)]
        (folder / "en" / f"part-{shard}.json.gz").write_bytes(gzip.compress("".join(texts).encode()))


def test_a_folder_is_read_by_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, shards=3, lines=4)
    (tmp_path / "other.jsonl").write_text('{"text": "not asked for"}\n')
    corpus = ForkingPickler.loads(ForkingPickler.dumps(HubCorpus(path=str(tmp_path), data_files="en/*.json.gz")))
    pieces = corpus.source_shards()
    assert [piece.name for piece in pieces] == ["shard 0", "shard 1", "shard 2"]
    assert [document.text for document in corpus.read(pieces[2])] == ["2 0", "2 1", "2 2", "2 3"]
    assert [(document.text, document.row) for document in corpus.read(pieces[1], 2)] == [("1 2", 2), ("1 3", 3)]
    assert len(list(corpus.documents())) == 12
    monkeypatch.setattr(module, "MAX_SHARDS", 2)
    first, second = corpus.source_shards()
    assert (first.name, second.name) == ("shards 0-1", "shard 2")
    assert [(document.text, document.row) for document in corpus.read(first, 3)] == [
        ("0 3", 3), ("1 0", 4), ("1 1", 5), ("1 2", 6), ("1 3", 7)
    ]  # fmt: skip
    with pytest.raises(DataError, match=naming_words(f"data.corpora {tmp_path} path name split revision")):
        HubCorpus(path=str(tmp_path), data_files="de/*").source_shards()


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    write(tmp_path, shards=1)
    corpus = HubCorpus(path=str(tmp_path))
    before = corpus.fingerprint()
    assert before == HubCorpus(path=str(tmp_path), weight=2.0, language="en").fingerprint()
    assert before != HubCorpus(path=str(tmp_path), unreadable="skip").fingerprint()
    write(tmp_path, shards=2)
    assert corpus.fingerprint() != before


@pytest.mark.parametrize(
    "card",
    [
        "configs: [{config_name: default, data_files: ../outside.jsonl}]",
        "configs: [{config_name: default, data_files: [{split: train, path: [train.jsonl, en/../../*.jsonl]}]}]",
        "configs: [{config_name: default, data_files: FOLDER/outside.jsonl}]",
        "configs: [{config_name: default, data_files: 'file://FOLDER/outside.jsonl'}]",
        "configs: [{config_name: default, data_files: 'https://localhost:1/outside.jsonl'}]",
        "configs: [{config_name: default, data_files: 'zip://outside.jsonl::FOLDER/outside.zip'}]",
        "configs: [{config_name: a, data_files: train.jsonl}, {config_name: b, data_dir: ..}]",
    ],
)
def test_a_folder_whose_card_names_files_elsewhere_is_refused(card: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (folder / "train.jsonl", tmp_path / "outside.jsonl"):
        path.write_text(json.dumps({"text": path.stem}) + "\n")
    card = card.replace("FOLDER", str(tmp_path))
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(DataError, match=naming_words(f"data.corpora {folder}/README.md data_files")):
        list(HubCorpus(path=str(folder)).documents())
    (folder / "README.md").rename(folder / ".huggingface.yaml")
    with pytest.raises(DataError, match=naming_words(f"data.corpora {folder}/.huggingface.yaml README.md")):
        list(HubCorpus(path=str(folder)).documents())


@pytest.mark.parametrize(
    "card",
    [
        "configs: 5",
        "configs: [3]",
        "configs: [{config_name: default, data_files: [{split: train, path: [3]}]}]",
        "dataset_info: {features: 3}",
        "dataset_info: {features: [{name: text, dtype: nonsense}]}",
        "configs: [{config_name: default, data_files: {split: train}}]",
        "configs: {a: [",
        "a: &a [*a]\n<<: [1]",
        "a: !!python/object/apply:os.system ['true']",
        "? {a: b}\n: c",
        "a: \0",
    ],
)
def test_a_card_with_values_of_other_types_is_an_error_of_the_data(card: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(DataError, match=naming_words(f"data.corpora {tmp_path}")):
        HubCorpus(path=str(tmp_path)).source_shards()


SUFFIXES = (
    *(".h5", ".lance", ".arrow", ".parquet", ".geoparquet", ".json", ".jsonl.gz", ".csv.gz", ".tsfile"),
    *(".pdb", ".cif", ".fa", ".gbk", ".nii", ".glb", ".pdf", ".mp4", ".avi", ".wav", ".eval", ".toml", ".xml"),
    *(".tar", ".tar.gz", ".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".py", ".nothing"),
)
"""Of files for which `datasets` has readers, archives it unpacks, and files that it does not know."""


@pytest.mark.parametrize(
    "content", [b"\x89HDF\r\n\x1a\n\0\xff{[<" * 40, b"PK\x03\x04 is not all there is", b"PAR1\0PAR1"]
)
def test_a_file_that_no_library_can_read_is_an_error_of_the_data(content: bytes, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        (folder / f"x{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=naming_words(f"data.corpora {folder}")) as caught:
            list(HubCorpus(path=str(folder)).documents())
        assert "\n" not in str(caught.value)
        assert "()" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        *("zip://a.txt::archive", "zip://a.txt::none.zip", "zip://none.txt::./archive", "zip://*::./folder"),
        *("gzip://a.txt::./text", "xz://a.txt::./text", "zst://a.txt::./text", "hf://", "hf://datasets/a/b/c.txt"),
        *("http://localhost:1/a.txt", "https://localhost:1/*.txt", "s3://a/b.txt", "gs://a/b", "abfs://a@b/c"),
        *("file://none.txt", "file://", "http://", "::", "zip::zip", "zip://::./text", "zip://["),
    ],
)
def test_an_address_that_cannot_be_opened_is_an_error(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the data, or a refusal to make such a corpus at all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    for make in (
        lambda: FilesCorpus(paths=(address,)),
        lambda: HubCorpus(path="json", data_files=address),
        lambda: HubCorpus(path=address),
    ):
        with pytest.raises((DataError, ValidationError)):
            list(make().documents())


@pytest.mark.parametrize(
    "data_files",
    [
        "../outside.jsonl",
        "FOLDER/outside.jsonl",
        "file://FOLDER/outside.jsonl",
    ],
)
def test_files_that_a_recipe_names_elsewhere_are_in_the_fingerprint(data_files: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "train"}\n')
    (tmp_path / "outside.jsonl").write_text('{"text": "outside"}\n')
    corpus = HubCorpus(path=str(tmp_path / "set"), data_files=data_files.replace("FOLDER", str(tmp_path)))
    assert [document.text for document in corpus.documents()] == ["outside"]
    before = corpus.fingerprint()
    (tmp_path / "outside.jsonl").write_text('{"text": "OUTSIDE"}\n')
    assert corpus.fingerprint() != before


def test_a_folder_of_the_hubs_cache_is_read_and_its_fingerprint_follows_its_blobs(tmp_path: Path) -> None:
    """In the layout of `snapshot_download`: all files are links to `blobs`, and folders may be links as well."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    (snapshot / "data").mkdir(parents=True)
    (blobs / "1").write_text("---\nconfigs: [{config_name: default, data_files: data/*.jsonl}]\n---\n")
    (blobs / "2").write_text('{"text": "a"}\n')
    (snapshot / "README.md").symlink_to("../../blobs/1")
    (snapshot / "data/part.jsonl").symlink_to("../../../blobs/2")
    corpus = HubCorpus(path=str(snapshot))
    assert [document.text for document in corpus.documents()] == ["a"]
    before = corpus.fingerprint()
    (blobs / "2").write_text('{"text": "b"}\n')
    assert corpus.fingerprint() != before
    (snapshot / "data").rename(tmp_path / "linked")
    (snapshot / "data").symlink_to("../../linked")
    (tmp_path / "linked/part.jsonl").unlink()
    (tmp_path / "linked/part.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / "linked/loop").symlink_to("..")
    before = corpus.fingerprint()
    assert [document.text for document in corpus.documents()] == ["c"]
    (tmp_path / "linked/part.jsonl").write_text('{"text": "d"}\n')
    assert corpus.fingerprint() != before


def test_a_subset_for_each_language(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _Dataset(rows("a"))
    monkeypatch.setattr("datasets.load_dataset", dataset)
    corpus = HubCorpus(
        path="allenai/c4", name="{language}", languages=("sw", "cy"), weight=3.0, where={"l": ("{language}",)}
    )
    sw, cy = corpus.per_language()
    assert sw == HubCorpus(path="allenai/c4", name="sw", language="sw", weight=3.0, where={"l": ("sw",)})
    assert (cy.name, cy.per_language()) == ("cy", (cy,))
