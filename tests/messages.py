"""What a user must find in a message, whatever its sentences are: keys, names, numbers, options, fixes."""

import re
from collections import Counter


def naming(*tokens: str) -> str:
    """Return a pattern for `match`: all tokens, each as a whole, in any order; one given twice must be there twice.

    A token does not match within a longer one: `d_ff` is not in `model.d_ff`.
    """
    return r"(?s)\A" + "".join(rf"(?=(?:.*?{_whole(token)}){{{count}}})" for token, count in Counter(tokens).items())


def naming_words(words: str) -> str:
    """Return the pattern of tokens that are separated by spaces."""
    return naming(*words.split())


def assert_line(line: str, where: str, words: str) -> None:
    """Assert that a message is about `where` (a file and its line) and holds the words behind that.

    A rule that an override breaks names its key itself.
    """
    assert where.startswith("override ") or line.startswith(f"{where}: "), line
    assert re.match(naming_words(words), line.removeprefix(f"{where}: ")), line


def lacking(said: str, words: str) -> list[str]:
    """Return those of `words`, parted by spaces, that no line has beside the others: of the line that lacks fewest.

    Words are a key, a number, a file, an option, or what tells one error from another. None counts in the key
    of the override that a message names, nor inside another word, as 4 in 40 or in 0.4.
    """
    patterns = {word: rf"(?<!\w)(?<!\d\.){re.escape(word)}(?!\w|\.\d)" for word in words.split()}
    lines = re.sub(r"override \S+: ", "", said).splitlines() or [""]
    return min(([word for word in patterns if not re.search(patterns[word], line)] for line in lines), key=len)


def _whole(token: str) -> str:
    before = r"(?<![\w.-])" if re.match(r"\w", token) else ""
    after = r"(?!\w|\.\w)" if re.match(r"\w", token[-1]) else ""
    return before + re.escape(token) + after
