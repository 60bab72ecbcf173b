"""The training loop, the same for every verb: objective, batches and callbacks are arguments."""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, SupportsFloat

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallelize import GradientNorm
from switchcli.errors import NumericsError
from switchcli.metric_names import GRADIENT_NORM
from switchcli.model.moe.layer import local_experts, sparse_layers
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.terminal.console import TrainingDisplay
from switchcli.training.config import TrainSpec
from switchcli.training.loss import Objective, StepLoss
from switchcli.training.microbatches import Loader, Microbatch, Microbatches, RealTokens
from switchcli.training.optimizers import Optimizer
from switchcli.training.router_health import (
    NONFINITE_FIX,
    first_nonfinite_backward,
    first_nonfinite_forward,
)
from switchcli.training.schedules import Schedule
from switchcli.training.state import Mean, Metrics, TrainState, merge
from switchcli.training.validation import exact

MAX_SKIPPED: Final = 10
"""Steps that a run leaves out with `train.nonfinite: skip`; the next gradient that is not finite ends it."""


class RouterBalance:
    """With `balance: bias`, the choices of one step change the biases of the next. Without biases it does nothing.

    After each step an expert's bias changes by bias_rate * sign(mean load - its load), where the load is the number of
    choices before capacity, without padding (DeepSeek-V3, section 2.1.2).

    Legend: L sparse layers, E experts.
    """

    def __init__(self, model: nn.Module, context: DistributedContext) -> None:
        self._context = context
        self._choice_LE: torch.Tensor | None = None
        """int64: choices of this rank in the step so far."""
        routers = [layer.router for layer in sparse_layers(model).values()]
        # A router that is not trained keeps its biases too.
        self._biases = [
            (index, router.bias, rate)
            for index, router in enumerate(routers)
            if router.bias is not None and (rate := router.router_spec.choice_bias_rate) and router.weight.requires_grad
        ]
        """Layer, bias and rate of the routers that choose by biases."""

    def begin_step(self) -> None:
        self._choice_LE = None

    def counting(self, objective: Objective) -> Objective:
        """Return the objective, whose choices are counted from now on."""

        def counted(model: nn.Module, batch: Batch) -> StepLoss:
            loss = objective(model, batch)
            # The loss has them once, also where the backward pass computes blocks again.
            choice_LE = torch.stack(loss.choices).long()
            self._choice_LE = choice_LE if self._choice_LE is None else self._choice_LE + choice_LE
            return loss

        return counted if self._biases else objective

    @torch.no_grad()
    def end_step(self) -> None:
        """Change the biases by the choices of the step, which has updated the weights. Collective."""
        if self._choice_LE is None:
            return
        choice_LE = self._context.all_reduce(self._choice_LE)
        for index, bias_E, rate in self._biases:
            choice_E = choice_LE[index]
            # The sign of mean - load, without rounding.
            bias_E.add_((choice_E.sum() - len(choice_E) * choice_E).sign(), alpha=rate)


