"""Checkpointer: a run's weights, optimizer and state to and from its checkpoints, on all ranks alike.

A save is two parts: what it takes from the run, on the main thread, and what it writes, there or in a thread beside it.
"""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Final

import torch

from switchcli.checkpoint import checkpoint, manifest, tensor_file, tensor_names
from switchcli.checkpoint.fsops import DISK, FileOperations
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import LocalPart, ModelWeights, local_values, unsharded_weights
from switchcli.distributed.signals import StopRequest
from switchcli.errors import CheckpointError, DistributedError, NumericsError, OtherRankError, RankError
from switchcli.model.transformer import SwitchTransformer
from switchcli.report.console import Console
from switchcli.train.config import CheckpointSpec
from switchcli.train.optimizers import Optimizer
from switchcli.train.router_health import NONFINITE_FIX
from switchcli.train.state import TrainState
from switchcli.train.validation import reduce

DATA = "data.json"
"""The document that identifies the text, and a teacher: a run goes on with those that it began with, or not at all."""
TEXT = "tokens_sha256"
EVALUATION = "evaluation_sha256"
"""The examples that a run is scored on: the best checkpoint compares scores of all its starts. Not in checkpoints of
versions up to 0.1, which are accepted without it."""
_LOST_SECONDS: Final = 2
"""How long a save under way is waited for when a rank is lost: what it still has to hear of that one never comes."""

Contents = Iterable[tuple[str, memoryview]]
"""Files by name."""


