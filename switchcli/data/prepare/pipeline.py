"""Prepare the data of a run, once: train the vocabulary if the recipe asks for one, and tokenize every text.

A prepared text is a folder of the cache, named by a digest of everything that its ids depend on. It holds a folder for
each source shard, which appears when it is complete, and a manifest of all of them, written when the last one is there.
Preparation can therefore go on after a stop.
"""

import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from switchcli.data.config import DataSpec
from switchcli.data.prepare.cache import ELSEWHERE, PrepareContext, Track, get_or_build, is_usable
from switchcli.data.prepare.dedup import distinct_texts
from switchcli.data.prepare.prepared_text import (
    FORMAT,
    HELD_OUT,
    SPLITS,
    TRAIN,
    PreparedText,
    open_prepared_text,
    write_text_manifest,
)
from switchcli.data.prepare.shards import TokenizeJob, split_text, tokenize_shards
from switchcli.data.prepare.store import (
    ShardManifest,
    ShardWriter,
    digest_of,
    digest_of_lines,
    is_complete,
    read_manifest,
    write_manifest,
)
from switchcli.data.sources.corpus import Corpus
from switchcli.data.sources.document import Document, is_held_out
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, disk_errors
from switchcli.system import publish
from switchcli.system.processor import available_processors

PROCESSES_FROM = 2**23
"""Bytes of sources above which starting more than one process saves time."""


class PreparedTexts(NamedTuple):
    """The prepared texts of a run, and the tokenizer of their ids."""

    tokenizer: Tokenizer
    texts: Mapping[str, PreparedText]
    """The texts by label; see `DataSpec.texts`."""

    @property
    def identity(self) -> str:
        """A digest of the ids of all texts."""
        if len(self.texts) == 1:
            return next(iter(self.texts.values())).identity
        return digest_of({label: text.identity for label, text in self.texts.items()})

    def digests(self) -> dict[str, str]:
        """Return digests of the tokenizer and of the ids of each text, by what they are of."""
        texts = {f"the text{_suffix(label)}": text.identity for label, text in self.texts.items()}
        return {"the tokenizer": self.tokenizer.sha256, **texts}


def prepare(spec: DataSpec, context: PrepareContext, tokenizer: Tokenizer | None = None) -> PreparedTexts:
    """Return the prepared texts of `spec`; those that the cache does not hold are prepared now.

    `tokenizer` replaces that of the spec, for a model that was trained with it.

    Raises:
        DataError: a text or the tokenizer cannot be used, or all documents or none are held out.
        CheckpointError: the cache cannot be written.
    """
    used = tokenizer or load_tokenizer(spec, context)
    context.accept(used)
    with get_or_build(_tokenizer_folder(used, context), lambda built: _write_tokenizer(built, used)):
        texts = {label: _prepare_text(label, spec, used, context) for label in spec.texts()}
    if spec.duplicates == "drop":
        texts = distinct_texts(texts, used, context)
        for label, text in texts.items():
            _check_text(label, text, spec, context.needed)
    return PreparedTexts(used, texts)


def load_tokenizer(spec: DataSpec, context: PrepareContext) -> Tokenizer:
    """Return the tokenizer of `spec`. A trained one is in the cache if it was trained on the same text before."""
    trained = spec.tokenizer
    if trained.kind != "train":
        return trained.load()
    documents = partial(iter_documents, spec, context.track, held_out=False)
    lines = [trained.fingerprint(), *_text_fingerprints(spec, _all_corpora(spec))]
    folder = context.cache / "vocabularies" / digest_of_lines(lines)
    with get_or_build(folder, lambda built: _write_tokenizer(built, trained.load(documents, context.wait))):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Tokenizer.from_json(text, str(folder / "tokenizer.json"))