class Callback(ABC):
    """Called with the state after every `every_steps`-th step and after the last."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    def due(self, step: int, last_step: int) -> bool:
        """Return whether to call it after `step`, counted from 1."""
        return step == last_step or step % self.every_steps == 0

    @abstractmethod
    def __call__(self, state: TrainState) -> None: ...


class StepResult(NamedTuple):
    """The gradient norm and the metrics of one step, still on the device."""

    step: int
    """Counted from 1."""
    norm: GradientNorm
    host_norm: SupportsFloat
    """The total norm, which is being copied to the host."""
    metrics: Metrics


def fit(
    state: TrainState,
    model: nn.Module,
    objective: Objective,
    loader: Loader | Microbatches,
    optimizer: Optimizer,
    schedule: Schedule,
    context: DistributedContext,
    callbacks: Sequence[Callback],
    settings: TrainSpec,
    stop: StopRequest,
    progress: TrainingDisplay | None = None,
    on_skip: Callable[[str], None] = lambda message: None,
) -> None:
    """Train from `state.step` to `settings.steps`. Changes state, weights and optimizer state in place.

    Args:
        state: the progress of the run.
        model: the model as `context.wrap` returns it.
        objective: the loss that each step minimizes.
        loader: this rank's microbatches of each step.
        optimizer: updates the weights.
        schedule: the learning rate of each step.
        context: the device, the precision and the other ranks.
        callbacks: called in order after the steps at which they are due. After a stop the caller saves the run.
        settings: length, seed, gradient clipping, and what to do when a gradient is not finite.
        stop: ends training after a step.
        progress: shows each step.
        on_skip: called with a message after a step is left out, which counts as one taken.

    Raises:
        StopTraining: `stop` was requested on some rank. All ranks raise it after the same step.
        NumericsError: the gradient is not finite, and the step is not left out. All ranks raise it, and no callback has
            seen the step. Or a callback raises it.
        DistributedError: another rank is lost.
    """
    model.train()
    balance = RouterBalance(model, context)
    objective = balance.counting(objective)
    unchecked: list[StepResult] = []
    first = state.step
    started = time.perf_counter()
    for step, microbatches in loader.from_step(state.step, settings.steps):
        assert step == state.step, "a skipped step counts as one taken"
        # One sum over ranks tells whether to stop and how many real tokens the step has.
        local_counts = [sum(counts) for counts in zip(*(micro.real for micro in microbatches), strict=True)]
        stopping, *counts = context.sum_over_ranks([int(stop.requested), *local_counts])
        real = RealTokens(
            *(count // context.tp_size for count in counts)
        )  # the ranks of a model axis have the same rows
        if stopping:
            _check_finite(unchecked, model, context)  # the caller saves after a stop
            raise StopTraining
        learning_rate = schedule(step, settings.steps)
        seed = f"{settings.seed}/{step}"
        balance.begin_step()
        metrics = accumulate_gradients(model, objective, microbatches, real, context, seed)
        norm = _clip_gradients(optimizer, settings.clip_norm, context)
        result = StepResult(step + 1, norm, context.to_host(norm.total), metrics)
        # Otherwise the check runs one step late, which avoids a wait for the device.
        error = _nonfinite_error(result, model, context) if settings.nonfinite == "skip" else None
        if error:
            _skip_step(state, error)
            on_skip(
                f"{error.problem}: going on without the batch of step {state.step} (time {len(state.skipped_steps)} of "
                f"at most {MAX_SKIPPED}: train.nonfinite)"
            )
        else:
            optimizer.step(learning_rate)
            balance.end_step()
            _record_step(state, result, real.targets, context)
            unchecked.append(result)
        optimizer.zero_grad()
        if step == first:
            context.end_first_step()

        due = [callback for callback in callbacks if callback.due(state.step, settings.steps)]
        # Checking a step waits for the device to finish it. Without a callback the newest step is checked when the next
        # one is queued, so that the device always has work.
        newest = 0 if due else 1
        while len(unchecked) > newest:
            _check_finite([unchecked.pop(0)], model, context)
        state.seconds += time.perf_counter() - started
        if progress is not None:
            progress.advance(state.step)
        for callback in due:
            callback(state)
        started = time.perf_counter()
    _check_finite(unchecked, model, context)


def _record_step(state: TrainState, result: StepResult, num_targets: int, context: DistributedContext) -> None:
    """Add one step, on `num_targets` real targets, to the state."""
    state.step += 1
    state.targets_seen += num_targets
    # All ranks have the same norm. One of them counts it, so that the weight of the sum is the number of steps.
    weight = torch.full_like(result.norm.total, float(context.dp_rank == 0))
    metrics = {**result.metrics, GRADIENT_NORM: Mean(result.norm.total * weight, weight)}
    state.metrics_since_log = merge(state.metrics_since_log, exact(metrics))


def _skip_step(state: TrainState, error: NumericsError) -> None:
    """Count the next step as taken without an update. Raises NumericsError after `MAX_SKIPPED` such steps."""
    num_skipped = len(state.skipped_steps)
    if num_skipped >= MAX_SKIPPED:
        raise NumericsError(
            f"{error.problem}, after {num_skipped} steps that this run left out, the most for train.nonfinite=skip",
            NONFINITE_FIX,
        )
    state.step += 1
    state.skipped_steps = [*state.skipped_steps, state.step]


def accumulate_gradients(
    model: nn.Module,
    objective: Objective,
    microbatches: Sequence[Microbatch],
    real: RealTokens,
    context: DistributedContext,
    seed: str,
) -> Metrics:
    """Add the gradient of a step's loss to every `.grad`, and return the metrics of this rank's microbatches.

    The cross-entropy and the decoder's auxiliary losses are summed over the step and divided by its number of targets,
    the encoder's auxiliary losses by its number of inputs. So the loss does not depend on how the batch is divided. The
    last backward pass averages the gradients over the data-parallel ranks.

    Args:
        model: the model as `context.wrap` returns it.
        objective: the loss.
        microbatches: this rank's rows of the batch.
        real: real tokens of the step over all ranks.
        context: the device, the precision and the other ranks.
        seed: names the noise of the step.
    """
    metrics: Metrics = {}
    # Gradients are averaged over ranks, so the loss is multiplied by their number: the result must be the sum.
    per_input, per_target = (context.dp_size / max(1, count) for count in real)
    for position, microbatch in enumerate(microbatches, 1):
        _seed_noise(f"{seed}/{microbatch.number}")
        batch = context.to_device(microbatch.batch)
        with context.synchronize_gradients(model, is_last=position == len(microbatches)):
            with context.autocast():
                loss = objective(model, batch)
            total = loss.target_sum * per_target
            if loss.auxiliary is not None:
                encoder, decoder = loss.auxiliary
                total = total + encoder.total * per_input + decoder.total * per_target
            total.backward()
        metrics = merge(metrics, loss.metrics)
    return metrics


def _seed_noise(name: str) -> None:
    """Seed torch's generators. Dropout and jitter follow from (seed, step, microbatch), so no generator is saved."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)  # 63 bits, which fit a signed int64


