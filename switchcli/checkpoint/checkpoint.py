"""Checkpoints: saved complete or not at all, and verified when they are opened.

    checkpoints/step-00001000/
      model-00000.safetensors ...       full logical tensors (see tensor_names.py), at most 2 GiB a file
      optimizer-00000.safetensors ...
      recipe.yaml tokenizer.json state.json ...     documents passed to `save`
      MANIFEST                          SHA-256 sums of these files

Any file of a tensor group may hold any of its tensors: readers go by the headers. Several writers, each with tensors of
its own, therefore produce a checkpoint that is equivalent to one by a single writer.

A save writes to a temporary folder and syncs every file, then the manifest, then the folder, and last it renames the
folder to `step-<step>` (see system/publish.py). Only the process that holds the run's lock may save, prune or call
`recover`.
"""

import errno
import json
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from switchcli.distributed.collectives import ONE_RANK, HostGroup
from switchcli.errors import CheckpointError, RankError, disk_errors
from switchcli.system import publish

TensorGroup = Literal["model", "optimizer"]

STEP: Final = re.compile(r"step-[0-9]{8,}")
"""Folder names that are reserved for the checkpoint of that step."""
_MAX_FILE_BYTES: Final = 1 << 31
_START_AGAIN: Final = "give another folder by --out to start again"
_FIX: Final = f"use the recipe.yaml saved with the checkpoint, or {_START_AGAIN}."
_ALTERNATIVE: Final = "give another folder by --out; checkpoints already saved are untouched."


@final
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified when it was opened."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """The optimizer steps that were taken."""
        return self.manifest.step

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "Checkpoint":
        """Verify the files in a folder, unless another rank has done so.

        Raises DamagedError (a CheckpointError) if one differs from what was saved.
        """
        manifest = manifests.load(path)
        if STEP.fullmatch(path.name) and path.name != _folder_name(manifest.step):
            raise DamagedError(path / manifests.NAME, f"is that of step {manifest.step}")
        if verify:
            manifest.verify(path)
        _read_state(path, manifest)
        return cls(path, manifest)

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
                    raise DamagedError(path, str(error)) from error
                if duplicates := specs.keys() & tensors.keys():
                    raise DamagedError(path, f"holds {min(duplicates)}, as another file does")
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
    ranks: HostGroup = ONE_RANK,
) -> Path:
    """Save a step under `folder`, replacing an earlier save of it, and return the new checkpoint's folder. Collective.

    Each rank gives tensors of its own, under their logical names; a tied parameter is given once. They may be on any
    device. The mappings may be lazy: each tensor is read twice, and the tensors of one file are in memory at a time.
    `documents` holds at least state.json.

    Raises CheckpointError when the disk refuses, and RankError or OtherRankError when it refuses on another rank. All
    earlier checkpoints then still exist.
    """
    assert "state.json" in documents
    (num_bytes,) = ranks.sum([tensor_file.num_bytes(chain(model.values(), optimizer.values()))])
    num_bytes += sum(map(len, documents.values()))
    path = checkpoint_path(folder, step)
    temporary = publish.temporary_path(path, ranks.all_gather_text(secrets.token_hex(8))[0])  # the main rank's
    built = temporary / "new"
    refused = disk_errors(folder, _ALTERNATIVE, num_bytes)

    @refused
    def begin() -> None:
        publish.check_folder(folder)
        publish.check_folder(path)
        publish.make_folder(folder)
        publish.sync(folder.parent)
        publish.make_folder(built)

    @refused
    def write(files: Iterable[tuple[str, bytes | memoryview]]) -> list[Entry]:
        entries = []
        for name, content in files:
            publish.write_new(built / name, content)
            entries.append(Entry(bytes=len(content), name=name, sha256=sha256(content).hexdigest()))
        return entries

    @refused
    def finish(entries: Sequence[Entry]) -> None:
        manifest = Manifest(files=tuple(sorted(entries, key=lambda file: file.name)), step=step)
        write([(manifests.NAME, manifest.encode())])
        publish.sync(built)
        publish.replace_folder(built, path)
        publish.remove_temporary(temporary)

    try:
        ranks.main_only(begin)
        written = ranks.on_all_ranks(lambda: write(encode_files(model, optimizer, ranks.rank, ranks.size)))
        texts = ranks.all_gather_text(json.dumps([file.model_dump() for file in written]))
        entries = [Entry(**file) for text in texts for file in json.loads(text)]
        ranks.main_only(lambda: finish([*entries, *write(documents.items())]))
    except (CheckpointError, RankError):  # raised on the main rank only when all ranks have stopped writing
        publish.remove_temporary(temporary)
        raise
    return path


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


def recover(folder: Path) -> None:
    """Finish what a killed save began: restore a checkpoint that was not replaced, and remove temporary folders."""
    with disk_errors(folder, _ALTERNATIVE):
        publish.check_folder(folder)
        publish.remove_stale_in(folder, age=0)


def newest(folder: Path, warn: Callable[[str], None], alternative: str = _START_AGAIN) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None if nothing was ever saved here. Nothing on disk changes.

    `warn` is told of each damaged checkpoint, in one line, and the one before it is tried. A run may be saving to the
    folder and pruning it meanwhile.

    Raises CheckpointError if all are damaged: a run never starts from scratch over saved work. `alternative` is the
    second fix that errors offer.
    """
    with disk_errors(folder, alternative):
        while True:
            listed = saved_checkpoints(folder)
            for path in listed:
                try:
                    return Checkpoint.open(path)
                except DamagedError as damage:
                    if not path.exists():  # the run has just pruned it, so that there are newer ones
                        break
                    warn(f"{damage} The one before it is tried.")
            if listed == saved_checkpoints(folder):
                break
    if listed:
        names = ", ".join(sorted(path.name for path in listed))
        raise CheckpointError(
            f"{folder}: none of the {len(listed)} checkpoints verifies ({names}): restore one of them, or {alternative}"
        )
    return None


def prune(folder: Path, step: int, keep_last: int, keep_steps: Collection[int] = (), *, keep_best: bool) -> None:
    """Remove all checkpoints but the last `keep_last` (>= 1), those of `keep_steps` and, with `keep_best`, the best by
    each metric.

    `step` is that of the checkpoint that was just saved. Checkpoints of later steps, which are damaged, are not counted
    and stay: the run saves those steps again. So do earlier ones with a damaged manifest or state.json; tensors are not
    verified here, to save time. A checkpoint counts for a metric only if that was evaluated at its step. The recipe
    keeps two by default: with one, damage to the newest would leave nothing to fall back to.
    """
    assert keep_last >= 1
    with disk_errors(folder, _ALTERNATIVE):
        publish.check_folder(folder)
        metrics_of: dict[Path, Mapping[str, float]] = {}
        for path in saved_checkpoints(folder):
            with suppress(CheckpointError):
                if _step_of(path) <= step:
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
                shutil.rmtree(path.rename(publish.temporary_path(path)))  # never half of it under its name


def preflight(folder: Path, bytes_needed: int) -> None:
    """Raise CheckpointError, before training, if the disk of `folder`, which need not exist, lacks `bytes_needed`."""
    with disk_errors(folder, _ALTERNATIVE, bytes_needed):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if shutil.disk_usage(existing).free < bytes_needed:
            raise OSError(errno.ENOSPC, "not enough space")


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


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _read_state(path: Path, manifest: Manifest) -> SavedState:
    try:
        state = SavedState.read(manifest.read(path, "state.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(path / "state.json", "is not the state of a run") from error
    if state.step != manifest.step:
        raise DamagedError(path / "state.json", f"is that of step {state.step}")
    return state


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
