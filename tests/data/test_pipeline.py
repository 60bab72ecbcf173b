"""Preparation: the same ids as encoding each document, by any number of processes; what is whole stays whole."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from multiprocessing import active_children
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
from messages import naming_words
from tokenizers import models

from switchcli.data.config import DataSpec
from switchcli.data.prepare import pipeline as module
from switchcli.data.prepare import shards, store
from switchcli.data.prepare.cache import PrepareContext, Track, default_cache
from switchcli.data.prepare.filters import Filters
from switchcli.data.prepare.prepared_text import HELD_OUT, SPLITS, TRAIN, PreparedText
from switchcli.data.prepare.store import (
    OFFSETS,
    TOKENS,
    StoreWriter,
    TokenStore,
    is_complete,
)
from switchcli.data.sources.corpus import FilesCorpus
from switchcli.data.sources.document import is_held_out
from switchcli.data.sources.paths import stamp
from switchcli.data.text_mixture import WeightedMixing
from switchcli.data.tokenizer.tokenizer import Tokenizer, TokenizerFile, TrainedTokenizer, Wait
from switchcli.errors import CheckpointError, DataError, OutOfMemory

NUM_FILES = 6
FRACTION = 0.1
CHARACTERS = "0123456789 abcdefghijklmnopqrstuvwxyz"


class Shows:
    """Progress as it was told; `then` may do something about it."""

    def __init__(self, then: Callable[[int], None] = lambda done: None) -> None:
        self.told: list[tuple[str, int]] = []
        """Labels and pieces of what was begun."""
        self.done: list[tuple[int, int]] = []
        self._then = then

    @contextmanager
    def __call__(self, label: str, pieces: int) -> Iterator[Callable[[int, int], None]]:
        self.told.append((label, pieces))

        def show(pieces: int, tokens: int) -> None:
            self.done.append((pieces, tokens))
            self._then(pieces)

        yield show

    @property
    def num_pieces(self) -> int:
        return sum(pieces for _, pieces in self.told)


class Corpus(NamedTuple):
    """Where a spec's text lies."""

    spec: DataSpec
    cache: Path

    def context(
        self, show: Shows | None = None, track: Track | None = None, processes: int | None = 1
    ) -> PrepareContext:
        return PrepareContext(self.cache, track or untracked, show or Shows(), processes)

    def prepare(self, show: Shows | None = None, processes: int | None = 1) -> PreparedText:
        (text,) = module.prepare(self.spec, self.context(show, processes=processes)).texts.values()
        return text

    @property
    def folders(self) -> list[Path]:
        """Return the folders of the complete source shards."""
        return [path.parent for path in sorted(self.cache.glob("tokens/*/piece-*/manifest.json"))]


def untracked(items: Iterable[object], label: str, total: int | None) -> Iterator[object]:
    return iter(items)


