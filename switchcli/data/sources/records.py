"""RowCorpus: a corpus of rows, each a line, a paragraph or a record with fields.

It decides which field of a row is the text, which rows are selected, and what happens to rows that cannot be read.
"""

from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from switchcli.data.sources.document import CorpusSpec, Document
from switchcli.errors import DataError


class UnreadableRow(Exception):
    """A row that yields no text.

    `reason` is a short phrase under which such rows are counted. `message` explains the fault and the fix. `location`
    returns the exact position if it is known better than the row's.
    """

    location: Callable[[], str] | None = None

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class RawRow(NamedTuple):
    """A row that is not parsed yet."""

    name: str
    """Name of the document that the row becomes."""
    location: Callable[[], str]
    """Function that returns the row's position for an error message. It may read the file again."""
    value: Callable[[], str | Mapping[str, object]]
    """Function that returns the row's text, or its fields. Raises UnreadableRow."""


class RowCorpus(CorpusSpec, ABC):
    """A corpus of rows."""

    field: str = "text"
    """Column, or key in JSON Lines, that holds the text."""
    where: dict[str, tuple[str | int | bool, ...]] = Field(default={})
    """Selects the rows whose columns hold one of the listed values, such as `{lang: [de, fr]}`. Default: all rows."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What happens to rows that are not UTF-8, hold a NUL, are not JSON or lack a field: `refuse` ends the run with an
    error, `skip` leaves them out and counts them."""

    def select(self, rows: Iterable[tuple[int, RawRow]], dropped: Counter[str] | None) -> Iterator[Document]:
        """Yield the documents of numbered rows, without blank ones. `dropped` counts rows left out, by reason.

        Raises DataError for an unreadable row, unless such rows are skipped.
        """
        dropped = Counter() if dropped is None else dropped
        for number, row in rows:
            try:
                value = row.value()
                text = value if isinstance(value, str) else self._selected_text(value, dropped)
            except UnreadableRow as error:
                if self.unreadable == "refuse":
                    raise DataError(f"{(error.location or row.location)()}: {error.message}") from error
                dropped[error.reason] += 1
                continue
            if text and not text.isspace():
                yield Document(row.name, text, text, number)

    def _selected_text(self, fields: Mapping[str, object], dropped: Counter[str]) -> str | None:
        """Return the text of a record, or None if `where` does not select it."""
        for column, values in self.where.items():
            value = _field(fields, column, "where")
            # Types must match: in Python, True == 1.
            if not any(type(value) is type(other) and value == other for other in values):
                dropped[f"where {column}"] += 1
                return None
        text = _field(fields, self.field, "field")
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UnreadableRow("no text", f"field {self.field!r} is a {kind}, text is needed: set `field` to another")
        return text


def _field(fields: Mapping[str, object], name: str, key: str) -> object:
    """Return a field. If it is missing, raises UnreadableRow with the fix to set the corpus's `key`."""
    if name not in fields:
        present = ", ".join(map(str, fields)) or "none"
        advice = f"set `{key}` to one that is there, or rename it"
        raise UnreadableRow("no field", f"no field {name!r} (fields: {present}): {advice}")
    return fields[name]
