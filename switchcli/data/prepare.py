"""Preparing data, once: a vocabulary is trained if asked for, and every text is cut into ids, piece by piece.

A text is a folder of the cache, named by everything that it depends on: a folder for each piece, which appears whole or
not at all, and a manifest of all of them when the last is there. So preparing goes on after a stop, and machines that
see one cache can each make a share of the pieces.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from switchcli.data.cache import ELSEWHERE, cached
from switchcli.data.corpus import Corpus
from switchcli.data.document import Document, is_held_out
from switchcli.data.pieces import FORMAT, PARTS, Job, Progress, build
from switchcli.data.spec import DataSpec
from switchcli.data.store import (
    OFFSETS,
    TOKENS,
    Shard,
    TokenStore,
    digest_of,
    facts_of,
    has_sizes,
    identity_of,
    is_whole,
    seal,
)
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import DataError, disk_errors

T = TypeVar("T")

CHECKED_AT_START = 2**30
"""Bytes of a text up to which all of it is read and compared with its checksums before a run; of a larger one each
shard when it is first used."""
PROCESSES_FROM = 2**23
"""Bytes of sources from which more than one process pays."""


class Track(Protocol):
    """A progress bar: yields the items, showing how many went by, of how many if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


class Shown(Protocol):
    """Shows how far a preparation is, of so many pieces and bytes; within, the progress is told as it changes."""

    def __call__(
        self, label: str, pieces: int, size: int | None, /
    ) -> AbstractContextManager[Callable[[Progress], None]]: ...


class Means(NamedTuple):
    """What preparing is done with."""

    cache: Path
    track: Track
    show: Shown
    processes: int | None = None
    """At once; None: as many as there are processors, where it pays."""
    share: tuple[int, int] = (0, 1)
    """Number and count, of the machines that share the pieces."""
    check: bool = False
    """Compare all of what is there with its checksums."""


class Counts(NamedTuple):
    """How much is in a part of a text."""

    documents: int
    tokens: int
    bytes: int
    """Of the text, as UTF-8."""


class Text(NamedTuple):
    """One text as ids."""

    shards: Mapping[str, tuple[Shard, ...]]
    """By part."""
    counts: Mapping[str, Counts]
    dropped: Mapping[str, int]
    """What was left out of it, by reason."""
    identity: str
    """A digest of the ids themselves: the same text, cut the same, has the same on any machine."""
    folder: Path


class Prepared(NamedTuple):
    """What training reads."""

    tokenizer: Tokenizer
    texts: Mapping[str, Text]
    """By label; see `DataSpec.texts`."""

    @property
    def identity(self) -> str:
        """A digest of the ids themselves."""
        if len(self.texts) == 1:
            return next(iter(self.texts.values())).identity
        return digest_of({label: text.identity for label, text in self.texts.items()})


def prepare(spec: DataSpec, means: Means, tokenizer: Tokenizer | None = None) -> Prepared:
    """The spec's texts as ids, from the cache where they are there already.

    `tokenizer` takes the place of the spec's, for a model trained with it. Raises DataError for anything wrong with the
    text or the tokenizer, and when no document, or every one, is held out; CheckpointError for the cache folder.
    """
    used, texts = prepare_share(spec, means, tokenizer)
    whole = {label: text for label, text in texts.items() if text is not None}
    assert len(whole) == len(texts), "all shares"
    return Prepared(used, whole)


def prepare_share(
    spec: DataSpec, means: Means, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, dict[str, Text | None]]:
    """The same with this machine's share of the pieces alone: a text is None while others' are not there."""
    used = tokenizer or vocabulary(spec, means)
    folder = means.cache / "tokenizers" / used.sha256[:32]
    with cached(folder, lambda built: _write(built, used)):
        file = folder / "tokenizer.json"
    return used, {label: _text(label, corpora, spec, used, file, means) for label, corpora in spec.texts().items()}


def vocabulary(spec: DataSpec, means: Means) -> Tokenizer:
    """The spec's tokenizer; one that is trained, from the cache where it was trained before on the same text."""

    def load() -> Tokenizer:
        return spec.tokenizer.load(lambda: documents(spec, means.track, held_out=False))

    if spec.tokenizer.kind != "train":
        return load()
    parts = [spec.tokenizer.fingerprint(), *_sources(spec, chain.from_iterable(spec.texts().values()))]
    folder = means.cache / "vocabularies" / _digest(parts)
    with cached(folder, lambda built: _write(built, load())):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Tokenizer.from_json(text, str(folder / "tokenizer.json"))


def documents(spec: DataSpec, track: Track, *, held_out: bool) -> dict[str, Iterator[Document]]:
    """The documents of each text that are held out, or those that are not, read as they are asked for."""

    def of(label: str, corpora: Sequence[Corpus]) -> Iterator[Document]:
        found = chain.from_iterable(corpus.documents() for corpus in corpora)
        for document in spec.filters(track(found, f"reading{_named(label)}", None), Counter()):
            if is_held_out(document.identity, spec.held_out_fraction) == held_out:
                yield document

    return {label: of(label, corpora) for label, corpora in spec.texts().items()}


