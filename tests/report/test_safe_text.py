from hypothesis import given
from hypothesis import strategies as st

from switchcli.terminal.safe_text import safe_text

BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
UNSAFE = {*range(0x20), *range(0x7F, 0xA0), *BIDI, *range(0xD800, 0xE000)} - {ord("\n"), ord("\t")}

any_text = st.text(st.one_of(st.characters(codec=None), st.sampled_from(sorted(map(chr, UNSAFE)))))


@given(any_text)
def test_escapes_what_is_unsafe_and_nothing_else(text: str) -> None:
    escaped = (ascii(character)[1:-1] if ord(character) in UNSAFE else character for character in text)
    assert safe_text(text) == "".join(escaped)


def test_an_escape_can_be_read() -> None:
    assert safe_text("a\x1b[2J\x9b\u202e\r\ud800\n") == r"a\x1b[2J\x9b\u202e\r\ud800" + "\n"


@given(any_text)
def test_is_printable_in_utf8_and_done_once(text: str) -> None:
    safe = safe_text(text)
    safe.encode("utf-8")
    assert safe_text(safe) == safe