def letters() -> Tokenizer:
    """A character is an id: nothing here hangs on how a vocabulary is trained."""
    vocabulary = [*((piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")), *((one, -1.0) for one in CHARACTERS)]
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    inner.add_special_tokens(["<extra_id_0>"])
    return Tokenizer.from_json(inner.to_str())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("letters.json").write_text(letters().to_json())
    return tmp_path


@pytest.fixture
def corpus(here: Path) -> Corpus:
    """A text in as many pieces as files: small ones of one corpus would share a piece."""
    for number in range(NUM_FILES):
        lines = (f"line {index} of file {number} tells of {index * index}\n" for index in range(60))
        Path(f"{number}.txt").write_text("".join(lines))
    corpora = tuple(FilesCorpus(paths=(f"{number}.txt",), sample_by="line") for number in range(NUM_FILES))
    tokenizer = TokenizerFile(path="letters.json")
    return Corpus(DataSpec(corpora=corpora, tokenizer=tokenizer, held_out_fraction=FRACTION), here / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name, without the record of what was compared."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != store.CHECKED]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def documents(shards: Iterable[store.TokenShard]) -> list[list[int]]:
    found = []
    for shard in shards:
        opened = shard.open()
        found += [ids.tolist() for ids in np.split(opened.tokens, opened.offsets[1:-1])]
    return found


def test_shards_hold_each_document_in_its_part(corpus: Corpus) -> None:
    text, tokenizer = corpus.prepare(), letters()
    for part, held_out in ((TRAIN, False), (HELD_OUT, True)):
        wanted = [
            document.text
            for one in corpus.spec.corpora
            for document in one.documents()
            if is_held_out(document.identity, FRACTION) == held_out
        ]
        assert documents(text.shards[part]) == [tokenizer.encode(text) for text in wanted]
        size = sum(len(text.encode()) for text in wanted)
        assert text.counts[part] == (len(wanted), size, size)  # a token a character
        assert len(text.shards[part]) == NUM_FILES
        assert all(shard.open().tokens.dtype == np.uint16 for shard in text.shards[part])
        for shard in text.shards[part]:
            assert (shard.num_documents, shard.num_tokens) == (shard.open().num_documents, shard.open().num_tokens)
    assert 15 < text.counts[HELD_OUT].documents < 60
    assert text.dropped == {}


@pytest.mark.integration
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_agree_on_every_byte(corpus: Corpus, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # off, as if it were not set
    first, alone = Shows(), corpus.prepare()
    other = corpus._replace(cache=corpus.cache.with_name("other"))
    text = other.prepare(first, processes)
    assert text.identity == alone.identity
    assert contents(other.cache / "tokens") == contents(corpus.cache / "tokens")
    assert first.told == [("tokenizing shards", NUM_FILES)]
    assert first.done[-1] == (NUM_FILES, sum(counts.tokens for counts in text.counts.values()))
    assert os.environ["PYTHONSAFEPATH"] == "", "the environment is as it was"


def test_a_vocabulary_is_trained_on_what_is_not_held_out_and_once(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    seen: list[str] = []

    def track(items: Iterable[object], label: str, total: int | None) -> Iterator[object]:
        if label != "reading sources":
            labels.append(label)
        return iter(items)

    trained = TrainedTokenizer(vocab_size=200)
    spec = corpus.spec.model_copy(update={"tokenizer": trained})
    load = TrainedTokenizer.load

    def noted(self: TrainedTokenizer, found: Callable[[], dict[str, Iterable[store.Any]]], wait: Wait) -> Tokenizer:
        texts = {label: list(of_text) for label, of_text in found().items()}
        seen.extend(document.identity for of_text in texts.values() for document in of_text)
        return load(self, lambda: texts, wait)

    monkeypatch.setattr(TrainedTokenizer, "load", noted)
    first = module.prepare(spec, corpus.context(track=track))
    assert labels == ["reading"]
    assert len(seen) == first.texts[""].counts[TRAIN].documents
    assert not any(is_held_out(identity, FRACTION) for identity in seen)
    shows = Shows()
    again = module.prepare(spec, corpus.context(shows, track))
    assert (again.tokenizer.sha256, again.identity) == (first.tokenizer.sha256, first.identity)
    assert (labels, shows.told) == (["reading"], [])


def test_the_identity_is_of_the_text_alone(corpus: Corpus) -> None:
    first, path = corpus.prepare(), Path("0.txt")
    os.utime(path, ns=(0, 0))
    shows = Shows()
    assert corpus.prepare(shows).identity == first.identity
    assert shows.told == [], "a file with the same content is not prepared again"
    moved = corpus._replace(cache=corpus.cache.with_name("moved"))
    assert moved.prepare().identity == first.identity
    path.write_text(path.read_text().replace("line 7 ", "line 8 "))
    assert corpus.prepare().identity != first.identity
    other = corpus.spec.model_copy(update={"held_out_fraction": 0.2})
    assert corpus._replace(spec=other).prepare().identity != first.identity


def test_whatever_matters_makes_another_folder_and_labels_and_weights_do_not(corpus: Corpus) -> None:
    spec, used = corpus.spec, letters()
    other = TrainedTokenizer(vocab_size=180).load(lambda: {"": spec.corpora[0].documents()})
    one = spec.corpora[0].model_copy
    changes: list[tuple[dict[str, object], Tokenizer]] = [
        ({}, used),
        ({}, other),
        ({"held_out_fraction": 0.2}, used),
        ({"filters": Filters(min_characters=5)}, used),
        ({"corpora": (one(update={"sample_by": "paragraph"}), *spec.corpora[1:])}, used),
        ({"duplicates": "drop"}, used),
    ]
    same: list[dict[str, object]] = [
        {"corpora": (one(update={"weight": 3.0, "language": "en"}), *spec.corpora[1:])},
        {"objective": spec.objective.model_copy(update={"inputs_length": 64})},
    ]

    def folder(update: dict[str, object], tokenizer: Tokenizer) -> Path:
        (text,) = module.prepare(spec.model_copy(update=update), corpus.context(), tokenizer).texts.values()
        return text.folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_check_text", lambda *_: None)  # paragraphs are few
        folders = {folder(*change) for change in changes}
    assert len(folders) == len(changes)
    assert {folder(update, used) for update in same} <= folders


# Stops


def stop_after(number: int, stop: Callable[[], None]) -> Shows:
    def then(done: int) -> None:
        if done >= number:
            stop()

    return Shows(then)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_is_whole_stays_whole_after_a_stop_and_is_not_made_again(corpus: Corpus) -> None:
    with pytest.raises(KeyboardInterrupt):
        corpus.prepare(stop_after(2, interrupt))
    first = corpus.folders
    assert [folder.name for folder in first] == ["piece-00000", "piece-00001"]
    assert {path.name for path in first[0].parent.iterdir()} == {"piece-00000", "piece-00001"}, "nothing half done"
    times = [(folder / "manifest.json").stat().st_mtime_ns for folder in first]
    (first[0].parent / f".tmp-{0:016x}-{0:016x}").mkdir()  # what SIGKILL leaves harms nothing
    shows = Shows()
    text = corpus.prepare(shows)
    assert shows.num_pieces == NUM_FILES - 2
    assert [(folder / "manifest.json").stat().st_mtime_ns for folder in first] == times
    assert text.identity == corpus._replace(cache=corpus.cache.with_name("straight")).prepare().identity


def test_what_is_wrong_with_a_tokenizer_is_told_before_any_text_is_cut(corpus: Corpus) -> None:
    def refuse(tokenizer: Tokenizer) -> None:
        raise DataError(f"of {tokenizer.vocab_size} pieces")

    shows = Shows()
    with pytest.raises(DataError, match=f"of {letters().vocab_size} pieces"):
        module.prepare(corpus.spec, corpus.context(shows)._replace(accept=refuse))
    assert shows.told == []
    assert not (corpus.cache / "tokens").exists()


def kill_one() -> None:
    active_children()[0].kill()


@pytest.mark.integration
@pytest.mark.parametrize("made", [0, 1], ids=["before a piece", "after a piece"])
def test_a_killed_worker_ends_the_others_and_the_rest_goes_on(corpus: Corpus, made: int) -> None:
    with pytest.raises(OutOfMemory, match=r"\bkilled\b.*--processes\b") as raised:
        corpus.prepare(stop_after(made, kill_one), processes=2)
    assert raised.value.exit_code == 1
    assert not active_children()
    whole = len(corpus.folders)
    assert made <= whole < NUM_FILES
    assert all(is_complete(folder) for folder in corpus.folders)
    assert not list(corpus.cache.glob("tokens/*/.tmp-*"))
    shows = Shows()
    text = corpus.prepare(shows, processes=2)
    assert shows.num_pieces == NUM_FILES - whole
    assert text.identity == corpus._replace(cache=corpus.cache.with_name("straight")).prepare().identity


@pytest.mark.integration
def test_what_one_process_meets_ends_all(corpus: Corpus) -> None:
    Path("3.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=naming_words("3.txt:2 0xe9 8 UTF-8")):
        corpus.prepare(processes=2)
    assert not active_children()
    assert all(is_complete(folder) for folder in corpus.folders)
    assert not list(corpus.cache.glob("tokens/*/.tmp-*"))


MAIN = """\
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from switchcli.data.prepare.cache import PrepareContext
from switchcli.data.prepare.pipeline import prepare
from switchcli.data.config import DataSpec

@contextmanager
def show(label, pieces):
    yield lambda done, tokens: print(done, *(process.pid for process in active_children()), flush=True)

if __name__ == "__main__":
    spec = DataSpec.model_validate_json(Path("spec.json").read_text(), strict=False)
    prepare(spec, PrepareContext(Path("cache"), lambda items, *_: iter(items), show, 2))
"""


def is_alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_it_leaves_whole_pieces_and_no_worker_behind(corpus: Corpus) -> None:
    lines = "".join(f"line {index} tells of {index * index}\n" for index in range(8_000))
    for number in range(NUM_FILES):
        Path(f"{number}.txt").write_text(f"file {number}\n{lines}")
    Path("spec.json").write_text(corpus.spec.model_dump_json())
    Path("main.py").write_text(MAIN)
    with subprocess.Popen([sys.executable, "main.py"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            whole, *workers = map(int, line.split())
            if whole:
                break
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "the workers go on for nobody"
        time.sleep(0.05)
    assert len(workers) == 2
    assert 1 <= len(corpus.folders) < NUM_FILES
    assert all(is_complete(folder) for folder in corpus.folders)


# Two processes


def test_two_at_once_agree(corpus: Corpus) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: corpus.prepare(), range(2))
    assert first.identity == second.identity
    (folder,) = (corpus.cache / "tokens").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(f"piece-{number:05}" for number in range(NUM_FILES)),
    }


# Damage


def flip(path: Path) -> None:
    """Change the last number of an array."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda folder: cut(folder / f"piece-00002/held_out-000{TOKENS}"),
    "lost": lambda folder: (folder / f"piece-00002/train-000{OFFSETS}").unlink(),
    "lost piece": lambda folder: shutil.rmtree(folder / "piece-00002"),
    "tokens": lambda folder: flip(folder / f"piece-00002/train-000{TOKENS}"),
    "offsets": lambda folder: flip(folder / f"piece-00002/train-000{OFFSETS}"),
}
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "altered": lambda folder: _alter(folder / "manifest.json"),
    "not json": lambda folder: _write(folder / "manifest.json", "[1]"),
    "lost": lambda folder: (folder / "manifest.json").unlink(),
    "foreign": lambda folder: _write(folder / "manifest.json", (folder / "piece-00001/manifest.json").read_text()),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _alter(path: Path) -> None:
    path.write_text(path.read_text().replace("tokens", "t0kens", 1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_made_anew_and_no_other(corpus: Corpus, damage: str) -> None:
    text = corpus.prepare()
    before = contents(text.folder)
    DAMAGES[damage](text.folder)
    shows = Shows()
    corpus.prepare(shows)
    assert shows.num_pieces == 1
    assert contents(text.folder) == before


@pytest.mark.parametrize("number_of_starts", [1, 2])
def test_no_flipped_bit_of_the_cache_changes_what_is_read(corpus: Corpus, number_of_starts: int) -> None:
    """Whether files have been compared before or not, and whether the run has a tokenizer or takes the recipe's own."""
    trained = TrainedTokenizer(vocab_size=150)
    spec = corpus.spec.model_copy(update={"tokenizer": trained, "duplicates": "drop"})

    def read(tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, list[list[int]]]:
        prepared = module.prepare(spec, corpus.context(), tokenizer)
        (text,) = prepared.texts.values()
        return prepared.tokenizer, documents(chain(*text.shards.values()))

    for _ in range(number_of_starts):
        tokenizer, before = read()
    random = np.random.default_rng(number_of_starts)
    paths = sorted(path for path in corpus.cache.rglob("*") if path.is_file())
    for path in random.permutation(np.array(paths))[:20]:
        content = bytearray(path.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
        found, after = read(tokenizer if random.integers(2) else None)
        assert (found.to_json(), after) == (tokenizer.to_json(), before), path


def test_damage_that_shows_in_no_time_is_found_by_a_check(corpus: Corpus) -> None:
    text = corpus.prepare()
    before = contents(text.folder)
    damaged = text.folder / f"piece-00002/train-000{TOKENS}"
    corpus.prepare()
    flip(damaged)
    record = json.loads((text.folder / store.CHECKED).read_text())
    record[f"piece-00002/{damaged.name}"] = [*stamp(damaged)]
    (text.folder / store.CHECKED).write_text(json.dumps(record))
    corpus.prepare()
    assert contents(text.folder) != before
    module.prepare(corpus.spec, corpus.context()._replace(check=True))
    assert contents(text.folder) == before


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_lost_or_foreign_manifest_is_written_anew(corpus: Corpus, damage: str) -> None:
    text = corpus.prepare()
    before = contents(text.folder)
    MANIFESTS[damage](text.folder)
    (text.folder / "piece-00002/manifest.json").write_text((text.folder / "piece-00001/manifest.json").read_text())
    shows = Shows()
    assert corpus.prepare(shows).identity == text.identity
    assert shows.num_pieces == 1
    assert contents(text.folder) == before


# Disks


def test_a_cache_that_is_no_folder(corpus: Corpus) -> None:
    Path("file").write_text("")
    with pytest.raises(CheckpointError, match=r"\bfile: .*Not a directory\b.*\bSWITCHCLI_CACHE\b"):
        corpus._replace(cache=Path("file")).prepare()


def test_a_disk_that_fills_up_keeps_what_is_whole_and_goes_on_after_room_is_made(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, add = 3000, StoreWriter.add

    def add_while_there_is_room(self: StoreWriter, ids: np.ndarray, *, starts_document: bool) -> None:
        nonlocal room
        room -= len(ids)
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, ids, starts_document=starts_document)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", add_while_there_is_room)
        with pytest.raises(CheckpointError, match=r"cache: .*No space left on device\b.*\bSWITCHCLI_CACHE\b"):
            corpus.prepare()
    first = corpus.folders
    assert first
    assert all(is_complete(folder) for folder in first)
    assert not list(corpus.cache.glob("tokens/*/.tmp-*"))
    shows = Shows()
    text = corpus.prepare(shows)
    assert shows.num_pieces == NUM_FILES - len(first)
    assert text.identity == corpus._replace(cache=corpus.cache.with_name("straight")).prepare().identity


# Texts


def test_long_documents_are_encoded_in_parts_and_stay_documents(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = " ".join(f"word{index}" for index in range(300)) + "x" * 3000
    Path("0.txt").write_text(f"{document}\nshort\n")
    monkeypatch.setattr(shards, "PART_CHARACTERS", 512)
    text, parts = corpus.prepare(), [*shards.split_text(document)]
    assert len(parts) > 8
    assert "".join(parts).replace(" ", "") == document.replace(" ", "")
    (long,) = (ids for part in SPLITS for ids in documents(text.shards[part]) if len(ids) > 1000)
    assert long == [index for part in parts for index in letters().encode(part)]
    assert sum(text.counts[part].documents for part in SPLITS) == 2 + (NUM_FILES - 1) * 60
    monkeypatch.setattr(shards, "PART_CHARACTERS", 16)
    assert list(shards.split_text("x" * 40)) == ["x" * 16, "x" * 16, "x" * 8]
    assert list(shards.split_text("ab " * 10)) == ["ab ab ab ab ab", "ab ab ab ab ab "]


def test_a_cut_at_a_space_changes_no_id_of_a_trained_vocabulary(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = corpus.spec.model_copy(update={"tokenizer": TrainedTokenizer(vocab_size=200)})
    whole = module.prepare(trained, corpus.context())
    monkeypatch.setattr(shards, "PART_CHARACTERS", 16)
    monkeypatch.setattr(shards, "CHUNK_CHARACTERS", 64)
    other = corpus._replace(cache=corpus.cache.with_name("parts"))
    assert module.prepare(trained, other.context(), whole.tokenizer).identity == whole.identity


def test_languages_are_texts_of_their_own(corpus: Corpus) -> None:
    labelled = [("de", 2.0), ("fr", 1.0), ("de", 1.0), (None, 1.0), ("fr", 1.0), (None, 1.0)]
    corpora = tuple(
        one.model_copy(update={"language": language, "weight": weight})
        for one, (language, weight) in zip(corpus.spec.corpora, labelled, strict=True)
    )
    spec = corpus.spec.model_copy(update={"corpora": corpora, "mixture": WeightedMixing()})
    shows = Shows()
    prepared = module.prepare(spec, corpus.context(shows))
    assert [*prepared.texts] == ["de", "fr", "corpus-4", "corpus-6"]
    pieces = {"de": 2, "fr": 2, "corpus-4": 1, "corpus-6": 1}
    assert shows.told == [(f"tokenizing shards of {label}", number) for label, number in pieces.items()]
    for label, numbers in (("de", (0, 2)), ("fr", (1, 4)), ("corpus-4", (3,))):
        alone = spec.model_copy(update={"corpora": tuple(corpora[one] for one in numbers)})
        (text,) = module.prepare(alone, corpus.context()).texts.values()
        assert text.identity == prepared.texts[label].identity
    assert prepared.identity not in {text.identity for text in prepared.texts.values()}
    swapped = spec.model_copy(update={"corpora": (*corpora[1:], corpora[0])})
    assert module.prepare(swapped, corpus.context()).texts["fr"].identity == prepared.texts["fr"].identity
    again = Shows()
    assert module.prepare(spec, corpus.context(again)).identity == prepared.identity
    assert again.told == []


def test_what_is_dropped_is_counted(corpus: Corpus) -> None:
    Path("0.txt").write_bytes(b"short\n" + b"caf\xe9 au lait\n" + b"long enough to stay here\n" * 3 + b"tiny\n")
    Path("1.txt").write_bytes(b"\xff\n" + b"another of the long lines\n" + b"a\n")
    corpora = tuple(one.model_copy(update={"unreadable": "skip"}) for one in corpus.spec.corpora)
    spec = corpus.spec.model_copy(update={"corpora": corpora, "filters": Filters(min_characters=10)})
    text = corpus._replace(spec=spec).prepare(processes=2)
    assert text.dropped == {"not UTF-8": 2, "shorter than min_characters": 3}
    kept = sum(text.counts[part].documents for part in SPLITS)
    assert kept == 4 + (NUM_FILES - 2) * 60


def test_filters_that_leave_nothing_say_what_they_left_out(corpus: Corpus) -> None:
    Path("0.txt").write_bytes(b"caf\xe9\n" * 1200)
    corpora = tuple(one.model_copy(update={"unreadable": "skip"}) for one in corpus.spec.corpora)
    spec = corpus.spec.model_copy(update={"corpora": corpora, "filters": Filters(min_characters=1000)})
    with pytest.raises(DataError) as raised:
        corpus._replace(spec=spec).prepare()
    assert str(raised.value).startswith("data: ")
    assert "1,200 not UTF-8" in str(raised.value)
    assert "300 shorter than min_characters" in str(raised.value)
    for number in range(NUM_FILES):
        Path(f"{number}.txt").write_text("\n")
    with pytest.raises(DataError, match=naming_words("data.corpora text")) as raised:
        corpus.prepare()
    assert not any(reason in str(raised.value) for reason in ("UTF-8", "min_characters"))


def test_duplicates_go_and_none_of_a_held_out_text_is_trained_on(corpus: Corpus) -> None:
    """Letters that the vocabulary lacks have one id: texts that differ in them alone are duplicates, on any side."""
    Path("0.txt").write_text("".join(f"\u00e9 is line {number}\n" for number in range(200)))
    Path("1.txt").write_text("".join(f"\u00fc is line {number}\n" for number in range(150, 300)))
    spec = corpus.spec.model_copy(update={"corpora": corpus.spec.corpora[:2]})
    whole = corpus._replace(spec=spec).prepare()
    found = corpus._replace(spec=spec.model_copy(update={"duplicates": "drop"})).prepare()
    assert found.dropped == {"exact duplicates": 50}
    before, after = (
        {part: [tuple(ids) for ids in documents(text.shards[part])] for part in SPLITS} for text in (whole, found)
    )
    assert {*before[TRAIN]} & {*before[HELD_OUT]}, "the case that matters is there"
    assert {*after[HELD_OUT]} == {*before[HELD_OUT]}
    assert {*after[TRAIN]} == {*before[TRAIN]} - {*before[HELD_OUT]}
    assert len(after[TRAIN]) + len(after[HELD_OUT]) == 300
    for part, all_ids in after.items():
        size = sum(map(len, all_ids))
        assert found.counts[part][:2] == (len(all_ids), size)
        assert size < found.counts[part].bytes <= size + 2 * len(all_ids)


@pytest.fixture
def mixture(corpus: Corpus) -> Corpus:
    """Three texts of two files each that share lines, and repeat some of their own."""
    draw = np.random.default_rng(3)
    for number in range(NUM_FILES):
        chosen = 80 * (number // 2) + draw.integers(0, 140, 60)
        Path(f"{number}.txt").write_text("".join(f"this is line {index}\n" for index in chosen))
    corpora = tuple(
        one.model_copy(update={"language": "abc"[number // 2]}) for number, one in enumerate(corpus.spec.corpora)
    )
    return corpus._replace(spec=corpus.spec.model_copy(update={"corpora": corpora, "mixture": WeightedMixing()}))


def test_the_first_text_of_a_mixture_keeps_a_document_as_by_comparing_each_with_each(mixture: Corpus) -> None:
    whole = module.prepare(mixture.spec, mixture.context()).texts
    spec = mixture.spec.model_copy(update={"duplicates": "drop"})
    found = module.prepare(spec, mixture.context()).texts
    earlier: list[list[int]] = []
    for label, text in whole.items():
        dropped = 0
        for part in (HELD_OUT, TRAIN):
            wanted = []
            for ids in documents(text.shards[part]):
                if ids in earlier:
                    dropped += 1
                else:
                    wanted.append(ids)
                earlier.append(ids)
            assert [ids for ids in documents(found[label].shards[part]) if ids] == wanted
        assert found[label].dropped == {"exact duplicates": dropped}
        assert dropped > 0, "the case that matters is there"
    first = spec.model_copy(update={"corpora": spec.corpora[:2]})
    assert module.prepare(first, mixture.context()).texts["a"].identity == found["a"].identity


@contextmanager
def few_files(number: int) -> Iterator[None]:
    """Let this process open about so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_search_for_duplicates_keeps_few_files_open(mixture: Corpus) -> None:
    spec = mixture.spec.model_copy(update={"duplicates": "drop"})
    expected = module.prepare(spec, mixture.context()).identity
    shutil.rmtree(mixture.cache)
    module.prepare(mixture.spec, mixture.context())
    with few_files(10):  # there are 12 shards
        assert module.prepare(spec, mixture.context()).identity == expected


def test_what_a_text_of_a_mixture_keeps_hangs_on_the_texts_before_it(mixture: Corpus) -> None:
    spec = mixture.spec.model_copy(update={"duplicates": "drop"})
    first = module.prepare(spec, mixture.context()).texts
    swapped = spec.model_copy(update={"corpora": (*spec.corpora[2:4], *spec.corpora[:2], *spec.corpora[4:])})
    second = module.prepare(swapped, mixture.context()).texts
    assert all(first[label].identity != second[label].identity for label in "ab")
    assert first["b"].counts[TRAIN].documents < second["b"].counts[TRAIN].documents
    Path("0.txt").write_text("a line of its own\n" * 2 + Path("0.txt").read_text())
    assert module.prepare(spec, mixture.context()).texts["c"].folder != first["c"].folder


def test_of_a_mixture_without_duplicates_the_damaged_text_alone_is_made_anew(mixture: Corpus) -> None:
    spec = mixture.spec.model_copy(update={"duplicates": "drop"})
    first = module.prepare(spec, mixture.context())
    before = {label: contents(text.folder) for label, text in first.texts.items()}
    inodes = [first.texts[label].folder.stat().st_ino for label in "ac"]
    flip(first.texts["b"].folder / f"train-00000{TOKENS}")
    told: list[str] = []
    again = module.prepare(spec, mixture.context()._replace(warn=told.append, check=True))
    assert again.identity == first.identity
    assert {label: contents(text.folder) for label, text in again.texts.items()} == before
    assert [again.texts[label].folder.stat().st_ino for label in "ac"] == inodes
    (line,) = told
    assert line.startswith(f"{first.texts['b'].folder}: ")


def test_a_text_of_a_mixture_that_holds_nothing_new_is_told_of(mixture: Corpus) -> None:
    for number in (2, 3):
        Path(f"{number}.txt").write_text(Path(f"{number - 2}.txt").read_text())
    spec = mixture.spec.model_copy(update={"duplicates": "drop"})
    with pytest.raises(DataError, match=naming_words("data b 120 exact duplicates")):
        module.prepare(spec, mixture.context())


def test_shards_of_duplicates_alone_are_empty_and_can_be_read(corpus: Corpus) -> None:
    for number in range(1, NUM_FILES):
        Path(f"{number}.txt").write_text(Path("0.txt").read_text())
    text = corpus._replace(spec=corpus.spec.model_copy(update={"duplicates": "drop"})).prepare()
    assert text.counts[TRAIN].documents + text.counts[HELD_OUT].documents == 60
    assert [shard.num_tokens for shard in text.shards[TRAIN]][1:] == [0] * (NUM_FILES - 1)
    assert all(len(shard.open().tokens) == shard.num_tokens for part in SPLITS for shard in text.shards[part])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_part_is_refused(corpus: Corpus, fraction: float) -> None:
    with pytest.raises(DataError, match=naming_words("data.held_out_fraction 360 sample_by:")):
        corpus._replace(spec=corpus.spec.model_copy(update={"held_out_fraction": fraction})).prepare()


# Files


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    with closing(StoreWriter(tmp_path, "store", 2**16 + 1)) as writer:
        writer.add(np.array([2**16, 5]), starts_document=True)
        writer.add(np.array([], dtype=np.int64), starts_document=True)
        writer.add(np.array([7]), starts_document=True)
        writer.add(np.array([8]), starts_document=False)
    found = TokenStore.open(tmp_path, "store")
    assert (found.tokens.dtype, found.tokens.tolist()) == (np.uint32, [2**16, 5, 7, 8])
    assert found.offsets.tolist() == [0, 2, 4]
    assert (found.num_documents, found.num_tokens) == (2, 4)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHCLI_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.setenv("SWITCHCLI_CACHE", "~/somewhere")
    assert default_cache() == Path.home() / "somewhere"
    monkeypatch.delenv("SWITCHCLI_CACHE")
    assert default_cache() == Path.home() / ".cache" / "switchcli"
