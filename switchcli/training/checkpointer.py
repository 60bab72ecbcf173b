"""Checkpointer: saves and restores a run's weights, optimizer state and progress, on all ranks together."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from switchcli.checkpoint import checkpoint, tensor_file, tensor_names
from switchcli.checkpoint.documents import DATA, TEXT
from switchcli.checkpoint.model_weights import load_parts, weight_parts
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import LocalPart, ModelWeights
from switchcli.errors import CheckpointError, NumericsError
from switchcli.training.config import CheckpointSpec
from switchcli.training.optimizers import Optimizer
from switchcli.training.router_health import NONFINITE_FIX
from switchcli.training.state import TrainState
from switchcli.training.validation import reduce


class Checkpointer:
    """A run's folder of checkpoints. All ranks use one folder and call every method together."""

    def __init__(
        self,
        folder: Path,
        weights: ModelWeights,
        optimizer: Optimizer,
        context: DistributedContext,
        documents: Mapping[str, bytes],
        settings: CheckpointSpec,
    ) -> None:
        """Save and restore a run.

        Args:
            folder: holds the checkpoints.
            weights: this rank's part of the weights.
            optimizer: its state is saved and restored.
            context: the other ranks.
            documents: files of every checkpoint by name: recipe, tokenizer and `DATA`. They make it self-contained.
            settings: which checkpoints to keep.
        """
        self._folder = folder
        self._weights = weights
        self._optimizer = optimizer
        self._context = context
        self._documents = documents
        self._settings = settings
        self.step: int | None = None
        """The step of the newest checkpoint that was written or restored."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state.step`, and remove checkpoints that need not be kept. Each rank writes a share.

        The next save or the next start removes what a killed save leaves behind.

        Raises:
            CheckpointError: the disk of this rank refuses.
            RankError: the disk of another rank refuses; OtherRankError on ranks other than the main one.
            NumericsError: a number is not finite. All ranks raise it, and nothing is written.
        """
        context, settings = self._context, self._settings
        weights, optimizer_state = weight_parts(self._weights), self._optimizer_parts()
        # Check all tensors of this rank, not only those that it writes: ranks may hold different copies.
        tensors = {name: part.tensor for name, part in {**weights, **optimizer_state}.items()}
        metrics = {f"the metric {name}": mean.total for name, mean in state.metrics_since_log.items()}
        self._check_finite(state.step, {**tensors, **metrics})
        model, optimizer = self._tensors_to_write(weights), self._tensors_to_write(optimizer_state)
        documents = {**self._documents, "state.json": state.to_json(reduce(state.metrics_since_log, context))}
        checkpoint.save(
            self._folder, state.step, model=model, optimizer=optimizer, documents=documents, ranks=context.saving
        )
        self.step = state.step
        keep_last, keep_best, keep_steps = settings.keep_last, settings.keep_best, settings.keep_steps
        context.saving.main_only(
            lambda: checkpoint.prune(self._folder, state.step, keep_last, keep_steps, keep_best=keep_best)
        )

    def _check_finite(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise a NumericsError on all ranks if a number on any rank is not finite.

        Gradients do not reveal every such number: the optimizer state or a metric may have one.
        """
        first = ""
        for name, tensor in tensors.items():
            # A sum is much faster than a test of each number. It is rarely not finite if they all are (overflow).
            if not tensor.sum().isfinite() and not tensor.isfinite().all():
                first = name
                break
        for rank, name in enumerate(self._context.all_gather_text(first)):
            if name:
                raise NumericsError(
                    f"step {step}: {name} is not finite, on rank {rank}", f"nothing is saved, and {NONFINITE_FIX}"
                )

    def _optimizer_parts(self) -> dict[str, LocalPart]:
        return optimizer_parts(self._optimizer, self._weights.experts)

    def _tensors_to_write(self, parts: Mapping[str, LocalPart]) -> dict[str, torch.Tensor]:
        """Return the full tensors that this rank writes.

        Ranks that hold the same tensors, or parts of the same tensors, take turns. A sharded tensor is gathered on all
        its ranks, one tensor after another, and kept in the memory of one host.
        """
        to_write = {}
        # Turns are counted separately for experts: ranks may hold different numbers of experts, but all of them hold
        # the same other tensors.
        counts = {True: 0, False: 0}
        for name, part in parts.items():
            full_tensor = part.gather()  # collective: called on every rank, whoever writes it
            is_expert = bool(tensor_names.expert_numbers([name]))
            index, num_writers = self._context.rank, self._context.world
            if is_expert:
                index, num_writers = self._weights.replica_index, self._weights.num_replicas
            if counts[is_expert] % num_writers == index:
                to_write[name] = full_tensor.cpu() if part.layout else full_tensor
            counts[is_expert] += 1
        return to_write

    def restore(self, state: TrainState, newest: checkpoint.Checkpoint) -> None:
        """Restore weights, optimizer state and `state` from the newest sound checkpoint of the run.

        Raises:
            CheckpointError: the checkpoint has another architecture, optimizer or text, or an optimizer state that no
                run wrote.
        """
        self._check_data(newest)
        weights, optimizer_state = weight_parts(self._weights), self._optimizer_parts()
        num_experts = self._weights.num_experts
        load_parts(weights, newest.read("model", full_tensors(weights), num_experts=num_experts))
        load_parts(optimizer_state, newest.read("optimizer", full_tensors(optimizer_state), num_experts=num_experts))
        _check_optimizer_state(self._optimizer, optimizer_state, newest)
        state.restore(newest.document("state.json"), self._context.device, with_metrics=self._context.dp_rank == 0)
        self.step = state.step

    def has_same_text(self, other: checkpoint.Checkpoint) -> bool:
        """Return whether a checkpoint of any run was trained on the text or the examples of this run."""
        before, now = self._identities(other)
        return before.get(TEXT) == now[TEXT]

    def _identities(self, other: checkpoint.Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
        """Return the content of `DATA` in a checkpoint and of this run."""
        before, now = {}, json.loads(self._documents[DATA])
        with suppress(ValueError, TypeError, RecursionError):  # a document that is no object equals no other
            before = dict(json.loads(other.document(DATA)))
        return before, now

    def _check_data(self, newest: checkpoint.Checkpoint) -> None:
        """Raise a CheckpointError if the checkpoint was trained on other data than the recipe's."""
        before, now = self._identities(newest)
        if before == now:
            return
        difference = "and scored on other examples of its tasks"
        if before.get(TEXT) != now[TEXT]:
            difference = "on other text (or, with data.mixture.max_epochs, for another train.steps)"
        raise CheckpointError(
            f"{newest.path} was trained {difference} than the recipe gives now: restore what has changed, give another "
            "folder by --out, or --no-resume to archive this run and start anew"
        )


def preflight(
    folder: Path,
    weights: ModelWeights,
    optimizer: Optimizer,
    context: DistributedContext,
    settings: CheckpointSpec,
    num_metrics: int = 1,
    num_present: int = 0,
    num_named: int = 0,
) -> None:
    """Raise a CheckpointError if the disk has no room for the checkpoints that are kept and one more being written.

    `num_metrics` is the number of evaluation metrics: each may have a best checkpoint of its own. `num_present` is the
    number of the run's checkpoints that are on the disk already, and `num_named` that of the steps of
    `checkpoint.keep_steps` that the run takes.
    """
    expert_factor = weights.num_experts // len(weights.experts)  # all experts over those on this rank
    tensors = {**full_tensors(weight_parts(weights)), **full_tensors(optimizer_parts(optimizer, weights.experts))}
    checkpoint_bytes = 0
    for name, tensor in tensors.items():
        is_expert = bool(tensor_names.expert_numbers([name]))
        checkpoint_bytes += tensor_file.num_bytes([tensor]) * (expert_factor if is_expert else 1)
    num_kept = settings.keep_last + settings.keep_best * num_metrics + num_named
    num_new = max(1, num_kept + 1 - num_present)
    context.main_only(lambda: checkpoint.preflight(folder, checkpoint_bytes * num_new))


_RESET = "start.keep=weights begins with a new one, or take the optimizer of the checkpoint's recipe.yaml."


def load_optimizer_state(optimizer: Optimizer, start: checkpoint.Checkpoint, experts: range, fix: str = _RESET) -> None:
    """Fill the optimizer of a new run from the optimizer state of the checkpoint `start`, whose weights it starts from.

    The checkpoint may hold the state of more parameters than the run trains, and of more experts than this rank's
    `experts`.

    Raises:
        CheckpointError: the checkpoint has no optimizer state, or that of another optimizer; with the `fix`.
    """
    saved, parts = start.tensor_specs("optimizer"), optimizer_parts(optimizer, experts)
    if not saved:
        raise CheckpointError(f"{start.path}: holds no optimizer state: {fix}")
    if not saved.keys() & parts.keys():
        raise CheckpointError(f"{start.path}: its optimizer is of another kind than the recipe's: {fix}")
    load_parts(parts, start.read("optimizer", full_tensors(parts), allow_extra=True, fix=fix))
    _check_optimizer_state(optimizer, parts, start)


def _check_optimizer_state(optimizer: Optimizer, parts: Mapping[str, LocalPart], loaded: checkpoint.Checkpoint) -> None:
    """Raise a CheckpointError if the state that was `loaded` holds a number that no optimizer of this kind makes."""
    for name, (tensor, _) in parts.items():
        if name.rpartition("/")[2] in optimizer.nonnegative_slots and tensor.numel() and tensor.min() < 0:
            raise CheckpointError(
                f"{loaded.path}: optimizer: {name}: is {float(tensor.min()):g} and cannot be negative: use another "
                "checkpoint of the run"
            )


def optimizer_parts(optimizer: Optimizer, experts: range) -> dict[str, LocalPart]:
    """Return views of this rank's part of the optimizer state, keyed by logical name."""
    return tensor_names.logical_parts(optimizer.state(), optimizer.state_layouts(), experts)


def full_tensors(parts: Mapping[str, LocalPart]) -> dict[str, torch.Tensor]:
    """Return tensors on `meta` with the shapes and dtypes of the full tensors."""
    return {name: torch.empty(part.full_shape, dtype=part.tensor.dtype, device="meta") for name, part in parts.items()}
