"""Preparation: the same ids as encoding each document, cached whole or not at all."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from switchcli.data import prepare as module
from switchcli.data.corpus import Files
from switchcli.data.document import is_held_out
from switchcli.data.prepare import Prepared, Track, default_cache
from switchcli.data.spec import DataSpec
from switchcli.data.store import StoreWriter, TokenStore, is_whole
from switchcli.data.tokenizer import Tokenizer, TrainedTokenizer
from switchcli.errors import CheckpointError, DataError


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSpec:
    monkeypatch.chdir(tmp_path)  # documents bear the path as it is given: a relative one splits them the same each time
    path = Path("text.txt")
    path.write_text("".join(f"line {index} tells of the number {index * index}, and no more\n" for index in range(400)))
    files = Files(paths=(str(path),), sample_by="line")
    return DataSpec(corpora=(files,), tokenizer=TrainedTokenizer(vocab_size=200), held_out_fraction=0.1)


def untracked(items: Iterable[object], label: str, total: int | None) -> Iterator[object]:
    return iter(items)


def prepare(spec: DataSpec, cache: Path, track: Track = untracked, tokenizer: Tokenizer | None = None) -> Prepared:
    return module.prepare(spec, cache, track, tokenizer)


def no_reading(items: Iterable[object], label: str, total: int | None) -> NoReturn:
    raise AssertionError(f"{label}: it is in the cache")


def same(a: Prepared, b: Prepared) -> bool:
    stores = ((a.train, b.train), (a.held_out, b.held_out))
    return a.tokenizer.sha256 == b.tokenizer.sha256 and all(
        np.array_equal(x.tokens, y.tokens) and np.array_equal(x.offsets, y.offsets) for x, y in stores
    )


def test_stores_hold_each_document_in_its_part(spec: DataSpec, tmp_path: Path) -> None:
    prepared = prepare(spec, tmp_path / "cache")
    for store, held_out in ((prepared.train, False), (prepared.held_out, True)):
        documents = [d for d in spec.corpora[0].documents() if is_held_out(d.identity, 0.1) == held_out]
        assert store.num_documents == len(documents)
        assert store.tokens.dtype == np.uint16
        for index, document in enumerate(documents):
            ids = store.tokens[store.offsets[index] : store.offsets[index + 1]]
            assert ids.tolist() == prepared.tokenizer.encode(document.text)
    assert 20 < prepared.held_out.num_documents < 60


def test_the_second_time_reads_nothing(spec: DataSpec, tmp_path: Path) -> None:
    labels = []

    def track(items: Iterable[object], label: str, total: int | None) -> Iterator[object]:
        labels.append(label)
        return iter(items)

    first = prepare(spec, tmp_path / "cache", track)
    assert labels == ["reading for a vocabulary", "tokenising"]
    assert same(first, prepare(spec, tmp_path / "cache", no_reading))


def test_the_identity_is_of_the_text_alone(spec: DataSpec, tmp_path: Path) -> None:
    first = prepare(spec, tmp_path / "cache")
    path = Path(spec.corpora[0].paths[0])
    os.utime(path, ns=(0, 0))
    assert module._key(spec, None) not in {folder.name for folder in (tmp_path / "cache" / "tokens").iterdir()}
    assert prepare(spec, tmp_path / "cache").identity == prepare(spec, tmp_path / "moved").identity == first.identity
    assert prepare(spec.model_copy(update={"held_out_fraction": 0.2}), tmp_path / "cache").identity != first.identity
    path.write_text(path.read_text().replace("line 7 ", "line 8 "))
    assert prepare(spec, tmp_path / "cache", tokenizer=first.tokenizer).identity != first.identity


def test_a_given_tokenizer_is_used(spec: DataSpec, tmp_path: Path) -> None:
    other = TrainedTokenizer(vocab_size=180).load(lambda: {"": spec.corpora[0].documents()})
    prepared = prepare(spec, tmp_path / "cache", tokenizer=other)
    assert prepared.tokenizer.sha256 == other.sha256
    assert same(prepared, prepare(spec, tmp_path / "cache", no_reading, other))


def test_whatever_matters_makes_another_folder(spec: DataSpec, tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"held_out_fraction": 0.2},
        {"tokenizer": TrainedTokenizer(vocab_size=210)},
        {"corpora": (Files(paths=spec.corpora[0].paths, sample_by="paragraph"),)},
    ]
    keys = {module._key(spec.model_copy(update=change), None) for change in changes}
    assert len(keys) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest", "not json", "no manifest"])
def test_a_damaged_cache_is_made_anew(spec: DataSpec, tmp_path: Path, damage: str) -> None:
    first = prepare(spec, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    tokens, manifest = folder / "train" / "tokens.npy", folder / "manifest.json"
    content = bytearray(tokens.read_bytes())
    kept = np.array(first.train.tokens)
    first = first._replace(train=TokenStore(kept, first.train.offsets))
    tokens.unlink()  # so that the array above keeps its file
    match damage:
        case "flip":
            content[-1] ^= 1
            tokens.write_bytes(content)
        case "cut":
            tokens.write_bytes(content[:-2])
        case "manifest":
            tokens.write_bytes(content)
            manifest.write_text(manifest.read_text().replace("tokens", "t0kens", 1))
        case "not json":
            tokens.write_bytes(content)
            manifest.write_text("[1]")
        case "no manifest":
            tokens.write_bytes(content)
            manifest.unlink()
    assert not is_whole(folder)
    assert same(first, prepare(spec, tmp_path / "cache"))
    assert is_whole(folder)
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [folder.name]


def test_an_interruption_leaves_nothing(spec: DataSpec, tmp_path: Path) -> None:
    def stop(items: Iterable[object], label: str, total: int | None) -> Iterator[object]:
        for index, item in enumerate(items):
            if label == "tokenising" and index == 50:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, tmp_path / "cache", stop)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    (tmp_path / "cache" / "tokens" / ".partial-killed").mkdir()  # what SIGKILL leaves harms nothing
    prepare(spec, tmp_path / "cache")


def test_two_at_once_agree(spec: DataSpec, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare(spec, tmp_path / "cache"), range(2))
    assert same(first, second)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_the_loser_of_a_race_takes_the_winners(spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = prepare(spec, tmp_path / "cache")
    answers = iter([False, True])
    monkeypatch.setattr(module, "is_whole", lambda folder: next(answers))
    assert same(winner, prepare(spec, tmp_path / "cache"))


def test_a_full_disk_and_a_cache_that_is_no_folder(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: Not a directory: .*SWITCHCLI_CACHE"):
        prepare(spec, tmp_path / "file")

    def full(self: StoreWriter, ids: object, *, starts_document: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        prepare(spec, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_part_is_refused(spec: DataSpec, tmp_path: Path, fraction: float) -> None:
    tokenizer = TrainedTokenizer(vocab_size=200).load(lambda: {"": spec.corpora[0].documents()})
    with pytest.raises(DataError, match=r"held_out_fraction .* of 400 documents leaves"):
        prepare(spec.model_copy(update={"held_out_fraction": fraction}), tmp_path / "cache", tokenizer=tokenizer)


def test_long_documents_are_encoded_in_parts(spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(spec, tmp_path / "whole")
    monkeypatch.setattr(module, "PART_CHARACTERS", 16)
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 64)
    assert same(whole, prepare(spec, tmp_path / "parts")), "a cut at a space changes no id"
    assert list(module._cut("x" * 40)) == ["x" * 16, "x" * 16, "x" * 8]
    assert list(module._cut("ab " * 10)) == ["ab ab ab ab ab", "ab ab ab ab ab "]


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", 2**16 + 1) as writer:
        writer.add(np.array([2**16, 5]), starts_document=True)
        writer.add(np.array([], dtype=np.int64), starts_document=True)
        writer.add(np.array([7]), starts_document=True)
        writer.add(np.array([8]), starts_document=False)
    store = TokenStore.open(tmp_path / "store")
    assert (store.tokens.dtype, store.tokens.tolist()) == (np.uint32, [2**16, 5, 7, 8])
    assert store.offsets.tolist() == [0, 2, 4]
    assert (store.num_documents, store.num_tokens) == (2, 4)


def test_the_manifest_says_what_is_in_it(spec: DataSpec, tmp_path: Path) -> None:
    prepared = prepare(spec, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    manifest = json.loads(json.loads((folder / "manifest.json").read_text())["manifest"])
    assert manifest["tokenizer"] == prepared.tokenizer.sha256
    assert manifest["train"] == {"documents": prepared.train.num_documents, "tokens": prepared.train.num_tokens}


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHCLI_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("SWITCHCLI_CACHE")
    assert default_cache() == Path.home() / ".cache" / "switchcli"
