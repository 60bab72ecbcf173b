"""Corpora: where documents come from, told apart by `kind`. The only file that opens a Hugging Face dataset.

A corpus is read piece by piece (`pieces`, `read`) or whole (`documents`), in a fixed order, and has a `fingerprint()`,
which changes when its text may have.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from glob import glob
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources.document import LABELS, CorpusSpec, Document, SourceShard
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.sources.io_errors import data_errors, reason
from switchcli.data.sources.paths import SourceFile, legacy_fingerprint
from switchcli.data.sources.python_stdlib import PythonStdlib
from switchcli.data.sources.records import RawRow, RowCorpus
from switchcli.errors import DataError
from switchcli.spec import MOST, Place

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["Corpus", "CorpusSpec", "Document", "FilesCorpus", "HubCorpus", "PythonStdlib", "SourceShard"]

MAX_SHARDS: Final = 4096


class HubCorpus(RowCorpus):
    """A dataset of the Hugging Face hub, or a folder of data files, as it comes: no copy is kept, no code is run."""

    kind: Literal["hub"] = "hub"
    path: Place
    """Its name, such as `allenai/c4`, or a folder here."""
    name: str | None = None
    """The subset, such as `en`."""
    split: str = "train"
    data_files: Place | tuple[Place, ...] | None = None
    """Files of it, or globs, in place of a subset: `en/*.json.gz`."""
    revision: str | None = None
    """A commit or tag. Without one, what is there on the day."""
    max_documents: int | None = Field(default=None, ge=1, le=MOST["count"])
    """Rows that are looked at, from the first; they are one piece."""

    def source_shards(self) -> tuple[SourceShard, ...]:
        """The dataset's shards, which are mostly its files, or groups of them where they are over 4,096.

        Raises DataError for no network, an unknown or closed dataset, a split or files that are not there.
        """
        if self.max_documents is not None:
            return (SourceShard("first rows", None),)
        _opened.cache_clear()  # look anew
        return tuple(SourceShard(name, None) for name in _groups(self._dataset().num_shards))

    def read(self, piece: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """In the dataset's own order. Raises DataError as `pieces`, and for a column that is not there or no text.

        The rows before `start` are fetched, but not looked into: some 300,000 of C4's size a second.
        """
        dataset = self._dataset()
        stop = None
        if self.max_documents is None:
            groups = _groups(dataset.num_shards)
            if piece.name not in groups:
                raise DataError(
                    f"data.corpora: {self.path}: no {piece.name} any more: give the `revision` that was read before"
                )
            dataset = dataset.shard(num_shards=len(groups), index=groups.index(piece.name), contiguous=True)
        else:
            stop = max(self.max_documents - start, 0)
        return self.select(enumerate(self._rows(dataset.skip(start), piece, start, stop), start), dropped)

    def fingerprint(self, digests: Digests) -> str:
        """Return the options that choose the text; of a folder, or of local `data_files`, names and contents too."""
        options = self.model_dump_json(exclude=LABELS)
        found = self._local_files()
        contents = [*zip(found, digests.of([*found.values()]), strict=True)]
        return f"hub {options} {contents}"

    def legacy_fingerprint(self) -> str:
        options = self.model_dump_json(exclude=LABELS)
        paths = _files_below(Path(self.path))
        return f"hub {options} {legacy_fingerprint(map(SourceFile.local, paths))}"

    def _local_files(self) -> dict[str, Path]:
        """The files of this machine that the dataset may read, by the names that `datasets` chooses splits by."""
        folder = Path(self.path)
        if folder.is_dir():
            return {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
        patterns = (self.data_files,) if isinstance(self.data_files, str) else self.data_files or ()
        found = (Path(name) for pattern in patterns for name in sorted(glob(pattern, recursive=True)))  # noqa: PTH207
        return {path.as_posix(): path for path in found if path.is_file()}

    def empty_error(self) -> DataError:
        return DataError(f"data.corpora: {self.path}: no text in column {self.field!r} of split {self.split}")

    def _rows(self, dataset: "IterableDataset", piece: SourceShard, start: int, stop: int | None) -> Iterator[RawRow]:
        parts = "/".join(filter(None, (self.path, self.name, self.split)))
        with self._refusals():
            for number, fields in enumerate(islice(dataset, stop), start):
                name = f"{parts}, {piece.name}:{number}"
                yield RawRow(name, partial(str, name), partial(dict, fields))

    def _dataset(self) -> "IterableDataset":
        with self._refusals():
            return _opened(self.path, self.name, self.split, self.data_files, self.revision)

    def _refusals(self) -> AbstractContextManager[None]:
        way_out = "check path, name, split, revision and the network; or use `kind: files` with text that is here"
        return hub_errors(self.path, "data.corpora", way_out)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def hub_rows(path: str, name: str | None, split: str, key: str, way_out: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a split of a dataset on the hub, in order, through a copy that is kept in the cache of `datasets`.

    DataError, naming the recipe's `key` and `way_out`, for no network and unknown names.
    """
    from datasets import load_dataset

    with hub_errors(path, key, way_out):
        yield from load_dataset(path, name, split=split)


@contextmanager
def hub_errors(path: str, key: str, way_out: str) -> Iterator[None]:
    """Within, what the hub and `datasets` refuse is raised as a DataError, with `way_out` or one that they suggest."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError

    where = f"{key}: {path}: the dataset cannot be opened"
    with data_errors(where, way_out):
        try:
            yield
        except (DatasetNotFoundError, RepositoryNotFoundError) as error:
            raise DataError(
                f"{where} ({reason(error)}): check the spelling of path and revision; to a private or gated one log in "
                f"by `hf auth login`, once https://huggingface.co/datasets/{path} lets you in"
            ) from error


@lru_cache(maxsize=1024)  # opening asks the hub several questions, and each piece of a corpus opens it
def _opened(
    path: str, name: str | None, split: str, data_files: str | tuple[str, ...] | None, revision: str | None
) -> "IterableDataset":
    from datasets import load_dataset

    files = list(data_files) if isinstance(data_files, tuple) else data_files
    return load_dataset(path, name, split=split, data_files=files, revision=revision, streaming=True)


def _groups(num_shards: int) -> list[str]:
    """Names of groups of consecutive shards, as `shard(contiguous=True)` makes them."""
    count = min(num_shards, MAX_SHARDS)
    sizes = [num_shards // count + (index < num_shards % count) for index in range(count)]
    ends = accumulate(sizes)
    return [
        f"shard {end - 1}" if size == 1 else f"shards {end - size}-{end - 1}"
        for size, end in zip(sizes, ends, strict=True)
    ]


Corpus = Annotated[PythonStdlib | FilesCorpus | HubCorpus, Field(discriminator="kind")]
