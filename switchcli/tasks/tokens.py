"""Tokenized tasks: packed training rows from the cache, and the examples to score in batches of similar length.

Legend  B examples of a batch  S source positions  T target positions
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.objectives.example_packing import (
    PackedExamples,
    RowLengths,
    pack,
    pack_as_given,
    store_from_texts,
)
from switchcli.data.prepare.cache import Track, get_or_build
from switchcli.data.prepare.prepared_text import FORMAT as STORE_FORMAT
from switchcli.data.prepare.store import (
    StoreWriter,
    TokenStore,
    digest_of_lines,
    identity_of_files,
    read_manifest,
    write_manifest,
)
from switchcli.data.rng import EXAMPLES, permutation
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS
from switchcli.tasks.reading import Split, fingerprint, read_examples
from switchcli.tasks.task import Example, Task, indices_by_unit

FORMAT: Final = 3
"""Version of the cached files. It must increase whenever the same cache key would give different ids."""
INPUTS, TARGETS = "inputs", "targets"
CHUNK_EXAMPLES: Final = 1024
BUCKET: Final = 16
"""Inputs and targets to score are padded to a multiple of this number of tokens."""


class PackedTask(NamedTuple):
    """A task's training examples as packed rows."""

    packed: PackedExamples
    identity: str
    """A digest of the token ids."""


def packed_task(
    task: Task,
    folder: str | None,
    tokenizer: Tokenizer,
    lengths: RowLengths,
    seed: int,
    cache: Path,
    track: Track,
) -> PackedTask:
    """Return the task's training split as packed rows, from the cache or by building the cache entry.

    Args:
        folder: a folder of data sets as `FOLDER/SPLIT.jsonl`; None for the hub.
        seed: determines the order in which examples are packed.

    Raises:
        DataError: the split cannot be read; see `read_examples`.
    """
    key_parts = [str(FORMAT), task.name, fingerprint(task, "train", folder), tokenizer.sha256, str(STORE_FORMAT)]
    entry = cache / "tasks" / digest_of_lines(key_parts)

    def build(temporary: Path) -> None:
        temporary.mkdir()
        examples = read_examples(task, "train", "training", folder)
        inputs, targets = (StoreWriter(temporary, name, tokenizer.vocab_size) for name in (INPUTS, TARGETS))
        tracked = iter(track(examples, f"tokenizing examples of {task.name}", len(examples)))
        while chunk := [*islice(tracked, CHUNK_EXAMPLES)]:
            _write(inputs, tokenizer, [example.input for example in chunk])
            _write(targets, tokenizer, [example.targets[0] for example in chunk])
        inputs.close()
        targets.close()
        write_manifest(temporary, {"format": FORMAT, "task": task.name, "examples": len(examples)})

    with get_or_build(entry, build):
        manifest = read_manifest(entry)
        assert manifest is not None, "get_or_build leaves a complete entry"
        packed = pack(TokenStore.open(entry, INPUTS), TokenStore.open(entry, TARGETS), lengths, seed)
        return PackedTask(packed, identity_of_files(manifest, (INPUTS, TARGETS)))


def _write(store: StoreWriter, tokenizer: Tokenizer, texts: list[str]) -> None:
    for ids in tokenizer.encode_batch(texts):
        store.add(np.append(ids, EOS), starts_document=True)


class ScoredExamples(NamedTuple):
    """The examples that a task is scored on."""

    task: Task
    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    """The index of each example in the split, from 0."""
    inputs: TokenStore
    packed: PackedExamples
    """Inputs and first targets of the examples that have a target, for the cross-entropy."""
    answers: TokenStore
    """The first target of each example, empty if it is secret."""

    @property
    def num_truncated(self) -> int:
        """Number of inputs that are longer than the model's and get truncated."""
        return int((np.diff(self.inputs.offsets) > self.packed.lengths.inputs).sum())

    def batches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the numbers of `size` examples at a time, the longest inputs first, always in the same order."""
        order = np.argsort(-np.diff(self.inputs.offsets), kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def padded_inputs(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the examples' inputs as int64 [B, S], truncated to the model's length, with S a multiple of BUCKET."""
        return _pad(self.inputs, numbers, self.packed.lengths.inputs)

    def targets(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the examples' first targets as int64 [B, T], truncated and padded as the inputs are."""
        return _pad(self.answers, numbers, self.packed.lengths.targets)


def scored_examples(
    task: Task, split: Split, folder: str | None, tokenizer: Tokenizer, lengths: RowLengths, limit: int | None
) -> ScoredExamples:
    """Return the task's examples of a split, tokenized.

    Args:
        limit: maximum number of examples. They are a random choice of whole units, the same in every call.

    Raises:
        DataError: the split cannot be read; see `read_examples`.
    """
    examples = read_examples(task, split, "scoring", folder)
    numbers = list(range(len(examples))) if limit is None else _sample_units(examples, limit)
    examples = [examples[number] for number in numbers]
    inputs = tokenizer.encode_batch([example.input for example in examples])
    answers = tokenizer.encode_batch([example.targets[0] if example.targets else "" for example in examples])
    labeled = [index for index, example in enumerate(examples) if example.targets]
    packed = pack(
        store_from_texts(inputs[index] for index in labeled),
        store_from_texts(answers[index] for index in labeled),
        lengths,
        seed=0,
    )
    return ScoredExamples(
        task, tuple(examples), tuple(numbers), store_from_texts(inputs), packed, store_from_texts(answers)
    )


def _sample_units(examples: list[Example], limit: int) -> list[int]:
    """Return the sorted indices of at most `limit` examples, in whole units; the first unit may exceed the limit."""
    units = indices_by_unit(examples)
    sample: list[int] = []
    for unit in permutation(len(units), 0, 0, EXAMPLES):
        # A unit that does not fit is skipped, and a smaller one that comes later may still fit.
        if not sample or len(sample) + len(units[unit]) <= limit:
            sample += units[unit]
    return sorted(sample)


def _pad(store: TokenStore, numbers: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """Return int64 [B, length] with one example per row; length is a multiple of BUCKET, and at most `max_length`."""
    longest = int(np.diff(store.offsets)[numbers].max())
    length = min(max_length, -(-longest // BUCKET) * BUCKET)  # rounded up
    rows = pack_as_given(store, store, RowLengths(length, length), [[int(number)] for number in numbers])
    return rows.rows(np.arange(len(numbers)))[0]
