"""A teacher's answers on disk: generated once and read in training.

    FOLDER/<digest of a task's examples>/             TeacherAnswers: its answer to each training example of a task
      facts.json                                      what they depend on: teacher, examples, settings
      examples-00000000-00001024-<digest>.safetensors    of examples 0 to 1023: ids

Files appear complete, by a rename. The name of a file holds the first half of its SHA-256. When the file is first read,
that is checked, and so are its values, because anybody can give a file the name of its digest. The next start computes
those that are missing, after a stop.

Legend: T target, X examples.
"""

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import ClassVar, NamedTuple, final

import safetensors.torch
import torch
from safetensors import SafetensorError

from switchcli.checkpoint.checkpoint import LEFTOVER, leftovers
from switchcli.checkpoint.tensor_file import TensorSpec, tensor_spec
from switchcli.errors import CheckpointError, disk_errors
from switchcli.system import publish
from switchcli.system.user_files import open_regular, read_regular

FACTS = "facts.json"
MAX_FACTS_BYTES = 1 << 20
"""Largest `facts.json` that is read."""
MAX_FILE_BYTES = 1 << 23
"""Largest file of answers, unless one example is larger."""
MAX_HEADER_BYTES = 1 << 16
"""Most bytes of a file besides those of its tensors."""
EXAMPLES_PER_FILE = 1024
_FILE_NAME = re.compile(r"examples-(\d{8,})-(\d{8,})-([0-9a-f]{32})\.safetensors")
_DIFFERENCES: Mapping[str, str] = {
    "teacher": "are those of another teacher",
    "text": "are for other examples",
}
"""What is wrong where a fact differs, by its name."""


Facts = Mapping[str, str | int | float]
"""What the answers depend on, by name."""


class _CacheFile(NamedTuple):
    """A file with the tensors of the items `first` to `stop` - 1."""

    first: int
    stop: int
    path: Path
    digest: str
    """First half of the SHA-256 of its bytes, hexadecimal."""


