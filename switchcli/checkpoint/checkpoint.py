"""Checkpoints: saved whole or not at all, verified before use, the one before taken when the newest is damaged.

    checkpoints/step-00001000/
      model-00000.safetensors ...       whole logical tensors (see tensor_names.py), at most 2 GiB a file
      optimizer-00000.safetensors ...
      recipe.yaml tokenizer.json state.json ...     the documents given
      MANIFEST

Any file of a group may hold any of its tensors: readers go by the headers, so several writers, each with tensors of its
own, are as good as one with all. A save goes to `.tmp-<step>-<unique>`; every file is synced, read back and verified;
then the manifest is, then the folder; then it is renamed. What bears the name `step-<step>` has thus been
verified: that is why it comes before the rename, and nothing good is ever displaced by something bad. Hidden names are
leftovers of a kill when found: `.tmp-`, `.old-` (a checkpoint that a second save of its step was to replace), `.del-`
(about to be removed).

Only the process that holds the run's lock may save, prune or call `latest`; readers beside it use `find`.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Final, Literal, final

from torch import Tensor

from switchcli import publish
from switchcli.checkpoint import manifest as manifests
from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.fsops import DISK, FileOperations
from switchcli.checkpoint.manifest import DamagedError, Entry, Manifest
from switchcli.checkpoint.saved_state import SavedState
from switchcli.checkpoint.tensor_names import expert_numbers
from switchcli.errors import CheckpointError, disk_errors

TensorGroup = Literal["model", "optimizer"]

STEP: Final = re.compile(r"step-[0-9]{8,}")
"""Names that a checkpoint of that very step alone may bear."""
_UNIQUE: Final = "[0-9a-f]{8}"
_REPLACED: Final = re.compile(rf"\.old-([0-9]{{8,}})-{_UNIQUE}")
LEFTOVER: Final = re.compile(rf"\.(tmp-(probe|[0-9]{{8,}})|old-[0-9]{{8,}}|del-step-[0-9]{{8,}})-{_UNIQUE}")
"""The hidden names that a save, a probe or a removal gives to folders: nothing of another name is removed."""
_MAX_FILE_BYTES: Final = 1 << 31
UNIQUE_BITS: Final = 32
_WAY_OUT: Final = "use the recipe.yaml saved with the checkpoint, or give another folder by --out to start again."
_ELSEWHERE: Final = "give another folder by --out; checkpoints already saved are untouched."


@final
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was verified when it was opened."""

    path: Path
    step: int
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verified: bool = False) -> "Checkpoint":
        """Read the folder through. Raises DamagedError (a CheckpointError) when a byte differs from what was saved.

        With `verified` tensors are not read: another process has just done so.
        """
        manifest = manifests.load(path)
        if STEP.fullmatch(path.name) and path.name != _name(manifest.step):
            raise DamagedError(path / manifests.NAME, "step", f"is that of step {manifest.step}")
        if not verified:
            manifest.verify(path)
        _state(path, manifest)
        return cls(path, manifest.step, manifest)

    def document(self, name: str) -> bytes:
        """A document that was given to `save`."""
        return self.manifest.read(self.path, name)

    def tensor_specs(self, group: TensorGroup) -> dict[str, tensor_file.TensorSpec]:
        """Dtype and shape of every tensor of a group, by its logical name; nothing but headers is read."""
        return {name: kind for kinds in self._files(group).values() for name, kind in kinds.items()}

    def read(
        self,
        group: TensorGroup,
        wanted: Mapping[str, Tensor],
        *,
        num_experts: int | None = None,
        some: bool = False,
        way_out: str = _WAY_OUT,
    ) -> Mapping[str, Tensor]:
        """The tensors of a group, on the CPU, under the logical names of `wanted`; each is read when it is asked for.

        `wanted` gives names, dtypes and shapes (tensors on `meta` will do). Nothing is read unless they are exactly the
        checkpoint's: CheckpointError names the first that differs, and `way_out`. With `some` it may hold others too;
        with `num_experts` it must hold so many, whether or not all of them are wanted.
        """
        files = self._files(group)
        held = {name: kind for kinds in files.values() for name, kind in kinds.items() if name in wanted or not some}
        difference = _difference(group, held, wanted, num_experts)
        if difference is not None:
            raise CheckpointError(f"{self.path}: {group}: {difference}: {way_out}")
        places = {key: self.path / name for name, kinds in files.items() for key in kinds}
        return tensor_file.LazyTensors({key: places[key] for key in wanted})

    def _files(self, group: TensorGroup) -> dict[str, dict[str, tensor_file.TensorSpec]]:
        """What each file of a group holds; no tensor twice."""
        files: dict[str, dict[str, tensor_file.TensorSpec]] = {}
        seen: set[str] = set()
        for name in self.manifest.names():
            if name.startswith(f"{group}-") and name.endswith(".safetensors"):
                try:
                    files[name] = tensor_file.read_tensor_specs(self.path / name)
                except ValueError as error:
                    raise DamagedError(self.path / name, "header", str(error)) from error
                if twice := files[name].keys() & seen:
                    raise DamagedError(self.path / name, "header", f"holds {min(twice)}, as another file does")
                seen |= files[name].keys()
        return files


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / _name(step)


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    documents: Mapping[str, bytes],
    files: FileOperations = DISK,
) -> Path:
    """Save a step under `folder`, replacing an earlier save of it, and return the new checkpoint's folder.

    Tensors come under their logical names, of any device; a tied parameter is given once. A mapping that reads them
    when asked will do: it is asked twice, and one file's worth is held at a time. `documents` holds at least
    state.json. Raises CheckpointError when the disk refuses; every checkpoint there was is then still there.
    """
    needed = tensor_file.num_bytes(chain(model.values(), optimizer.values())) + sum(map(len, documents.values()))
    saving = CheckpointWriter(folder, step, secrets.randbits(UNIQUE_BITS), needed, files)
    try:
        saving.begin()
        return saving.finish(saving.write(encode_files(model, optimizer)), documents)
    finally:
        saving.clean_up()


