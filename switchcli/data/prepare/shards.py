"""Tokenize source shards: read, filter, split and encode their documents, and write the ids as shards.

The files are the same, byte for byte, for any number of processes. A pool of processes gets the source shards one by
one. Each becomes a folder that appears when it is complete, so finished folders outlive a stop.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

from switchcli.data.prepare.cache import ELSEWHERE, build_atomically, scratch_folder
from switchcli.data.prepare.filters import Filters
from switchcli.data.prepare.prepared_text import FORMAT, HELD_OUT, TRAIN
from switchcli.data.prepare.store import ShardWriter, write_manifest
from switchcli.data.sources.corpus import Corpus, SourceShard
from switchcli.data.sources.document import Document, is_held_out
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import OutOfMemory, disk_errors
from switchcli.system.processor import available_processors
from switchcli.system.signals import STOPPING

PART_CHARACTERS = 2**16
"""Characters of a document that are encoded together. The tokenizer takes many times the memory of its text."""
CHUNK_CHARACTERS = 2**20
"""Characters that are encoded by one call, by the tokenizer's own threads."""


class TokenizeJob(NamedTuple):
    """A source shard to tokenize, and the folder for its ids."""

    corpus: Corpus
    source_shard: SourceShard
    folder: Path
    """CACHE/tokens/DIGEST/piece-NUMBER."""
    held_out_fraction: float
    filters: Filters


def tokenize_shards(
    jobs: Sequence[TokenizeJob], tokenizer: Path, processes: int, show: Callable[[int, int], None]
) -> None:
    """Build the folder of every job. Folders that are complete when an error is raised stay.

    Args:
        tokenizer: the tokenizer.json to encode with.
        processes: how many processes work at the same time; 1: this one does all the work.
        show: called with the numbers of complete source shards and of tokens written, as they change.

    Raises:
        DataError: a text cannot be used.
        CheckpointError: the disk is full, or refuses to write.
        OutOfMemory: a process was killed.
    """
    loaded = _load_tokenizer(tokenizer)  # before any process starts, so that an error is raised once
    with scratch_folder(jobs[0].folder.parent) as scratch:  # of all processes: those that are ended leave nothing
        if processes == 1:
            _build_here(jobs, scratch, loaded, show)
        else:
            _build_in_processes(jobs, scratch, tokenizer, processes, show)


def _build_here(
    jobs: Sequence[TokenizeJob], scratch: Path, tokenizer: Tokenizer, show: Callable[[int, int], None]
) -> None:
    """Build the folders one after the other in this process."""
    tokens = number = 0

    def add_tokens(count: int) -> None:
        nonlocal tokens
        tokens += count
        show(number, tokens)

    for number, job in enumerate(jobs):
        _build(job, scratch, tokenizer, add_tokens)
        show(number + 1, tokens)


def _build_in_processes(
    jobs: Sequence[TokenizeJob], scratch: Path, tokenizer: Path, processes: int, show: Callable[[int, int], None]
) -> None:
    """Build the folders in a pool of processes. The first error ends all of them."""
    threads = max(1, available_processors() // processes)
    context = multiprocessing.get_context("spawn")  # the threads of this process would not survive a fork
    others = {*multiprocessing.active_children()}
    # The pool starts its processes here, and they block these signals for good: a terminal sends a signal to all
    # processes, but this one alone decides what to do.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        executor = ProcessPoolExecutor(processes, context, _start_worker, (threads,))
        pending = {executor.submit(_build_in_worker, job, scratch, tokenizer): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    tokens = 0
    try:
        for number, future in enumerate(as_completed(pending), start=1):
            tokens += future.result()
            show(number, tokens)
    except BrokenProcessPool as error:
        if error.__cause__ is not None:  # no process was killed: the result of one cannot be unpickled
            raise
        raise OutOfMemory(
            "a process that prepared data was killed, perhaps because memory ran out: what is complete stays; run the "
            "same command again, with fewer --processes if it happens again"
        ) from None
    finally:
        # After an error the executor would wait for the jobs that are running. After the last job everything is
        # written, and killing the processes is faster than their orderly exit.
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
        executor.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process has gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _build_in_worker(job: TokenizeJob, scratch: Path, tokenizer: Path) -> int:
    """Build the folder of one job, and return the number of its tokens."""
    counts: list[int] = []
    _build(job, scratch, _load_tokenizer_once(tokenizer), counts.append)
    return sum(counts)


def _load_tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_json(file.read_text(encoding="utf-8"), str(file))


_load_tokenizer_once = cache(_load_tokenizer)


def _build(job: TokenizeJob, scratch: Path, tokenizer: Tokenizer, add_tokens: Callable[[int], None]) -> None:
    """Build the folder of one job in `scratch`. `add_tokens` is called with the number of tokens at each write."""

    def write(folder: Path) -> None:
        folder.mkdir()
        dropped: Counter[str] = Counter()
        documents = job.filters(job.corpus.read(job.source_shard, dropped=dropped), dropped)
        train, held_out = (ShardWriter(folder, split, tokenizer.vocab_size) for split in (TRAIN, HELD_OUT))
        for chunk in group_parts(split_documents(documents, job.held_out_fraction)):
            ids_of_parts = tokenizer.encode_batch([part.text for part in chunk])
            for part, ids in zip(chunk, ids_of_parts, strict=True):
                writer = held_out if part.held_out else train
                writer.add(ids, len(part.text.encode()), starts_document=part.starts_document)
                add_tokens(len(ids))
        train.close()
        held_out.close()
        facts = {
            "format": FORMAT,
            "piece": job.folder.name,
            "dropped": dropped,
            "shards": {TRAIN: train.shards, HELD_OUT: held_out.shards},
        }
        write_manifest(folder, facts)

    with disk_errors(job.folder.parents[2], ELSEWHERE):  # the cache itself
        build_atomically(job.folder, write, scratch)


class DocumentPart(NamedTuple):
    """A part of a document that is encoded by itself."""

    held_out: bool
    starts_document: bool
    text: str


def split_documents(documents: Iterable[Document], held_out_fraction: float) -> Iterator[DocumentPart]:
    """Yield the parts of each document, and whether it is held out; `held_out_fraction` of the documents are."""
    for document in documents:
        held_out = is_held_out(document.identity, held_out_fraction)
        for index, text in enumerate(split_text(document.text)):
            yield DocumentPart(held_out, index == 0, text)


def split_text(text: str) -> Iterator[str]:
    """Yield parts of at most PART_CHARACTERS characters, split at spaces where possible."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        # From start + 1, because a space at `start` would leave an empty part.
        space = text.rfind(" ", start + 1, start + PART_CHARACTERS)
        if space == -1:  # one long word
            end = next_start = start + PART_CHARACTERS
        else:
            # The space is left out, because encoding puts one before the next part.
            end, next_start = space, space + 1
        yield text[start:end]
        start = next_start
    yield text[start:]


def group_parts(parts: Iterable[DocumentPart]) -> Iterator[list[DocumentPart]]:
    """Yield lists of consecutive parts, each of about CHUNK_CHARACTERS characters: a list is encoded by one call."""
    chunk: list[DocumentPart] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
