"""A piece of a corpus as ids: read, filtered, cut and written as shards, the same by any process on any machine.

Several processes take pieces from one queue; each writes whole folders, so that what was done before a stop stays done.
"""

import multiprocessing
import os
import queue
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from switchcli.data.cache import ELSEWHERE, PARTIAL, make, sweep
from switchcli.data.corpus import Corpus, Piece
from switchcli.data.document import Document, is_held_out
from switchcli.data.filters import Filters
from switchcli.data.store import TOKENS, ShardWriter, seal, token_type
from switchcli.data.text import FORMAT, HELD_OUT, TRAIN
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import OutOfMemory, SwitchError, disk_errors

PART_CHARACTERS = 2**16  # longer documents are encoded in parts: the tokenizer holds many times its text in memory
CHUNK_CHARACTERS = 2**20  # encoded at once, by the tokenizer's own threads
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
    context = multiprocessing.get_context("spawn")  # the threads of this process do not survive a fork
    todo: multiprocessing.Queue[int | None] = context.Queue()
    done_by: multiprocessing.Queue[_Built] = context.Queue()
    for index in [*range(len(jobs)), *[None] * processes]:
        todo.put(index)
    arguments = (jobs, tokenizer, todo, done_by, threads)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        _await(jobs, done_by, workers, token_type(used.vocab_size).itemsize, show)
    finally:
        for worker in workers:
            worker.kill()  # what it was at is not whole, and is done again
            worker.join()
        for folder in {job.folder.parent for job in jobs}:
            sweep(folder)


class _Built(NamedTuple):
    """What a worker did: the tokens of a piece, or why it could not."""

    job: int
    tokens: int
    error: SwitchError | None


def _await(
    jobs: Sequence[Job],
    done: "multiprocessing.Queue[_Built]",
    workers: Sequence[BaseProcess],
    token_bytes: int,
    show: Callable[[Progress], None],
) -> None:
    """Return when all pieces are whole; raise what a worker met."""
    whole: list[_Built] = []
    folders = {job.folder.parent for job in jobs}
    while len(whole) < len(jobs):
        try:
            built = done.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            codes = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
            if codes:
                raise OutOfMemory(
                    f"a process that prepared data ended with code {codes[0]}, killed or out of memory: what is whole "
                    "stays; run it again, with fewer --processes if it comes again"
                ) from None
        else:
            if built.error is not None:
                raise built.error
            whole.append(built)
        under_way = sum(map(_bytes_under_way, folders)) // token_bytes
        size = sum(jobs[one.job].piece.size or 0 for one in whole)
        show(Progress(len(whole), size, sum(one.tokens for one in whole) + under_way))


def _bytes_under_way(folder: Path) -> int:
    """About how much is written of pieces that are not whole."""
    total = 0
    for path in folder.glob(f"{PARTIAL}*/built/*/{TOKENS}"):
        with suppress(FileNotFoundError):  # it is whole by now
            total += path.stat().st_size
    return total


def _work(
    jobs: Sequence[Job],
    tokenizer: Path,
    todo: "multiprocessing.Queue[int | None]",
    done: "multiprocessing.Queue[_Built]",
    threads: int,
) -> None:
    """A worker: pieces until there are none, or nobody waits for them."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all: the first process decides
        signal.signal(number, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    used, parent = _read(tokenizer), multiprocessing.parent_process()
    while (index := todo.get()) is not None:
        tokens = 0

        def count(more: int) -> None:
            nonlocal tokens
            tokens += more
            if parent is not None and not parent.is_alive():
                os._exit(1)

        try:
            _build(jobs[index], used, count)
        except SwitchError as error:
            done.put(_Built(index, 0, error))
            return
        done.put(_Built(index, tokens, None))


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
            for chunk in _chunks(_parts(found, job.held_out_fraction)):
                for part, ids in zip(chunk, tokenizer.encode_batch([part.text for part in chunk]), strict=True):
                    writer = held_out if part.held_out else train
                    writer.add(ids, len(part.text.encode()), starts_document=part.starts_document)
                    count(len(ids))
        shards = {TRAIN: train.shards, HELD_OUT: held_out.shards}
        seal(folder, {"format": FORMAT, "piece": job.piece.name, "dropped": dropped, "shards": shards})

    with disk_errors(job.folder.parents[2], ELSEWHERE):
        make(job.folder, write)


class _Part(NamedTuple):
    held_out: bool
    starts_document: bool
    text: str


def _parts(documents: Iterable[Document], fraction: float) -> Iterator[_Part]:
    for document in documents:
        held_out = is_held_out(document.identity, fraction)
        for index, text in enumerate(cut_up(document.text)):
            yield _Part(held_out, index == 0, text)


def cut_up(text: str) -> Iterator[str]:
    """Parts of at most PART_CHARACTERS, cut at a space where possible: encoding begins each part with one again."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        space = text.rfind(" ", start + 1, start + PART_CHARACTERS)
        end = space if space > 0 else start + PART_CHARACTERS
        yield text[start:end]
        start = end + 1 if space > 0 else end
    yield text[start:]


def _chunks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    chunk: list[_Part] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk
