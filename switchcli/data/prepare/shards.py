"""A piece of a corpus as ids: read, filtered, cut and written as shards, the same by any process on any machine.

Several processes are given pieces one by one; each writes whole folders, so that what was done before a stop stays.
"""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from switchcli.data.prepare.cache import ELSEWHERE, PARTIAL, make, sweep
from switchcli.data.prepare.filters import Filters
from switchcli.data.prepare.prepared_text import FORMAT, HELD_OUT, TRAIN
from switchcli.data.prepare.store import TOKENS, ShardWriter, seal, token_type
from switchcli.data.sources.corpus import Corpus, Piece
from switchcli.data.sources.document import Document, is_held_out
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import OutOfMemory, SwitchError, disk_errors

PART_CHARACTERS = 2**16  # longer documents are encoded in parts: the tokenizer holds many times its text in memory
CHUNK_CHARACTERS = 2**20  # encoded at once, by the tokenizer's own threads
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""Equal to `parallel.signals.STOPPING`, which this package cannot import."""
_SECONDS_BETWEEN_LOOKS = 0.2


class Job(NamedTuple):
    """A piece, and where its ids go."""

    corpus: Corpus
    piece: Piece
    folder: Path
    held_out_fraction: float
    filters: Filters


class Progress(NamedTuple):
    """How far a preparation is."""

    pieces: int
    """Whole ones."""
    size: int
    """Bytes of their sources, of those whose size is known."""
    tokens: int
    """Written, also of pieces that are not whole yet."""


def build(jobs: Sequence[Job], tokenizer: Path, processes: int, threads: int, show: Callable[[Progress], None]) -> None:
    """Make every job's folder, `processes` at once with `threads` each; `tokenizer` is its tokenizer.json.

    Raises:
        DataError: of the text. What is whole by then stays, then and below.
        CheckpointError: the disk is full, or refuses.
        OutOfMemory: a process was killed.
    """
    used = _read(tokenizer)
    if processes == 1:
        done = Progress(0, 0, 0)

        def count(tokens: int) -> None:
            nonlocal done
            done = done._replace(tokens=done.tokens + tokens)
            show(done)

        for job in jobs:
            _build(job, used, count)
            done = Progress(done.pieces + 1, done.size + (job.piece.size or 0), done.tokens)
            show(done)
        return
    try:
        with _workers(processes, tokenizer, threads) as workers:
            _share_out(jobs, workers, token_type(used.vocab_size).itemsize, show)
    finally:
        for folder in {job.folder.parent for job in jobs}:
            sweep(folder)


class _Worker(NamedTuple):
    """A process, and what it is told and tells by."""

    process: BaseProcess
    pipe: "Connection[Job, _Built]"


class _Built(NamedTuple):
    """What a worker did: the tokens of a piece, or why it could not."""

    tokens: int
    error: SwitchError | None


@contextmanager
def _workers(number: int, tokenizer: Path, threads: int) -> Iterator[list[_Worker]]:
    """Processes that wait for jobs; afterwards they are gone, and what they were at with them."""
    context = multiprocessing.get_context("spawn")  # the threads of this process do not survive a fork
    workers: list[_Worker] = []
    try:
        # A terminal sends its signals to all: this process decides. The mask is inherited.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            for _ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, tokenizer, threads), daemon=True)
                process.start()
                theirs.close()
                workers.append(_Worker(process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _share_out(
    jobs: Sequence[Job], workers: Sequence[_Worker], token_bytes: int, show: Callable[[Progress], None]
) -> None:
    """Give each worker the next job when it is done with one, until all are whole; raise what a worker met."""
    left, whole, size, tokens = list(jobs[::-1]), 0, 0, 0
    folders = {job.folder.parent for job in jobs}
    at: dict[Connection[Job, _Built], Job] = {}
    try:
        for worker in workers:
            at[worker.pipe] = left.pop()
            worker.pipe.send(at[worker.pipe])
        while at:
            ready = connection.wait([*at], timeout=_SECONDS_BETWEEN_LOOKS)
            for pipe in [one for one in at if one in ready]:
                built, job = pipe.recv(), at.pop(pipe)
                if built.error is not None:
                    raise built.error
                whole, size, tokens = whole + 1, size + (job.piece.size or 0), tokens + built.tokens
                if left:
                    at[pipe] = left.pop()
                    pipe.send(at[pipe])
            show(Progress(whole, size, tokens + sum(map(_bytes_under_way, folders)) // token_bytes))
    except (EOFError, ConnectionError):
        raise OutOfMemory(
            "a process that prepared data was killed, out of memory as it may be: what is whole stays; run it again, "
            "with fewer --processes if it comes again"
        ) from None


def _bytes_under_way(folder: Path) -> int:
    """About how much is written of pieces that are not whole."""
    total = 0
    for path in folder.glob(f"{PARTIAL}*/built/*/{TOKENS}"):
        with suppress(FileNotFoundError):  # it is whole by now
            total += path.stat().st_size
    return total


def _work(pipe: "Connection[_Built, Job]", tokenizer: Path, threads: int) -> None:
    """A worker: jobs as they come, until nobody is there to send any."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    used, parent = _read(tokenizer), multiprocessing.parent_process()
    with suppress(EOFError, ConnectionError):
        while True:
            job, tokens = pipe.recv(), 0

            def count(more: int) -> None:
                nonlocal tokens
                tokens += more
                if parent is not None and not parent.is_alive():
                    os._exit(1)

            try:
                _build(job, used, count)
                pipe.send(_Built(tokens, None))
            except SwitchError as error:
                pipe.send(_Built(0, error))


