"""Corpora: sources of documents, chosen by `kind`. This is the only module that opens Hugging Face datasets.

A corpus is read in source shards (`source_shards`, `read`) or completely (`documents`), always in the same order. Its
`fingerprint()` changes when its text may have changed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from glob import glob
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from switchcli.data.sources.document import LABELS, CorpusSpec, Document, SourceShard
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.sources.io_errors import data_errors, reason
from switchcli.data.sources.paths import block_references, digests_of
from switchcli.data.sources.python_stdlib import PythonStdlib
from switchcli.data.sources.records import RawRow, RowCorpus
from switchcli.errors import DataError
from switchcli.spec import PathOrUrl
from switchcli.system.user_files import is_within_folder, read_regular

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["Corpus", "CorpusSpec", "Document", "FilesCorpus", "HubCorpus", "PythonStdlib", "SourceShard"]

_CARD, _CARD_OF_YAML = "README.md", ".huggingface.yaml"
"""Files of a dataset that may name its data files. The second one is not read."""
_MAX_CARD_BYTES: Final = 2**24
MAX_SHARDS: Final = 4096
"""Source shards of a dataset. A dataset of more shards is read in groups of consecutive ones."""


class HubCorpus(RowCorpus):
    """A dataset of the Hugging Face hub, or a local folder of data files, streamed. Its own code is never run."""

    kind: Literal["hub"] = "hub"
    """`hub` reads a data set from the Hugging Face hub."""
    path: PathOrUrl
    """Name on the hub, such as `allenai/c4`, or a local folder."""
    name: str | None = None
    """Subset of the dataset, such as `en`."""
    split: str = "train"
    """Split of the dataset."""
    data_files: PathOrUrl | tuple[PathOrUrl, ...] | None = None
    """Files of the dataset, or globs of them, instead of a subset: `en/*.json.gz`."""
    revision: str | None = None
    """Commit or tag. Default: the latest commit when the dataset is opened."""

    def source_shards(self) -> tuple[SourceShard, ...]:
        """Return the dataset's shards, usually its files, or groups of them if there are more than MAX_SHARDS.

        Raises DataError for no network, an unknown or closed dataset, and a split or files that do not exist.
        """
        _open_dataset.cache_clear()  # the dataset may have changed since
        with self._dataset_errors():
            return tuple(SourceShard(name, None) for name in _group_names(self._dataset().num_shards))

    def read(self, shard: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield documents in the dataset's order. Raises DataError as `source_shards`, and for a row without text.

        Rows before `start` are fetched but not parsed.
        """
        dataset = self._dataset()
        names = _group_names(dataset.num_shards)
        if shard.name not in names:
            raise DataError(
                f"data.corpora: {self.path}: {shard.name} is not there any more: give the `revision` that "
                "was read before"
            )
        dataset = dataset.shard(num_shards=len(names), index=names.index(shard.name), contiguous=True)
        rows = self._rows(dataset.skip(start), shard, start)
        return self.select(enumerate(rows, start), dropped)

    def fingerprint(self) -> str:
        """Return the options that choose the text and, of a folder or local `data_files`, file names and contents."""
        options = self.model_dump_json(exclude=LABELS)
        files = self._local_files()
        contents = [*zip(files, digests_of([*files.values()]), strict=True)]
        return f"hub {options} {contents}"

    def _local_files(self) -> dict[str, Path]:
        """Return the local files that the dataset may read, by the names from which `datasets` infers splits."""
        folder = Path(self.path)
        files = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
        below = {*files.values()}
        patterns = (self.data_files,) if isinstance(self.data_files, str) else self.data_files or ()
        for pattern in patterns:
            # `datasets` takes paths from the data set's folder, and of zip://MEMBER::ARCHIVE from the current one.
            is_in_archive = "::" in pattern
            local = re.sub("^(file|local):(//)?", "", pattern.rpartition("::")[2])  # as fsspec does
            local = local if is_in_archive or not folder.is_dir() else str(folder / local)
            paths = (Path(name) for name in sorted(glob(local, recursive=True)))  # noqa: PTH207
            files |= {path.as_posix(): path for path in paths if path.is_file() and path not in below}
        return files

    def empty_error(self) -> DataError:
        return DataError(f"data.corpora: {self.path}: no text in column {self.field!r} of split {self.split}")

    def _rows(self, dataset: "IterableDataset", shard: SourceShard, start: int) -> Iterator[RawRow]:
        """Yield the records of a dataset as rows that are numbered from `start`."""
        dataset_name = "/".join(filter(None, (self.path, self.name, self.split)))
        with self._dataset_errors():
            for number, fields in enumerate(dataset, start):
                name = f"{dataset_name}, {shard.name}:{number}"
                yield RawRow(name, partial(str, name), partial(dict, fields))

    def _dataset(self) -> "IterableDataset":
        with self._dataset_errors():
            return _open_dataset(self.path, self.name, self.split, self.data_files, self.revision)

    def _dataset_errors(self) -> AbstractContextManager[None]:
        fix = "check path, name, split, revision and the network; or use `kind: files` with local text"
        return hub_errors(self.path, "data.corpora", fix)


