"""PreparedText: one text as shards of token ids, as the manifest of its folder describes it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.data.prepare.digests import Track
from switchcli.data.prepare.store import (
    OFFSETS,
    TOKENS,
    ShardManifest,
    TokenShard,
    TokenStore,
    digest_of,
    is_complete,
    matches_identity,
    read_manifest,
    write_manifest,
)
from switchcli.data.prepare.verified import IN_MEMORY_BYTES, VerifiedFolder

FORMAT = 3
"""Version of the ids that a digest of sources stands for. Increment it when equal sources would give other ids."""
LAYOUT = "arrow"
"""Name of the storage format. It is in the names of folders in the cache, but not in checkpoints: change it when equal
ids are stored in a new way."""
TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
CHECKED_AT_START = 2**30
"""Bytes of all texts of a run up to which they are compared with their digests before the run, and prepared again where
they differ. Every shard is compared when it is opened, whatever its size."""


class TextCounts(NamedTuple):
    """Size of one split of a text."""

    documents: int
    tokens: int
    bytes: int
    """Bytes of the text in UTF-8."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


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
    num_bytes: int
    """Bytes on disk."""
    check: Callable[[], None]
    """Raises DataError if a shard that was read has changed since it was prepared; see `VerifiedFolder.check`."""


def write_text_manifest(
    folder: Path,
    shards: Mapping[str, Sequence[ShardManifest]],
    dropped: Mapping[str, int],
    tokenizer: str,
    arrays: Mapping[str, object],
    files: Mapping[str, object] | None = None,
) -> None:
    """Write the manifest of a text whose shards lie in `folder`.

    Args:
        shards: the shards of each split.
        dropped: the number of documents or lines that were left out, by reason.
        tokenizer: the SHA-256 digest of the tokenizer.
        arrays: sizes and digests of the shards' arrays, from `ShardWriter`.
        files: sizes and digests of the files, if they are known; otherwise all files are read.
    """
    counts = {
        split: {field: sum(shard[field] for shard in split_shards) for field in TextCounts._fields}
        for split, split_shards in shards.items()
    }
    facts = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "dropped": dropped,
        "counts": counts,
        "shards": shards,
        "arrays": arrays,
    }
    write_manifest(folder, facts, files)


def open_prepared_text(folder: Path, before: int = 0) -> PreparedText:
    """Return the text in a complete folder. Its shards are opened, and verified, when they are first read.

    `before` counts the bytes of the texts before this one: all texts up to IN_MEMORY_BYTES are held in memory.
    """
    facts = read_manifest(folder)
    assert facts is not None, "the folder is complete"
    arrays = facts["arrays"]
    num_bytes = manifest_bytes(facts)
    verified = VerifiedFolder(folder, facts["files"], in_memory=before + num_bytes <= IN_MEMORY_BYTES)

    array_identities: dict[str, object] = {}
    shards: dict[str, tuple[TokenShard, ...]] = {}
    for split in SPLITS:
        opened = []
        for number, shard in enumerate(facts["shards"][split]):
            # The first shard has no number: a text of one shard keeps the identity from before there were shards.
            label = f"{split}-{number}" if number else split
            for array in (OFFSETS, TOKENS):
                array_identities[f"{label}/{array}"] = arrays[f"{shard['name']}/{array}"]
            open_store = partial(TokenStore.open, verified, shard["name"])
            open_index = partial(TokenStore.open_index, verified, shard["name"], arrays[f"{shard['name']}/{OFFSETS}"])
            opened.append(TokenShard(shard["documents"], shard["tokens"], open_store, open_index))
        shards[split] = tuple(opened)

    counts = {split: TextCounts(*(facts["counts"][split][field] for field in TextCounts._fields)) for split in SPLITS}
    return PreparedText(
        shards, counts, facts["dropped"], digest_of(array_identities), folder, num_bytes, verified.check
    )


def is_undamaged(folder: Path, facts: Mapping[str, Any], before: int, check: bool, track: Track) -> bool:
    """Return whether the files of a text, whose manifest is `facts`, match the digests in it.

    A large text is compared only if `check` asks for it. `before` counts the bytes of the texts before this one.
    """
    if not is_large(facts, before=before):
        return is_complete(folder)
    if not check:
        return True
    files = facts["files"]
    return all(matches_identity(folder / name, files[name]) for name in track(files, "comparing checksums", len(files)))


def is_large(*facts: Mapping[str, Any], before: int = 0) -> bool:
    """Return whether the folders with these manifests are too large to be compared with their digests at every start.

    `before` counts the bytes of other folders that are compared too.
    """
    return before + sum(map(manifest_bytes, facts)) > CHECKED_AT_START


def manifest_bytes(facts: Mapping[str, Any]) -> int:
    """Return the bytes of all files that a manifest names."""
    return sum(identity["bytes"] for identity in facts["files"].values())
