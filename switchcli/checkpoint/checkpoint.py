"""Checkpoints: saved complete or not at all, verified before use, with fallback to the one before a damaged one.

    checkpoints/step-00001000/
      model-00000.safetensors ...       full logical tensors (see tensor_names.py), at most 2 GiB a file
      optimizer-00000.safetensors ...
      recipe.yaml tokenizer.json state.json ...     documents passed to `save`
      MANIFEST

Any file of a tensor group may hold any of its tensors: readers go by the headers. Several writers, each with tensors of
its own, therefore produce a checkpoint that is equivalent to one by a single writer.

A save writes to `.tmp-<step>-<unique>`. It syncs every file, reads it back and verifies it, then the manifest, then the
folder, and last it renames the folder to `step-<step>`. As verification comes before the rename, every folder with that
name has been verified, and a good checkpoint is never replaced by a bad one. Hidden names are leftovers of a killed
process: `.tmp-`, `.old-` (a checkpoint that a second save of its step was to replace), `.del-` (about to be removed).

Only the process that holds the run's lock may save, prune or call `latest`. Other readers use `latest_read_only`.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Final, Literal, final

from torch import Tensor

from switchcli.checkpoint import manifest as manifests
from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.manifest import DamagedError, Entry, Manifest
from switchcli.checkpoint.saved_state import SavedState
from switchcli.checkpoint.tensor_names import expert_numbers
from switchcli.errors import CheckpointError, disk_errors
from switchcli.system import publish

TensorGroup = Literal["model", "optimizer"]

STEP: Final = re.compile(r"step-[0-9]{8,}")
"""Folder names that are reserved for the checkpoint of that step."""
_UNIQUE: Final = "[0-9a-f]{8}"
_REPLACED: Final = re.compile(rf"\.old-([0-9]{{8,}})-{_UNIQUE}")
LEFTOVER: Final = re.compile(rf"\.(tmp-(probe|[0-9]{{8,}})|old-[0-9]{{8,}}|del-step-[0-9]{{8,}})-{_UNIQUE}")
"""Hidden names that a save, a probe or a removal gives to folders. Folders with other names are never removed."""
_MAX_FILE_BYTES: Final = 1 << 31
UNIQUE_BITS: Final = 32
_START_AGAIN: Final = "give another folder by --out to start again"
_FIX: Final = f"use the recipe.yaml saved with the checkpoint, or {_START_AGAIN}."
_ALTERNATIVE: Final = "give another folder by --out; checkpoints already saved are untouched."


@final
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified when it was opened."""

    path: Path
    step: int
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verified: bool = False) -> "Checkpoint":
        """Verify the files in a folder. Raises DamagedError (a CheckpointError) if a byte differs from what was saved.

        With `verified`, tensor files are not read, because another process has just verified them.
        """
        manifest = manifests.load(path)
        if STEP.fullmatch(path.name) and path.name != _folder_name(manifest.step):
            raise DamagedError(path / manifests.NAME, "step", f"is that of step {manifest.step}")
        if not verified:
            manifest.verify(path)
        _read_state(path, manifest)
        return cls(path, manifest.step, manifest)

    def document(self, name: str) -> bytes:
        """Return the content of a document that was passed to `save`."""
        return self.manifest.read(self.path, name)

    def tensor_specs(self, group: TensorGroup) -> dict[str, tensor_file.TensorSpec]:
        """Return dtype and shape of every tensor of a group by its logical name. Only headers are read."""
        return {name: spec for name, (_, spec) in self._tensors(group).items()}

    def read(
        self,
        group: TensorGroup,
        expected: Mapping[str, Tensor],
        *,
        num_experts: int | None = None,
        allow_extra: bool = False,
        fix: str = _FIX,
    ) -> Mapping[str, Tensor]:
        """Return the tensors of a group under the logical names of `expected`, on the CPU. Each is read on access.

        `expected` gives names, dtypes and shapes; its tensors may be on `meta`. Raises CheckpointError, with `fix`, for
        the first tensor that is missing, extra, or of another dtype or shape. With `allow_extra`, the checkpoint may
        hold other tensors too. With `num_experts`, it must hold that many experts, even if `expected` names only some
        of them.
        """
        tensors = self._tensors(group)
        specs = {name: spec for name, (_, spec) in tensors.items() if name in expected or not allow_extra}
        mismatch = _first_mismatch(group, specs, expected, num_experts)
        if mismatch is not None:
            raise CheckpointError(f"{self.path}: {group}: {mismatch}: {fix}")
        return tensor_file.LazyTensors({name: tensors[name][0] for name in expected})

    def _tensors(self, group: TensorGroup) -> dict[str, tuple[Path, tensor_file.TensorSpec]]:
        """Return the file, dtype and shape of every tensor of a group. Raises DamagedError if two files hold one."""
        tensors: dict[str, tuple[Path, tensor_file.TensorSpec]] = {}
        for name in self.manifest.names():
            if name.startswith(f"{group}-") and name.endswith(".safetensors"):
                path = self.path / name
                try:
                    specs = tensor_file.read_tensor_specs(path)
                except ValueError as error:
                    raise DamagedError(path, "header", str(error)) from error
                if duplicates := specs.keys() & tensors.keys():
                    raise DamagedError(path, "header", f"holds {min(duplicates)}, as another file does")
                tensors |= {tensor: (path, spec) for tensor, spec in specs.items()}
        return tensors


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step, which need not exist."""
    return folder / _folder_name(step)


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    documents: Mapping[str, bytes],
) -> Path:
    """Save a step under `folder`, replacing an earlier save of it, and return the new checkpoint's folder.

    Tensors have their logical names and may be on any device; a tied parameter is given once. The mappings may be lazy:
    each tensor is read twice, and the tensors of one file are in memory at a time. `documents` holds at least
    state.json. Raises CheckpointError when the disk refuses; all earlier checkpoints then still exist.
    """
    num_bytes = tensor_file.num_bytes(chain(model.values(), optimizer.values())) + sum(map(len, documents.values()))
    writer = CheckpointWriter(folder, step, secrets.randbits(UNIQUE_BITS), num_bytes)
    try:
        writer.begin()
        return writer.finish(writer.write(encode_files(model, optimizer)), documents)
    finally:
        writer.clean_up()


def encode_files(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[str, memoryview]]:
    """Yield name and content of each tensor file that `rank` writes. The content is a copy, made when it is reached.

    Ranks number their files rank, rank + num_ranks, rank + 2 * num_ranks, ..., so that names differ.
    """
    groups: dict[TensorGroup, Mapping[str, Tensor]] = {"model": model, "optimizer": optimizer}
    for group, tensors in groups.items():
        for number, shard in enumerate(tensor_file.group_by_bytes(tensors, _MAX_FILE_BYTES)):
            yield f"{group}-{rank + num_ranks * number:05d}.safetensors", tensor_file.encode(shard)


@final
class CheckpointWriter:
    """The save of one step by one process, or by several that each write other tensors.

    One process calls `begin`; then all call `write`; then one calls `finish` and `clean_up`. `save` does all four.
    Every method raises CheckpointError when the disk refuses.
    """

    def __init__(self, folder: Path, step: int, unique: int, num_bytes: int) -> None:
        """`unique` is a random number of `UNIQUE_BITS` bits, the same in all processes, that no other save has.

        `num_bytes` is the size of the complete checkpoint.
        """
        self._folder, self._step, self._num_bytes = folder, step, num_bytes
        self._unique = f"{unique:08x}"
        self._temporary = folder / f".tmp-{step:08d}-{self._unique}"

    def begin(self) -> None:
        """Make the temporary folder."""
        with self._disk_errors():
            publish.check_folder(self._folder)
            publish.check_folder(checkpoint_path(self._folder, self._step))
            publish.make_folder(self._folder)
            publish.sync(self._folder.parent)
            publish.make_folder(self._temporary)

    def write(self, contents: Iterable[tuple[str, memoryview]]) -> list[Entry]:
        """Write and verify the files of this process, as `encode_files` yields them, and return their entries."""
        with self._disk_errors():
            entries = [_write(self._temporary / name, content) for name, content in contents]
            Manifest(self._step, tuple(entries)).verify(self._temporary)
        return entries

    def finish(self, entries: Sequence[Entry], documents: Mapping[str, bytes]) -> Path:
        """Add the documents and a manifest of all files, publish the checkpoint, and return its folder.

        `entries` are those of all processes.
        """
        assert "state.json" in documents
        final_path = checkpoint_path(self._folder, self._step)
        with self._disk_errors():
            written = [_write(self._temporary / name, content) for name, content in documents.items()]
            Manifest(self._step, tuple(written)).verify(self._temporary)
            manifest = Manifest(self._step, tuple(sorted([*entries, *written], key=lambda entry: entry.name)))
            _write(self._temporary / manifests.NAME, manifest.encode())
            publish.sync(self._temporary)
            manifest.check_sizes(self._temporary)
            Checkpoint.open(self._temporary, verified=True)
            if final_path.exists():
                final_path.rename(self._folder / f".old-{self._step:08d}-{self._unique}")
            self._temporary.rename(final_path)
            publish.sync(self._folder)
        return final_path

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self._folder, _ALTERNATIVE, self._num_bytes)

    def clean_up(self) -> None:
        """Restore a checkpoint that was not replaced and remove leftovers, after `finish` or after a failure.

        Call it when no process writes any more. If the disk refuses, `latest` does it later.
        """
        with suppress(OSError):
            _clean_up(self._folder)


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None if nothing was ever saved here.

    Leftovers of killed saves are removed. A damaged checkpoint is renamed to `step-N.bad-<why>`, with a warning, and
    the one before it is tried. Raises CheckpointError if none is left: a run never starts from scratch over saved work.
    """

    def rename_damaged(path: Path, damage: DamagedError) -> None:
        renamed = path.with_name(f"{path.name}.bad-{damage.why}")
        renamed = publish.free_name(renamed) if os.path.lexists(renamed) else renamed
        path.rename(renamed)
        publish.sync(folder)
        warn(f"{damage} It is now {renamed.name}; the one before it is tried.")

    recover(folder)
    with disk_errors(folder, _ALTERNATIVE):
        return _newest(folder, rename_damaged)


