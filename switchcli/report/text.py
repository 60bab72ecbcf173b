"""safe_text: text from data or from a model, made harmless for a terminal.

It does not escape rich markup: wrap the result in `rich.text.Text`, which reads none. HTML is escaped elsewhere.
"""

import re

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f"  # C0 but tab and newline: ESC starts a terminal command, a carriage return overwrites the line
    "\x7f-\x9f"  # DEL and C1: 0x9b is ESC [ in one character
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls: they reorder what is read
    "\ud800-\udfff"  # lone surrogates: no encoding prints them
    "]"
)


def safe_text(text: str) -> str:
    """`text` with control characters (but newline and tab), bidirectional controls and lone surrogates as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def capital(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def shortened(text: str, characters: int) -> str:
    """On one line, with its beginning only when it is long."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters].rstrip() + " ..."
