"""Corpora: where documents come from, told apart by `kind`. The only file that opens a Hugging Face dataset.

A corpus has `documents()`, an iterator of `Document` in a fixed order, and `fingerprint()`, which changes when its text
may have.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from switchcli.data.document import Document
from switchcli.data.files import Files, files_fingerprint
from switchcli.data.python_stdlib import PythonStdlib
from switchcli.errors import DataError
from switchcli.spec import Spec

__all__ = ["Corpus", "Files", "Hub", "PythonStdlib"]


class Hub(Spec):
    """A dataset of the Hugging Face hub, or a folder of data files, through `datasets`. No code from the hub is run."""

    kind: Literal["hub"] = "hub"
    path: str
    """Its name, such as `allenai/c4`, or a folder here."""
    name: str | None = None
    """The configuration, such as `en`."""
    split: str = "train"
    field: str = "text"
    """The column of the text."""
    revision: str | None = None
    """A commit or tag. Without one, what was first read stays in the cache."""
    streaming: bool = False
    """Read as it comes, keeping no copy of the whole."""
    max_documents: int | None = Field(default=None, ge=1)

    def documents(self) -> Iterator[Document]:
        """In the dataset's own order, named by their row.

        Raises DataError for no network, an unknown name or column, no text.
        """
        empty = True
        way_out = "check path, name, split, revision and the network; or use `kind: files` with text that is here"
        rows = hub_rows(self.path, self.name, self.split, self.revision, self.streaming, "data.corpora", way_out)
        for row, example in enumerate(islice(rows, self.max_documents)):
            text = self._text(example)
            if text.strip():
                empty = False
                yield Document(f"{self.path}/{self.name or ''}/{self.split}:{row}", text)
        if empty:
            raise DataError(f"data.corpora: {self.path}: no text in column {self.field!r} of split {self.split}")

    def fingerprint(self) -> str:
        """The options that choose the text; for a folder, its files' sizes and times too."""
        options = self.model_dump_json(exclude={"streaming"})
        folder = Path(self.path)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return f"hub {options} {files_fingerprint(files)}"

    def _text(self, example: Mapping[str, Any]) -> str:
        text = example.get(self.field)
        if not isinstance(text, str):
            raise DataError(
                f"data.corpora: {self.path}: column {self.field!r} holds no text (columns: {', '.join(example)}): "
                "set `field` to the one that does"
            )
        return text


def hub_rows(
    path: str, name: str | None, split: str, revision: str | None, streaming: bool, key: str, way_out: str
) -> Iterator[Mapping[str, Any]]:
    """The rows of a split of a dataset on the hub, or of a folder of data files, in order.

    DataError, naming the recipe's `key` and `way_out`, for no network and unknown names.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{key}: {path}: the dataset cannot be opened ({reason}): {way_out}") from error


Corpus = Annotated[PythonStdlib | Files | Hub, Field(discriminator="kind")]
