"""A teacher's answers on disk: its K largest probabilities of every target, asked once, read as the student trains.

    FOLDER/
      answers.json                                    whose answers to what, and how they were asked for
      steps-00000000-00000064-<digest>.safetensors    steps 0 to 63, all rows of each: ids, probability, rest

Parts appear whole, by a rename; a part's name holds the first half of its SHA-256, which is looked at when it is first
read. What is missing is asked for by the next start: after a stop, or for more steps. A batch is a function of the
step, so any number of ranks may ask, and any other read.

Legend: R rows of a step, T target, K kept probabilities.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError

from switchcli import publish
from switchcli.checkpoint.checkpoint import LEFTOVER, leftovers
from switchcli.checkpoint.fsops import DISK
from switchcli.data.batch import TeacherTopK
from switchcli.errors import CheckpointError, disk_errors
from switchcli.spec import MOST, Place, Spec
from switchcli.user_files import open_regular, read_regular

FACTS = "answers.json"
MAX_FACTS_BYTES = 1 << 20
PART_BYTES = 1 << 23
_PART = re.compile(r"steps-(\d{8,})-(\d{8,})-([0-9a-f]{32})\.safetensors")
ELSEWHERE = "name another folder by distill.cache.folder"
_DIFFERS: Mapping[str, str] = {
    "teacher": "are those of another teacher",
    "text": "are to other text",
    "batches": "are to other batches of that text (train.seed, train.batch_tokens, lengths or spans)",
}


Facts = Mapping[str, str | int | float]


class TeacherCacheSpec(Spec):
    """Where a teacher's answers are kept, and how many of its probabilities."""

    folder: Place
    """Made if it is not there; what it lacks is asked of the teacher before training."""
    top_k: int = Field(default=64, ge=1, le=MOST["vocab_size"])
    """Probabilities of each target; of all others their sum is kept. At most the vocabulary."""
    precision: Literal["float16", "float32"] = "float16"
    """What they are kept in; ids take 2 bytes, or 4 of a vocabulary beyond 65,536."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.precision == "float16" else torch.float32


class _Part(NamedTuple):
    first: int
    last: int
    """The step after its last."""
    path: Path
    digest: str


class TeacherCache:
    """The answers to the batches of a run, R rows a step."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows
        self._open: tuple[_Part, Mapping[str, torch.Tensor]] | None = None

    def is_begun(self, facts: Facts) -> bool:
        """Whether answers with these facts, on which they depend, are kept in the folder, some of them at least.

        Raises:
            CheckpointError: it holds answers with other facts, or something else.
        """
        with disk_errors(self._folder, ELSEWHERE):
            if (self._folder / FACTS).exists():
                self._check(facts)
                return True
            others = self._folder.iterdir() if self._folder.exists() else ()
            if any(path.name != "run.lock" and not _is_leftover(path) for path in others):
                raise CheckpointError(f"{self._folder}: is there already and holds no answers: {ELSEWHERE}")
            return False

    def begin(self, facts: Facts) -> None:
        """Make the folder ready for answers, and remove the leftovers of a kill; only who holds its lock may.

        Raises:
            CheckpointError: as `is_begun`, or the disk refuses.
        """
        with disk_errors(self._folder, ELSEWHERE):
            DISK.make_dir(self._folder)
            publish.remove_stale_in(self._folder, publish.TEMPORARY)
            for path in [*leftovers(self._folder), *self.damaged()]:
                DISK.remove_tree(path)
            if not self.is_begun(facts):
                self._place(FACTS, (json.dumps(dict(facts), indent=1) + "\n").encode())

    def damaged(self) -> list[Path]:
        """The parts whose bytes are not those that were kept; all of them are read."""
        with disk_errors(self._folder, ELSEWHERE):
            parts = self._parts() if self._folder.exists() else []
            return [part.path for part in parts if not _is_sound(part)]

    def missing(self, first: int, last: int, step_bytes: int) -> list[range]:
        """The steps from `first` to before `last` that no part holds, in runs that make a part each; a step takes
        `step_bytes`."""
        with disk_errors(self._folder, ELSEWHERE):
            held = {step for part in self._parts() for step in range(part.first, part.last)}
        each = max(1, PART_BYTES // step_bytes)
        runs: list[range] = []
        for step in (step for step in range(first, last) if step not in held):
            if runs and runs[-1].stop == step and len(runs[-1]) < each:
                runs[-1] = range(runs[-1].start, step + 1)
            else:
                runs.append(range(step, step + 1))
        return runs

    def add(self, steps: range, answers: TeacherTopK) -> None:
        """Keep the answers to all rows of these steps, one after another: [steps * R, T, K]."""
        fields = zip(TeacherTopK._fields, answers, strict=True)
        content = safetensors.torch.save({name: kept.cpu().contiguous() for name, kept in fields})
        digest = hashlib.sha256(content).hexdigest()[:32]
        with disk_errors(self._folder, ELSEWHERE, len(content)):
            self._place(f"steps-{steps.start:08d}-{steps.stop:08d}-{digest}.safetensors", content)

    def read(self, step: int, first: int, count: int) -> TeacherTopK:
        """The answers to rows first..first+count of a step.

        Raises:
            CheckpointError: they are not there, or not what was kept.
        """
        with disk_errors(self._folder, ELSEWHERE):
            part, tensors = self._enter(step)
            begin = (step - part.first) * self._rows + first
            return TeacherTopK(*(tensors[name][begin : begin + count].clone() for name in TeacherTopK._fields))

    def _enter(self, step: int) -> tuple[_Part, Mapping[str, torch.Tensor]]:
        """The part that holds a step, in memory: the very bytes whose digest was compared, whatever becomes of the
        file."""
        if self._open is not None and self._open[0].first <= step < self._open[0].last:
            return self._open
        part = next((part for part in self._parts() if part.first <= step < part.last), None)
        if part is None:
            raise CheckpointError(f"{self._folder}: no answers to step {step}: run the same command again to have them")
        try:
            with open_regular(part.path) as file:
                content = file.read()
            if not hashlib.sha256(content).hexdigest().startswith(part.digest):
                raise SafetensorError("its SHA-256 is not that of its name")
            self._open = part, safetensors.torch.load(content)
        except SafetensorError as error:
            raise CheckpointError(
                f"{part.path}: is damaged ({error}): the same command asks the teacher again"
            ) from error
        return self._open

    def _parts(self) -> list[_Part]:
        found = ((_PART.fullmatch(path.name), path) for path in sorted(self._folder.iterdir()))
        return [_Part(int(name[1]), int(name[2]), path, name[3]) for name, path in found if name]

    def _check(self, facts: Facts) -> None:
        try:
            held = json.loads(read_regular(self._folder / FACTS, MAX_FACTS_BYTES))
        except (OSError, ValueError):
            held = None
        if not isinstance(held, dict):
            raise CheckpointError(f"{self._folder / FACTS}: is not what was written: {ELSEWHERE}")
        for name, fact in facts.items():
            if held.get(name) != fact:
                said = _DIFFERS.get(name, f"were asked for with {name} {held.get(name)}, and the recipe says {fact}")
                raise CheckpointError(f"{self._folder}: its answers {said}: {ELSEWHERE}")

    def _place(self, name: str, content: bytes) -> None:
        publish.write_file(self._folder / name, content)


def _is_leftover(path: Path) -> bool:
    """Return whether the name is that of a temporary file, or of a probe of the disk."""
    return bool(publish.TEMPORARY.fullmatch(path.name) or LEFTOVER.fullmatch(path.name))


def _is_sound(part: _Part) -> bool:
    with open_regular(part.path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(part.digest)


def bytes_per_step(settings: TeacherCacheSpec, rows: int, targets: int, vocabulary: int) -> int:
    """What the answers to a step's R rows of T targets take on disk."""
    each = settings.dtype.itemsize
    return rows * targets * (min(settings.top_k, vocabulary) * (id_dtype(vocabulary).itemsize + each) + each)


def id_dtype(vocabulary: int) -> torch.dtype:
    """The shortest integers for the ids of a vocabulary."""
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32
