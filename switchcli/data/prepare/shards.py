"""A piece of a corpus as ids: read, filtered, cut and written as shards, the same by any process on any machine.

Several processes are given pieces one by one; each writes whole folders, so that what was done before a stop stays.
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

if TYPE_CHECKING:
    from ctypes import Array, c_int64

PART_CHARACTERS = 2**16  # longer documents are encoded in parts: the tokenizer holds many times its text in memory
CHUNK_CHARACTERS = 2**20  # encoded at once, by the tokenizer's own threads
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""Equal to `distributed.signals.STOPPING`, which this package cannot import."""
_SECONDS_BETWEEN_LOOKS = 0.2
_JOBS_AHEAD = 2  # for each process: a text may have more pieces than the queues of a pool can hold


class TokenizeJob(NamedTuple):
    """A piece, and the folder for its ids."""

    corpus: Corpus
    source_shard: SourceShard
    folder: Path
    held_out_fraction: float
    filters: Filters


class PrepareProgress(NamedTuple):
    """How far a preparation is."""

    source_shards: int
    """Whole ones."""
    size: int
    """Bytes of their sources, of those whose size is known."""
    tokens: int
    """Written, also of pieces that are not whole yet."""


def tokenize_shards(
    jobs: Sequence[TokenizeJob], tokenizer: Path, processes: int, threads: int, show: Callable[[PrepareProgress], None]
) -> None:
    """Make every job's folder, `processes` at once with `threads` each; `tokenizer` is its tokenizer.json.

    Raises:
        DataError: of the text. What is whole by then stays, then and below.
        CheckpointError: the disk is full, or refuses.
        OutOfMemory: a process was killed.
    """
    used = _read(tokenizer)
    if processes == 1:
        done = PrepareProgress(0, 0, 0)

        def count(tokens: int) -> None:
            nonlocal done
            done = done._replace(tokens=done.tokens + tokens)
            show(done)

        for job in jobs:
            _build(job, used, count)
            done = PrepareProgress(done.source_shards + 1, done.size + (job.source_shard.size or 0), done.tokens)
            show(done)
        return
    try:
        _build_in_processes(jobs, tokenizer, processes, threads, show)
    finally:
        for folder in {job.folder.parent for job in jobs}:
            remove_stale(folder)


def _build_in_processes(
    jobs: Sequence[TokenizeJob], tokenizer: Path, processes: int, threads: int, show: Callable[[PrepareProgress], None]
) -> None:
    """Build in a pool of processes. The first error ends all of them."""
    context = multiprocessing.get_context("spawn")  # the threads of this process do not survive a fork
    written = context.RawArray("q", len(jobs))  # each job writes to its own number alone: no lock is needed
    others, pieces, size = {*multiprocessing.active_children()}, 0, 0
    waiting, pending = iter(enumerate(jobs)), dict[Future[None], TokenizeJob]()
    with _stopping_blocked():  # starts the resource tracker of multiprocessing: it needs the mask too
        executor = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, threads, written))
    try:
        while True:
            with _stopping_blocked():  # `submit` starts the processes
                for number, job in islice(waiting, _JOBS_AHEAD * processes - len(pending)):
                    pending[executor.submit(_build_in_worker, number, job)] = job
            if not pending:
                break
            done, _ = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for future in done:
                future.result()
                job = pending.pop(future)
                pieces, size = pieces + 1, size + (job.source_shard.size or 0)
            show(PrepareProgress(pieces, size, sum(written)))
    except BaseException as error:
        # The executor itself would send SIGTERM, which they block, and wait until they are done with their jobs.
        for process in {*multiprocessing.active_children()} - others:
            process.kill()
        if isinstance(error, BrokenProcessPool) and error.__cause__ is None:  # the cause: a result cannot be unpickled
            raise OutOfMemory(
                "a process that prepared data was killed, out of memory as it may be: what is whole stays; run it "
                "again, with fewer --processes if it comes again"
            ) from None
        raise
    finally:
        executor.shutdown()


@contextmanager
def _stopping_blocked() -> Iterator[None]:
    """Let signals wait. Processes that are started inherit this: a terminal signals all, and this one decides."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


class _Worker:
    """What a process of the pool builds with."""

    tokenizer: Path
    """Its tokenizer.json."""
    written: "Array[c_int64]"
    """Tokens of each job that are written."""


def _start_worker(tokenizer: Path, threads: int, written: "Array[c_int64]") -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    _Worker.tokenizer, _Worker.written = tokenizer, written  # a job reads it: an error here would lose its message
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Wait until the process that started this one is gone, and leave too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _build_in_worker(number: int, job: TokenizeJob) -> None:
    def count(tokens: int) -> None:
        _Worker.written[number] += tokens

    _build(job, _read_once(_Worker.tokenizer), count)


def _read(tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_json(tokenizer.read_text(encoding="utf-8"), str(tokenizer))


@cache
def _read_once(tokenizer: Path) -> Tokenizer:
    return _read(tokenizer)


def _build(job: TokenizeJob, tokenizer: Tokenizer, count: Callable[[int], None]) -> None:
    """Make the folder of one job; `count` is told of tokens as they are written."""

    def write(folder: Path) -> None:
        folder.mkdir()
        dropped: Counter[str] = Counter()
        found = job.filters(job.corpus.read(job.source_shard, dropped=dropped), dropped)
        with (
            ShardWriter(folder, TRAIN, tokenizer.vocab_size) as train,
            ShardWriter(folder, HELD_OUT, tokenizer.vocab_size) as held_out,
        ):
            for chunk in group_parts(split_documents(found, job.held_out_fraction)):
                for part, ids in zip(chunk, tokenizer.encode_batch([part.text for part in chunk]), strict=True):
                    writer = held_out if part.held_out else train
                    writer.add(ids, len(part.text.encode()), starts_document=part.starts_document)
                    count(len(ids))
        shards = {TRAIN: train.shards, HELD_OUT: held_out.shards}
        arrays = train.arrays | held_out.arrays
        write_manifest(
            folder,
            {"format": FORMAT, "piece": job.source_shard.name, "dropped": dropped, "shards": shards, "arrays": arrays},
        )

    with disk_errors(job.folder.parents[2], ELSEWHERE):
        build_atomically(job.folder, write)


class DocumentPart(NamedTuple):
    """So much of a document as is encoded at once."""

    held_out: bool
    starts_document: bool
    text: str


def split_documents(documents: Iterable[Document], fraction: float) -> Iterator[DocumentPart]:
    """Documents cut up, and whether they are of the `fraction` that is held out."""
    for document in documents:
        held_out = is_held_out(document.identity, fraction)
        for index, text in enumerate(split_text(document.text)):
            yield DocumentPart(held_out, index == 0, text)


def split_text(text: str) -> Iterator[str]:
    """Parts of at most PART_CHARACTERS, cut at a space where possible: encoding begins each part with one again."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        space = text.rfind(" ", start + 1, start + PART_CHARACTERS)
        end = space if space > 0 else start + PART_CHARACTERS
        yield text[start:end]
        start = end + 1 if space > 0 else end
    yield text[start:]


def group_parts(found: Iterable[DocumentPart]) -> Iterator[list[DocumentPart]]:
    """Group parts into lists of about CHUNK_CHARACTERS characters, which are encoded at once."""
    chunk: list[DocumentPart] = []
    size = 0
    for part in found:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
