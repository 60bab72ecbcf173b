"""Text that a vocabulary cannot express: how much of it there is, and the warning."""

from switchcli.data.prepare.prepared_text import HELD_OUT, PreparedText
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.terminal.console import Console

UNKNOWN_LIMIT = 0.03
"""The fraction of unknown tokens above which a vocabulary does not suit a text."""


def unknown_fraction(text: PreparedText, tokenizer: Tokenizer) -> float:
    """Return the fraction of unknown tokens at the beginning of the first shard of the held-out part."""
    shard = next(shard for shard in text.shards[HELD_OUT] if shard.num_tokens)
    return shard.open().fraction_of(tokenizer.unknown)


def warn_of_unknown(what: str, fraction: float, console: Console) -> None:
    """Print a warning if more than `UNKNOWN_LIMIT` of the tokens of `what` are unknown."""
    if fraction > UNKNOWN_LIMIT:
        console.warning(
            f"{what}: {fraction:.1%} of the tokens are characters that the vocabulary lacks, and look alike to the "
            "model: train a vocabulary on text of this kind, or one with byte_fallback"
        )