def recover(folder: Path) -> None:
    """Finish what a killed save began: restore a checkpoint that was not replaced, and remove leftovers."""
    with disk_errors(folder, _ALTERNATIVE):
        publish.check_folder(folder)
        _clean_up(folder)


def latest_read_only(folder: Path, warn: Callable[[str], None], alternative: str = _START_AGAIN) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, like `latest`, but without renaming or removing anything.

    A run may be saving to the folder and pruning it meanwhile. `alternative` is the second fix that errors offer.
    """
    with disk_errors(folder, alternative):
        return _newest(folder, lambda path, damage: warn(f"{damage} The one before it is tried."), alternative)


def verify_all(paths: Iterable[Path]) -> Iterator[tuple[Path, Checkpoint | DamagedError]]:
    """Yield each path with its checkpoint, or with the damage. A checkpoint is read when it is reached."""
    for path in paths:
        try:
            yield path, Checkpoint.open(path)
        except DamagedError as damage:
            yield path, damage


def prune(folder: Path, keep_last: int, keep_steps: Collection[int] = (), *, keep_best: bool) -> None:
    """Remove all checkpoints but the last `keep_last` (>= 1), those of `keep_steps` and, with `keep_best`, the best by
    each metric.

    A checkpoint counts for a metric only if that was evaluated at its step. The recipe keeps two by default: with one,
    damage to the newest would leave nothing to fall back to. Checkpoints with a damaged manifest or state.json are not
    counted and stay, as do `.bad-` folders. Tensors are not verified here, to save time.
    """
    assert keep_last >= 1
    with disk_errors(folder, _ALTERNATIVE):
        publish.check_folder(folder)
        metrics_of: dict[Path, Mapping[str, float]] = {}
        for path in saved_checkpoints(folder):
            with suppress(CheckpointError):
                metrics_of[path] = _read_state(path, manifests.load(path)).metrics_at_step()
        best: dict[str, Path] = {}
        for path, metrics in metrics_of.items():
            for name, value in metrics.items():
                # Newest first: of equal values the newest is kept.
                if name not in best or value > metrics_of[best[name]][name]:
                    best[name] = path
        keep = {*list(metrics_of)[:keep_last], *(best.values() if keep_best else ())}
        keep |= {checkpoint_path(folder, step) for step in keep_steps}
        for path in metrics_of:
            if path not in keep and publish.is_folder(path):
                path.rename(path.with_name(f".del-{path.name}-{secrets.token_hex(4)}"))
        _clean_up(folder)


def preflight(folder: Path, bytes_needed: int, alternative: str = _ALTERNATIVE) -> None:
    """Raise CheckpointError, before training, if `folder` cannot be written to or its disk lacks `bytes_needed`."""
    probe = folder / f".tmp-probe-{secrets.token_hex(4)}"
    with disk_errors(folder, alternative, bytes_needed):
        publish.check_folder(folder)
        publish.make_folder(probe)
        try:
            if shutil.disk_usage(folder).free < bytes_needed:
                raise OSError(errno.ENOSPC, "not enough space")
        finally:
            publish.remove_tree(probe)
            with suppress(OSError):
                folder.rmdir()  # unless it holds something


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the folders that have the name of a checkpoint, newest first. Nothing is read."""
    if not folder.exists():
        return []
    paths = (path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.exists())
    return sorted(paths, key=_step_of, reverse=True)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of `saved_checkpoints`, newest first."""
    return [*map(_step_of, saved_checkpoints(folder))]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def leftovers(folder: Path) -> list[Path]:
    """Return the folders that a killed save, probe or removal left."""
    return sorted(path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name) and publish.is_folder(path))


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _newest(
    folder: Path, on_damage: Callable[[Path, DamagedError], None], alternative: str = _START_AGAIN
) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, after `on_damage` was called for each newer one that does not."""
    listed = saved_checkpoints(folder)
    for path, checkpoint in verify_all(listed):
        if isinstance(checkpoint, Checkpoint):
            return checkpoint
        if not path.exists():  # the run has just pruned it, so that there are newer ones
            return _newest(folder, on_damage, alternative)
        on_damage(path, checkpoint)
    if not {*listed}.issuperset(saved_checkpoints(folder)):  # a run saves and prunes meanwhile
        return _newest(folder, on_damage, alternative)
    if names := sorted(path.name for path in folder.glob("step-*")):
        raise CheckpointError(
            f"{folder}: none of the {len(names)} checkpoints verifies ({', '.join(names)}): "
            f"restore one of them, or {alternative}"
        )
    return None


