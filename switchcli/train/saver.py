"""Saver: a run's weights, optimizer and state to and from its checkpoints, on all ranks alike.

A save is two parts: what it takes from the run, on the main thread, and what it writes, there or in a thread beside it.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Final

import torch

from switchcli.errors import CheckpointError, DistributedError, OtherRankError, RankError
from switchcli.model.moe import experts_here
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.runtime import Runtime
from switchcli.train import checkpoint, logical, manifest, tensor_file
from switchcli.train.evaluate import reduce
from switchcli.train.fsops import DISK, Files
from switchcli.train.optimizer import Optimizer
from switchcli.train.spec import CheckpointSpec
from switchcli.train.state import TrainState

DATA = "data.json"
"""The document that identifies the text, and a teacher: a run goes on with those that it began with, or not at all."""
TEXT = "tokens_sha256"
_LOST_SECONDS: Final = 10
"""How long a save under way is waited for when a rank is lost: what it still has to hear of that one never comes."""

Contents = Iterable[tuple[str, memoryview]]
"""Files by name."""


class Saver:
    """One folder of checkpoints, the same for all ranks. Its methods are called on every rank."""

    def __init__(
        self,
        folder: Path,
        model: SwitchTransformer,
        optimizer: Optimizer,
        runtime: Runtime,
        documents: Mapping[str, bytes],
        settings: CheckpointSpec,
        files: Files = DISK,
    ) -> None:
        """`model` is the plain one; `documents` (recipe, tokenizer, `DATA`) make a checkpoint whole by itself."""
        self._folder = folder
        self._model = model
        self._optimizer = optimizer
        self._runtime = runtime
        self._documents = documents
        self._settings = settings
        self._files = files
        self._thread = ThreadPoolExecutor(1, "save")
        self._under_way: Future[None] | None = None
        self._failed: Callable[[], None] = lambda: None

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state.step`, each rank its share, and remove those that need not be kept.

        With `checkpoint.background` it is copied here and written while training goes on, once the one before it is
        done: see `wait`. What any other end leaves behind is removed by the next save, or the next start.

        Raises:
            CheckpointError: the disk refuses this rank; RankError: another one. Off the main rank: OtherRankError.
        """
        self.wait()
        runtime = self._runtime
        documents = {**self._documents, "state.json": state.to_json(reduce(state.window, runtime))}
        model, optimizer = self._share(logical_tensors(self._model)), self._share(self._slots())
        own = [
            secrets.randbits(checkpoint.UNIQUE_BITS) if runtime.is_main else 0,
            tensor_file.num_bytes([*model.values(), *optimizer.values()]),
        ]
        unique, size = runtime.sum_over_ranks(own)
        size += sum(map(len, documents.values()))
        saving = checkpoint.Saving(self._folder, state.step, unique, size, self._files)
        contents = checkpoint.encoded(model, optimizer, runtime.rank, runtime.world)
        if self._settings.background:
            self._under_way = self._thread.submit(self._write_beside, saving, list(contents), documents)
        else:
            self._write(saving, contents, documents)

    def wait(self) -> None:
        """Return when no save is under way. Raises what `save` would have raised for the last one, had it waited."""
        last, self._under_way = self._under_way, None
        if last is not None:
            last.result()

    @contextmanager
    def beside_training(self, failed: Callable[[], None], warn: Callable[[str], None]) -> Iterator[None]:
        """Around training: left when no save is under way. `failed` is called, in any thread, as soon as one fails.

        If training fails, the save under way, of a step that was sound, is done all the same, unless a rank is lost.
        """
        self._failed = failed
        try:
            yield
        except Exception as error:
            last, self._under_way = self._under_way, None
            if last is not None:
                wait([last], _LOST_SECONDS if isinstance(error, DistributedError) else None)
                failure = last.exception(0) if last.done() else None
                if failure is not None and not isinstance(failure, (OtherRankError, DistributedError)):
                    warn(f"the save under way failed as well: {failure}")
            raise
        self.wait()

    def _write_beside(self, saving: checkpoint.Saving, contents: Contents, documents: Mapping[str, bytes]) -> None:
        try:
            self._write(saving, contents, documents)
        except BaseException:
            self._failed()
            raise

    def _write(self, saving: checkpoint.Saving, contents: Contents, documents: Mapping[str, bytes]) -> None:
        """All that a save does to the disk, and says to other ranks over a group of its own: in any one thread."""
        ranks, settings = self._runtime.saving, self._settings
        try:
            ranks.on_main(saving.begin)
            entries = ranks.on_every(lambda: saving.write(contents))
            everything = [
                manifest.Entry(*entry)
                for one in ranks.gather(json.dumps([astuple(entry) for entry in entries]))
                for entry in json.loads(one)
            ]
            ranks.on_main(lambda: saving.finish(everything, documents))
        except (CheckpointError, RankError):  # on the main rank, when no other writes any more
            saving.clear()
            raise
        keep_last, keep_best = settings.keep_last, settings.keep_best
        ranks.on_main(lambda: checkpoint.prune(self._folder, keep_last, keep_best=keep_best, files=self._files))

    def _slots(self) -> dict[str, torch.Tensor]:
        return logical.split(self._optimizer.state(), experts_here(self._model))

    def _share(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this rank writes of what it holds: with those that hold the same tensors it takes turns."""
        return {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if self._runtime.is_turn(number, of_expert=bool(logical.expert_numbers([name])))
        }

    def restore(self, state: TrainState, warn: Callable[[str], None]) -> bool:
        """Take weights, optimizer and `state` from the newest sound checkpoint; False when there is none.

        Raises:
            CheckpointError: the checkpoint is of another architecture, optimizer or text.
        """
        newest = self._runtime.on_main(lambda: checkpoint.latest(self._folder, warn))
        step = self._runtime.from_main(-1 if newest is None else newest.step)
        if step < 0:
            return False
        found = newest or checkpoint.Checkpoint.open(checkpoint.path(self._folder, step), verified=True)
        before, now = (json.loads(document) for document in (found.document(DATA), self._documents[DATA]))
        if before != now:
            what = "on other text" if before.get(TEXT) != now[TEXT] else "by another teacher"
            raise CheckpointError(
                f"{found.path} was trained {what} than the recipe gives now: bring that back, give another folder by "
                "--out, or --no-resume to set this run aside and begin anew"
            )
        experts = self._model.spec.num_experts
        fill(self._model, found.read("model", logical_tensors(self._model), num_experts=experts))
        slots = found.read("optimizer", self._slots(), num_experts=experts)
        self._optimizer.load(logical.join(slots, experts_here(self._model)))
        state.restore(found.document("state.json"), self._runtime.device, with_window=self._runtime.is_main)
        return True


def preflight(
    folder: Path,
    model: SwitchTransformer,
    optimizer: Optimizer,
    runtime: Runtime,
    settings: CheckpointSpec,
    num_figures: int = 1,
) -> None:
    """Raise a CheckpointError now if the disk will not hold what the run keeps, and one more being written.

    `num_figures` is how many an evaluation notes: as many checkpoints may be best.
    """
    experts = experts_here(model)
    elsewhere = model.spec.num_experts // len(experts)  # times as many expert weights as are here
    tensors = {**logical_tensors(model), **logical.split(optimizer.state(), experts)}
    one = sum(
        tensor_file.num_bytes([tensor]) * (elsewhere if logical.expert_numbers([name]) else 1)
        for name, tensor in tensors.items()
    )
    here = sum(path.is_dir() for path in folder.glob("step-*"))
    kept = settings.keep_last + settings.keep_best * num_figures
    runtime.on_main(lambda: checkpoint.preflight(folder, one * max(1, kept + 1 - here)))


def carry_over(optimizer: Optimizer, found: checkpoint.Checkpoint, experts: range) -> None:
    """Fill the optimizer of a run that begins with the weights of `found` from the optimizer's state there.

    The checkpoint may hold the state of more parameters than learn now, and of more `experts` than are here.

    Raises:
        CheckpointError: it has no such state, or that of another optimizer.
    """
    held, slots = found.kinds("optimizer"), logical.split(optimizer.state(), experts)
    way_out = "start.optimizer=reset begins with a new one, or take the optimizer of the checkpoint's recipe.yaml."
    if not held:
        raise CheckpointError(f"{found.path}: holds no optimizer state: start.optimizer=reset begins with a new one.")
    if not held.keys() & slots.keys():
        raise CheckpointError(f"{found.path}: its optimizer is of another kind than the recipe's: {way_out}")
    optimizer.load(logical.join(found.read("optimizer", slots, some=True, way_out=way_out), experts))


@torch.no_grad()
def fill(model: SwitchTransformer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the model's weights, in place, from tensors under their logical names, one after another."""
    for name, tensor in logical_tensors(model).items():
        tensor.copy_(tensors[name])


def logical_tensors(model: SwitchTransformer) -> dict[str, torch.Tensor]:
    """The weights of the model that are here, under their logical names, as views."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return logical.split(named, experts_here(model))