def _files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, also those behind links; each folder is entered once, so that loops end."""
    files, entered = list[Path](), {os.path.realpath(folder)}
    for name, folders, names in os.walk(folder, followlinks=True):
        files += (path for path in map(Path(name).joinpath, names) if path.is_file())
        real_paths = {each: os.path.realpath(Path(name, each)) for each in sorted(folders)}
        folders[:] = [each for each, real_path in real_paths.items() if real_path not in entered]
        entered.update(real_paths.values())
    return sorted(files)


def hub_rows(path: str, name: str | None, split: str, key: str, fix: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a split of a hub dataset, in order. `datasets` keeps a copy of the dataset in its cache.

    Raises DataError, naming the recipe's `key` and the `fix`, for no network and unknown names.
    """
    from datasets import load_dataset

    block_references()
    with hub_errors(path, key, fix):
        yield from load_dataset(path, name, split=split)


@contextmanager
def hub_errors(path: str, key: str, fix: str) -> Iterator[None]:
    """Raise errors of the hub and of `datasets` inside the block as DataError, with `fix` or one that fits better."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError

    where = f"{key}: {path}: the dataset cannot be opened"
    with data_errors(where, fix):
        try:
            yield
        except (DatasetNotFoundError, RepositoryNotFoundError) as error:
            raise DataError(
                f"{where} ({reason(error)}): check the spelling of path and revision; for a private or gated dataset, "
                f"log in with `hf auth login` once https://huggingface.co/datasets/{path} grants you access"
            ) from error


@lru_cache(maxsize=1024)  # opening takes several requests to the hub, and reading each source shard opens the dataset
def _open_dataset(
    path: str, name: str | None, split: str, data_files: str | tuple[str, ...] | None, revision: str | None
) -> "IterableDataset":
    from datasets import load_dataset

    block_references()
    if data_files is None:
        _check_card(Path(path))
    files = list(data_files) if isinstance(data_files, tuple) else data_files
    return load_dataset(path, name, split=split, data_files=files, revision=revision, streaming=True)


def _check_card(folder: Path) -> None:
    """Raise DataError if the description of a local dataset names files outside of its folder.

    Whoever made the folder wrote it. OSError and ValueError are raised for a description that cannot be read.
    """
    from huggingface_hub import DatasetCard

    if (other := folder / _CARD_OF_YAML).exists():
        raise DataError(
            f"data.corpora: {other}: may name files outside of its folder: remove it, and put its keys into {_CARD}"
        )
    path = folder / _CARD
    if not path.exists():
        return
    card = DatasetCard(read_regular(path, _MAX_CARD_BYTES).decode("utf-8"))
    for config in _as_list(card.data.get("configs")):
        if not isinstance(config, Mapping):
            continue  # `datasets` refuses it, as the other values that are skipped here
        entries = _as_list(config.get("data_files"))
        names = [_as_list(entry.get("path") if isinstance(entry, Mapping) else entry) for entry in entries]
        for name in chain(*names, _as_list(config.get("data_dir"))):
            if isinstance(name, str) and not is_within_folder(name):
                raise DataError(
                    f"data.corpora: {path}: names {name!r}, which may lie outside of its folder: copy these files "
                    "into the folder, or name them by data_files of the corpus"
                )


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _group_names(num_shards: int) -> list[str]:
    """Return names of at most MAX_SHARDS groups of consecutive shards, as `shard(contiguous=True)` makes them."""
    num_groups = min(num_shards, MAX_SHARDS)
    # The first `remainder` groups have one shard more than the others.
    size, remainder = divmod(num_shards, max(1, num_groups))
    bounds = [index * size + min(index, remainder) for index in range(num_groups + 1)]
    return [f"shard {begin}" if end - begin == 1 else f"shards {begin}-{end - 1}" for begin, end in pairwise(bounds)]


Corpus = Annotated[PythonStdlib | FilesCorpus | HubCorpus, Field(discriminator="kind")]
