"""Span corruption read from the description of T5's algorithm (paper.md 9.1), one token at a time."""

from typing import NamedTuple

import numpy as np

EOS = 1
EOS_TOKENS = 1
"""Tokens that the end of a row takes."""


class Counts(NamedTuple):
    kept: int
    noise: int
    spans: int


def counts(length: int, density: float, mean: float) -> Counts:
    """A share of the tokens is noise, in spans of a mean length; no part is empty.

    T5 computes both in float32.
    """
    single = np.float32
    noise = max(1, min(int(np.rint(single(length) * single(density))), length - 1))
    return Counts(length - noise, noise, max(1, int(np.rint(single(noise) / single(mean)))))


def segments(draws: list[int], num_items: int, num_segments: int) -> list[int]:
    """A random partition into non-empty segments: cut behind those items whose draws are least."""
    cuts = sorted(sorted(range(num_items - 1), key=lambda place: draws[place])[: num_segments - 1])
    lengths, last = [], 0
    for cut in cuts:
        lengths.append(cut + 1 - last)
        last = cut + 1
    return [*lengths, num_items - last]


def corrupted(raw: list[int], share: Counts, draws: list[int], sentinels: list[int]) -> tuple[list[int], list[int]]:
    """Inputs and targets of a text, with EOS."""
    kept = segments(draws[: share.kept - 1], share.kept, share.spans)
    noise = segments(draws[share.kept - 1 :], share.noise, share.spans)
    inputs: list[int] = []
    targets: list[int] = []
    rest = list(raw)
    for span in range(share.spans):
        for _ in range(kept[span]):
            inputs.append(rest.pop(0))
        inputs.append(sentinels[span])
        targets.append(sentinels[span])
        for _ in range(noise[span]):
            targets.append(rest.pop(0))
    assert not rest
    return [*inputs, EOS], [*targets, EOS]


def padded(row: list[int], length: int) -> list[int]:
    assert len(row) <= length
    return row + [0] * (length - len(row))


def restored(inputs: list[int], targets: list[int], sentinels: list[int]) -> list[int]:
    """The text of inputs and targets without EOS; the sentinels come in their order, with hidden text behind each."""
    hidden: dict[int, list[int]] = {}
    for index in targets:
        if index in sentinels:
            assert index not in hidden
            hidden[index] = []
        else:
            hidden[list(hidden)[-1]].append(index)
    assert list(hidden) == sentinels[: len(hidden)], "in order, no closing one"
    assert [index for index in inputs if index in sentinels] == list(hidden)
    assert all(hidden.values())
    return [token for index in inputs for token in hidden.get(index, [index])]


def raw_length(inputs_length: int, density: float, mean: float) -> int:
    """T5's `random_spans_helper`: the most raw tokens, 2 at least, whose inputs fit `inputs_length` tokens.

    Tries every length downward from one that cannot fit. At half noise, T5 takes one token off if the targets would be
    longer than the inputs.
    """

    def lengths(length: int) -> tuple[int, int]:
        share = counts(length, density, mean)
        return share.kept + share.spans + EOS_TOKENS, share.noise + share.spans + EOS_TOKENS

    # A row of n tokens keeps at least n (1 - density) - 1 of them, so no more than this many can fit.
    length = int((inputs_length + 2) / (1 - density)) + 2
    while length > 2 and lengths(length)[0] > inputs_length:
        length -= 1
    inputs, targets = lengths(length)
    return length - 1 if density == 0.5 and targets > inputs else length
