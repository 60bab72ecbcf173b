"""Damage by chance, and by what an enemy would write: to bytes, to JSON, to text; each a function of a generator."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ESCAPES = "\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m\u202egnp.exe\u2066\x08\r"
"""What a terminal would act on: clear, clipboard, colour in C1, reordering, overwriting."""
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "0", "-1", "nan", ESCAPES, "\ud800", "\0", "../../x", "/etc/passwd", "x" * 100_000, "<unk>", "\u2581"),
    *([], {}, [[]], [None], {"": None}, {"type": "x"}, [0] * 1000, [["a", 0.0]], {"a": 2**31}),
)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four blows: bits flipped, bytes cut, doubled, zeroed, replaced or put in."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(found) + 1)
        length = draw.choice((1, 1, 2, 8, 64, 1024))
        match draw.randrange(6):
            case 0 if place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                del found[place:]
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[place : place + length]
            case 4:
                found[place : place + length] = bytes(len(found[place : place + length]))
            case _:
                found[place:place] = draw.choice(
                    (b"\0", b"\n", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{", draw.randbytes(length))
                )
    return bytes(found)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """Return the object with one to three values changed, or now and then its bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _changed(value, draw)
    text = json.dumps(value)
    if draw.random() < 0.05:
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, draw: random.Random) -> Any:
    """Down to a place by chance, as deep as it comes."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return copy.deepcopy(draw.choice(NASTY))  # the next change may be within it
    keys = [*value] if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    match draw.randrange(10):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[draw.choice(("", key + "_", ESCAPES, "\ud800", str(draw.choice(keys))))] = value.pop(key)
        case 1:
            value.append(copy.deepcopy(draw.choice(NASTY)))
        case 2:
            value[key] = copy.deepcopy(value[draw.choice(keys)])
        case _:
            value[key] = _changed(value[key], draw)
    return value


def mutate_text(content: bytes, draw: random.Random) -> bytes:
    """Lines moved, doubled, joined, indented, or words replaced by what YAML and JSON read in ways of their own."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    lines = content.decode().split("\n")
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        words = lines[place].split(" ")
        match draw.randrange(7):
            case 0:
                del lines[place : place + 1]
                lines = lines or [""]
            case 1:
                lines.insert(other, lines[place])
            case 2:
                lines[place] = "  " + lines[place]
            case 3:
                lines[place] = lines[place].lstrip()
            case _:
                words[draw.randrange(len(words))] = draw.choice(WORDS)
                lines[place] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


WORDS = (
    *(
        "no",
        "~",
        "1e-4",
        "012",
        "0o17",
        "12:30:45",
        ".nan",
        "-.inf",
        "1_000",
        "0x1f",
        "2001-01-01",
        "=",
        "<<: *a",
        "&a",
        "*a",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "!!binary aGk=",
        "'",
        '"',
        "[",
        "{",
        "}",
        "- -",
        "? a",
        "|",
        ">-",
        "---",
        "...",
    ),
    *(
        "%YAML 9.9",
        "\t",
        "\u2028",
        "\x85",
        "\x1b[2J",
        "\u202e",
        "\ufeff",
        "9" * 5000,
        "x" * 5000,
        "null",
        "true",
        "-1",
        "0",
        '"\\ud800"',
    ),
)

Mutation = Callable[[bytes, random.Random], bytes]
