"""Lines and paragraphs of a range of a file's bytes: those that start in it, so that ranges that share out a file share
out its lines, each whole, whatever the cuts."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from switchcli.data.sources.paths import SourceFile
from switchcli.data.sources.records import UnreadableRow

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 2**16


class ByteRange(NamedTuple):
    """A range of a file's bytes, to its end where `end` is None."""

    file: SourceFile
    begin: int = 0
    end: int | None = None

    def holds(self, offset: int) -> bool:
        return self.begin <= offset and (self.end is None or offset < self.end)


class Line(NamedTuple):
    """A line, its end left out."""

    file: SourceFile
    number: int | None
    """From 1; None in a range that does not begin the file, where it would have to be counted."""
    offset: int
    raw: bytes

    @property
    def name(self) -> str:
        """`path:line`, or `path@offset` where the line's number is not known."""
        return f"{self.file.name}@{self.offset}" if self.number is None else f"{self.file.name}:{self.number}"

    def place(self) -> str:
        """`path:line`, counted if need be."""
        return self.name if self.number is not None else f"{self.file.name}:{_count(self.file, self.offset) + 1}"

    @property
    def is_blank(self) -> bool:
        raw = self._raw_text()
        return not raw or raw.decode("utf-8", "replace").isspace()  # what is not UTF-8 is not blank

    def text(self) -> str:
        """Without a byte-order mark. Raises Unreadable for a NUL and for what is not UTF-8."""
        raw = self._raw_text()
        try:
            return decode(raw, self.offset + len(self.raw) - len(raw))
        except UnreadableRow as error:
            error.place = self.place
            raise

    def _raw_text(self) -> bytes:
        return self.raw if self.offset else self.raw.removeprefix(_BOM)


def decode(raw: bytes, offset: int = 0) -> str:
    """Raises Unreadable for a NUL and for what is not UTF-8."""
    if b"\0" in raw:
        place = offset + raw.index(b"\0")
        words = f"a NUL byte at offset {place}: this is not a text file; leave it out or clean it"
        raise UnreadableRow("a NUL byte", words)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, place = raw[error.start], offset + error.start
        raise UnreadableRow(
            "not UTF-8",
            f"byte 0x{byte:02x} at offset {place} is not UTF-8: convert the file, for example with "
            "`iconv -f latin1 -t utf-8`",
        ) from error


def lines(span: ByteRange) -> Iterator[Line]:
    """The lines that start in the span. DataError for a file that cannot be read."""
    for line in _lines(span):
        if span.holds(line.offset):
            yield line
        elif line.offset >= span.begin:
            return


def paragraphs(span: ByteRange) -> Iterator[list[Line]]:
    """The paragraphs that start in the span: at a line that is not blank, after a blank one or the file's start."""
    paragraph: list[Line] = []
    of_others = False  # within a paragraph that starts before the span
    for line in _lines(span):
        if line.is_blank:
            of_others = False
            if paragraph:
                yield paragraph
                paragraph = []
        elif paragraph:
            paragraph.append(line)
        elif line.offset < span.begin:
            of_others = True
        elif not span.holds(line.offset):
            return
        elif not of_others:
            paragraph = [line]
    if paragraph:
        yield paragraph


def _lines(span: ByteRange) -> Iterator[Line]:
    """From the line before the span to the file's end."""
    with span.file.open() as file:
        offset = 0
        if span.begin:
            offset = _start_of_line(file, span.begin - 1)
            file.seek(offset)
        number = None if span.begin else 0
        for raw in file:
            number = None if number is None else number + 1
            yield Line(span.file, number, offset, raw.rstrip(b"\r\n"))
            offset += len(raw)


def _start_of_line(file: BinaryIO, offset: int) -> int:
    """Where the line begins that the byte at `offset` is of."""
    while offset > 0:
        block = min(offset, _BLOCK_BYTES)
        file.seek(offset - block)
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            return offset - block + newline + 1
        offset -= block
    return 0


def _count(file: SourceFile, offset: int) -> int:
    """The lines that end before `offset`."""
    count = 0
    with file.open() as opened:
        while offset > 0 and (block := opened.read(min(offset, 2**20))):
            count += block.count(b"\n")
            offset -= len(block)
    return count
