"""TeacherCache: a teacher's K largest probabilities of every target on disk, computed once and read in training.

    FOLDER/
      facts.json                                      what they depend on: teacher, text, batches, settings
      steps-00000000-00000064-<digest>.safetensors    of all rows of steps 0 to 63: ids, probability, rest

Files appear complete, by a rename. The name of a file holds the first half of its SHA-256. When the file is first read,
that is checked, and so are its values, because anybody can give a file the name of its digest. The next start computes
those that are missing, after a stop or when the run has more steps. A batch is a function of its step, so any
number of ranks can compute them and any other number can read them.

Legend: R rows of a step, T target, K cached probabilities of a target.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from switchcli.checkpoint.checkpoint import LEFTOVER, leftovers
from switchcli.checkpoint.fsops import DISK
from switchcli.checkpoint.tensor_file import TensorSpec, tensor_spec
from switchcli.data.batch import TeacherTopK
from switchcli.errors import CheckpointError, disk_errors
from switchcli.system import publish
from switchcli.system.user_files import open_regular, read_regular
from switchcli.training.distillation_specs import TeacherCacheSpec

FACTS = "facts.json"
MAX_FACTS_BYTES = 1 << 20
"""Largest `facts.json` that is read."""
MAX_FILE_BYTES = 1 << 23
"""Largest file of probabilities, unless one step is larger."""
MAX_HEADER_BYTES = 1 << 16
"""Most bytes of a file besides those of its tensors."""
SUM_TOLERANCE = 0.01
"""Distance of a target's probabilities from a sum of 1 that rounding explains: bfloat16 has an error of 0.004."""
ELSEWHERE = "name another folder by distill.cache.folder"
_FILE_NAME = re.compile(r"steps-(\d{8,})-(\d{8,})-([0-9a-f]{32})\.safetensors")
_DIFFERENCES: Mapping[str, str] = {
    "teacher": "are those of another teacher",
    "text": "are for other text",
    "batches": "are for other batches of that text (train.seed, train.batch_tokens, lengths or spans)",
}
"""What is wrong where a fact differs, by its name."""


Facts = Mapping[str, str | int | float]
"""What the probabilities depend on, by name."""


class _CacheFile(NamedTuple):
    """A file with the probabilities of steps `first` to `stop` - 1."""

    first: int
    stop: int
    path: Path
    digest: str
    """First half of the SHA-256 of its bytes, hexadecimal."""


