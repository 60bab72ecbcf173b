"""Filters: which documents of a corpus are kept, and which of their lines; by length and repetition, not quality."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.sources.document import Document
from switchcli.spec import MOST, Spec

SHORT_LINE: Final = 10
"""Characters: a shorter line may well stand twice, such as a bracket, a bullet or `Yes.`"""


class Filters(Spec):
    """What is left out of a corpus. The lines come first: a document's length is that of what is left of it."""

    min_characters: int | None = Field(default=None, ge=1, le=MOST["count"])
    """Shorter documents are left out."""
    max_characters: int | None = Field(default=None, ge=1, le=MOST["count"])
    """Longer documents are left out."""
    repeated_lines: Literal["keep", "drop"] = "keep"
    """Of lines of one document that are the same but for blanks around them, the first alone stays, as in the C4 of
    section 5.6. Lines of fewer than 10 characters always stay."""

    @model_validator(mode="after")
    def _some_length_is_left(self) -> Self:
        if (self.min_characters or 1) > (self.max_characters or float("inf")):
            raise ValueError(
                f"min_characters ({self.min_characters}) is above max_characters ({self.max_characters}): no document "
                "has such a length"
            )
        return self

    def __call__(self, documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
        """The documents that are kept; `dropped` counts the others, and the lines, by reason."""
        for document in documents:
            found = self._with_new_lines(document, dropped) if self.repeated_lines == "drop" else document
            size = len(found.text)
            if self.min_characters is not None and size < self.min_characters:
                dropped["shorter than min_characters"] += 1
            elif self.max_characters is not None and size > self.max_characters:
                dropped["longer than max_characters"] += 1
            else:
                yield found

    def _with_new_lines(self, document: Document, dropped: Counter[str]) -> Document:
        lines = document.text.split("\n")
        seen: set[str] = set()
        kept = []
        for line in lines:
            bare = line.strip()
            if len(bare) < SHORT_LINE or bare not in seen:
                seen.add(bare)
                kept.append(line)
        if len(kept) == len(lines):
            return document
        dropped["lines that repeat one of their document"] += len(lines) - len(kept)
        text = "\n".join(kept)
        # Where equal texts are to be on one side, texts that have become equal are.
        identity = text if document.identity == document.text else document.identity
        return document._replace(text=text, identity=identity)
