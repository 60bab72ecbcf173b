"""PreparedText: one text as shards of token ids, as the manifest of its folder describes it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from switchcli.data.prepare.store import (
    ShardManifest,
    TokenShard,
    TokenStore,
    identity_of_files,
    read_manifest,
    write_manifest,
)

FORMAT = 4
"""Version of the format of prepared text. It is part of the name of each folder in the cache."""
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)


class TextCounts(NamedTuple):
    """Size of one split of a text."""

    documents: int
    tokens: int
    bytes: int
    """Bytes of the text in UTF-8."""


class PreparedText(NamedTuple):
    """One text as token ids."""

    shards: Mapping[str, tuple[TokenShard, ...]]
    """The shards of each split."""
    counts: Mapping[str, TextCounts]
    """The size of each split."""
    dropped: Mapping[str, int]
    """The number of documents or lines that were left out, by reason."""
    identity: str
    """A digest of the ids: equal text and an equal vocabulary give the same identity on any machine."""
    folder: Path


def write_text_manifest(
    folder: Path,
    shards: Mapping[str, Sequence[ShardManifest]],
    dropped: Mapping[str, int],
    tokenizer: str,
    files: Mapping[str, object] | None = None,
) -> None:
    """Write the manifest of a text whose shards lie in `folder`.

    Args:
        shards: the shards of each split.
        dropped: the number of documents or lines that were left out, by reason.
        tokenizer: the SHA-256 digest of the tokenizer.
        files: sizes and digests of the files, if they are known; otherwise all files are read.
    """
    counts = {
        split: {field: sum(shard[field] for shard in split_shards) for field in TextCounts._fields}
        for split, split_shards in shards.items()
    }
    facts = {"format": FORMAT, "tokenizer": tokenizer, "dropped": dropped, "counts": counts, "shards": shards}
    write_manifest(folder, facts, files)


def open_prepared_text(folder: Path) -> PreparedText:
    """Return the text in a complete folder. Its shards are opened when they are first read."""
    facts = read_manifest(folder)
    assert facts is not None, "the folder is complete"
    shards = {
        split: tuple(
            TokenShard(shard["documents"], shard["tokens"], partial(TokenStore.open, folder, shard["name"]))
            for shard in facts["shards"][split]
        )
        for split in SPLITS
    }
    names = [shard["name"] for split in SPLITS for shard in facts["shards"][split]]
    counts = {split: TextCounts(**facts["counts"][split]) for split in SPLITS}
    return PreparedText(shards, counts, facts["dropped"], identity_of_files(facts, names), folder)
