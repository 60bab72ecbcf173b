"""What a test asks of a message: the words that a reader needs, wherever they stand, without the prose."""

import re


def lacking(said: str, words: str) -> list[str]:
    """Return those of `words`, parted by spaces, that no line has beside the others: of the line that lacks fewest.

    Words are a key, a number, a file, an option, or what tells one error from another. None counts in the override that
    a message repeats, nor inside another word, as 4 in 40 or in 0.4.
    """
    patterns = {word: rf"(?<!\w)(?<!\d\.){re.escape(word)}(?!\w|\.\d)" for word in words.split()}
    lines = re.sub(r"override (['\"]).*?\1: ", "", said).splitlines() or [""]
    return min(([word for word in patterns if not re.search(patterns[word], line)] for line in lines), key=len)