class TeacherCache:
    """A folder with a teacher's probabilities of the targets of a run, R rows a step."""

    def __init__(self, folder: Path, settings: TeacherCacheSpec, rows: int, targets: int, vocabulary: int) -> None:
        """A step has R rows with T targets each. The ids are those of a `vocabulary` of so many tokens."""
        self._folder, self._rows, self._vocabulary = folder, rows, vocabulary
        self._step_bytes = bytes_per_step(settings, rows, targets, vocabulary)
        top_k = min(settings.top_k, vocabulary)
        self._specs = {
            "ids": TensorSpec(id_dtype(vocabulary), (targets, top_k)),
            "probability": TensorSpec(settings.dtype, (targets, top_k)),
            "rest": TensorSpec(settings.dtype, (targets,)),
        }
        """Dtype and shape of each tensor of a file, without its first dim: the rows of its steps."""
        self._lock = Lock()
        self._loaded: tuple[_CacheFile, Mapping[str, torch.Tensor]] | None = None

    def is_begun(self, facts: Facts) -> bool:
        """Return whether the folder is a cache with these facts, complete or not.

        Raises:
            CheckpointError: it is a cache with other facts, or holds something else.
        """
        with disk_errors(self._folder, ELSEWHERE):
            if (self._folder / FACTS).exists():
                self._check(facts)
                return True
            entries = self._folder.iterdir() if self._folder.exists() else ()
            if any(path.name != "run.lock" and not _is_leftover(path) for path in entries):
                raise CheckpointError(f"{self._folder}: exists already and is no teacher cache: {ELSEWHERE}")
            return False

    def begin(self, facts: Facts) -> None:
        """Prepare the folder for writing, and remove temporary and damaged files. Only the holder of its lock may.

        Raises:
            CheckpointError: see `is_begun`, or the disk refuses.
        """
        with disk_errors(self._folder, ELSEWHERE):
            DISK.make_dir(self._folder)
            publish.remove_stale_in(self._folder, age=0)
            for path in [*leftovers(self._folder), *self.damaged()]:
                DISK.remove_tree(path)
            if not self.is_begun(facts):
                publish.write_file(self._folder / FACTS, (json.dumps(dict(facts), indent=1) + "\n").encode())

    def damaged(self) -> list[Path]:
        """Return the files that do not hold what was written. All files are read."""
        damaged = []
        with disk_errors(self._folder, ELSEWHERE):
            for file in self._files() if self._folder.exists() else []:
                try:
                    self._tensors(file)
                except ValueError:
                    damaged.append(file.path)
        return damaged

    def missing(self, first: int, stop: int) -> list[range]:
        """Return the missing steps from `first` to `stop` - 1, as one range of steps for each file to write."""
        with disk_errors(self._folder, ELSEWHERE):
            files = self._files()
        # Within the bounds, as the name of a file may claim any number of steps.
        cached = {step for file in files for step in range(max(first, file.first), min(stop, file.stop))}
        steps_per_file = max(1, MAX_FILE_BYTES // self._step_bytes)
        ranges: list[range] = []
        for step in range(first, stop):
            if step in cached:
                continue
            # Extend the last range if the step follows it and it is not full.
            if ranges and ranges[-1].stop == step and len(ranges[-1]) < steps_per_file:
                ranges[-1] = range(ranges[-1].start, step + 1)
            else:
                ranges.append(range(step, step + 1))
        return ranges

    def add(self, steps: range, probs: TeacherTopK) -> None:
        """Write a file with the probabilities of all rows of `steps`.

        The rows of all steps are in dim 0, step after step: [steps * R, T, K] and [steps * R, T].
        """
        fields = zip(TeacherTopK._fields, probs, strict=True)
        content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in fields})
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = self._folder / f"steps-{steps.start:08d}-{steps.stop:08d}-{digest}.safetensors"
        with disk_errors(self._folder, ELSEWHERE, len(content)):
            publish.write_file(path, content)

    def read(self, step: int, first: int, count: int) -> TeacherTopK:
        """Return the probabilities of rows first..first+count of a step: [count, T, K] and [count, T].

        Raises:
            CheckpointError: they are missing or damaged.
        """
        with disk_errors(self._folder, ELSEWHERE):
            with self._lock:  # `train.workers` threads read
                file, tensors = self._load(step)
            start = (step - file.first) * self._rows + first  # R rows for each step before this one
            return TeacherTopK(*(tensors[name][start : start + count].clone() for name in TeacherTopK._fields))

    def _load(self, step: int) -> tuple[_CacheFile, Mapping[str, torch.Tensor]]:
        """Return the file with a step, and its tensors in memory. The last file stays in memory."""
        if self._loaded is not None and self._loaded[0].first <= step < self._loaded[0].stop:
            return self._loaded
        file = next((file for file in self._files() if file.first <= step < file.stop), None)
        if file is None:
            raise CheckpointError(f"{self._folder}: lacks step {step}: run the same command again to get them")
        try:
            self._loaded = file, self._tensors(file)
        except ValueError as error:
            raise CheckpointError(
                f"{file.path}: is damaged ({error}): the same command asks the teacher again"
            ) from error
        return self._loaded

    def _tensors(self, file: _CacheFile) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a file. Raises ValueError if they are not a teacher's probabilities of its steps.

        The tensors come from the very bytes whose digest was checked, so a file that changes later does no harm.
        """
        num_steps = file.stop - file.first
        with open_regular(file.path) as opened:
            if os.fstat(opened.fileno()).st_size > num_steps * self._step_bytes + MAX_HEADER_BYTES:
                raise ValueError(f"it is larger than {num_steps} steps are")
            content = opened.read()
        if not hashlib.sha256(content).hexdigest().startswith(file.digest):
            raise ValueError("its SHA-256 is not that of its name")
        try:
            tensors = safetensors.torch.load(content)
        except (SafetensorError, KeyError) as error:  # KeyError: an unknown dtype
            raise ValueError(str(error)) from error
        specs = {
            name: TensorSpec(dtype, (num_steps * self._rows, *shape)) for name, (dtype, shape) in self._specs.items()
        }
        found = {name: tensor_spec(tensor) for name, tensor in tensors.items()}
        if wrong := next((name for name in {**specs, **found} if found.get(name) != specs.get(name)), None):
            raise ValueError(
                f"{wrong} is {found.get(wrong, 'missing')}, where {specs.get(wrong, 'nothing')} is expected"
            )
        ids, probability, rest = (tensors[name] for name in TeacherTopK._fields)
        if bool((ids.int() < 0).any()) or bool((ids.int() >= self._vocabulary).any()):
            raise ValueError(f"an id is not below {self._vocabulary}, the size of the vocabulary")
        # Comparisons with NaN are false, so a sound value is one for which they hold.
        total = probability.float().sum(-1) + rest.float()
        is_sound = ((probability >= 0).all(-1)) & (rest >= 0) & ((total - 1).abs() <= SUM_TOLERANCE)
        if not is_sound.all():
            raise ValueError("the probabilities of a target are negative, or do not sum to 1")
        return tensors

    def _files(self) -> list[_CacheFile]:
        files = []
        for path in sorted(self._folder.iterdir()):
            match = _FILE_NAME.fullmatch(path.name)
            if match:
                files.append(_CacheFile(int(match[1]), int(match[2]), path, match[3]))
        return files

    def _check(self, facts: Facts) -> None:
        """Raise a CheckpointError if the facts of the folder are not `facts`."""
        try:
            written = json.loads(read_regular(self._folder / FACTS, MAX_FACTS_BYTES))
        except (OSError, ValueError, RecursionError):
            written = None
        if not isinstance(written, dict):
            raise CheckpointError(f"{self._folder / FACTS}: is damaged: {ELSEWHERE}")
        for name, fact in facts.items():
            if written.get(name) != fact:
                other = f"were made with {name} {written.get(name)}, and the recipe says {fact}"
                raise CheckpointError(f"{self._folder}: its probabilities {_DIFFERENCES.get(name, other)}: {ELSEWHERE}")


def _is_leftover(path: Path) -> bool:
    """Return whether the name is that of a temporary file, or of a probe of the disk."""
    return bool(publish.TEMPORARY.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))


def bytes_per_step(settings: TeacherCacheSpec, rows: int, targets: int, vocabulary: int) -> int:
    """Return the bytes on disk of a step of R rows with T targets each."""
    probability_bytes = settings.dtype.itemsize
    # Each target has K ids, K probabilities, and the sum of the others.
    pair_bytes = id_dtype(vocabulary).itemsize + probability_bytes
    return rows * targets * (min(settings.top_k, vocabulary) * pair_bytes + probability_bytes)


def id_dtype(vocabulary: int) -> torch.dtype:
    """Return the smallest integer type used for the ids of a vocabulary."""
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32
