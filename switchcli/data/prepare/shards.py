"""Tokenize source shards: read, filter, split and encode their documents, and write the ids as shards.

The files are the same, byte for byte, for any number of processes on any machines. A pool of processes gets the source
shards one by one. Each becomes a folder that appears when it is complete, so finished folders outlive a stop.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from switchcli.data.prepare.cache import ELSEWHERE, build_atomically, remove_stale
from switchcli.data.prepare.filters import Filters
from switchcli.data.prepare.prepared_text import FORMAT, HELD_OUT, TRAIN
from switchcli.data.prepare.store import ShardWriter, write_manifest
from switchcli.data.sources.corpus import Corpus, SourceShard
from switchcli.data.sources.document import Document, is_held_out
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import OutOfMemory, disk_errors
from switchcli.system.startup import SAFE_PATH

if TYPE_CHECKING:
    from ctypes import Array, c_int64

PART_CHARACTERS = 2**16
"""Characters of a document that are encoded together. The tokenizer takes many times the memory of its text."""
CHUNK_CHARACTERS = 2**20
"""Characters that are encoded by one call, by the tokenizer's own threads."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""Signals that ask a run to stop. They equal `distributed.signals.STOPPING`, which this package cannot import."""
_POLL_SECONDS = 0.2
_JOBS_PER_PROCESS = 2
"""Jobs that the pool holds for each process. A text may have more source shards than the queues of a pool can hold."""


class TokenizeJob(NamedTuple):
    """A source shard to tokenize, and the folder for its ids."""

    corpus: Corpus
    source_shard: SourceShard
    folder: Path
    """CACHE/tokens/DIGEST/piece-NUMBER."""
    held_out_fraction: float
    filters: Filters


class PrepareProgress(NamedTuple):
    """Work that is done so far."""

    source_shards: int
    """Source shards that are complete."""
    size: int
    """Bytes of the complete source shards, as far as their sizes are known."""
    tokens: int
    """Tokens written, including those of incomplete source shards."""


def tokenize_shards(
    jobs: Sequence[TokenizeJob], tokenizer: Path, processes: int, threads: int, show: Callable[[PrepareProgress], None]
) -> None:
    """Build the folder of every job. Folders that are complete when an error is raised stay.

    Args:
        tokenizer: the tokenizer.json to encode with.
        processes: how many processes work at the same time; 1: this one does all the work.
        threads: tokenizer threads of each process, if there are several.
        show: called with the progress as it changes.

    Raises:
        DataError: a text cannot be used.
        CheckpointError: the disk is full, or refuses to write.
        OutOfMemory: a process was killed.
    """
    loaded = _load_tokenizer(tokenizer)  # before any process starts, so that an error is raised once
    if processes == 1:
        _build_here(jobs, loaded, show)
        return
    try:
        _build_in_processes(jobs, tokenizer, processes, threads, show)
    finally:
        for folder in {job.folder.parent for job in jobs}:
            remove_stale(folder)  # killed processes leave unfinished folders


def _build_here(jobs: Sequence[TokenizeJob], tokenizer: Tokenizer, show: Callable[[PrepareProgress], None]) -> None:
    """Build the folders one after the other in this process."""
    progress = PrepareProgress(0, 0, 0)

    def add_tokens(count: int) -> None:
        nonlocal progress
        progress = progress._replace(tokens=progress.tokens + count)
        show(progress)

    for job in jobs:
        _build(job, tokenizer, add_tokens)
        size = progress.size + (job.source_shard.size or 0)
        progress = PrepareProgress(progress.source_shards + 1, size, progress.tokens)
        show(progress)