def _write(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    seal(folder, {})


def _sources(spec: DataSpec, corpora: Iterable[Corpus]) -> list[str]:
    """What documents depend on."""
    return [
        str(FORMAT),
        *(corpus.fingerprint() for corpus in corpora),
        spec.filters.model_dump_json(),
        repr(spec.held_out_fraction),
    ]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _text(
    label: str, corpora: Sequence[Corpus], spec: DataSpec, tokenizer: Tokenizer, file: Path, means: Means
) -> Text | None:
    """One text, made where it is not there or not whole. None where others' pieces are missing."""
    folder = means.cache / "tokens" / _digest([*_sources(spec, corpora), tokenizer.sha256])
    with disk_errors(means.cache, ELSEWHERE):
        facts = facts_of(folder)
        if facts is None or not _is_sound(folder, facts, means):
            jobs = [
                Job(corpus, piece, folder / f"piece-{number:05}", spec.held_out_fraction, spec.filters)
                for number, (corpus, piece) in enumerate((one, piece) for one in corpora for piece in one.pieces())
            ]
            is_there = has_sizes if facts is None else is_whole
            number, count = means.share
            _make([job for job in jobs[number::count] if not is_there(job.folder)], label, file, means)
            if not all(has_sizes(job.folder) for job in jobs):
                return None
            _seal(folder, jobs, tokenizer)
        text = _opened(folder)
    _check_split(label, text, spec.held_out_fraction)
    return text


def _is_sound(folder: Path, facts: Mapping[str, Any], means: Means) -> bool:
    """Whether all of a text that was whole agrees with its checksums, which is looked at where it is soon done."""
    if not means.check and _is_large(facts):
        return True
    pieces = sorted({name.split("/")[0] for name in facts["files"]})
    tracked = means.track(pieces, "comparing checksums", len(pieces)) if _is_large(facts) else pieces
    return not [name for name in tracked if not is_whole(folder / name)] and has_sizes(folder)


def _is_large(facts: Mapping[str, Any]) -> bool:
    return sum(said["bytes"] for said in facts["files"].values()) > CHECKED_AT_START


def _make(jobs: Sequence[Job], label: str, file: Path, means: Means) -> None:
    """Make the pieces of these jobs."""
    if not jobs:
        return
    processors = len(os.sched_getaffinity(0))
    sizes = [job.piece.size for job in jobs]
    size = None if None in sizes else sum(one or 0 for one in sizes)
    pays = size is None or size >= PROCESSES_FROM
    processes = min(means.processes or (processors if pays else 1), len(jobs))
    with means.show(f"tokenising{_named(label)}", len(jobs), size) as show:
        build(jobs, file, processes, max(1, processors // processes), show)


def _named(label: str) -> str:
    return f" {label}" if label else ""


def _seal(folder: Path, jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
    """The manifest of a text whose pieces are all there."""
    files: dict[str, object] = {}
    dropped: Counter[str] = Counter()
    shards: dict[str, list[Any]] = {part: [] for part in PARTS}
    for job in jobs:
        facts = facts_of(job.folder)
        assert facts is not None, "was looked at"
        dropped.update(facts["dropped"])
        files |= {f"{job.folder.name}/{name}": said for name, said in facts["files"].items()}
        for part, found in facts["shards"].items():
            shards[part] += [{**one, "name": f"{job.folder.name}/{one['name']}"} for one in found]
    counts = {
        part: {fact: sum(one[fact] for one in found) for fact in Counts._fields} for part, found in shards.items()
    }
    facts = {"format": FORMAT, "tokenizer": tokenizer.sha256, "dropped": dropped, "counts": counts, "shards": shards}
    seal(folder, facts, files)


def _opened(folder: Path) -> Text:
    facts = facts_of(folder)
    assert facts is not None, "sealed, or found whole"
    files = facts["files"]
    shards, counts = {}, {}
    named: dict[str, object] = {}
    for part in PARTS:
        found = facts["shards"][part]
        shards[part] = tuple(
            Shard(one["documents"], one["tokens"], _opener(folder, one["name"], files if _is_large(facts) else {}))
            for one in found
        )
        counts[part] = Counts(*(facts["counts"][part][fact] for fact in Counts._fields))
        for number, one in enumerate(found):
            # The first shard's as if it were alone: a text of one shard has the identity that it had before shards.
            place = f"{part}-{number}" if number else part
            named |= {f"{place}/{name}": files[f"{one['name']}/{name}"] for name in (OFFSETS, TOKENS)}
    return Text(shards, counts, facts["dropped"], digest_of(named), folder)


def _opener(folder: Path, name: str, files: Mapping[str, object]) -> Callable[[], TokenStore]:
    """What opens a shard, after a look at its checksums where `files` has them."""

    def opened() -> TokenStore:
        for file in (OFFSETS, TOKENS):
            place = f"{name}/{file}"
            if place in files and identity_of(folder / place) != files[place]:
                raise DataError(
                    f"{folder / place}: not what was prepared: the file was cut or altered since; `switchcli data "
                    "prepare RECIPE` makes its piece anew, and training goes on from the last save"
                )
        return TokenStore.open(folder / name)

    return opened


def _check_split(label: str, text: Text, fraction: float) -> None:
    num_train, num_held_out = (text.counts[part].documents for part in PARTS)
    if not num_train or not num_held_out:
        raise DataError(
            f"data.held_out_fraction ({fraction}) of {num_train + num_held_out} documents{_named(label)} leaves "
            f"{num_train} for training, {num_held_out} held out, both need one at least: change it, add text, or make "
            "the documents smaller (sample_by: line)"
        )
