"""RowCorpus: what corpora of rows share, be a row a line, a paragraph or a record of fields: which column is the text,
which rows are wanted, and what becomes of those that cannot be read."""

from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from switchcli.data.sources.document import CorpusSpec, Document
from switchcli.errors import DataError


class UnreadableRow(Exception):
    """A row that gives no text: a word for the count of such rows, the whole story, and the place where it is known
    better than the row's."""

    def __init__(self, reason: str, words: str, place: Callable[[], str] | None = None) -> None:
        super().__init__(words)
        self.reason, self.words, self.place = reason, words, place


class RawRow(NamedTuple):
    """A raw row, not looked into yet."""

    name: str
    place: Callable[[], str]
    """Where it is, for an error: may be dear."""
    value: Callable[[], str | Mapping[str, object]]
    """Its text, or its fields. Raises Unreadable."""


class RowCorpus(CorpusSpec, ABC):
    """A corpus of rows."""

    field: str = "text"
    """The column, or the key in JSON Lines, that holds the text."""
    where: dict[str, tuple[str | int | bool, ...]] = Field(default={})
    """Only rows whose columns of these names hold one of the values: `{lang: [de, fr]}`."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What is no UTF-8, has NULs, is no JSON or lacks a field ends the run, or is passed over and counted."""

    def select(self, rows: Iterable[tuple[int, RawRow]], dropped: Counter[str] | None) -> Iterator[Document]:
        """The documents of numbered rows. Raises DataError for one that is unreadable, unless such are skipped."""
        dropped = Counter() if dropped is None else dropped
        for number, row in rows:
            try:
                value = row.value()
                text = value if isinstance(value, str) else self._wanted(value, dropped)
            except UnreadableRow as error:
                if self.unreadable == "refuse":
                    raise DataError(f"{(error.place or row.place)()}: {error.words}") from error
                dropped[error.reason] += 1
                continue
            if text and not text.isspace():
                yield Document(row.name, text, text, number)

    def _wanted(self, fields: Mapping[str, object], dropped: Counter[str]) -> str | None:
        for column, values in self.where.items():
            value = _field(fields, column, "where")
            # By type too: True is 1 to Python, not to a reader of a recipe.
            if not any(type(value) is type(one) and value == one for one in values):
                dropped[f"where {column}"] += 1
                return None
        text = _field(fields, self.field, "field")
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UnreadableRow("no text", f"field {self.field!r} is a {kind}, text is needed: set `field` to another")
        return text


def _field(fields: Mapping[str, object], name: str, key: str) -> object:
    if name not in fields:
        here = ", ".join(map(str, fields)) or "none"
        raise UnreadableRow("no field", f"no field {name!r} (fields here: {here}): set `{key}` to one that is there")
    return fields[name]
