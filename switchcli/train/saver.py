"""Saver: a run's weights, optimizer and state to and from its checkpoints, on all ranks alike."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path

import torch

from switchcli.errors import CheckpointError, RankError
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.layout import Part, Weights, here, whole_weights
from switchcli.parallel.runtime import Runtime
from switchcli.train import checkpoint, logical, manifest, tensor_file
from switchcli.train.evaluate import reduce
from switchcli.train.optimizer import Optimizer
from switchcli.train.spec import CheckpointSpec
from switchcli.train.state import TrainState

DATA = "data.json"
"""The document that identifies the text, and a teacher: a run goes on with those that it began with, or not at all."""
TEXT = "tokens_sha256"


class Saver:
    """One folder of checkpoints, the same for all ranks. Its methods are called on every rank."""

    def __init__(
        self,
        folder: Path,
        weights: Weights,
        num_experts: int,
        optimizer: Optimizer,
        runtime: Runtime,
        documents: Mapping[str, bytes],
        settings: CheckpointSpec,
    ) -> None:
        """`num_experts` are those of a layer on all ranks; `documents` (recipe, tokenizer, `DATA`) make a checkpoint
        whole by itself."""
        self._folder = folder
        self._weights = weights
        self._num_experts = num_experts
        self._optimizer = optimizer
        self._runtime = runtime
        self._documents = documents
        self._settings = settings

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state.step`, each rank its share, and remove those that need not be kept.

        What any other end leaves behind is removed by the next save, or the next start.

        Raises:
            CheckpointError: the disk refuses this rank; RankError: another one. Off the main rank: OtherRankError.
        """
        runtime, settings = self._runtime, self._settings
        window = reduce(state.window, runtime)
        (unique,) = runtime.sum_over_ranks([secrets.randbits(checkpoint.UNIQUE_BITS) if runtime.is_main else 0])
        documents = {**self._documents, "state.json": state.to_json(window)}
        model, optimizer = self._share(parts_of(self._weights)), self._share(self._slots())
        (size,) = runtime.sum_over_ranks([tensor_file.num_bytes([*model.values(), *optimizer.values()])])
        saving = checkpoint.Saving(self._folder, state.step, unique, size + sum(map(len, documents.values())))
        try:
            runtime.on_main(saving.begin)
            entries = runtime.on_every(lambda: saving.write(model, optimizer, runtime.rank, runtime.world))
            everything = [
                manifest.Entry(*entry)
                for one in runtime.gather(json.dumps([astuple(entry) for entry in entries]))
                for entry in json.loads(one)
            ]
            runtime.on_main(lambda: saving.finish(everything, documents))
        except (CheckpointError, RankError):  # on the main rank, when no other writes any more
            saving.clear()
            raise
        runtime.on_main(lambda: checkpoint.prune(self._folder, settings.keep_last, keep_best=settings.keep_best))

    def _slots(self) -> dict[str, Part]:
        return slots_of(self._optimizer, self._weights.experts)

    def _share(self, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
        """What this rank writes: with those that have the same tensors, or parts of them, it takes turns.

        A tensor in parts comes together on all of its ranks, one after another, and stays in the memory of one host.
        """
        share = {}
        for number, (name, part) in enumerate(parts.items()):
            whole = part.whole()
            if self._runtime.is_turn(number, of_expert=bool(logical.expert_numbers([name]))):
                share[name] = whole.cpu() if part.cuts else whole
        return share

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
        weights, slots, experts = parts_of(self._weights), self._slots(), self._num_experts
        take(weights, found.read("model", wholes(weights), num_experts=experts))
        take(slots, found.read("optimizer", wholes(slots), num_experts=experts))
        state.restore(found.document("state.json"), self._runtime.device, with_window=self._runtime.data_rank == 0)
        return True


def preflight(
    folder: Path,
    weights: Weights,
    num_experts: int,
    optimizer: Optimizer,
    runtime: Runtime,
    settings: CheckpointSpec,
    num_figures: int = 1,
) -> None:
    """Raise a CheckpointError now if the disk will not hold what the run keeps, and one more being written.

    `num_figures` is how many an evaluation notes: as many checkpoints may be best.
    """
    elsewhere = num_experts // len(weights.experts)  # times as many expert weights as are here
    tensors = {**wholes(parts_of(weights)), **wholes(slots_of(optimizer, weights.experts))}
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
    held, slots = found.kinds("optimizer"), slots_of(optimizer, experts)
    way_out = "start.optimizer=reset begins with a new one, or take the optimizer of the checkpoint's recipe.yaml."
    if not held:
        raise CheckpointError(f"{found.path}: holds no optimizer state: start.optimizer=reset begins with a new one.")
    if not held.keys() & slots.keys():
        raise CheckpointError(f"{found.path}: its optimizer is of another kind than the recipe's: {way_out}")
    take(slots, found.read("optimizer", wholes(slots), some=True, way_out=way_out))


def fill(weights: Weights, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the weights, in place, from whole tensors under their logical names, one after another."""
    take(parts_of(weights), tensors)


@torch.no_grad()
def take(parts: Mapping[str, Part], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill each part, in place, from the whole tensor of its name."""
    for name, part in parts.items():
        if isinstance(tensors, tensor_file.Tensors):
            part.tensor.copy_(tensors.part(name, part.where))
        else:
            part.tensor.copy_(tensors[name][part.where])


def parts_of(weights: Weights) -> dict[str, Part]:
    """What is here of the weights, under their logical names, as views."""
    named = {name: here(parameter) for name, parameter in weights.parameters.items()}
    return logical.parts(named, weights.cuts, weights.experts)


def slots_of(optimizer: Optimizer, experts: range) -> dict[str, Part]:
    """The same of the optimizer's state."""
    return logical.parts(optimizer.state(), optimizer.state_cuts(), experts)


def wholes(parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """Tensors on `meta` of the shapes of the wholes."""
    return {name: torch.empty(part.whole_shape, dtype=part.tensor.dtype, device="meta") for name, part in parts.items()}


def logical_tensors(model: SwitchTransformer) -> dict[str, torch.Tensor]:
    """The weights of a model that is all here, under their logical names, as views."""
    return {name: part.tensor for name, part in parts_of(whole_weights(model)).items()}
