"""A task as ids: its training examples in the cache, and those that it is scored on, in batches of a like length."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.objectives.example_packing import Lengths, Packed, pack, packed_as, store_of
from switchcli.data.prepare.cache import cached
from switchcli.data.prepare.digests import Digests, Track
from switchcli.data.prepare.prepared_text import LAYOUT, num_bytes
from switchcli.data.prepare.store import StoreWriter, TokenStore, facts_of, identity, seal
from switchcli.data.prepare.verified import IN_MEMORY_BYTES, Verified
from switchcli.data.rng import permutation
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS
from switchcli.tasks.reading import Split, examples, fingerprint
from switchcli.tasks.task import Example, Task

FORMAT = 2  # raise when the same key would come to mean other ids
INPUTS, TARGETS = "inputs", "targets"
CHUNK_EXAMPLES = 1024
BUCKET = 16
"""Inputs are padded to a multiple of it."""


class Training(NamedTuple):
    """A task's training examples as packed rows."""

    packed: Packed
    identity: str
    """A digest of the ids themselves."""
    num_bytes: int
    """Their bytes on disk."""
    check: Callable[[], None]
    """Raises DataError if rows that were read are not what was prepared; see `Verified.check`."""


def training(
    task: Task,
    folder: str | None,
    tokenizer: Tokenizer,
    lengths: Lengths,
    seed: int,
    cache: Path,
    track: Track,
    warn: Callable[[str], None] = lambda text: None,
    before: int = 0,
) -> Training:
    """Return the task's training split, from the cache if it is there. Raises DataError as `examples` does.

    `before` are the bytes of the tasks that come before it: together up to IN_MEMORY_BYTES are held in memory. `warn`
    is called with a line for each file that changed since the split was prepared.
    """
    digests = Digests(cache, track=track, warn=warn)
    parts = [str(FORMAT), task.name, fingerprint(task, "train", folder, digests), tokenizer.sha256, LAYOUT]
    place = cache / "tasks" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def build(built: Path) -> None:
        built.mkdir()
        found = examples(task, "train", "training", folder)
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
        seal(built, {"format": FORMAT, "task": task.name, "examples": len(found), "arrays": arrays})

    with cached(place, build):
        facts = facts_of(place)
        assert facts is not None, "sealed"
        size = num_bytes(facts)
        verified = Verified(place, facts["files"], in_memory=before + size <= IN_MEMORY_BYTES)
        packed = pack(TokenStore.open(verified, INPUTS), TokenStore.open(verified, TARGETS), lengths, seed)
        return Training(packed, identity(place, (INPUTS, TARGETS)), size, verified.check)


class Scored(NamedTuple):
    """The examples that a task is scored on."""

    task: Task
    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    """The place of each among all examples of the split, from 0."""
    inputs: TokenStore
    packed: Packed
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


def scored(
    task: Task, split: Split, folder: str | None, tokenizer: Tokenizer, lengths: Lengths, limit: int | None
) -> Scored:
    """The task's examples of a split, or `limit` of them drawn by lot, whole units, the same ones each time.

    DataError as above.
    """
    found = examples(task, split, "scoring", folder)
    numbers = range(len(found)) if limit is None else _drawn(found, limit)
    found = [found[number] for number in numbers]
    asked = tokenizer.encode_batch([one.input for one in found])
    answers = tokenizer.encode_batch([one.targets[0] if one.targets else "" for one in found])
    labelled = [number for number, one in enumerate(found) if one.targets]
    known = [store_of(ids[number] for number in labelled) for ids in (asked, answers)]
    packed = pack(known[0], known[1], lengths, 0)
    return Scored(task, tuple(found), tuple(numbers), store_of(asked), packed, store_of(answers))


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
    rows = packed_as(store, store, Lengths(length, length), [[int(number)] for number in numbers])
    return rows.rows(np.arange(len(numbers)))[0]
