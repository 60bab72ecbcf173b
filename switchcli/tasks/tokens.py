"""A task as ids: its training examples in the cache, and those that it is scored on, in batches of a like length."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.objectives.example_packing import PackedExamples, RowLengths, pack, pack_as_given, store_from_texts
from switchcli.data.prepare.cache import get_or_build
from switchcli.data.prepare.digests import Digests, Track
from switchcli.data.prepare.prepared_text import LAYOUT, manifest_bytes
from switchcli.data.prepare.store import StoreWriter, TokenStore, identity_of_stores, read_manifest, write_manifest
from switchcli.data.prepare.verified import IN_MEMORY_BYTES, VerifiedFolder
from switchcli.data.rng import permutation
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS
from switchcli.tasks.reading import Split, fingerprint, read_examples
from switchcli.tasks.task import Example, Task

FORMAT = 2  # raise when the same key would come to mean other ids
INPUTS, TARGETS = "inputs", "targets"
CHUNK_EXAMPLES = 1024
BUCKET = 16
"""Inputs are padded to a multiple of it."""


class PackedTask(NamedTuple):
    """A task's training examples as packed rows."""

    packed: PackedExamples
    identity: str
    """A digest of the ids themselves."""
    num_bytes: int
    """Their bytes on disk."""
    check: Callable[[], None]
    """Raises DataError if rows that were read are not what was prepared; see `Verified.check`."""


def packed_task(
    task: Task,
    folder: str | None,
    tokenizer: Tokenizer,
    lengths: RowLengths,
    seed: int,
    cache: Path,
    track: Track,
    warn: Callable[[str], None] = lambda text: None,
    before: int = 0,
) -> PackedTask:
    """Return the task's training split, from the cache if it is there. Raises DataError as `examples` does.

    `before` are the bytes of the tasks that come before it: together up to IN_MEMORY_BYTES are held in memory. `warn`
    is called with a line for each file that changed since the split was prepared.
    """
    digests = Digests(cache, track=track, warn=warn)
    parts = [str(FORMAT), task.name, fingerprint(task, "train", folder, digests), tokenizer.sha256, LAYOUT]
    place = cache / "tasks" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def build(built: Path) -> None:
        built.mkdir()
        found = read_examples(task, "train", "training", folder)
        with (
            StoreWriter(built, INPUTS, tokenizer.vocab_size) as inputs,
            StoreWriter(built, TARGETS, tokenizer.vocab_size) as targets,
        ):
            starts = range(0, len(found), CHUNK_EXAMPLES)
            for start in track(starts, f"tokenising {task.name}, in thousands", len(starts)):
                chunk = found[start : start + CHUNK_EXAMPLES]
                for writer, texts in (
                    (inputs, [one.input for one in chunk]),
                    (targets, [one.targets[0] for one in chunk]),
                ):
                    for ids in tokenizer.encode_batch(texts):
                        writer.add(np.append(ids, EOS), starts_document=True)
        arrays = inputs.arrays | targets.arrays
        write_manifest(built, {"format": FORMAT, "task": task.name, "examples": len(found), "arrays": arrays})

    with get_or_build(place, build):
        facts = read_manifest(place)
        assert facts is not None, "sealed"
        size = manifest_bytes(facts)
        verified = VerifiedFolder(place, facts["files"], in_memory=before + size <= IN_MEMORY_BYTES)
        packed = pack(TokenStore.open(verified, INPUTS), TokenStore.open(verified, TARGETS), lengths, seed)
        return PackedTask(packed, identity_of_stores(place, (INPUTS, TARGETS)), size, verified.check)


class ScoredExamples(NamedTuple):
    """The examples that a task is scored on."""

    task: Task
    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    """The place of each among all examples of the split, from 0."""
    inputs: TokenStore
    packed: PackedExamples
    """Inputs and first targets of those that have a target, for the cross-entropy."""
    answers: TokenStore
    """The first target of each, empty where it is secret."""

    @property
    def num_cut(self) -> int:
        """Inputs that are longer than the model's."""
        return int((np.diff(self.inputs.offsets) > self.packed.lengths.inputs).sum())

    def batches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """The numbers of the examples, `size` at a time, the longest first: the same whatever reads them."""
        order = np.argsort(-np.diff(self.inputs.offsets), kind="stable")
        yield from (order[first : first + size] for first in range(0, len(order), size))

    def padded(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B, S]: these examples' inputs, cut to the model's length, S a multiple of BUCKET."""
        return _padded(self.inputs, numbers, self.packed.lengths.inputs)

    def targets(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B, T]: their first targets in the same way."""
        return _padded(self.answers, numbers, self.packed.lengths.targets)


def scored_examples(
    task: Task, split: Split, folder: str | None, tokenizer: Tokenizer, lengths: RowLengths, limit: int | None
) -> ScoredExamples:
    """The task's examples of a split, or `limit` of them drawn by lot, whole units, the same ones each time.

    DataError as above.
    """
    found = read_examples(task, split, "scoring", folder)
    numbers = range(len(found)) if limit is None else _drawn(found, limit)
    found = [found[number] for number in numbers]
    asked = tokenizer.encode_batch([one.input for one in found])
    answers = tokenizer.encode_batch([one.targets[0] if one.targets else "" for one in found])
    labelled = [number for number, one in enumerate(found) if one.targets]
    known = [store_from_texts(ids[number] for number in labelled) for ids in (asked, answers)]
    packed = pack(known[0], known[1], lengths, 0)
    return ScoredExamples(
        task, tuple(found), tuple(numbers), store_from_texts(asked), packed, store_from_texts(answers)
    )


def _drawn(found: list[Example], limit: int) -> list[int]:
    """The numbers of at most `limit` examples, in order: units drawn by lot, but for those that would be too many."""
    units: dict[str | int, list[int]] = {}
    for number, example in enumerate(found):
        units.setdefault(example.unit or number, []).append(number)
    members = list(units.values())
    kept: list[int] = []
    for unit in permutation(len(members), 0, 0, 0):
        if not kept or len(kept) + len(members[unit]) <= limit:
            kept += members[unit]
    return sorted(kept)


def _padded(store: TokenStore, numbers: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    longest = int(np.diff(store.offsets)[numbers].max())
    length = min(most, -(-longest // BUCKET) * BUCKET)
    rows = pack_as_given(store, store, RowLengths(length, length), [[int(number)] for number in numbers])
    return rows.rows(np.arange(len(numbers)))[0]
