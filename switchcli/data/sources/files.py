"""A corpus in files: text, JSON Lines or Parquet, here or elsewhere, streamed. Every fault is told with file and line.

The builders of `datasets` read the same formats, but draw other bounds: a lone carriage return ends a line, a byte
order mark stays in the text, and exactly two line feeds part paragraphs. Their JSON builder infers types: a text that
looks like a date becomes one. Files are read here, since other documents would change the ids of existing runs, and
since an error has to name the file and the line.

Its pieces are ranges of bytes of a large file, or several small files, so that many processes share out either.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources import parquet
from switchcli.data.sources.document import LABELS, Document, SourceShard
from switchcli.data.sources.lines import ByteRange, Line, decode, lines, paragraphs
from switchcli.data.sources.paths import SourceFile, expand_paths, fingerprint, legacy_fingerprint
from switchcli.data.sources.records import RawRow, RowCorpus, UnreadableRow
from switchcli.errors import DataError
from switchcli.spec import Place

SHARD_BYTES: Final = 2**26
_JSON = (".json", ".jsonl")
_PARQUET = ".parquet"


class FilesCorpus(RowCorpus):
    """Text or JSON Lines (.json, .jsonl), either compressed (.gz, .bz2, .xz, .zst) or not; or Parquet (.parquet)."""

    kind: Literal["files"] = "files"
    paths: Annotated[tuple[Place, ...], Field(min_length=1)]
    """Files, URLs (s3://, gs://, hf://datasets/...) or globs of them (`**` goes down), from the current folder."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What a document is in a text file; paragraphs are parted by blank lines. The unit that is held out."""

    def source_shards(self) -> tuple[SourceShard, ...]:
        """In the order of `paths`, each glob's files by name. Raises DataError for no match and for a folder."""
        _layout.cache_clear()  # look anew
        return tuple(self._layout())

    def read(self, piece: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Named by the path as given, or URL, and the first line; in a piece that does not begin its file `path@byte`.

        A document's row counts lines (blank ones too), paragraphs, files or rows of Parquet, as `sample_by` and the
        file have it. Raises DataError for what cannot be read, or is unreadable and not skipped.
        """
        spans = self._layout().get(piece)
        if spans is None:
            raise DataError(
                f"data.corpora: {piece.name}: the files are not those that were listed: begin again when no other "
                "program changes them"
            )
        rows = chain.from_iterable(self._rows(span) for span in spans)
        return self.select(islice(enumerate(rows), start, None), dropped)

    def fingerprint(self, digests: Digests) -> str:
        """Return the options that choose the text, and a digest of the files' contents."""
        options = self.model_dump_json(exclude=LABELS | {"paths"})
        return f"{options} {fingerprint(expand_paths(self.paths, 'data.corpora'), digests)}"

    def legacy_fingerprint(self) -> str:
        options = self.model_dump_json(exclude=LABELS | {"paths"})
        return f"{options} {legacy_fingerprint(expand_paths(self.paths, 'data.corpora'))}"

    def empty_error(self) -> DataError:
        return DataError(f"data.corpora: {', '.join(self.paths)}: no text in these files: name files that hold some")

    def _layout(self) -> dict[SourceShard, tuple[ByteRange, ...]]:
        return _layout(self.paths, self.sample_by == "document")

    def _rows(self, span: ByteRange) -> Iterator[RawRow]:
        file = span.file
        if file.kind == _PARQUET:
            yield from parquet.rows(span, (self.field, *self.where))
        elif file.kind in _JSON:
            yield from (RawRow(line.name, line.place, partial(_fields, line, self.field)) for line in lines(span))
        elif self.where:
            raise DataError(
                f"data.corpora: where: {file.name} is plain text, without columns: leave out one of the two"
            )
        elif self.sample_by == "line":
            yield from (RawRow(line.name, line.place, line.text) for line in lines(span))
        elif self.sample_by == "paragraph":
            for first, *rest in paragraphs(span):
                yield RawRow(first.name, first.place, partial(_text, (first, *rest)))
        else:
            yield RawRow(file.name, partial(str, file.name), partial(_text, lines(span)))


def json_rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSON Lines file with its `path:line`; blank lines are passed over. DataError for other JSON."""
    for line in lines(ByteRange(file)):
        if not line.is_blank:
            try:
                yield line.name, _object(line)
            except UnreadableRow as error:
                raise DataError(f"{line.name}: {error.words}") from error


@lru_cache(maxsize=1024)  # a look at each file, and each piece asks for all of them
def _layout(paths: tuple[str, ...], whole: bool) -> dict[SourceShard, tuple[ByteRange, ...]]:
    """Every piece with what it reads: a range of a file, or files of together PIECE_BYTES at most.

    whole: text files are not cut.
    """
    layout: dict[SourceShard, tuple[ByteRange, ...]] = {}
    group: list[SourceFile] = []
    size = 0  # of the group

    def close() -> None:
        if group:
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            known = None if None in (sizes := [file.size for file in group]) else sum(filter(None, sizes))
            layout[SourceShard(f"{group[0].name}{more}", known)] = tuple(ByteRange(file) for file in group)
            group.clear()

    for file in expand_paths(paths, "data.corpora"):
        is_text = file.kind not in (*_JSON, _PARQUET)
        more = SHARD_BYTES if file.size is None else file.size  # one that is not known may be any
        if size + more > SHARD_BYTES:
            close()
            size = 0
        if file.size and file.size > SHARD_BYTES and not file.is_compressed and not (whole and is_text):
            cuts = range(0, file.size, SHARD_BYTES)
            for number, begin in enumerate(cuts):
                # The last goes on to the file's end, should the file have grown.
                end = begin + SHARD_BYTES if number + 1 < len(cuts) else None
                piece = SourceShard(f"{file.name}#{number}", min(SHARD_BYTES, file.size - begin))
                layout[piece] = (ByteRange(file, begin, end),)
        else:
            group.append(file)
            size += more
    close()
    return layout


def _text(found: Iterable[Line]) -> str:
    return "\n".join(line.text() for line in found)


def _fields(line: Line, field: str) -> str | Mapping[str, object]:
    """A blank line is no object, and no fault either."""
    if line.is_blank:
        return ""
    fields = _object(line)
    if isinstance(text := fields.get(field), str):
        try:
            decode(text.encode("utf-8"))  # JSON can spell what a file of text cannot hold
        except UnicodeEncodeError as error:
            words = f"field {field!r} holds half a surrogate pair: clean the text"
            raise UnreadableRow("half a surrogate pair", words) from error
    return fields


def _object(line: Line) -> dict[str, Any]:
    try:
        value = json.loads(line.text())
    except (ValueError, RecursionError) as error:
        raise UnreadableRow("not JSON", f"not JSON ({error}): one whole JSON object a line is needed") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UnreadableRow("not JSON", f"a JSON object is needed in each line, this is a {kind}")
    return value