def encode_files(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], part: int = 0, parts: int = 1
) -> Iterator[tuple[str, memoryview]]:
    """Name and content of each file of tensors, a copy made when it is asked for: part `part` of a save in `parts`."""
    groups: dict[TensorGroup, Mapping[str, Tensor]] = {"model": model, "optimizer": optimizer}
    for group, named in groups.items():
        for number, shard in enumerate(tensor_file.group_by_bytes(named, _MAX_FILE_BYTES)):
            yield f"{group}-{part + parts * number:05d}.safetensors", tensor_file.encode(shard)


@final
class CheckpointWriter:
    """A save of a step by one process, or by several, each with tensors of its own: `save` is all its parts in order.

    Its methods raise a CheckpointError when the disk refuses.
    """

    def __init__(self, folder: Path, step: int, unique: int, num_bytes: int, files: FileOperations = DISK) -> None:
        """`unique` is a number of `UNIQUE_BITS`, the same in all processes, that no other save of the folder has.

        `num_bytes` are those of the whole checkpoint.
        """
        self._folder, self._step, self._num_bytes, self._files = folder, step, num_bytes, files
        self._unique = f"{unique:08x}"
        self._temporary = folder / f".tmp-{step:08d}-{self._unique}"

    def begin(self) -> None:
        """Make the folder that is written to: one process, before any other goes on."""
        with self._refusals():
            publish.check_folder(self._folder)
            publish.check_folder(checkpoint_path(self._folder, self._step))
            self._files.make_dir(self._folder)
            self._files.sync(self._folder.parent)
            self._files.make_dir(self._temporary)

    def write(self, contents: Iterable[tuple[str, memoryview]]) -> list[Entry]:
        """Write and verify these files (`encoded`), which no other process has."""
        with self._refusals():
            entries = [_write(self._temporary / name, content, self._files) for name, content in contents]
            Manifest(self._step, tuple(entries)).verify(self._temporary)
        return entries

    def finish(self, entries: Sequence[Entry], documents: Mapping[str, bytes]) -> Path:
        """Make a checkpoint of the files that all processes wrote and these documents: one process, the last step."""
        assert "state.json" in documents
        files, final_path = self._files, checkpoint_path(self._folder, self._step)
        with self._refusals():
            written = [_write(self._temporary / name, content, files) for name, content in documents.items()]
            Manifest(self._step, tuple(written)).verify(self._temporary)
            manifest = Manifest(self._step, tuple(sorted([*entries, *written], key=lambda entry: entry.name)))
            _write(self._temporary / manifests.NAME, manifest.encode(), files)
            files.sync(self._temporary)
            manifest.check_sizes(self._temporary)
            Checkpoint.open(self._temporary, verified=True)
            if final_path.exists():
                files.rename(final_path, self._folder / f".old-{self._step:08d}-{self._unique}")
            files.rename(self._temporary, final_path)
            files.sync(self._folder)
        return final_path

    def _refusals(self) -> AbstractContextManager[None]:
        return disk_errors(self._folder, _ELSEWHERE, self._num_bytes)

    def clean_up(self) -> None:
        """After `finish`, or a failure: what was replaced comes back if need be, what is left over goes.

        A disk that refuses this too leaves it to `latest`. One process, when no other writes any more.
        """
        with suppress(OSError):
            _sweep(self._folder, self._files)


