"""Trim a vocabulary: the same tokenizer with fewer pieces. Pad, EOS, unknown, sentinels, bytes and added tokens stay.

A text whose tokens are all kept is divided into the same pieces as before:

- Unigram takes the likeliest segmentation, which is also the likeliest of fewer, and ties are broken as before. Unknown
  characters are weighed by the lowest score of all pieces, so a piece of that score stays.
- BPE applies the first merge in its list that fits, again and again. What it makes on the way are parts of the pieces
  at the end, so these and their merges stay; others would not have been applied.
- WordPiece takes the longest piece that fits, and WordLevel whole words: of fewer, these are the same.

Any other text falls back to shorter pieces, then to bytes if the tokenizer has them, or else to `<unk>`. Pieces of one
character stay if a used piece has that character, so that a text in the same alphabet has no new `<unk>`.

Legend: V ids of the tokenizer.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS, PAD


class TrimmedTokenizer(NamedTuple):
    """A tokenizer with fewer pieces."""

    tokenizer: Tokenizer
    kept: NDArray[np.int64]
    """The id that each of its ids had before, in the order of the ids now: [size]."""
    num_needed: int
    """Number of ids that had to stay. The others fill up the vocabulary."""


def trim(tokenizer: Tokenizer, texts: Iterable[list[str]], size_for: Callable[[int], int]) -> TrimmedTokenizer:
    """Return the tokenizer with the ids of `texts`, which come in lists to encode at once, and what these ids need.

    `size_for` gives the size of a vocabulary that has so many ids to keep. It is filled up with the lowest of the
    other ids whose parts are there, if there are enough: a Unigram model has its likeliest pieces first.
    """
    is_used_V = np.zeros(tokenizer.vocab_size, dtype=bool)
    for chunk in texts:
        for used in tokenizer.encode_batch(chunk):
            is_used_V[used] = True
    text = tokenizer.to_json()
    content = json.loads(text)
    model = content["model"]
    ids: dict[str, int] = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    is_kept_V = is_used_V.copy()
    is_kept_V[[PAD, EOS, tokenizer.unknown, *tokenizer.sentinels]] = True
    is_kept_V[[ids[token["content"]] for token in content["added_tokens"]]] = True
    is_kept_V |= tokenizer.is_byte_V
    # A byte-level tokenizer writes each byte of a text as one of 256 characters.
    alphabet = set(ByteLevel.alphabet()) if '"ByteLevel"' in text else set()
    alphabet.update(*(piece for piece, index in ids.items() if is_used_V[index]))
    is_kept_V[[index for piece, index in ids.items() if piece in alphabet]] = True
    if model["type"] == "Unigram":
        is_kept_V[np.argmin([score for _, score in model["vocab"]])] = True
    parts = _parts(model, ids)
    pending = is_kept_V.nonzero()[0].tolist()
    while pending:
        missing = [part for part in parts[pending.pop()] if not is_kept_V[part]]
        is_kept_V[missing] = True
        pending += missing
    num_needed = int(is_kept_V.sum())
    num_free = size_for(num_needed) - num_needed
    for index in sorted(ids.values()):
        if num_free and not is_kept_V[index] and all(is_kept_V[part] for part in parts[index]):
            is_kept_V[index] = True
            num_free -= 1

    def is_kept(piece: str) -> bool:
        return bool(is_kept_V[ids[piece]])

    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            model["unk_id"] = int(is_kept_V[: model["unk_id"]].sum())  # an id is the number of pieces before it
        model["vocab"] = [entry for entry in model["vocab"] if is_kept(entry[0])]
    else:
        by_id = sorted(filter(is_kept, model["vocab"]), key=model["vocab"].__getitem__)
        model["vocab"] = {piece: index for index, piece in enumerate(by_id)}
    if "merges" in model:
        # The parts of a kept piece are kept.
        model["merges"] = [[first, second] for first, second, result in _merges(model) if is_kept(result)]
    # Its ids are those of before. switchcli appends EOS by itself, and `convert` writes what transformers needs.
    content["post_processor"] = None
    # Added tokens get their new ids when they are loaded: after the pieces, in the same order.
    trimmed = Tokenizer.from_json(json.dumps(content))
    kept = [ids[piece] for piece in trimmed.pieces(range(trimmed.vocab_size))]
    return TrimmedTokenizer(trimmed, np.array(kept), num_needed)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return both parts and the result of each merge of BPE, in order; none of another model."""
    skipped = len(model.get("continuing_subword_prefix") or "")
    return [(first, second, first + second[skipped:]) for first, second in model.get("merges", ())]


def _parts(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, set[int]]:
    """Return the ids of which BPE makes each id, by every merge that does; none for an id that no merge makes."""
    parts: dict[int, set[int]] = defaultdict(set)
    for first, second, result in _merges(model):
        parts[ids[result]] |= {ids[first], ids[second]}
    return parts
