"""Filters: which documents of a corpus are used, and which of their lines; by length and repetition, not by quality."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, Literal, Self

from pydantic import model_validator

from switchcli.data.sources.document import Document
from switchcli.spec import Count, Spec

SHORT_LINE: Final = 10
"""Characters below which a repeated line always stays, such as a bracket, a bullet or `Yes.`"""


class Filters(Spec):
    """Rules for leaving out documents and lines. Lines go first: those left out do not count as length."""

    min_characters: Count | None = None
    """Length below which a document is left out, in characters. Absent: documents may be as short as they like."""
    max_characters: Count | None = None
    """Length above which a document is left out, in characters. Absent: documents may be as long as they like."""
    repeated_lines: Literal["keep", "drop"] = "keep"
    """Whether a line that repeats an earlier one of its document is kept; drop imitates the C4 of section 5.6.

    Spaces around a line do not count, and lines of fewer than 10 characters always stay."""

    @model_validator(mode="after")
    def _some_length_is_left(self) -> Self:
        if (self.min_characters or 1) > (self.max_characters or float("inf")):
            raise ValueError(
                f"min_characters ({self.min_characters}) is above max_characters ({self.max_characters}): no document "
                "has such a length"
            )
        return self

    def __call__(self, documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
        """Yield the documents that pass; count the others, and dropped lines, in `dropped` by reason.

        Manifests of prepared text record the reasons, so their names do not change.
        """
        for document in documents:
            filtered = self._drop_repeated_lines(document, dropped) if self.repeated_lines == "drop" else document
            size = len(filtered.text)
            if self.min_characters is not None and size < self.min_characters:
                dropped["shorter than min_characters"] += 1
            elif self.max_characters is not None and size > self.max_characters:
                dropped["longer than max_characters"] += 1
            else:
                yield filtered

    def _drop_repeated_lines(self, document: Document, dropped: Counter[str]) -> Document:
        lines = document.text.split("\n")
        seen: set[str] = set()
        kept = []
        for line in lines:
            stripped = line.strip()
            if len(stripped) < SHORT_LINE or stripped not in seen:
                seen.add(stripped)
                kept.append(line)
        if len(kept) == len(lines):
            return document
        dropped["lines that repeat one of their document"] += len(lines) - len(kept)
        text = "\n".join(kept)
        # A document that is identified by its text is now identified by the shorter text: documents that became equal
        # then fall on the same side of the held-out split.
        identity = text if document.identity == document.text else document.identity
        return document._replace(text=text, identity=identity)
