"""Document: one text of a corpus and its name. The name alone decides whether it is held out."""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """A text and a name that stays the same from run to run."""

    name: str
    text: str


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is of the `fraction` kept for evaluation: the same anywhere, in any order."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64