def latest(folder: Path, warn: Callable[[str], None], *, files: FileOperations = DISK) -> Checkpoint | None:
    """The newest checkpoint that verifies, to go on from; None when nothing was ever saved here.

    Leftovers of killed saves are removed. A damaged checkpoint is renamed to `step-N.bad-<why>`, with a warning, and
    the one before it is tried; CheckpointError when none is left: no run starts from scratch over what was saved.
    """

    def put_aside(path: Path, damage: DamagedError) -> None:
        aside = _free_name(path.with_name(f"{path.name}.bad-{damage.why}"))
        files.rename(path, aside)
        files.sync(folder)
        warn(f"{damage} It is now {aside.name}; the one before it is tried.")

    with disk_errors(folder, _ELSEWHERE):
        publish.check_folder(folder)
        _sweep(folder, files)
        return _newest(folder, put_aside)


def latest_read_only(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """As `latest`, for a reader while a run may be at work in the folder: nothing is renamed or removed."""
    with disk_errors(folder, _ELSEWHERE):
        return _newest(folder, lambda path, damage: warn(f"{damage} The one before it is tried."))


def verify_all(paths: Iterable[Path]) -> Iterator[tuple[Path, Checkpoint | DamagedError]]:
    """Each of these checkpoints, read through when it is asked for, or what is wrong with it."""
    for path in paths:
        try:
            yield path, Checkpoint.open(path)
        except DamagedError as damage:
            yield path, damage


def prune(folder: Path, keep_last: int, *, keep_best: bool, files: FileOperations = DISK) -> None:
    """Remove all but the last `keep_last` (>= 1) checkpoints and, if asked, the best by each figure of its own step.

    Two is the recipe's default: with one, damage to the newest leaves nothing to go back to. Checkpoints whose manifest
    or state.json is damaged are not counted and stay, as do `.bad-` ones; tensors are not read here, for time.
    """
    assert keep_last >= 1
    with disk_errors(folder, _ELSEWHERE):
        publish.check_folder(folder)
        figures: dict[Path, Mapping[str, float]] = {}
        for path in saved_checkpoints(folder):
            with suppress(CheckpointError):
                figures[path] = _state(path, manifests.load(path)).metrics_at_step()
        best: dict[str, Path] = {}
        for path, own in figures.items():
            for name, figure in own.items():
                if name not in best or figure > figures[best[name]][name]:  # the newest of equals
                    best[name] = path
        keep = {*list(figures)[:keep_last], *(best.values() if keep_best else ())}
        for path in figures:
            if path not in keep and publish.is_folder(path):
                files.rename(path, path.with_name(f".del-{path.name}-{secrets.token_hex(4)}"))
        _sweep(folder, files)


def preflight(folder: Path, bytes_needed: int, elsewhere: str = _ELSEWHERE, *, files: FileOperations = DISK) -> None:
    """Check before training that `folder` can be written to and its disk has this much room. Raises CheckpointError."""
    probe = folder / f".tmp-probe-{secrets.token_hex(4)}"
    with disk_errors(folder, elsewhere, bytes_needed):
        publish.check_folder(folder)
        files.make_dir(probe)
        try:
            if shutil.disk_usage(folder).free < bytes_needed:
                raise OSError(errno.ENOSPC, "not enough space")
        finally:
            files.remove_tree(probe)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by name alone, newest first."""
    if not folder.exists():
        return []
    found = (path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.exists())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _newest(folder: Path, damaged: Callable[[Path, DamagedError], None]) -> Checkpoint | None:
    """The newest that verifies; `damaged` is told of each before it that does not."""
    for path, found in verify_all(saved_checkpoints(folder)):
        if isinstance(found, Checkpoint):
            return found
        if not path.exists():  # the run has just pruned it, so there are newer ones
            return _newest(folder, damaged)
        damaged(path, found)
    if names := sorted(path.name for path in folder.glob("step-*")):
        raise CheckpointError(
            f"{folder}: none of the {len(names)} checkpoints verifies ({', '.join(names)}): "
            "restore one of them, or give another folder by --out to start again."
        )
    return None


def _state(path: Path, manifest: Manifest) -> SavedState:
    try:
        state = SavedState.read(manifest.read(path, "state.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(path / "state.json", "state", "is no state of a run") from error
    if state.step != manifest.step:
        raise DamagedError(path / "state.json", "state", f"is that of step {state.step}")
    return state


def _write(path: Path, content: bytes | memoryview, files: FileOperations) -> Entry:
    """Write and sync a file. The digest is of the bytes in memory, so that it vouches for the way to the disk too."""
    files.write(path, content)
    files.sync(path)
    return Entry(path.name, len(content), sha256(content).hexdigest())


def _sweep(folder: Path, files: FileOperations) -> None:
    """Undo what a kill left: a checkpoint that its successor has not replaced yet comes back, the rest goes.

    Folders with names of the exact form alone: no links, and nothing in a folder that is a link itself.
    """
    if not publish.is_folder(folder):
        return
    for path in leftovers(folder):
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not os.path.lexists(successor := folder / f"step-{replaced[1]}"):
            files.rename(path, successor)
    found = leftovers(folder)
    if found:
        files.sync(folder)  # a power cut must not take a successor that has just been renamed, and what it replaced
    for path in found:
        files.remove_tree(path)


def leftovers(folder: Path) -> list[Path]:
    """The folders that a killed save, probe or removal left."""
    return sorted(path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name) and publish.is_folder(path))


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{f'-{number}' if number else ''}") for number in range(10_000))
    return next(name for name in names if not os.path.lexists(name))


def _difference(
    group: TensorGroup,
    held: Mapping[str, tensor_file.TensorSpec],
    wanted: Mapping[str, Tensor],
    num_experts: int | None,
) -> str | None:
    """The first way in which a checkpoint is not of the model's architecture."""
    have, want = expert_numbers(held), expert_numbers(wanted)
    if want and num_experts is not None:
        elsewhere = {*range(num_experts)}.difference(want)
        held = {name: kind for name, kind in held.items() if elsewhere.isdisjoint(expert_numbers([name]))}
        want = list(range(num_experts))
    if group == "model" and have != want:
        return f"num_experts: the checkpoint has {_experts(have)}, the recipe {_experts(want)}"
    for name, tensor in wanted.items():
        kind = tensor_file.tensor_spec(tensor)
        if held.get(name) != kind:
            have_kind = held.get(name, "nothing of that name")
            return f"{name}: the checkpoint has {have_kind}, the recipe wants {kind}"
    for name in held:
        if name not in wanted:
            return f"{name}: the checkpoint has {held[name]}, the recipe wants nothing of that name"
    return None


def _experts(numbers: list[int]) -> str:
    return f"experts {numbers[0]}..{numbers[-1]}" if numbers else "none"