def _clip_gradients(optimizer: Optimizer, clip_norm: float | None, context: DistributedContext) -> GradientNorm:
    """Clip the gradients to a global norm of `clip_norm`, and return their norm before that."""
    norm = context.gradient_norm(optimizer.parameters, optimizer.layouts)
    if clip_norm is not None:
        # The same formula as torch.nn.utils.clip_grad_norm_.
        optimizer.scale_gradients((clip_norm / (norm.total + 1e-6)).clamp(max=1.0))
    return norm


def _check_finite(results: Sequence[StepResult], model: nn.Module, context: DistributedContext) -> None:
    """Raise a NumericsError if the gradient of a step is not finite. Identical on all ranks."""
    for result in results:
        error = _nonfinite_error(result, model, context)
        if error:
            raise error


def _nonfinite_error(result: StepResult, model: nn.Module, context: DistributedContext) -> NumericsError | None:
    """Return the error that describes a non-finite gradient, or None. Collective: identical on all ranks."""
    total = float(result.host_norm)
    if math.isfinite(total):
        return None
    # What is not finite on each rank: in the forward pass or, if that is finite everywhere, in the backward pass.
    causes = context.all_gather_text(first_nonfinite_forward(result.metrics, sparse_layers(model)))
    if not any(causes):
        causes = context.all_gather_text(first_nonfinite_backward(result.norm.local, local_experts(model)))
    ranks = [rank for rank, cause in enumerate(causes) if cause]
    where = f" (first in {causes[ranks[0]]}, on rank {', '.join(map(str, ranks))})" if ranks else ""
    return NumericsError(
        f"step {result.step}: the gradient norm is {total}{where}", f"{NONFINITE_FIX}, or go on by train.nonfinite=skip"
    )
