"""What a message must tell, whatever its sentences are."""

import re


def naming(*tokens: str) -> str:
    """A pattern for `match`: all of these keys, names, numbers and options, each as a whole, in any order."""
    return r"(?s)\A" + "".join(f"(?=.*{_whole(token)})" for token in tokens)


def _whole(token: str) -> str:
    before, after = (r"\b" if re.match(r"\w", end) else "" for end in (token[0], token[-1]))
    return before + re.escape(token) + after
