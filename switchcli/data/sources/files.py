"""FilesCorpus: text, JSON Lines or Parquet files, local or remote, streamed. Errors name the file and the line.

The builders of `datasets` read the same formats but divide text differently: a lone carriage return ends a line, a byte
order mark stays in the text, and only exactly two line feeds separate paragraphs. Their JSON builder infers types, so a
text that looks like a date becomes one. Files are read here because other documents would change the ids of existing
runs, and because an error has to name the file and the line.

A source shard is a byte range of a large file, or several small files: many processes can divide either.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from switchcli.data.sources import parquet
from switchcli.data.sources.document import LABELS, Document, SourceShard
from switchcli.data.sources.lines import ByteRange, FileLine, decode, lines, paragraphs
from switchcli.data.sources.paths import SourceFile, expand_paths, fingerprint
from switchcli.data.sources.records import RawRow, RowCorpus, UnreadableRow
from switchcli.errors import DataError
from switchcli.spec import PathOrUrl

SHARD_BYTES: Final = 2**26
"""Bytes of files as stored, compressed or not, above which they are divided among source shards."""
_JSON = (".json", ".jsonl", ".ndjson")
_PARQUET = ".parquet"
_TABLE = (
    "a table: convert it to JSON Lines, as by pandas: `read_csv(FILE, dtype=str, keep_default_na=False)`, then "
    "`to_json(NEW, orient='records', lines=True)`"
)
_NO_TEXT: Final = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls"), _TABLE),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".epub"), "a document: save its text"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), "an archive: name the files in it after extracting them"),
}
"""What files are, by suffix, that nobody means to be read line by line, and what to do."""


class FilesCorpus(RowCorpus):
    """Text or JSON Lines files (.json, .jsonl), optionally compressed (.gz, .bz2, .xz, .zst), or Parquet (.parquet)."""

    kind: Literal["files"] = "files"
    """`files` reads files or URLs: text, JSON Lines or Parquet."""
    paths: Annotated[tuple[PathOrUrl, ...], Field(min_length=1)]
    """Files, URLs (s3://, gs://, hf://datasets/...) or globs of them (`**` matches nested folders), relative to the
    current folder."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What a document is in a text file: a line, a paragraph (blank lines separate them) or the whole file. It is also
    the unit that is held out."""

    def text_bytes(self) -> int | None:
        files = expand_paths(self.paths, "data.corpora")
        is_known = all(file.size is not None and not file.is_compressed and file.kind != _PARQUET for file in files)
        return sum(file.size or 0 for file in files) if is_known else None

    def source_shards(self) -> tuple[SourceShard, ...]:
        """Return the source shards in the order of `paths`, the files of a glob by name.

        Raises DataError for a path without a match and for a folder.
        """
        _layout.cache_clear()  # files may have changed since
        return tuple(self._layout())

    def read(self, shard: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield documents named by path or URL and first line: `path:line`, or `path@byte` after a file's first shard.

        `start` and a document's row count lines (blank ones too), paragraphs, files or Parquet rows, depending on
        `sample_by` and the format. Raises DataError for what cannot be read, or is unreadable and not skipped.
        """
        byte_ranges = self._layout().get(shard)
        if byte_ranges is None:
            raise DataError(
                f"data.corpora: {shard.name}: the files changed after they were listed: start again when no "
                "other program changes them"
            )
        rows = chain.from_iterable(self._rows(byte_range) for byte_range in byte_ranges)
        return self.select(islice(enumerate(rows), start, None), dropped)

    def fingerprint(self) -> str:
        """Return the options that choose the text, and a digest of the files' contents."""
        options = self.model_dump_json(exclude=LABELS | {"paths"})
        return f"{options} {fingerprint(expand_paths(self.paths, 'data.corpora'))}"

    def empty_error(self) -> DataError:
        rows = f"the rows that where ({self.where}) selects" if self.where else "these files"
        return DataError(f"data.corpora: {', '.join(self.paths)}: no text in {rows}: name files that hold some")

    def _layout(self) -> dict[SourceShard, tuple[ByteRange, ...]]:
        return _layout(self.paths, self.sample_by == "document")

    def _rows(self, byte_range: ByteRange) -> Iterator[RawRow]:
        """Yield the rows of a byte range, not parsed yet, as the file's format and `sample_by` define them."""
        file = byte_range.file
        if file.kind == _PARQUET:
            yield from parquet.read_rows(byte_range, (self.field, *self.where))
        elif file.kind in _JSON:
            for line in lines(byte_range):
                yield RawRow(line.name, line.location, partial(_fields, line, self.field))
        elif self.where:
            raise DataError(
                f"data.corpora: where: {file.name} is plain text, without columns: leave out one of the two"
            )
        elif self.sample_by == "line":
            for line in lines(byte_range):
                yield RawRow(line.name, line.location, line.text)
        elif self.sample_by == "paragraph":
            for paragraph in paragraphs(byte_range):
                yield RawRow(paragraph[0].name, paragraph[0].location, partial(_text, paragraph))
        else:
            yield RawRow(file.name, partial(str, file.name), partial(_text, lines(byte_range)))


def json_rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name `path:line` and the object of each line of a JSON Lines file that is not blank.

    Raises DataError for a line that is not a JSON object, and for a table of another format.
    """
    if problem := _TABLE if file.kind == _PARQUET else _NO_TEXT.get(file.kind):
        raise DataError(f"{file.name}: {problem}")
    for line in lines(ByteRange(file)):
        if not line.is_blank:
            try:
                yield line.name, _object(line)
            except UnreadableRow as error:
                raise DataError(f"{line.name}: {error.message}") from error


@lru_cache(maxsize=1024)  # it looks at every file, and reading each source shard asks for the whole layout
def _layout(paths: tuple[str, ...], keep_text_whole: bool) -> dict[SourceShard, tuple[ByteRange, ...]]:
    """Return all source shards in order, each with the byte ranges it consists of.

    A file of more than SHARD_BYTES is divided into ranges of that size, one per shard, unless it is compressed, or a
    text file and `keep_text_whole`. Other files are grouped into shards of up to SHARD_BYTES.
    """
    groups: list[list[SourceFile]] = []
    group_bytes = 0
    for file in expand_paths(paths, "data.corpora"):
        if file.kind in _NO_TEXT:
            raise DataError(f"data.corpora: {file.name}: {_NO_TEXT[file.kind]}")
        size = SHARD_BYTES if file.size is None else file.size  # a file of unknown size may be large: a shard by itself
        if not groups or group_bytes + size > SHARD_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append(file)
        group_bytes += size
    layout: dict[SourceShard, tuple[ByteRange, ...]] = {}
    for first, *others in groups:
        is_text = first.kind not in (*_JSON, _PARQUET)
        # A file of more than SHARD_BYTES is the only one of its group.
        if first.size and first.size > SHARD_BYTES and not first.is_compressed and not (keep_text_whole and is_text):
            starts = range(0, first.size, SHARD_BYTES)
            for number, begin in enumerate(starts):
                # The last range has no end: it includes what was appended since.
                end = begin + SHARD_BYTES if number + 1 < len(starts) else None
                source_shard = SourceShard(f"{first.name}#{number}", min(SHARD_BYTES, first.size - begin))
                layout[source_shard] = (ByteRange(first, begin, end),)
        else:
            name = f"{first.name} and {len(others)} more" if others else first.name
            sizes = [file.size for file in (first, *others)]
            total = None if None in sizes else sum(filter(None, sizes))
            layout[SourceShard(name, total)] = tuple(map(ByteRange, (first, *others)))
    return layout


def _text(text_lines: Iterable[FileLine]) -> str:
    return "\n".join(line.text() for line in text_lines)


def _fields(line: FileLine, field: str) -> str | Mapping[str, object]:
    """Return the fields of a JSON line, or "" for a blank line, which is neither an object nor an error."""
    if line.is_blank:
        return ""
    fields = _object(line)
    if isinstance(text := fields.get(field), str):
        try:
            decode(text.encode("utf-8"))  # JSON escapes can spell a NUL or half a surrogate pair
        except UnicodeEncodeError as error:
            message = f"field {field!r} holds half a surrogate pair: clean the text"
            raise UnreadableRow("half a surrogate pair", message) from error
    return fields


def _object(line: FileLine) -> dict[str, Any]:
    try:
        value = json.loads(line.text())
    except (ValueError, RecursionError) as error:
        raise UnreadableRow("not JSON", f"not JSON ({error}): one whole JSON object a line is needed") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UnreadableRow("not JSON", f"a JSON object is needed in each line, this is a {kind}")
    return value