def _read(tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_json(tokenizer.read_text(encoding="utf-8"), str(tokenizer))


def _build(job: Job, tokenizer: Tokenizer, count: Callable[[int], None]) -> None:
    """Make the folder of one job; `count` is told of tokens as they are written."""

    def write(folder: Path) -> None:
        folder.mkdir()
        dropped: Counter[str] = Counter()
        found = job.filters(job.corpus.read(job.piece, dropped=dropped), dropped)
        with (
            ShardWriter(folder, TRAIN, tokenizer.vocab_size) as train,
            ShardWriter(folder, HELD_OUT, tokenizer.vocab_size) as held_out,
        ):
            for chunk in chunks(parts(found, job.held_out_fraction)):
                for part, ids in zip(chunk, tokenizer.encode_batch([part.text for part in chunk]), strict=True):
                    writer = held_out if part.held_out else train
                    writer.add(ids, len(part.text.encode()), starts_document=part.starts_document)
                    count(len(ids))
        shards = {TRAIN: train.shards, HELD_OUT: held_out.shards}
        arrays = train.arrays | held_out.arrays
        seal(
            folder, {"format": FORMAT, "piece": job.piece.name, "dropped": dropped, "shards": shards, "arrays": arrays}
        )

    with disk_errors(job.folder.parents[2], ELSEWHERE):
        make(job.folder, write)


class Part(NamedTuple):
    """So much of a document as is encoded at once."""

    held_out: bool
    starts_document: bool
    text: str


def parts(documents: Iterable[Document], fraction: float) -> Iterator[Part]:
    """Documents cut up, and whether they are of the `fraction` that is held out."""
    for document in documents:
        held_out = is_held_out(document.identity, fraction)
        for index, text in enumerate(cut_up(document.text)):
            yield Part(held_out, index == 0, text)


def cut_up(text: str) -> Iterator[str]:
    """Parts of at most PART_CHARACTERS, cut at a space where possible: encoding begins each part with one again."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        space = text.rfind(" ", start + 1, start + PART_CHARACTERS)
        end = space if space > 0 else start + PART_CHARACTERS
        yield text[start:end]
        start = end + 1 if space > 0 else end
    yield text[start:]


def chunks(found: Iterable[Part]) -> Iterator[list[Part]]:
    """As many as are encoded at once."""
    chunk: list[Part] = []
    size = 0
    for part in found:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
