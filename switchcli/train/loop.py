"""The one training loop. It does not know which verb runs: objective, batches and callbacks are given to it."""

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import nn

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallelize import GradientNorm
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.errors import NumericsError
from switchcli.metric_names import GRADIENT_NORM
from switchcli.model.moe.layer import local_experts, sparse_layers
from switchcli.report.console import TrainingDisplay
from switchcli.train.callbacks import Callback
from switchcli.train.config import TrainSpec
from switchcli.train.loss import LossSchedule, Objective
from switchcli.train.metrics import Mean, Metrics, merge
from switchcli.train.microbatches import Microbatch, Microbatches, RealTokens
from switchcli.train.nonfinite import ALWAYS_STOP, NonFiniteHandler
from switchcli.train.optimizers import Optimizer
from switchcli.train.prefetch import Loader
from switchcli.train.router_health import WHEN_LOST, first_nonfinite_backward, first_nonfinite_forward
from switchcli.train.schedules import ScheduleSpec
from switchcli.train.state import TrainState
from switchcli.train.validation import exact


def fit(
    state: TrainState,
    model: nn.Module,
    losses: LossSchedule,
    loader: Loader | Microbatches,
    optimizer: Optimizer,
    schedule: ScheduleSpec,
    context: DistributedContext,
    callbacks: Sequence[Callback],
    settings: TrainSpec,
    stop: StopRequest,
    progress: TrainingDisplay | None = None,
    nonfinite: NonFiniteHandler = ALWAYS_STOP,
) -> None:
    """Train from `state.step` to `settings.steps`, changing `state`, the weights and the optimizer's state in place.

    `loader` gives this rank's microbatches of each step, `losses` what is minimised at it. `progress` is moved after
    each step, the callbacks are called after the steps that they are due at; not for a stop. `nonfinite` is asked
    whether to go on where a number is not finite: a step left out counts as one taken.

    Raises:
        StopTraining: `stop` was requested on some rank; every rank raises, after the same whole step.
        NumericsError: the gradient is not finite; every rank raises, and no callback has seen the step. Or a callback
            raises it.
        DistributedError: another rank is gone.
    """
    model.train()
    unchecked: list[tuple[int, GradientNorm, Metrics]] = []
    started = time.perf_counter()
    for step, microbatches in loader.from_step(state.step, settings.steps):
        assert step == state.step, "a step that is left out counts as one taken"
        own = [sum(counts) for counts in zip(*(micro.real for micro in microbatches), strict=True)]
        stopping, *counted = context.sum_over_ranks([int(stop.requested), *own])
        real = RealTokens(*(count // context.tp_size for count in counted))  # ranks of a model axis share a batch
        if stopping:
            _check_all(unchecked, model, context)  # what is saved after a stop has been looked at
            raise StopTraining
        learning_rate = schedule(step, settings.steps)
        seed = f"{settings.seed}/{step}"
        metrics = accumulate_gradients(model, losses.loss_at(step), microbatches, real, context, seed)
        norm = _clip(optimizer, settings.clip_norm, context)
        lost = _lost(step + 1, norm, metrics, model, context) if nonfinite.before_updates else None
        if lost:
            nonfinite(lost, state, step + 1, updated=False)
        else:
            optimizer.step(learning_rate)
            _note(state, real.targets, metrics, norm)
            unchecked.append((state.step, norm, metrics))
        optimizer.zero_grad()

        due = [callback for callback in callbacks if callback.due(state.step, settings.steps)]
        while len(unchecked) > (0 if due else 1):  # one step late unless a callback is due: no wait for the device
            _check_finite(*unchecked.pop(0), model, context)
        state.seconds += time.perf_counter() - started
        if progress is not None:
            progress.advance(state.step)
        call(due, state, nonfinite)
        started = time.perf_counter()
    _check_all(unchecked, model, context)  # what is shown at the end has been looked at


def _note(state: TrainState, num_targets: int, metrics: Metrics, norm: GradientNorm) -> None:
    """One more step was taken, on `num_targets`."""
    state.step += 1
    state.targets_seen += num_targets
    of_norm = {GRADIENT_NORM: Mean(norm.total, torch.ones_like(norm.total))}
    state.metrics_since_log = merge(state.metrics_since_log, exact({**metrics, **of_norm}))


def call(callbacks: Sequence[Callback], state: TrainState, nonfinite: NonFiniteHandler) -> None:
    """Call them in order, and again where one met a number that is not finite and `nonfinite` has the run go on."""
    try:
        for callback in callbacks:
            callback(state)
    except NumericsError as error:
        nonfinite(error, state, state.step, updated=True)
        for callback in callbacks:
            if callback.of_weights:
                callback(state)


def accumulate_gradients(
    model: nn.Module,
    objective: Objective,
    microbatches: Sequence[Microbatch],
    real: RealTokens,
    context: DistributedContext,
    seed: str,
) -> Metrics:
    """Add to every `.grad` the gradient of this step's loss, averaged or summed over the shares of a batch by the last
    backward pass.

    `real` counts the real tokens of the step on all ranks. The cross-entropy and the decoder's auxiliary losses are
    summed over the step's targets and divided by their number; the encoder's are divided by the number of inputs. So
    the loss does not depend on how the batch is cut. `seed` names the noise.
    """
    metrics: Metrics = {}
    # Shares that are averaged afterwards are meant to be summed: hence their number.
    num_averaged = context.grad_divisor
    per_input, per_target = (num_averaged / max(1, count) for count in real)
    for position, micro in enumerate(microbatches, 1):
        _seed_noise(f"{seed}/{micro.number}")
        placed = context.to_device(micro.batch)
        with context.synchronize_gradients(model, position, len(microbatches)):
            with context.autocast():
                loss = objective(model, placed)
            total = loss.target_sum * per_target
            if loss.auxiliary is not None:
                encoder, decoder = loss.auxiliary
                total = total + encoder.total * per_input + decoder.total * per_target
            total.backward()  # type: ignore[no-untyped-call]
        metrics = merge(metrics, loss.metrics)
    return metrics


def _seed_noise(name: str) -> None:
    """Seed torch's generators, so that dropout and jitter follow from (seed, step, microbatch) and none is saved."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)


def _clip(optimizer: Optimizer, clip_norm: float | None, context: DistributedContext) -> GradientNorm:
    """The global gradient norm, before clipping to `clip_norm`."""
    norm = context.gradient_norm(optimizer.parameters, optimizer.layouts)
    if clip_norm is not None:
        optimizer.scale_gradients((clip_norm / (norm.total + 1e-6)).clamp(max=1.0))  # as torch has it
    return norm


def _check_all(
    unchecked: Sequence[tuple[int, GradientNorm, Metrics]], model: nn.Module, context: DistributedContext
) -> None:
    for one in unchecked:
        _check_finite(*one, model, context)


def _check_finite(
    step: int, norm: GradientNorm, metrics: Metrics, model: nn.Module, context: DistributedContext
) -> None:
    if lost := _lost(step, norm, metrics, model, context):
        raise lost


def _lost(
    step: int, norm: GradientNorm, metrics: Metrics, model: nn.Module, context: DistributedContext
) -> NumericsError | None:
    """What a step whose gradient is not finite is to be told of with, on all ranks."""
    if torch.isfinite(norm.total):
        return None
    looks = (
        first_nonfinite_forward(metrics, sparse_layers(model)),
        first_nonfinite_backward(norm.local, local_experts(model)),
    )
    told = next(filter(any, map(context.all_gather_text, looks)), [])
    ranks = [rank for rank, what in enumerate(told) if what]
    where = f" (first in {told[ranks[0]]}, on rank {', '.join(map(str, ranks))})" if ranks else ""
    return NumericsError(f"step {step}: the gradient norm is {float(norm.total)}{where}", f"{WHEN_LOST} or skip")
