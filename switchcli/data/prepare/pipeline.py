"""Preparing data, once: a vocabulary is trained if asked for, and every text is cut into ids, piece by piece.

A text is a folder of the cache, named by everything that it depends on: a folder for each piece, which appears whole or
not at all, and a manifest of all of them when the last is there. So preparing goes on after a stop, and machines that
see one cache can each make a share of the pieces.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from switchcli.data.config import DataSpec
from switchcli.data.prepare.cache import ELSEWHERE, build_atomically, get_or_build, remove_stale, scratch_folder
from switchcli.data.prepare.dedup import Duplicates
from switchcli.data.prepare.digests import Digests, Track
from switchcli.data.prepare.distinct import find_distinct, write_distinct
from switchcli.data.prepare.prepared_text import (
    FORMAT,
    HELD_OUT,
    LAYOUT,
    PARTS,
    TRAIN,
    PreparedText,
    is_large,
    manifest_bytes,
    open_prepared_text,
    write_text_manifest,
)
from switchcli.data.prepare.shards import PrepareProgress, TokenizeJob, split_text, tokenize_shards
from switchcli.data.prepare.store import (
    ShardManifest,
    ShardWriter,
    digest_of,
    has_sizes,
    is_complete,
    matches_identity,
    read_manifest,
    write_manifest,
)
from switchcli.data.sources.corpus import Corpus
from switchcli.data.sources.document import Document, is_held_out
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, disk_errors

PROCESSES_FROM = 2**23
"""Bytes of sources from which more than one process pays."""


class ShowProgress(Protocol):
    """Shows how far a preparation is, of so many pieces and bytes; within, the progress is told as it changes."""

    def __call__(
        self, label: str, pieces: int, size: int | None, /
    ) -> AbstractContextManager[Callable[[PrepareProgress], None]]: ...


class PrepareContext(NamedTuple):
    """What preparing is done with."""

    cache: Path
    track: Track
    show: ShowProgress
    processes: int | None = None
    """At once; None: as many as there are processors, where it pays."""
    share: tuple[int, int] = (0, 1)
    """Number and count, of the machines that share the pieces."""
    check: bool = False
    """Compare all of what is there with its checksums."""
    warn: Callable[[str], None] = lambda text: None
    """Receives one line about each damaged folder."""
    accept: Callable[[Tokenizer], None] = lambda tokenizer: None
    """Raises what is wrong with a tokenizer for the run, before its text is cut."""
    digests: Digests | None = None
    """Digests of the sources, one object for all that one command prepares; see `with_digests`."""


class PreparedTexts(NamedTuple):
    """What training reads."""

    tokenizer: Tokenizer
    texts: Mapping[str, PreparedText]
    """The texts by label; see `DataSpec.texts`."""

    @property
    def identity(self) -> str:
        """A digest of the ids themselves."""
        if len(self.texts) == 1:
            return next(iter(self.texts.values())).identity
        return digest_of({label: text.identity for label, text in self.texts.items()})

    def check(self) -> None:
        """Raise DataError if something that was read of the texts is not what was prepared."""
        for text in self.texts.values():
            text.check()


def with_digests(spec: DataSpec, means: PrepareContext) -> PrepareContext:
    """Return `means` with the digests of the sources of `spec`, which further calls then share."""
    if means.digests is not None:
        return means
    sampled = spec.access == "stream"
    digests = Digests(means.cache, sampled=sampled, check=means.check, warn=means.warn, track=means.track)
    return means._replace(digests=digests)


def prepare(spec: DataSpec, means: PrepareContext, tokenizer: Tokenizer | None = None) -> PreparedTexts:
    """The spec's texts as ids, from the cache where they are there already.

    `tokenizer` takes the place of the spec's, for a model trained with it. Raises DataError for anything wrong with the
    text or the tokenizer, and when no document, or every one, is held out; CheckpointError for the cache folder.
    """
    used, texts = prepare_share(spec, means, tokenizer)
    complete = {label: text for label, text in texts.items() if text is not None}
    assert len(complete) == len(texts), "all shares"
    return PreparedTexts(used, complete)


def prepare_share(
    spec: DataSpec, means: PrepareContext, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, dict[str, PreparedText | None]]:
    """Do as `prepare` with this machine's share of the pieces: a text is None while others' are not there.

    With `data.duplicates` a text depends on those before it, and is None while one of them is.
    """
    means = with_digests(spec, means)
    used = tokenizer or load_tokenizer(spec, means)
    means.accept(used)
    folder = means.cache / "tokenizers" / used.sha256[:32]
    with get_or_build(folder, lambda built: _write(built, used)):
        file = folder / "tokenizer.json"
    texts: dict[str, PreparedText | None] = {}

    def make_missing() -> None:
        for label, corpora in spec.texts().items():
            if texts.get(label) is None:
                before = sum(text.num_bytes for text in texts.values() if text is not None)
                texts[label] = _text(label, corpora, spec, used, file, means, before)

    make_missing()
    if (duplicates := spec.duplicates) is not None:
        make_missing()  # meanwhile another machine may have made the last piece of one
        complete: dict[str, PreparedText] = {}
        for label, text in texts.items():
            if text is None:
                break
            complete[label] = text
        distinct = _distinct_texts(complete, duplicates, used, means)
        for label, text in distinct.items():
            _check_text(label, text, spec)
        return used, {label: distinct.get(label) for label in texts}
    return used, texts


def load_tokenizer(spec: DataSpec, means: PrepareContext) -> Tokenizer:
    """The spec's tokenizer; one that is trained, from the cache where it was trained before on the same text."""

    def load() -> Tokenizer:
        return spec.tokenizer.load(lambda: iter_documents(spec, means.track, held_out=False))

    if spec.tokenizer.kind != "train":
        return load()
    parts = [spec.tokenizer.fingerprint(), *_sources(spec, chain.from_iterable(spec.texts().values()), means)]
    folder = means.cache / "vocabularies" / _digest(parts)
    with get_or_build(folder, lambda built: _write(built, load())):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Tokenizer.from_json(text, str(folder / "tokenizer.json"))


