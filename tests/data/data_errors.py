"""What a user must find in a message about data, in whatever sentence."""

import re
from collections import Counter


def naming(words: str) -> str:
    """Return a pattern of texts that hold these words in any order; a word given twice must be there twice.

    Words are separated by spaces. A word does not match within a longer one: `d_ff` is not in `model.d_ff`.
    """
    return "".join(
        rf"(?=(?:[\s\S]*?(?<![\w.-]){re.escape(word)}(?!\w|\.\w)){{{count}}})"
        for word, count in Counter(words.split()).items()
    )