def _build_in_processes(
    jobs: Sequence[TokenizeJob], tokenizer: Path, processes: int, threads: int, show: Callable[[PrepareProgress], None]
) -> None:
    """Build the folders in a pool of processes. The first error ends all of them."""
    context = multiprocessing.get_context("spawn")  # the threads of this process would not survive a fork
    written = context.RawArray("q", len(jobs))  # int64 [jobs]: each job adds to its own element, so no lock is needed
    others = {*multiprocessing.active_children()}
    num_complete = size = 0
    waiting = iter(enumerate(jobs))
    pending: dict[Future[None], TokenizeJob] = {}
    with _starting_processes():  # this starts multiprocessing's resource tracker, which must not be stopped either
        executor = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, threads, written))
    try:
        while True:
            with _starting_processes():  # `submit` starts the processes
                for number, job in islice(waiting, _JOBS_PER_PROCESS * processes - len(pending)):
                    pending[executor.submit(_build_in_worker, number, job)] = job
            if not pending:
                break
            done, _ = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
                num_complete += 1
                size += pending.pop(future).source_shard.size or 0
            show(PrepareProgress(num_complete, size, sum(written)))
    except BrokenProcessPool as error:
        if error.__cause__ is not None:  # no process was killed: the result of one cannot be unpickled
            raise
        raise OutOfMemory(
            "a process that prepared data was killed, perhaps because memory ran out: what is complete stays; run the "
            "same command again, with fewer --processes if it happens again"
        ) from None
    finally:
        # After an error the executor would send SIGTERM, which the processes block, and wait for their jobs. After the
        # last job everything is written, and killing the processes is faster than their orderly exit.
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
        executor.shutdown()


@contextmanager
def _starting_processes() -> Iterator[None]:
    """Let stop signals wait. Processes that start meanwhile block them for good, and import no module of the folder.

    A terminal sends a signal to all processes, but this one alone decides what to do. The command line has set
    SAFE_PATH for all its processes; a program that calls the Python API has not.
    """
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before  # which is off if it is empty
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


class _Worker:
    """State of a process of the pool, set by `_start_worker`."""

    tokenizer: Path
    """The tokenizer.json."""
    written: "Array[c_int64]"
    """Tokens that each job has written, shared with the parent process."""


def _start_worker(tokenizer: Path, threads: int, written: "Array[c_int64]") -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizer
    # The first job loads the tokenizer, because the pool would hide the message of an error here.
    _Worker.tokenizer, _Worker.written = tokenizer, written
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process has gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _build_in_worker(number: int, job: TokenizeJob) -> None:
    def add_tokens(count: int) -> None:
        _Worker.written[number] += count

    _build(job, _load_tokenizer_once(_Worker.tokenizer), add_tokens)


def _load_tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_json(file.read_text(encoding="utf-8"), str(file))


_load_tokenizer_once = cache(_load_tokenizer)


def _build(job: TokenizeJob, tokenizer: Tokenizer, add_tokens: Callable[[int], None]) -> None:
    """Build the folder of one job. `add_tokens` is called with the number of tokens at each write."""

    def write(folder: Path) -> None:
        folder.mkdir()
        dropped: Counter[str] = Counter()
        documents = job.filters(job.corpus.read(job.source_shard, dropped=dropped), dropped)
        with (
            ShardWriter(folder, TRAIN, tokenizer.vocab_size) as train,
            ShardWriter(folder, HELD_OUT, tokenizer.vocab_size) as held_out,
        ):
            for chunk in group_parts(split_documents(documents, job.held_out_fraction)):
                ids_of_parts = tokenizer.encode_batch([part.text for part in chunk])
                for part, ids in zip(chunk, ids_of_parts, strict=True):
                    writer = held_out if part.held_out else train
                    writer.add(ids, len(part.text.encode()), starts_document=part.starts_document)
                    add_tokens(len(ids))
        facts = {
            "format": FORMAT,
            "piece": job.source_shard.name,
            "dropped": dropped,
            "shards": {TRAIN: train.shards, HELD_OUT: held_out.shards},
        }
        write_manifest(folder, facts)

    with disk_errors(job.folder.parents[2], ELSEWHERE):  # the cache itself
        build_atomically(job.folder, write)


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
