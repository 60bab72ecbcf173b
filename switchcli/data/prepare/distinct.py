"""Texts without their duplicates: made of texts that are prepared, from their ids alone."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.dedup import Duplicates, first_occurrences
from switchcli.data.prepare.digests import Track
from switchcli.data.prepare.prepared_text import HELD_OUT, TRAIN, PreparedText, write_text_manifest
from switchcli.data.prepare.store import ShardManifest, StoreWriter, TokenShard
from switchcli.data.tokenizer.tokenizer import Tokenizer


def find_distinct(
    texts: Sequence[PreparedText], duplicates: Duplicates, scratch: Path, track: Track
) -> list[list[NDArray[np.bool_]]]:
    """Return for each text which documents are no duplicate of an earlier one, as a mask [D] for each of its shards.

    Documents are in order of their texts: the first text keeps one that several have. In each text the held-out ones
    come first: what a model is measured on, it was not trained on. The masks are in the order of `_shards`.

    `scratch` is a folder for the keys: 8 bytes a document, 112 for near duplicates. Raises DataError for a shard that
    is not what was prepared.
    """
    shards = [(text, shard) for text in texts for _, shard in _shards(text)]
    file = scratch / "keys"
    ends = [0]
    with file.open("wb") as keys_file:
        for text, shard in track(shards, "looking for duplicates, in shards", len(shards)):
            store = shard.open()
            keys_BD = duplicates.signatures(store.gather(slice(None)), store.offsets).T
            keys_file.write(np.ascontiguousarray(keys_BD).data)
            ends.append(ends[-1] + keys_BD.size)
            text.check()  # now, not at the end: a shard that was not checked since it was read is held open
    all_keys = np.memmap(file, np.uint64, "r") if ends[-1] else np.zeros(0, np.uint64)  # an empty file has no mapping
    keys = [all_keys[first:end].reshape(duplicates.num_keys, -1).T for first, end in pairwise(ends)]
    masks = iter(first_occurrences(keys, lambda bands: track(bands, "comparing their keys, in bands", len(bands))))
    return [[next(masks) for _ in _shards(text)] for text in texts]


def write_distinct(
    text: PreparedText,
    stays: Sequence[NDArray[np.bool_]],
    reason: str,
    tokenizer: Tokenizer,
    folder: Path,
    track: Track,
) -> None:
    """Write the documents of `text` that stay, in shards as they were. `stays` is from `find_distinct`.

    The others count as dropped for the `reason`. Raises DataError for a shard that is not what was prepared.
    """
    folder.mkdir()
    arrays: dict[str, object] = {}
    facts: dict[str, list[ShardManifest]] = {TRAIN: [], HELD_OUT: []}
    dropped = Counter(text.dropped)
    shards = track(_shards(text), "leaving duplicates out, in shards", len(stays))
    for (part, shard), stays_D in zip(shards, stays, strict=True):
        store = shard.open()
        length_D = np.diff(store.offsets)
        name = f"{part}-{len(facts[part]):05}"
        with StoreWriter(folder, name, tokenizer.vocab_size) as writer:
            writer.add_all(store.gather(np.flatnonzero(np.repeat(stays_D, length_D))), length_D[stays_D])
        arrays |= writer.arrays
        tokens = int(length_D[stays_D].sum())
        counts = text.counts[part]
        num_bytes = round(tokens * counts.bytes / max(counts.tokens, 1))  # on average: a document's own are not kept
        facts[part].append({"name": name, "documents": int(stays_D.sum()), "tokens": tokens, "bytes": num_bytes})
        dropped[reason] += int((~stays_D).sum())
    text.check()
    write_text_manifest(folder, facts, dropped, tokenizer.sha256, arrays)


def _shards(text: PreparedText) -> list[tuple[str, TokenShard]]:
    return [(part, shard) for part in (HELD_OUT, TRAIN) for shard in text.shards[part]]