def iter_documents(spec: DataSpec, track: Track, *, held_out: bool) -> dict[str, Iterator[Document]]:
    """The documents of each text that are held out, or those that are not, read as they are asked for."""

    def of(label: str, corpora: Sequence[Corpus]) -> Iterator[Document]:
        found = chain.from_iterable(corpus.documents() for corpus in corpora)
        for document in spec.filters(track(found, f"reading{_named(label)}", None), Counter()):
            if is_held_out(document.identity, spec.held_out_fraction) == held_out:
                yield document

    return {label: of(label, corpora) for label, corpora in spec.texts().items()}


def source_digest(spec: DataSpec, tokenizer: Tokenizer, means: PrepareContext) -> str:
    """Return a digest of all that the ids of a spec's texts depend on, whether they are prepared or not."""
    return _digest([*_sources(spec, chain.from_iterable(spec.texts().values()), means), tokenizer.sha256])


def legacy_source_digest(spec: DataSpec, tokenizer: Tokenizer) -> str:
    """Return `source` as versions up to 0.1 had it, from the files' paths, sizes and times.

    A checkpoint of a stream holds it. A run goes on from such a checkpoint, and its next one holds `source`.
    """
    corpora = chain.from_iterable(spec.texts().values())
    parts = ["2", *(corpus.legacy_fingerprint() for corpus in corpora), *_rules(spec), tokenizer.sha256]
    return _digest(parts)


