"""Text: what was prepared of one text, as the manifest of its folder has it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.data.prepare.store import (
    OFFSETS,
    TOKENS,
    ShardManifest,
    TokenShard,
    TokenStore,
    digest_of,
    read_manifest,
    write_manifest,
)
from switchcli.data.prepare.verified import IN_MEMORY_BYTES, VerifiedFolder

FORMAT = 3  # raise when the same key would come to mean other ids
LAYOUT = "arrow"
"""A part of the names of folders in the cache, but of no checkpoint: change it when the same ids are stored in a new
way."""
TRAIN, HELD_OUT = "train", "held_out"
PARTS = (TRAIN, HELD_OUT)
CHECKED_AT_START = 2**30
"""Bytes of all texts of a run, up to which they are read and compared with their digests before it, and prepared again
where they differ. Every shard is compared when it is opened, whatever the size."""


class TextCounts(NamedTuple):
    """How much is in a part of a text."""

    documents: int
    tokens: int
    bytes: int
    """Bytes of the text in UTF-8."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


class PreparedText(NamedTuple):
    """One text as ids."""

    shards: Mapping[str, tuple[TokenShard, ...]]
    """The shards of each part."""
    counts: Mapping[str, TextCounts]
    dropped: Mapping[str, int]
    """What was left out of it, by reason."""
    identity: str
    """A digest of the ids themselves: the same text, cut the same, has the same on any machine."""
    folder: Path
    num_bytes: int
    """Bytes on the disk."""
    check: Callable[[], None]
    """Raises DataError if a shard that was read is not what was prepared any more; see `Verified.check`."""


def write_text_manifest(
    folder: Path,
    shards: Mapping[str, Sequence[ShardManifest]],
    dropped: Mapping[str, int],
    tokenizer: str,
    arrays: Mapping[str, object],
    files: Mapping[str, object] | None = None,
) -> None:
    """Write the manifest of a text whose shards, by part, lie in the folder.

    `arrays` are their sizes and digests as `ShardWriter` has them; `files` those of the files, if they were digested.
    """
    counts = {
        part: {fact: sum(one[fact] for one in found) for fact in TextCounts._fields} for part, found in shards.items()
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
    """Return the text of a folder that was sealed. The shards are opened, and verified, when they are first read.

    `before` are the bytes of the texts that come before it: together up to IN_MEMORY_BYTES are held in memory.
    """
    facts = read_manifest(folder)
    assert facts is not None, "sealed, or found whole"
    arrays = facts["arrays"]
    verified = VerifiedFolder(folder, facts["files"], in_memory=before + manifest_bytes(facts) <= IN_MEMORY_BYTES)
    named: dict[str, object] = {}
    for part in PARTS:
        for number, one in enumerate(facts["shards"][part]):
            # The first shard's as if it were alone: a text of one shard has the identity that it had before shards.
            place = f"{part}-{number}" if number else part
            named |= {f"{place}/{name}": arrays[f"{one['name']}/{name}"] for name in (OFFSETS, TOKENS)}
    return PreparedText(
        {
            part: tuple(
                TokenShard(
                    one["documents"],
                    one["tokens"],
                    partial(TokenStore.open, verified, one["name"]),
                    partial(TokenStore.open_index, verified, one["name"], arrays[f"{one['name']}/{OFFSETS}"]),
                )
                for one in facts["shards"][part]
            )
            for part in PARTS
        },
        {part: TextCounts(*(facts["counts"][part][fact] for fact in TextCounts._fields)) for part in PARTS},
        facts["dropped"],
        digest_of(named),
        folder,
        manifest_bytes(facts),
        verified.check,
    )


def is_large(*facts: Mapping[str, Any], before: int = 0) -> bool:
    """Whether comparing all of a text, or of these pieces of one, with its checksums takes long; `before` are the bytes
    of other texts that were compared."""
    return before + sum(map(manifest_bytes, facts)) > CHECKED_AT_START


def manifest_bytes(facts: Mapping[str, Any]) -> int:
    """Return the bytes of all files that a manifest names."""
    return sum(said["bytes"] for said in facts["files"].values())
