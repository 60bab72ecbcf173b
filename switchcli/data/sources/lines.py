"""Lines and paragraphs of a byte range of a file.

A range yields the lines and paragraphs that start in it, each to its end, even beyond the range. Ranges that cover a
file without overlap therefore yield each of them exactly once, wherever the bounds are.
"""

from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from switchcli.data.sources.paths import SourceFile
from switchcli.data.sources.records import UnreadableRow
from switchcli.system.user_files import to_utf8

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 2**16


class ByteRange(NamedTuple):
    """The bytes `begin` to `end` (exclusive) of a file, or to the file's end if `end` is None."""

    file: SourceFile
    begin: int = 0
    end: int | None = None

    def contains(self, offset: int) -> bool:
        return self.begin <= offset and (self.end is None or offset < self.end)


_FORMATS: Final = {
    b"PAR1": ".parquet",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
}
"""How files of some formats begin, and the names by which they are known."""


class FileLine(NamedTuple):
    """A line of a file, without its line break."""

    file: SourceFile
    number: int | None
    """Line number, from 1. None in a range that does not begin the file: lines before it would have to be counted."""
    offset: int
    """Byte offset in the file, decompressed."""
    raw: bytes

    @property
    def name(self) -> str:
        """`path:line`, or `path@offset` if the line number is not known."""
        return f"{self.file.name}@{self.offset}" if self.number is None else f"{self.file.name}:{self.number}"

    def location(self) -> str:
        """Return `path:line`. Reads the file up to this line if the number is not known."""
        if self.number is not None:
            return self.name
        number, remaining = 1, self.offset
        with self.file.open() as opened:
            while remaining > 0 and (block := opened.read(min(remaining, 2**20))):
                number += block.count(b"\n")
                remaining -= len(block)
        return f"{self.file.name}:{number}"

    @property
    def is_blank(self) -> bool:
        raw = self._without_bom()
        return not raw or raw.decode("utf-8", "replace").isspace()  # a byte that is not UTF-8 is not blank

    def text(self) -> str:
        """Return the text without a byte order mark. Raises UnreadableRow for a NUL or bytes that are not UTF-8."""
        raw = self._without_bom()
        try:
            return decode(raw, self.offset + len(self.raw) - len(raw))
        except UnreadableRow as error:
            error.location = self.location
            raise

    def _without_bom(self) -> bytes:
        return self.raw if self.offset else self.raw.removeprefix(_BOM)


def decode(raw: bytes, offset: int = 0) -> str:
    """Decode UTF-8 bytes that begin at `offset`. Raises UnreadableRow, with the position of a NUL or invalid byte."""
    if b"\0" in raw:
        position = offset + raw.index(b"\0")
        fix = _name_fix(raw, offset) or f"convert a file in UTF-16 by {to_utf8(raw)}, and leave out another"
        raise UnreadableRow("a NUL byte", f"a NUL byte at offset {position}: {fix}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, position = raw[error.start], offset + error.start
        fix = _name_fix(raw, offset) or f"convert the file, for example with {to_utf8(raw)}"
        message = f"byte 0x{byte:02x} at offset {position} is not UTF-8: {fix}"
        raise UnreadableRow("not UTF-8", message) from error


def _name_fix(raw: bytes, offset: int) -> str | None:
    """Return what to do about a file that begins as one of another format, None for other bytes."""
    suffix = next((suffix for start, suffix in _FORMATS.items() if offset == 0 and raw.startswith(start)), None)
    return suffix and f"it is a {suffix} file: give it a name that ends so"


def lines(byte_range: ByteRange) -> Iterator[FileLine]:
    """Yield the lines that start in the range. Raises DataError if the file cannot be read."""
    for line in _lines_from_before(byte_range):
        if byte_range.contains(line.offset):
            yield line
        elif line.offset >= byte_range.begin:  # the first line after the range
            return


def paragraphs(byte_range: ByteRange) -> Iterator[list[FileLine]]:
    """Yield the paragraphs whose first line starts in the range. Raises DataError if the file cannot be read.

    A paragraph starts at a line that is not blank and that follows a blank line or begins the file.
    """
    paragraph: list[FileLine] = []
    started_before = False  # whether the current paragraph belongs to the range before this one
    # The line before the range is read too: it tells whether a paragraph is in progress where the range begins.
    for line in _lines_from_before(byte_range):
        if line.is_blank:
            started_before = False
            if paragraph:
                yield paragraph
                paragraph = []
        elif paragraph:
            paragraph.append(line)  # a paragraph is completed even after the end of the range
        elif line.offset < byte_range.begin:
            started_before = True
        elif not byte_range.contains(line.offset):
            return
        elif not started_before:
            paragraph = [line]
    if paragraph:
        yield paragraph


def _lines_from_before(byte_range: ByteRange) -> Iterator[FileLine]:
    """Yield lines to the end of the file, starting with the line that holds the last byte before the range.

    A range that begins the file has no such line and starts at its first one.
    """
    with byte_range.file.open() as file:
        offset = 0
        if byte_range.begin:
            # If byte `begin - 1` is a line break, the line that it ends is yielded before the first line of the range.
            # Otherwise the line across `begin` is, which starts before the range and belongs to another one.
            offset = _start_of_line(file, byte_range.begin - 1)
            file.seek(offset)
        number = None if byte_range.begin else 0
        for raw in file:
            number = None if number is None else number + 1
            yield FileLine(byte_range.file, number, offset, raw.rstrip(b"\r\n"))
            offset += len(raw)


def _start_of_line(file: BinaryIO, offset: int) -> int:
    """Return the offset at which the line begins that holds the byte at `offset`."""
    # Search backward, block by block, for the last line break in bytes [0, offset). The byte at `offset` may itself be
    # a line break: it then ends the line in question, and is not searched.
    while offset > 0:
        size = min(offset, _BLOCK_BYTES)
        file.seek(offset - size)
        newline = file.read(size).rfind(b"\n")
        if newline >= 0:
            return offset - size + newline + 1
        offset -= size
    return 0