def _write(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_manifest(folder, {})


def _sources(spec: DataSpec, corpora: Iterable[Corpus], means: PrepareContext) -> list[str]:
    """Return all that documents depend on, as strings to digest."""
    digests = with_digests(spec, means).digests
    assert digests is not None
    return [str(FORMAT), *(corpus.fingerprint(digests) for corpus in corpora), *_rules(spec)]


def _rules(spec: DataSpec) -> list[str]:
    return [spec.filters.model_dump_json(), repr(spec.held_out_fraction)]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _text(
    label: str,
    corpora: Sequence[Corpus],
    spec: DataSpec,
    tokenizer: Tokenizer,
    file: Path,
    means: PrepareContext,
    before: int,
) -> PreparedText | None:
    """Return one text, made if it is not there or not whole; None if pieces of other machines are missing.

    `before` counts the bytes of the texts that come before it.
    """
    key = _digest([*_sources(spec, corpora, means), tokenizer.sha256, LAYOUT])
    folder = means.cache / "tokens" / key
    with disk_errors(means.cache, ELSEWHERE):
        remove_stale(folder.parent)
        facts = read_manifest(folder)
        if facts is None or not _is_sound(folder, facts, means, before):
            remove_stale(folder)
            jobs = [
                TokenizeJob(corpus, piece, folder / f"piece-{number:05}", spec.held_out_fraction, spec.filters)
                for number, (corpus, piece) in enumerate(
                    (one, piece) for one in corpora for piece in one.source_shards()
                )
            ]
            begun = [piece for job in jobs if (piece := read_manifest(job.folder)) is not None]
            trusted = facts is None and not means.check and is_large(*begun, before=before)
            number, count = means.share
            mine = [job for job in jobs[number::count] if not _is_made(job, trusted, means.warn)]
            _make(mine, label, file, means)
            if mine and _digest([*_sources(spec, corpora, means), tokenizer.sha256, LAYOUT]) != key:
                for job in mine:  # which of the two contents they hold is not known
                    shutil.rmtree(job.folder, ignore_errors=True)
                raise DataError(
                    f"data.corpora{_named(label)}: files changed while they were prepared: run the same command again "
                    "when no other program writes to them"
                )
            if not all(_is_made(job, trusted=True, warn=means.warn) for job in jobs):  # those of other machines too
                return None
            _seal(folder, jobs, tokenizer)
        text = open_prepared_text(folder, before)
    _check_text(label, text, spec)
    return text


def _distinct_texts(
    complete: Mapping[str, PreparedText], duplicates: Duplicates, tokenizer: Tokenizer, means: PrepareContext
) -> dict[str, PreparedText]:
    """Return the texts without documents of which an earlier one, of any of them, is a duplicate.

    They are made where they are not there or not whole. A folder is named by the text and those before it, on which it
    depends too.
    """
    folders: dict[str, Path] = {}
    for label in complete:
        names = [complete[earlier].folder.name for earlier in (*folders, label)]
        folders[label] = means.cache / "tokens" / _digest([*names, duplicates.model_dump_json()])
    with disk_errors(means.cache, ELSEWHERE):
        missing, before = list[str](), 0
        for label, folder in folders.items():
            facts = read_manifest(folder)
            if facts is not None and _is_sound(folder, facts, means, before):
                before += manifest_bytes(facts)
                continue
            if facts is not None:
                means.warn(_damaged(folder))
            missing.append(label)
        if missing:
            read = [*complete][: [*complete].index(missing[-1]) + 1]
            with scratch_folder(means.cache / "tokens") as scratch:
                masks = find_distinct([complete[label] for label in read], duplicates, scratch, means.track)
            stays, reason = dict(zip(read, masks, strict=True)), f"{duplicates.kind} duplicates"
            for label in missing:
                write = partial(write_distinct, complete[label], stays[label], reason, tokenizer, track=means.track)
                build_atomically(folders[label], write)
        texts: dict[str, PreparedText] = {}
        for label, folder in folders.items():
            texts[label] = open_prepared_text(folder, before=sum(text.num_bytes for text in texts.values()))
    return texts


def _is_made(job: TokenizeJob, trusted: bool, warn: Callable[[str], None]) -> bool:
    """Whether a piece is there; one that is damaged is told of."""
    facts = read_manifest(job.folder)
    if facts is None or facts.get("piece") != job.source_shard.name:
        return False
    if (has_sizes if trusted else is_complete)(job.folder):
        return True
    warn(_damaged(job.folder))
    return False


def _damaged(folder: Path) -> str:
    return f"{folder}: not what was prepared, cut or altered since: it is made anew"


def _is_sound(folder: Path, facts: Mapping[str, Any], means: PrepareContext, before: int) -> bool:
    """Whether all of a text that was whole agrees with its checksums, which is looked at where it is soon done."""
    if not is_large(facts, before=before):
        return is_complete(folder)
    if not means.check:
        return True
    files = facts["files"]
    return all(
        matches_identity(folder / name, files[name]) for name in means.track(files, "comparing checksums", len(files))
    )


def _make(jobs: Sequence[TokenizeJob], label: str, file: Path, means: PrepareContext) -> None:
    """Make the pieces of these jobs."""
    if not jobs:
        return
    processors = _processors()
    sizes = [job.source_shard.size for job in jobs]
    size = None if None in sizes else sum(one or 0 for one in sizes)
    pays = size is None or size >= PROCESSES_FROM
    processes = min(means.processes or (processors if pays else 1), len(jobs))
    with means.show(f"tokenising{_named(label)}", len(jobs), size) as show:
        tokenize_shards(jobs, file, processes, max(1, processors // processes), show)


def _processors() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no such call
        return os.cpu_count() or 1


def _named(label: str) -> str:
    return f" {label}" if label else ""


def _seal(folder: Path, jobs: Sequence[TokenizeJob], tokenizer: Tokenizer) -> None:
    """Write the manifest of a text whose pieces are all there."""
    files: dict[str, object] = {}
    arrays: dict[str, object] = {}
    dropped: Counter[str] = Counter()
    shards: dict[str, list[ShardManifest]] = {part: [] for part in PARTS}
    for job in jobs:
        facts = read_manifest(job.folder)
        assert facts is not None, "was looked at"
        dropped.update(facts["dropped"])
        files |= {f"{job.folder.name}/{name}": said for name, said in facts["files"].items()}
        arrays |= {f"{job.folder.name}/{name}": said for name, said in facts["arrays"].items()}
        for part, found in facts["shards"].items():
            shards[part] += [{**one, "name": f"{job.folder.name}/{one['name']}"} for one in found]
    write_text_manifest(folder, shards, dropped, tokenizer.sha256, arrays, files)


def held_out_sample(spec: DataSpec, means: PrepareContext, tokenizer: Tokenizer, num_tokens: int) -> PreparedTexts:
    """Return of each text the first held-out documents, of `num_tokens` tokens or a few more, and none to train on.

    A run that streams its text is evaluated on them.
    """
    means = with_digests(spec, means)
    texts = {}
    found = iter_documents(spec, means.track, held_out=True)
    for label, corpora in spec.texts().items():
        parts = [*_sources(spec, corpora, means), tokenizer.sha256, LAYOUT, f"the first {num_tokens} held-out tokens"]
        folder = means.cache / "tokens" / _digest(parts)
        with get_or_build(folder, partial(_write_head, found[label], tokenizer, num_tokens)):
            texts[label] = open_prepared_text(folder)
    return PreparedTexts(tokenizer, texts)


def _write_head(found: Iterable[Document], tokenizer: Tokenizer, num_tokens: int, folder: Path) -> None:
    folder.mkdir()
    with ShardWriter(folder, HELD_OUT, tokenizer.vocab_size) as writer:
        for document in found:
            parts = [*split_text(document.text)]
            for number, (text, ids) in enumerate(zip(parts, tokenizer.encode_batch(parts), strict=True)):
                writer.add(ids, len(text.encode()), starts_document=number == 0)
            if sum(one["tokens"] for one in writer.shards) >= num_tokens:
                break
    write_text_manifest(folder, {TRAIN: [], HELD_OUT: writer.shards}, {}, tokenizer.sha256, writer.arrays)


def _check_text(label: str, text: PreparedText, spec: DataSpec) -> None:
    """Raise DataError for a text without documents, or without any of them in one of its parts."""
    num_train, num_held_out = (text.counts[part].documents for part in PARTS)
    if not num_train and not num_held_out:
        if not text.dropped:
            raise spec.texts()[label][0].empty_error()
        said = ", ".join(f"{number:,} {reason}" for reason, number in text.dropped.items())
        raise DataError(f"data{_named(label)}: nothing is left of the text: left out were {said}")
    if not num_train or not num_held_out:
        raise DataError(
            f"data.held_out_fraction ({spec.held_out_fraction}) of {num_train + num_held_out} documents{_named(label)} "
            f"leaves {num_train} for training, {num_held_out} held out, both need one at least: change it, add text, "
            "or make the documents smaller (sample_by: line)"
        )