class Checkpointer:
    """One folder of checkpoints, the same for all ranks. Its methods are called on every rank."""

    def __init__(
        self,
        folder: Path,
        weights: ModelWeights,
        optimizer: Optimizer,
        context: DistributedContext,
        documents: Mapping[str, bytes],
        settings: CheckpointSpec,
        files: FileOperations = DISK,
        former_text: str | None = None,
    ) -> None:
        """`documents` (recipe, tokenizer, `DATA`) make a checkpoint whole by itself.

        `former_text` is the digest that an earlier version gave to the same text: `restore` accepts it.
        """
        self._folder = folder
        self._weights = weights
        self._optimizer = optimizer
        self._context = context
        self._documents = documents
        self._settings = settings
        self._files = files
        self._former_text = former_text
        self._thread = ThreadPoolExecutor(1, "save")
        self._under_way: Future[None] | None = None
        self._stop = StopRequest()
        self.step: int | None = None
        """The step of the newest checkpoint: written, under way or read."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state.step`, each rank its share, and remove those that need not be kept.

        With `checkpoint.background` it is copied here and written while training goes on, once the one before it is
        done: see `wait`. What any other end leaves behind is removed by the next save, or the next start.

        Raises:
            CheckpointError: the disk refuses this rank; RankError: another one. Off the main rank: OtherRankError.
            NumericsError: a number is not finite; on every rank, and nothing is written.
        """
        self.wait()
        context = self._context
        weights, slots = weight_parts(self._weights), self._slots()
        # Of this rank all, not what it writes alone: what is lost in a copy is in the others' weights a step later.
        tensors = {name: part.tensor for name, part in {**weights, **slots}.items()}
        window = {f"the metric {name}": mean.total for name, mean in state.metrics_since_log.items()}
        self._check_finite(state.step, {**tensors, **window})
        self.step = state.step
        model, optimizer = self._share(weights), self._share(slots)
        documents = {**self._documents, "state.json": state.to_json(reduce(state.metrics_since_log, context))}
        own = [
            secrets.randbits(checkpoint.UNIQUE_BITS) if context.is_main else 0,
            tensor_file.num_bytes([*model.values(), *optimizer.values()]),
        ]
        unique, size = context.sum_over_ranks(own)
        size += sum(map(len, documents.values()))
        saving = checkpoint.CheckpointWriter(self._folder, state.step, unique, size, self._files)
        contents = checkpoint.encode_files(model, optimizer, context.rank, context.world)
        if self._settings.background:
            self._under_way = self._thread.submit(self._write, saving, list(contents), documents)
            self._under_way.add_done_callback(lambda done: self._stop.request() if done.exception() else None)
        else:
            self._write(saving, contents, documents)

    def _check_finite(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """A number may be lost where no gradient tells: in the optimizer's state, or in a metric."""
        # A sum is twenty times as fast, and where all is finite it is but rarely not.
        lost = (name for name, one in tensors.items() if not one.sum().isfinite() and not one.isfinite().all())
        told = self._context.all_gather_text(next(lost, ""))
        for rank, name in enumerate(told):
            if name:
                raise NumericsError(
                    f"step {step}: {name} is not finite, on rank {rank}", f"nothing is saved, and {NONFINITE_FIX}"
                )

    def wait(self) -> None:
        """Return when no save is under way. Raises what `save` would have raised for the last one, had it waited."""
        last, self._under_way = self._under_way, None
        if last is not None:
            last.result()

    @contextmanager
    def background_saves(self, stop: StopRequest, console: Console) -> Iterator[None]:
        """Around training: left when no save is under way. The run is asked to `stop` as soon as one fails.

        If training fails, the save under way, of a step that was sound, is done all the same, unless a rank is lost.
        """
        self._stop = stop
        try:
            yield
        except Exception as error:
            last, self._under_way = self._under_way, None
            if last is not None:
                wait([last], _LOST_SECONDS if isinstance(error, DistributedError) else None)
                failure = last.exception(0) if last.done() else None
                if failure is not None and not isinstance(failure, (OtherRankError, DistributedError)):
                    console.warning(f"the save under way failed as well: {failure}")
            raise
        self.wait()

    def _write(self, saving: checkpoint.CheckpointWriter, contents: Contents, documents: Mapping[str, bytes]) -> None:
        """All that a save does to the disk, and says to other ranks over a group of its own: in any one thread."""
        ranks, settings = self._context.saving, self._settings
        try:
            ranks.main_only(saving.begin)
            entries = ranks.on_all_ranks(lambda: saving.write(contents))
            everything = [
                manifest.Entry(*entry)
                for one in ranks.all_gather_text(json.dumps([astuple(entry) for entry in entries]))
                for entry in json.loads(one)
            ]
            ranks.main_only(lambda: saving.finish(everything, documents))
        except (CheckpointError, RankError):  # on the main rank, when no other writes any more
            saving.clean_up()
            raise
        keep_last, keep_best = settings.keep_last, settings.keep_best
        ranks.main_only(lambda: checkpoint.prune(self._folder, keep_last, keep_best=keep_best, files=self._files))

    def _slots(self) -> dict[str, LocalPart]:
        return optimizer_parts(self._optimizer, self._weights.experts)

    def _share(self, parts: Mapping[str, LocalPart]) -> dict[str, torch.Tensor]:
        """What this rank writes: with those that have the same tensors, or parts of them, it takes turns.

        A tensor in parts comes together on all of its ranks, one after another, and stays in the memory of one host.
        """
        share = {}
        # Experts are counted apart: ranks may hold different numbers of them, and hold the same other tensors.
        counts = {True: 0, False: 0}
        for name, part in parts.items():
            whole = part.gather()
            is_expert = bool(tensor_names.expert_numbers([name]))
            writer, num_writers = self._context.rank, self._context.world
            if is_expert:
                writer, num_writers = self._weights.replica_index, self._weights.num_replicas
            if counts[is_expert] % num_writers == writer:
                share[name] = whole.cpu() if part.layout else whole
            counts[is_expert] += 1
        return share

    def restore(self, state: TrainState, console: Console) -> bool:
        """Take weights, optimizer and `state` from the newest sound checkpoint; False when there is none.

        Raises:
            CheckpointError: the checkpoint is of another architecture, optimizer or text.
        """
        newest = self._context.main_only(lambda: checkpoint.latest(self._folder, console.warning))
        step = self._context.from_main(-1 if newest is None else newest.step)
        if step < 0:
            return False
        found = newest or checkpoint.Checkpoint.open(checkpoint.checkpoint_path(self._folder, step), verified=True)
        before, now = {}, json.loads(self._documents[DATA])
        with suppress(ValueError, TypeError, RecursionError):  # what is no object is no run's
            before = dict(json.loads(found.document(DATA)))
        if self._former_text is not None and before.get(TEXT) == self._former_text:
            before[TEXT] = now[TEXT]
        if EVALUATION in now:
            before.setdefault(EVALUATION, now[EVALUATION])
        if before != now:
            what = "by another teacher"
            if before.get(TEXT) != now[TEXT]:
                what = "on other text"
            elif before.get(EVALUATION) != now.get(EVALUATION):
                what = "and scored on other examples of its tasks"
            raise CheckpointError(
                f"{found.path} was trained {what} than the recipe gives now: bring that back, give another folder by "
                "--out, or --no-resume to set this run aside and begin anew"
            )
        weights, slots, experts = weight_parts(self._weights), self._slots(), self._weights.num_experts
        load_parts(weights, found.read("model", full_tensors(weights), num_experts=experts))
        load_parts(slots, found.read("optimizer", full_tensors(slots), num_experts=experts))
        state.restore(found.document("state.json"), self._context.device, with_metrics=self._context.dp_rank == 0)
        self.step = state.step
        return True


def preflight(
    folder: Path,
    weights: ModelWeights,
    optimizer: Optimizer,
    context: DistributedContext,
    settings: CheckpointSpec,
    num_figures: int = 1,
) -> None:
    """Raise a CheckpointError now if the disk will not hold what the run keeps, and one more being written.

    `num_figures` is how many an evaluation notes: as many checkpoints may be best.
    """
    elsewhere = weights.num_experts // len(weights.experts)  # times as many expert weights as are here
    tensors = {**full_tensors(weight_parts(weights)), **full_tensors(optimizer_parts(optimizer, weights.experts))}
    one = sum(
        tensor_file.num_bytes([tensor]) * (elsewhere if tensor_names.expert_numbers([name]) else 1)
        for name, tensor in tensors.items()
    )
    present = sum(path.is_dir() for path in folder.glob("step-*"))
    kept = settings.keep_last + settings.keep_best * num_figures
    context.main_only(lambda: checkpoint.preflight(folder, one * max(1, kept + 1 - present)))


def load_optimizer_state(optimizer: Optimizer, found: checkpoint.Checkpoint, experts: range) -> None:
    """Fill the optimizer of a run that begins with the weights of `found` from the optimizer's state there.

    The checkpoint may hold the state of more parameters than learn now, and of more `experts` than are here.

    Raises:
        CheckpointError: it has no such state, or that of another optimizer.
    """
    held, slots = found.tensor_specs("optimizer"), optimizer_parts(optimizer, experts)
    way_out = "start.optimizer=reset begins with a new one, or take the optimizer of the checkpoint's recipe.yaml."
    if not held:
        raise CheckpointError(f"{found.path}: holds no optimizer state: start.optimizer=reset begins with a new one.")
    if not held.keys() & slots.keys():
        raise CheckpointError(f"{found.path}: its optimizer is of another kind than the recipe's: {way_out}")
    load_parts(slots, found.read("optimizer", full_tensors(slots), allow_extra=True, fix=way_out))


def load_weights(weights: ModelWeights, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the weights, in place, from whole tensors under their logical names, one after another."""
    load_parts(weight_parts(weights), tensors)


def load_parts(parts: Mapping[str, LocalPart], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill each part, in place, from the whole tensor of its name."""
    for name, part in parts.items():
        if isinstance(tensors, tensor_file.LazyTensors):  # of a file no more is read
            LocalPart(part.tensor).copy_from(tensors.read_slice(name, part.slices))
        else:
            part.copy_from(tensors[name])


def weight_parts(weights: ModelWeights) -> dict[str, LocalPart]:
    """What is here of the weights, under their logical names, as views."""
    named = {name: local_values(parameter) for name, parameter in weights.parameters.items()}
    return tensor_names.logical_parts(named, weights.layouts, weights.experts)


def optimizer_parts(optimizer: Optimizer, experts: range) -> dict[str, LocalPart]:
    """What is here of the optimizer's state, under its logical names, as views."""
    return tensor_names.logical_parts(optimizer.state(), optimizer.state_layouts(), experts)


def full_tensors(parts: Mapping[str, LocalPart]) -> dict[str, torch.Tensor]:
    """Tensors on `meta` of the shapes of the wholes."""
    return {name: torch.empty(part.full_shape, dtype=part.tensor.dtype, device="meta") for name, part in parts.items()}


def logical_tensors(model: SwitchTransformer) -> dict[str, torch.Tensor]:
    """The weights of a model that is all here, under their logical names, as views."""
    return {name: part.tensor for name, part in weight_parts(unsharded_weights(model)).items()}