def iter_documents(spec: DataSpec, track: Track, *, held_out: bool) -> dict[str, Iterator[Document]]:
    """Return, for each text, an iterator of the documents that are held out, or of the others, read on demand."""

    def iter_text(label: str, corpora: Sequence[Corpus]) -> Iterator[Document]:
        documents = chain.from_iterable(corpus.documents() for corpus in corpora)
        for document in spec.filters(track(documents, f"reading{_suffix(label)}", None), Counter()):
            if is_held_out(document.identity, spec.held_out_fraction) == held_out:
                yield document

    return {label: iter_text(label, corpora) for label, corpora in spec.texts().items()}


# Digests of what ids depend on


def source_digest(spec: DataSpec, tokenizer: Tokenizer) -> str:
    """Return a digest of everything that the ids of the texts depend on. The texts need not be prepared."""
    return _digest_of_corpora(spec, _all_corpora(spec), tokenizer)


def _digest_of_corpora(spec: DataSpec, corpora: Iterable[Corpus], tokenizer: Tokenizer, *more: str) -> str:
    """Return a digest of everything that the ids of `corpora` depend on, and of `more`."""
    return digest_of_lines([*_text_fingerprints(spec, corpora), tokenizer.sha256, *more])


def _text_fingerprints(spec: DataSpec, corpora: Iterable[Corpus]) -> list[str]:
    """Return strings that change if the documents of a text, or their ids, may change."""
    fingerprints = [corpus.fingerprint() for corpus in corpora]
    return [str(FORMAT), *fingerprints, spec.filters.model_dump_json(), repr(spec.held_out_fraction)]


def _all_corpora(spec: DataSpec) -> Iterator[Corpus]:
    return chain.from_iterable(spec.texts().values())


# One text


def _prepare_text(label: str, spec: DataSpec, tokenizer: Tokenizer, context: PrepareContext) -> PreparedText:
    """Return one text, built if it is missing or damaged."""
    corpora = spec.texts()[label]
    key = _digest_of_corpora(spec, corpora, tokenizer)
    folder = context.cache / "tokens" / key
    with disk_errors(context.cache, ELSEWHERE):
        publish.remove_stale_in(folder.parent)
        publish.remove_stale_in(folder)
        with context.wait("comparing prepared text with its checksums"):
            is_prepared = is_complete(folder, check=context.check)
        if not is_prepared:
            source_shards = [(corpus, source_shard) for corpus in corpora for source_shard in corpus.source_shards()]
            jobs = [
                TokenizeJob(corpus, source_shard, folder / f"piece-{number:05}", spec.held_out_fraction, spec.filters)
                for number, (corpus, source_shard) in enumerate(source_shards)
            ]
            missing = [job for job in jobs if not _is_built(job, context)]
            _tokenize(missing, label, tokenizer, context)
            if missing and _digest_of_corpora(spec, corpora, tokenizer) != key:
                for job in missing:  # each may hold the old content or the new
                    shutil.rmtree(job.folder, ignore_errors=True)
                raise DataError(
                    f"data.corpora{_suffix(label)}: files changed while they were prepared: run the same command again "
                    "when no other program writes to them"
                )
            _write_merged_manifest(folder, jobs, tokenizer)
        text = open_prepared_text(folder)
    _check_text(label, text, spec, context.needed)
    return text


def _is_built(job: TokenizeJob, context: PrepareContext) -> bool:
    """Return whether the folder of a job is complete, and that of this job. Warn if it is damaged."""
    facts = read_manifest(job.folder)
    return facts is not None and facts.get("piece") == job.folder.name and is_usable(job.folder, context)


def _tokenize(jobs: Sequence[TokenizeJob], label: str, tokenizer: Tokenizer, context: PrepareContext) -> None:
    """Build the folders of these jobs, with a progress display."""
    if not jobs:
        return
    sizes = [job.source_shard.size for job in jobs]
    is_small = None not in sizes and sum(size or 0 for size in sizes) < PROCESSES_FROM
    processes = min(context.processes or (1 if is_small else available_processors()), len(jobs))
    tokenizer_file = _tokenizer_folder(tokenizer, context) / "tokenizer.json"
    with context.show("tokenizing shards" + (f" of {label}" if label else ""), len(jobs)) as show:
        tokenize_shards(jobs, tokenizer_file, processes, show)


