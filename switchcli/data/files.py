"""A corpus in files: text or JSON Lines, plain or .gz, streamed. Every fault is told with its file and line."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, cast

from pydantic import Field

from switchcli.data.document import Document
from switchcli.errors import DataError
from switchcli.spec import Spec


class Files(Spec):
    """Text files, and JSON Lines where the name ends in .json or .jsonl; either with .gz after it."""

    kind: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files or globs (`**` goes down), from the current folder."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What a document is in a text file; paragraphs are parted by blank lines. The unit that is held out."""
    field: str = "text"
    """The key of the text in JSON Lines."""

    def documents(self) -> Iterator[Document]:
        """In the order of `paths`, each glob's files by name; named by the path as given and the first line.

        Raises DataError for no match, a folder, bytes that are not UTF-8, NULs, broken JSON, no such field, no text.
        """
        empty = True
        for path in matches(self.paths, "data.corpora"):
            is_json = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
            for document in self._json(path) if is_json else self._text(path):
                if document.text.strip():
                    empty = False
                    yield document
        if empty:
            raise DataError(f"data.corpora: {', '.join(self.paths)}: no text in these files: name files that hold some")

    def fingerprint(self) -> str:
        """The options, and each file's path as given and resolved, size and time of change."""
        return f"files {self.sample_by} {self.field} {files_fingerprint(matches(self.paths, 'data.corpora'))}"

    def _text(self, path: Path) -> Iterator[Document]:
        lines = _lines(path)
        if self.sample_by == "document":
            yield Document(path.as_posix(), "\n".join(line.text for line in lines))
        elif self.sample_by == "line":
            for line in lines:
                yield Document(f"{path.as_posix()}:{line.number}", line.text)
        else:
            for blank, group in groupby(lines, key=lambda line: not line.text.strip()):
                if not blank:
                    first, *rest = group
                    text = "\n".join([first.text, *(line.text for line in rest)])
                    yield Document(f"{path.as_posix()}:{first.number}", text)

    def _json(self, path: Path) -> Iterator[Document]:
        for where, value in json_rows(path):
            yield Document(where, _json_text(value, self.field, where))


class _Line(NamedTuple):
    number: int
    text: str


def files_fingerprint(paths: Iterable[Path]) -> str:
    """A digest of the files' paths, as given (which name documents, and so say what is held out) and resolved, and of
    their sizes and times of change."""
    stats = [(path.as_posix(), str(path.resolve()), path.stat()) for path in paths]
    identity = repr([(given, full, stat.st_size, stat.st_mtime_ns) for given, full, stat in stats])
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSON Lines file with its `path:line`; blank lines are passed over. DataError for other JSON."""
    for line in _lines(path):
        if line.text.strip():
            where = f"{path.as_posix()}:{line.number}"
            yield where, _json_object(line.text, where)


def matches(patterns: Iterable[str], key: str) -> list[Path]:
    """The files that `patterns` (paths or globs) name, each once. DataError, naming the recipe's `key`, for none."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f"{key}: {pattern} is a folder: name the files in it, such as {path / '*.txt'}")
        if path.exists():
            found[path] = None
            continue
        if not set(pattern) & set("*?["):
            raise DataError(f"{key}: {pattern}: no such file (from {Path.cwd()}): mend the path")
        anchor = Path(path.anchor)
        files = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        if not files:
            raise DataError(f"{key}: {pattern}: no file matches (from {Path.cwd()}): mend the pattern")
        found.update(dict.fromkeys(files))
    return list(found)


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[_Line]:
    """Decoded lines from 1, without their ends; a UTF-8 byte-order mark is dropped."""
    offset = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield _Line(number, _decode(line, f"{path}:{number}", offset + len(raw) - len(line)).rstrip("\r\n"))
                offset += len(raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}): mend or leave out the file") from error


def _decode(raw: bytes, where: str, offset: int) -> str:
    if b"\0" in raw:
        place = offset + raw.index(b"\0")
        raise DataError(f"{where}: a NUL byte at offset {place}: this is not a text file; leave it out or clean it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8: convert the file, "
            "for example with `iconv -f latin1 -t utf-8`"
        ) from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): one whole JSON object a line is needed") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed in each line, this is a {type(value).__name__}")
    return value


def _json_text(value: dict[str, Any], field: str, where: str) -> str:
    if field not in value:
        keys = ", ".join(map(str, value)) or "none"
        raise DataError(
            f"{where}: no field {field!r} (fields here: {keys}): set `field` to the one that holds the text"
        )
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is a {type(text).__name__}, text is needed: set `field` to another")
    try:
        _decode(text.encode("utf-8"), where, 0)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} holds half a surrogate pair: clean the text") from error
    return text
