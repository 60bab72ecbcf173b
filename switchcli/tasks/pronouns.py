"""T5's format for resolving pronouns, `wsc: ... *pronoun* ...`: finding the pronoun to mark in WSC, DPR and WNLI.

The answer is the phrase that the pronoun stands for, its referent. WSC and DPR are written as in T5, for all rows that
T5 can read. Rows of WSC at which T5's code would fail, and the alignment of WNLI's sentences, follow rules of our own.
"""

import re
from itertools import takewhile
from reprlib import repr as short
from typing import Final, NamedTuple

PREFIX: Final = "wsc: "
PRONOUNS: Final = {"he", "she", "they", "it", "her", "his", "their", "them", "him"}


def mark_word(text: str, index: int, pronoun: str) -> str:
    """Return the input for a row of WSC, with the pronoun near word `index` marked.

    Words are separated by single spaces. In a few rows the index is off by one, or punctuation is attached to the
    pronoun. So the marked word is the one nearest to the index that is the pronoun, apart from punctuation. A space
    separates it from what follows, as in `*him* ,"`. Spaces at the ends of the text are dropped, and all others are
    kept, as in `Singer 's`.

    Raises:
        ValueError: the pronoun is not a word of the text.
    """
    words = text.strip().split(" ")
    pattern = re.compile(rf"(\W*)({re.escape(pronoun)})(|\W.*)", re.DOTALL)
    for position in sorted(range(len(words)), key=lambda position: abs(position - index)):
        match = pattern.fullmatch(words[position])
        if match:
            words[position] = _mark(match)
            return PREFIX + " ".join(words)
    raise ValueError(f"span2_text: the pronoun {short(pronoun)} is not a word of the text")


def _mark(word: re.Match[str]) -> str:
    before, pronoun, after = word.groups()
    return f"{before}*{pronoun}*" + (f" {after}" if after else "")


def mark_first(sentence: str, pronoun: str) -> str:
    """Return the input for a row of DPR, with the first occurrence of the pronoun marked.

    Only an occurrence between a space and a space, full stop or comma is marked. If there is none, the sentence stays
    unmarked.
    """
    return PREFIX + re.sub(rf"(?<= )({re.escape(pronoun)})(?=[ .,])", r"*\1*", sentence, count=1)


class Resolved(NamedTuple):
    """A row of WNLI as a question about a pronoun."""

    text: str
    """The premise, with the pronoun marked."""
    referent: str
    """The phrase that the hypothesis has in the pronoun's place."""


def resolve(premise: str, hypothesis: str) -> Resolved:
    """Return the pronoun that the hypothesis of a WNLI row replaces, and the phrase that replaces it.

    The hypothesis repeats the words around a pronoun of the premise, with a phrase in the pronoun's place. Of all pairs
    of a pronoun and a phrase, the best has the most equal words directly before and directly after the two. Ties go to
    the earlier pronoun, then to more equal words after it, then to the longer phrase. Case does not count. Punctuation
    counts before the two, but not after: in `my car. It runs`, the word before the pronoun differs from the `car` of
    `My car runs`. The referent is the phrase without punctuation around it and without a possessive's 's or '.

    Raises:
        ValueError: the premise has no pronoun, or the hypothesis has no words.
    """
    premise_matches, hypothesis_words = list(re.finditer(r"\S+", premise)), hypothesis.split()
    # Words before the pair are compared in lower case, words after it without punctuation too.
    first, second = [match.group().lower() for match in premise_matches], [word.lower() for word in hypothesis_words]
    first_bare, second_bare = [_bare(word) for word in first], [_bare(word) for word in second]
    fits: list[_Fit] = []
    for position, word in enumerate(first_bare):
        if word not in PRONOUNS:
            continue
        for start in range(len(second)):
            # Both prefixes are reversed, so that the words nearest to the pair are compared first.
            before = _common_prefix_length(first[:position][::-1], second[:start][::-1])
            for end in range(start + 1, len(second) + 1):
                after = _common_prefix_length(first_bare[position + 1 :], second_bare[end:])
                fits.append(_Fit(before + after, -position, after, end - start, end))
    if not fits:
        known = ", ".join(sorted(PRONOUNS))
        raise ValueError(f"sentence1: has none of the pronouns {known}, or sentence2 has no words")
    best = max(fits)
    premise_match = premise_matches[-best.negative_position]
    pronoun = re.fullmatch(r"(\W*)(\w+)(|\W.*)", premise_match.group(), re.DOTALL)
    assert pronoun is not None, "a pronoun has letters"
    referent = _bare(" ".join(hypothesis_words[best.end - best.length : best.end]))
    return Resolved(
        PREFIX + premise[: premise_match.start()] + _mark(pronoun) + premise[premise_match.end() :],
        re.sub(r"'s$", "", referent),
    )


class _Fit(NamedTuple):
    """How well a phrase of the hypothesis fits a pronoun. The greatest value, compared field by field, fits best."""

    equal_words: int
    negative_position: int
    """Minus the position of the pronoun in the premise, so that an earlier pronoun is greater."""
    equal_words_after: int
    length: int
    """Number of words of the phrase."""
    end: int
    """The position in the hypothesis after the phrase."""


def _bare(phrase: str) -> str:
    """Return a word or a phrase without the punctuation around it."""
    return re.sub(r"^\W+|\W+$", "", phrase)


def _common_prefix_length(first: list[str], second: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