def _read_state(path: Path, manifest: Manifest) -> SavedState:
    try:
        state = SavedState.read(manifest.read(path, "state.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(path / "state.json", "state", "is not the state of a run") from error
    if state.step != manifest.step:
        raise DamagedError(path / "state.json", "state", f"is that of step {state.step}")
    return state


def _write(path: Path, content: bytes | memoryview) -> Entry:
    """Write and sync a file. The digest is of the bytes in memory, so that verification covers the write itself."""
    publish.write_new(path, content)
    publish.sync(path)
    return Entry(path.name, len(content), sha256(content).hexdigest())


def _clean_up(folder: Path) -> None:
    """Restore a checkpoint that was moved aside but not replaced, and remove all other leftovers.

    Only folders whose names match exactly are touched: no links, and nothing in a folder that is a link itself.
    """
    if not publish.is_folder(folder):
        return
    for path in leftovers(folder):
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not os.path.lexists(successor := folder / f"step-{replaced[1]}"):
            path.rename(successor)
    remaining = leftovers(folder)
    replaced_checkpoints = [path for path in remaining if _REPLACED.fullmatch(path.name)]
    for path in remaining:
        if path not in replaced_checkpoints:
            publish.remove_tree(path)  # before the sync, which a full disk may refuse
    if replaced_checkpoints:
        # A successor may have just been renamed. Its name must be on disk before the checkpoint that it replaced goes.
        publish.sync(folder)
    for path in replaced_checkpoints:
        publish.remove_tree(path)


def _first_mismatch(
    group: TensorGroup,
    specs: Mapping[str, tensor_file.TensorSpec],
    expected: Mapping[str, Tensor],
    num_experts: int | None,
) -> str | None:
    """Return a description of the first difference between a checkpoint and the recipe's model, or None."""
    experts, expected_experts = expert_numbers(specs), expert_numbers(expected)
    if expected_experts and num_experts is not None:
        # `expected` has this rank's experts: leave out the other ranks' tensors, but require that all experts exist.
        other_experts = {*range(num_experts)}.difference(expected_experts)
        specs = {name: spec for name, spec in specs.items() if other_experts.isdisjoint(expert_numbers([name]))}
        expected_experts = list(range(num_experts))
    if group == "model" and experts != expected_experts:
        return f"num_experts: the checkpoint has {_experts(experts)}, the recipe {_experts(expected_experts)}"
    for name, tensor in expected.items():
        expected_spec = tensor_file.tensor_spec(tensor)
        if specs.get(name) != expected_spec:
            spec = specs.get(name, "nothing of that name")
            return f"{name}: the checkpoint has {spec}, the recipe wants {expected_spec}"
    for name, spec in specs.items():
        if name not in expected:
            return f"{name}: the checkpoint has {spec}, the recipe wants nothing of that name"
    return None


def _experts(numbers: list[int]) -> str:
    return f"experts {numbers[0]}..{numbers[-1]}" if numbers else "none"
