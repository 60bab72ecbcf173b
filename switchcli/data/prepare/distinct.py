"""A text without its duplicates: made of one that is prepared, from its ids alone."""

from collections import Counter
from pathlib import Path

import numpy as np

from switchcli.data.prepare.dedup import Duplicates, kept
from switchcli.data.prepare.prepared_text import HELD_OUT, TRAIN, Text, seal_text
from switchcli.data.prepare.store import ShardFacts, StoreWriter
from switchcli.data.tokenizer.tokenizer import Tokenizer


def write_distinct(text: Text, duplicates: Duplicates, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the documents of `text` of which no earlier one is a duplicate, in shards as they were.

    The held-out ones come first: what a model is measured on, it was not trained on.
    """
    folder.mkdir()
    shards = [(part, shard) for part in (HELD_OUT, TRAIN) for shard in text.shards[part]]
    keys = []
    for number, (_, shard) in enumerate(shards):
        store = shard.open()
        scratch = folder / f"signatures-{number}.npy"
        np.save(scratch, duplicates.signatures(store.take(slice(None)), store.offsets), allow_pickle=False)
        keys.append(np.load(scratch, mmap_mode="r", allow_pickle=False))
    arrays: dict[str, object] = {}
    facts: dict[str, list[ShardFacts]] = {TRAIN: [], HELD_OUT: []}
    dropped = Counter(text.dropped)
    for (part, shard), stays_D in zip(shards, kept(keys), strict=True):
        store = shard.open()
        length_D = np.diff(store.offsets)
        name = f"{part}-{len(facts[part]):05}"
        with StoreWriter(folder, name, tokenizer.vocab_size) as writer:
            writer.add_all(store.take(np.flatnonzero(np.repeat(stays_D, length_D))), length_D[stays_D])
        arrays |= writer.arrays
        tokens = int(length_D[stays_D].sum())
        counts = text.counts[part]
        num_bytes = round(tokens * counts.bytes / max(counts.tokens, 1))  # on average: a document's own are not kept
        facts[part].append({"name": name, "documents": int(stays_D.sum()), "tokens": tokens, "bytes": num_bytes})
        dropped[f"{duplicates.kind} duplicates"] += int((~stays_D).sum())
    text.check()
    for scratch in folder.glob("signatures-*.npy"):
        scratch.unlink()
    seal_text(folder, facts, dropped, tokenizer.sha256, arrays)
