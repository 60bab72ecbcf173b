"""T5's form for resolving pronouns, `wsc: ... *pronoun* ...`: which word is marked in WSC, DPR and WNLI.

The answer is the phrase that the pronoun stands for, its referent. WSC and DPR are written as T5 writes them, where T5
reads their rows at all; a row of WSC that it would stop at, and how the sentences of WNLI are aligned, are ours.
"""

import re
from itertools import takewhile
from reprlib import repr as short
from typing import NamedTuple

PREFIX = "wsc: "
PRONOUNS = {"he", "she", "they", "it", "her", "his", "their", "them", "him"}


def mark_word(text: str, index: int, pronoun: str) -> str:
    """WSC: mark the pronoun at a word's index, counted between single spaces.

    A few rows have an index that is one off, or punctuation stuck to the pronoun. So the word is taken that is the
    pronoun, but for what is stuck to it, and is nearest to the index; a space parts it from what follows, as in
    `*him* ,"`. Spaces around the text are dropped, all others stay, as in `Singer 's`.
    """
    words = text.strip().split(" ")
    shape = re.compile(rf"(\W*)({re.escape(pronoun)})(|\W.*)", re.DOTALL)
    for place in sorted(range(len(words)), key=lambda place: abs(place - index)):
        if found := shape.fullmatch(words[place]):
            return PREFIX + " ".join([*words[:place], _marked(found), *words[place + 1 :]])
    raise ValueError(f"span2_text: the pronoun {short(pronoun)} is no word of the text")


def _marked(word: re.Match[str]) -> str:
    before, pronoun, after = word.groups()
    return f"{before}*{pronoun}*" + (f" {after}" if after else "")


def mark_first(sentence: str, pronoun: str) -> str:
    """DPR: mark the first pronoun between a space and a space, full stop or comma; what follows it stays stuck to it.

    A sentence without such a place stays unmarked.
    """
    return PREFIX + re.sub(rf"(?<= )({re.escape(pronoun)})(?=[ .,])", r"*\1*", sentence, count=1)


class Resolved(NamedTuple):
    text: str
    """The premise, with the pronoun marked."""
    referent: str


def resolve(premise: str, hypothesis: str) -> Resolved:
    """WNLI: the pronoun of the premise that the hypothesis replaces, and by what.

    The hypothesis repeats words of the premise around a pronoun, with a phrase in its place. Of every pronoun and every
    phrase of the hypothesis, the pair is taken with the most equal words directly before and directly after the two;
    among equals the earlier pronoun, then more of the words after, then the longer phrase. Case does not count.
    Punctuation counts before the two and not after: in `my car. It runs`, the word before the pronoun is not the `car`
    of `My car runs`. The phrase is given as the hypothesis has it, without punctuation around it, and without a
    possessive's 's or '.
    """
    words, others = list(re.finditer(r"\S+", premise)), hypothesis.split()
    here, there = [word.group().lower() for word in words], [word.lower() for word in others]
    bare_here, bare_there = [_bare(word) for word in here], [_bare(word) for word in there]
    fits = [
        _Fit(before + after, -place, after, end - start, end)
        for place in (index for index, word in enumerate(bare_here) if word in PRONOUNS)
        for start in range(len(there))
        for before in (_shared(here[:place][::-1], there[:start][::-1]),)
        for end in range(start + 1, len(there) + 1)
        for after in (_shared(bare_here[place + 1 :], bare_there[end:]),)
    ]
    if not fits:
        known = ", ".join(sorted(PRONOUNS))
        raise ValueError(f"sentence1: has none of the pronouns {known}, or sentence2 has no words")
    best = max(fits)
    word = words[-best.earliness]
    pronoun = re.fullmatch(r"(\W*)(\w+)(|\W.*)", word.group(), re.DOTALL)
    assert pronoun is not None, "a pronoun has letters"
    referent = re.sub(r"^\W+|\W+$", "", " ".join(others[best.end - best.length : best.end]))
    return Resolved(
        PREFIX + premise[: word.start()] + _marked(pronoun) + premise[word.end() :],
        re.sub(r"'s$", "", referent),
    )


class _Fit(NamedTuple):
    """How well a phrase fits a pronoun: the greatest is the best, by the first number that differs."""

    equal_words: int
    earliness: int
    equal_words_after: int
    length: int
    end: int


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word.lower())


def _shared(first: list[str], second: list[str]) -> int:
    """How many words both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
