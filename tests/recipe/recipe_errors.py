"""What a user must find in the message of a refused recipe, in whatever sentence."""

import re
from collections import Counter


def naming(words: str) -> str:
    """Return a pattern of texts that hold these words in any order; a word given twice must be there twice.

    Words are separated by spaces. A word does not match within a longer one: `d_ff` is not in `model.d_ff`.
    """
    return "".join(
        rf"(?=(?:.*?(?<![\w.-]){re.escape(word)}(?!\w|\.\w)){{{count}}})"
        for word, count in Counter(words.split()).items()
    )


def assert_line(line: str, where: str, words: str) -> None:
    """Assert that a message is about `where` (a file and its line, or an override) and holds the words behind that."""
    assert line.startswith(f"{where}: "), line
    assert re.match(naming(words), line.removeprefix(f"{where}: ")), line