class TeacherFolder(ABC):
    """A folder with tensors of the items of a run, R rows each: of its steps, or of its training examples."""

    unit: ClassVar[str]
    """What an item is."""
    content: ClassVar[str]
    """What is kept of an item."""
    elsewhere: ClassVar[str]
    """The fix where the folder cannot be used."""

    def __init__(self, folder: Path, rows: int, specs: Mapping[str, TensorSpec], per_file: int | None = None) -> None:
        """`specs` gives dtype and shape of a row of each tensor. A file has `per_file` items, or `MAX_FILE_BYTES`."""
        self.folder, self._rows, self._specs = folder, rows, specs
        self.item_bytes = rows * sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        """Bytes of an item on disk."""
        self._per_file = per_file
        self._lock = Lock()
        self._loaded: tuple[_CacheFile, Mapping[str, torch.Tensor]] | None = None

    @abstractmethod
    def _problem(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return what is wrong with the values of a file, whose dtypes and shapes are right."""

    def is_begun(self, facts: Facts) -> bool:
        """Return whether the folder is a cache with these facts, complete or not.

        Raises:
            CheckpointError: it is a cache with other facts, or holds something else.
        """
        with disk_errors(self.folder, self.elsewhere):
            if (self.folder / FACTS).exists():
                self._check(facts)
                return True
            entries = self.folder.iterdir() if self.folder.exists() else ()
            if any(path.name != "run.lock" and not _is_leftover(path) for path in entries):
                raise CheckpointError(f"{self.folder}: exists already and is no folder of answers: {self.elsewhere}")
            return False

    def begin(self, facts: Facts) -> None:
        """Prepare the folder for writing, and remove temporary and damaged files. Only the holder of its lock may.

        Raises:
            CheckpointError: see `is_begun`, or the disk refuses.
        """
        with disk_errors(self.folder, self.elsewhere):
            publish.make_folder(self.folder)
            publish.remove_stale_in(self.folder, age=0)
            for path in [*leftovers(self.folder), *self.damaged()]:
                publish.remove_tree(path)
            if not self.is_begun(facts):
                publish.write_file(self.folder / FACTS, (json.dumps(dict(facts), indent=1) + "\n").encode())

    def damaged(self) -> list[Path]:
        """Return the files that do not hold what was written. All files are read."""
        damaged = []
        with disk_errors(self.folder, self.elsewhere):
            for file in self._files() if self.folder.exists() else []:
                try:
                    self._tensors(file)
                except (ValueError, FileNotFoundError):  # the run that fills the folder has removed a damaged file
                    damaged.append(file.path)
        return damaged

    def missing(self, first: int, stop: int) -> list[range]:
        """Return the missing items from `first` to `stop` - 1, as one range of them for each file to write."""
        with disk_errors(self.folder, self.elsewhere):
            files = self._files()
        # Within the bounds, as the name of a file may claim any number of steps.
        cached = {item for file in files for item in range(max(first, file.first), min(stop, file.stop))}
        per_file = self._per_file or max(1, MAX_FILE_BYTES // self.item_bytes)
        ranges: list[range] = []
        for item in range(first, stop):
            if item in cached:
                continue
            # Extend the last range if the item follows it and it is not full.
            if ranges and ranges[-1].stop == item and len(ranges[-1]) < per_file:
                ranges[-1] = range(ranges[-1].start, item + 1)
            else:
                ranges.append(range(item, item + 1))
        return ranges

    def _write(self, items: range, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file with the tensors of `items`, whose rows are in dim 0, item after item."""
        content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = self.folder / f"{self.unit}s-{items.start:08d}-{items.stop:08d}-{digest}.safetensors"
        with disk_errors(self.folder, self.elsewhere, len(content)):
            publish.write_file(path, content)

    def _read(self, item: int, first: int, count: int) -> dict[str, torch.Tensor]:
        """Return the tensors of rows first..first+count of an item.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        with disk_errors(self.folder, self.elsewhere):
            with self._lock:  # `train.workers` threads read
                file, tensors = self._load(item)
            start = (item - file.first) * self._rows + first  # R rows for each item before this one
            return {name: tensors[name][start : start + count].clone() for name in self._specs}

    def _load(self, item: int) -> tuple[_CacheFile, Mapping[str, torch.Tensor]]:
        """Return the file with an item, and its tensors in memory. The last file stays in memory."""
        if self._loaded is not None and self._loaded[0].first <= item < self._loaded[0].stop:
            return self._loaded
        file = next((file for file in self._files() if file.first <= item < file.stop), None)
        if file is None:
            raise CheckpointError(f"{self.folder}: lacks {self.unit} {item}: run the same command again to get it")
        try:
            self._loaded = file, self._tensors(file)
        except ValueError as error:
            raise CheckpointError(
                f"{file.path}: is damaged ({error}): the same command asks the teacher again"
            ) from error
        return self._loaded

    def _tensors(self, file: _CacheFile) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a file. Raises ValueError if they are not those of its items.

        The tensors come from the very bytes whose digest was checked, so a file that changes later does no harm.
        """
        num_items = file.stop - file.first
        with open_regular(file.path) as opened:
            if os.fstat(opened.fileno()).st_size > num_items * self.item_bytes + MAX_HEADER_BYTES:
                raise ValueError(f"it is larger than {num_items} {self.unit}s are")
            content = opened.read()
        if not hashlib.sha256(content).hexdigest().startswith(file.digest):
            raise ValueError("its SHA-256 is not that of its name")
        try:
            tensors = safetensors.torch.load(content)
        except (SafetensorError, KeyError) as error:  # KeyError: an unknown dtype
            raise ValueError(str(error)) from error
        specs = {
            name: TensorSpec(dtype, (num_items * self._rows, *shape)) for name, (dtype, shape) in self._specs.items()
        }
        found = {name: tensor_spec(tensor) for name, tensor in tensors.items()}
        if wrong := next((name for name in {**specs, **found} if found.get(name) != specs.get(name)), None):
            raise ValueError(
                f"{wrong} is {found.get(wrong, 'missing')}, where {specs.get(wrong, 'nothing')} is expected"
            )
        if problem := self._problem(tensors):
            raise ValueError(problem)
        return tensors

    def _files(self) -> list[_CacheFile]:
        files = []
        for path in sorted(self.folder.iterdir()):
            match = _FILE_NAME.fullmatch(path.name)
            if match:
                files.append(_CacheFile(int(match[1]), int(match[2]), path, match[3]))
        return files

    def _check(self, facts: Facts) -> None:
        """Raise a CheckpointError if the facts of the folder are not `facts`."""
        try:
            written = json.loads(read_regular(self.folder / FACTS, MAX_FACTS_BYTES))
        except (OSError, ValueError, RecursionError):
            written = None
        if not isinstance(written, dict):
            raise CheckpointError(f"{self.folder / FACTS}: is damaged: {self.elsewhere}")
        for name, fact in facts.items():
            if written.get(name) != fact:
                other = f"were made with {name} {written.get(name)}, and the recipe says {fact}"
                difference = _DIFFERENCES.get(name, other)
                raise CheckpointError(f"{self.folder}: its {self.content} {difference}: {self.elsewhere}")


@final
class TeacherAnswers(TeacherFolder):
    """A folder with a teacher's answers to the training examples of a task."""

    unit: ClassVar[str] = "example"
    content: ClassVar[str] = "answers"
    elsewhere: ClassVar[str] = "name another folder by distill.answers"

    def __init__(self, folder: Path, targets: int, vocabulary: int) -> None:
        """An answer has at most T targets, of a `vocabulary` of so many tokens."""
        self._vocabulary = vocabulary
        super().__init__(folder, 1, {"ids": TensorSpec(id_dtype(vocabulary), (targets,))}, EXAMPLES_PER_FILE)

    def add(self, examples: range, ids_XT: torch.Tensor) -> None:
        """Write a file with the answers to `examples`, which end in EOS unless they are cut off, then padding."""
        self._write(examples, {"ids": ids_XT.to(self._specs["ids"].dtype)})

    def read(self, count: int) -> torch.Tensor:
        """Return the answers to examples 0..count-1: int64 [X, T]. Raises CheckpointError like `TeacherCache.read`."""
        answers, start = [], 0
        with disk_errors(self.folder, self.elsewhere):
            while start < count:
                file, tensors = self._load(start)
                answers.append(tensors["ids"][start - file.first :].long())
                start = file.stop
        return torch.cat(answers)[:count]

    def _problem(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        return _unknown_token(tensors["ids"], self._vocabulary)


def _unknown_token(ids: torch.Tensor, vocabulary: int) -> str | None:
    is_known = (ids.int() >= 0) & (ids.int() < vocabulary)
    return None if is_known.all() else f"an id is not below {vocabulary}, the size of the vocabulary"


def _is_leftover(path: Path) -> bool:
    """Return whether the name is that of a temporary file, or of a probe of the disk."""
    return bool(publish.TEMPORARY.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))


def id_dtype(vocabulary: int) -> torch.dtype:
    """Return the smallest integer type used for the ids of a vocabulary."""
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32