def _write_merged_manifest(folder: Path, jobs: Sequence[TokenizeJob], tokenizer: Tokenizer) -> None:
    """Write the manifest of a text from the manifests of its source shards, which are all complete."""
    files: dict[str, object] = {}
    dropped: Counter[str] = Counter()
    shards: dict[str, list[ShardManifest]] = {split: [] for split in SPLITS}
    for job in jobs:
        facts = read_manifest(job.folder)
        assert facts is not None, "it is complete"
        # Names in the text's manifest are relative to its folder.
        prefix = f"{job.folder.name}/"
        dropped.update(facts["dropped"])
        files |= {prefix + name: identity for name, identity in facts["files"].items()}
        for split, job_shards in facts["shards"].items():
            shards[split] += [{**shard, "name": prefix + shard["name"]} for shard in job_shards]
    write_text_manifest(folder, shards, dropped, tokenizer.sha256, files)


# Text to evaluate on


def held_out_sample(spec: DataSpec, context: PrepareContext, tokenizer: Tokenizer, num_tokens: int) -> PreparedTexts:
    """Return the first held-out documents of each text, about `num_tokens` tokens, and no documents to train on.

    A run that streams its text is evaluated on them. A sample ends with the document that reaches `num_tokens`.
    """
    texts = {}
    documents = iter_documents(spec, context.track, held_out=True)
    for label, corpora in spec.texts().items():
        key = _digest_of_corpora(spec, corpora, tokenizer, f"the first {num_tokens} held-out tokens")
        folder = context.cache / "tokens" / key
        with get_or_build(folder, partial(_write_sample, documents[label], tokenizer, num_tokens)):
            texts[label] = open_prepared_text(folder)
    return PreparedTexts(tokenizer, texts)


def _write_sample(documents: Iterable[Document], tokenizer: Tokenizer, num_tokens: int, folder: Path) -> None:
    """Write documents as a held-out split until it has `num_tokens` tokens."""
    folder.mkdir()
    writer = ShardWriter(folder, HELD_OUT, tokenizer.vocab_size)
    for document in documents:
        parts = [*split_text(document.text)]
        for index, (text, ids) in enumerate(zip(parts, tokenizer.encode_batch(parts), strict=True)):
            writer.add(ids, len(text.encode()), starts_document=index == 0)
        if sum(shard["tokens"] for shard in writer.shards) >= num_tokens:
            break
    writer.close()
    write_text_manifest(folder, {TRAIN: [], HELD_OUT: writer.shards}, {}, tokenizer.sha256)


# Helpers


def _tokenizer_folder(tokenizer: Tokenizer, context: PrepareContext) -> Path:
    return context.cache / "tokenizers" / tokenizer.sha256[:32]


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_manifest(folder, {})


def _check_text(label: str, text: PreparedText, spec: DataSpec, needed: Collection[str]) -> None:
    """Raise DataError for a text without documents, or with none in a split that is needed."""
    num_train, num_held_out = (text.counts[split].documents for split in SPLITS)
    if not num_train and not num_held_out:
        if not text.dropped:
            raise spec.texts()[label][0].empty_error()
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in text.dropped.items())
        raise DataError(f"data{_suffix(label)}: no document is left; left out were {reasons}")
    if not all(text.counts[split].documents for split in needed):
        if TRAIN not in needed:  # of an evaluation
            raise DataError(
                f"text.held_out_fraction ({spec.held_out_fraction}) holds out none of {num_train} documents"
                f"{_suffix(label)}: take 1 to measure all of them"
            )
        raise DataError(
            f"data.held_out_fraction ({spec.held_out_fraction}) of {num_train + num_held_out} documents"
            f"{_suffix(label)} leaves {num_train} to train on and {num_held_out} held out, and each needs at least 1: "
            "change it, add text, or make the documents smaller (sample_by: line)"
        )


def _suffix(label: str) -> str:
    """Return the label of a text in the form that messages append; the only text of a run has none."""
    return f" {label}" if label else ""
