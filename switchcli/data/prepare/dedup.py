"""Duplicates: leave out the documents whose token ids repeat those of an earlier document.

Texts without duplicates are made from prepared texts, by their ids alone.

Legend  T tokens  D documents
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.cache import ELSEWHERE, PrepareContext, Track, build_atomically, is_usable
from switchcli.data.prepare.prepared_text import (
    HELD_OUT,
    TRAIN,
    PreparedText,
    open_prepared_text,
    write_text_manifest,
)
from switchcli.data.prepare.store import ShardManifest, StoreWriter, TokenShard, digest_of_lines
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import disk_errors


def distinct_texts(
    texts: Mapping[str, PreparedText], tokenizer: Tokenizer, context: PrepareContext
) -> dict[str, PreparedText]:
    """Return each text without the documents that repeat one of the same text or of a text before it.

    Texts that are missing in the cache, or damaged, are built.
    """
    folders: dict[str, Path] = {}
    for label in texts:
        # What stays of a text depends on the texts before it, so that its folder is named by these too.
        names = [texts[earlier].folder.name for earlier in (*folders, label)]
        folders[label] = context.cache / "tokens" / digest_of_lines([*names, "distinct"])
    with disk_errors(context.cache, ELSEWHERE):
        if missing := [label for label, folder in folders.items() if not is_usable(folder, context)]:
            masks = iter(_first_occurrences([*texts.values()], context.track))
            for label, text in texts.items():
                masks_of_text = [*islice(masks, len(_shards(text)))]
                if label in missing:
                    write = partial(_write_distinct, text, masks_of_text, tokenizer, context.track)
                    build_atomically(folders[label], write)
        return {label: open_prepared_text(folder) for label, folder in folders.items()}


def _first_occurrences(texts: Sequence[PreparedText], track: Track) -> list[NDArray[np.bool_]]:
    """Return, for each shard of each text, a mask [D] of the documents that repeat no earlier one.

    It takes about 30 bytes of memory for each document. Raises DataError for a shard that cannot be read.
    """
    shards = [shard for text in texts for _, shard in _shards(text)]
    keys: list[NDArray[np.uint64]] = []
    for shard in track(shards, "looking for duplicates, in shards", len(shards)):
        digests = [hashlib.blake2b(ids, digest_size=8).digest() for ids in shard.open().documents()]
        keys.append(np.frombuffer(b"".join(digests), np.uint64))
    _, first = np.unique(np.concatenate(keys), return_index=True)
    stays = np.zeros(sum(map(len, keys)), np.bool_)
    stays[first] = True
    return np.split(stays, np.cumsum([len(of_shard) for of_shard in keys])[:-1])


def _write_distinct(
    text: PreparedText, masks: Sequence[NDArray[np.bool_]], tokenizer: Tokenizer, track: Track, folder: Path
) -> None:
    """Write a new text of the documents of `text` that `masks` select, shard by shard."""
    folder.mkdir()
    manifests: dict[str, list[ShardManifest]] = {TRAIN: [], HELD_OUT: []}
    shards = track(_shards(text), "leaving duplicates out, in shards", len(masks))
    for (split, shard), stays_D in zip(shards, masks, strict=True):
        store = shard.open()
        length_D = np.diff(store.offsets)
        name = f"{split}-{len(manifests[split]):05}"
        writer = StoreWriter(folder, name, tokenizer.vocab_size)
        tokens_T = store.tokens[np.repeat(stays_D, length_D)]  # each token stays if its document does
        writer.add_all(tokens_T, length_D[stays_D])
        writer.close()
        # The bytes of a single document are not recorded, so that this is an average.
        counts = text.counts[split]
        num_bytes = round(len(tokens_T) * counts.bytes / max(counts.tokens, 1))
        manifests[split].append(
            {"name": name, "documents": int(stays_D.sum()), "tokens": len(tokens_T), "bytes": num_bytes}
        )
    dropped = {**text.dropped, "exact duplicates": sum(int((~stays_D).sum()) for stays_D in masks)}
    write_text_manifest(folder, manifests, dropped, tokenizer.sha256)


def _shards(text: PreparedText) -> list[tuple[str, TokenShard]]:
    """Return the shards of a text, each with its split, in the order in which a document is an earlier one.

    Held-out documents come before those to train on: a model is not trained on what it is measured on.
    """
    return [(split, shard) for split in (HELD_OUT, TRAIN) for shard in text.shards[split]]
