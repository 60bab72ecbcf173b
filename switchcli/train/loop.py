"""The one training loop. It does not know which verb runs: objective, batches and hooks are given to it."""

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from switchcli.distributed.context import Runtime
from switchcli.distributed.parallelize import GradientNorm
from switchcli.distributed.signals import StopRequest
from switchcli.errors import NumericsError
from switchcli.model.moe.layer import experts_here, sparse_layers
from switchcli.train.callbacks import Hook
from switchcli.train.config import TrainSpec
from switchcli.train.loss import Objective
from switchcli.train.metrics import Mean, Metrics, merge
from switchcli.train.microbatches import Microbatch, RealTokens
from switchcli.train.nonfinite import ENDS, Recovery
from switchcli.train.optimizers import Optimizer
from switchcli.train.router_health import WHEN_LOST, lost_backward, lost_forward
from switchcli.train.schedules import ScheduleSpec
from switchcli.train.state import TrainState
from switchcli.train.validation import exact


def fit(
    state: TrainState,
    model: nn.Module,
    objective: Callable[[int], Objective],
    batches: Callable[[int], Sequence[Microbatch]],
    optimizer: Optimizer,
    schedule: ScheduleSpec,
    runtime: Runtime,
    hooks: Sequence[Hook],
    settings: TrainSpec,
    stop: StopRequest,
    on_step: Callable[[int], None] = lambda step: None,
    recovery: Recovery = ENDS,
) -> bool:
    """Train from `state.step` to `settings.steps`, changing `state`, the weights and the optimizer's state in place.

    Returns whether the run is complete: False when `stop` was requested on any rank, after a whole step on all of them.
    `batches` gives this rank's microbatches of a step, `objective` what is minimised at it. `on_step` is called with
    the number of steps taken after each one, the hooks after those that they are due at; neither is called for the stop
    itself. `recovery` is asked whether to go on where a number is not finite: a step left out counts as one taken.

    Raises:
        NumericsError: the gradient is not finite; every rank raises, and no hook has seen the step. Or a hook's.
        DistributedError: another rank is gone.
    """
    model.train()
    unchecked: list[tuple[int, GradientNorm, Metrics]] = []
    while state.step < settings.steps:
        started = time.perf_counter()
        microbatches = batches(state.step)
        own = [sum(counts) for counts in zip(*(micro.real for micro in microbatches), strict=True)]
        stopping, *counted = runtime.sum_over_ranks([int(stop.requested), *own])
        real = RealTokens(*(count // runtime.model_ranks for count in counted))  # ranks of a model axis share a batch
        if stopping:
            break
        learning_rate = schedule(state.step, settings.steps)
        seed = f"{settings.seed}/{state.step}"
        metrics = accumulate_gradients(model, objective(state.step), microbatches, real, runtime, seed)
        norm = _clip(optimizer, settings.clip_norm, runtime)
        lost = _lost(state.step + 1, norm, metrics, model, runtime) if recovery.before_updates else None
        if lost:
            recovery(lost, state, state.step + 1, updated=False)
        else:
            optimizer.step(learning_rate)
            _note(state, real.targets, metrics, norm)
            unchecked.append((state.step, norm, metrics))
        optimizer.zero_grad()

        due = [hook for hook in hooks if hook.due(state.step, settings.steps)]
        while len(unchecked) > (0 if due else 1):  # one step late unless a hook is due: no wait for the device
            _check_finite(*unchecked.pop(0), model, runtime)
        state.seconds += time.perf_counter() - started
        on_step(state.step)
        call(due, state, recovery)
    for one in unchecked:  # what is saved after a stop, or shown at the end, has been looked at
        _check_finite(*one, model, runtime)
    return state.step >= settings.steps


def _note(state: TrainState, num_targets: int, metrics: Metrics, norm: GradientNorm) -> None:
    """One more step was taken, on `num_targets`."""
    state.step += 1
    state.targets_seen += num_targets
    of_norm = {"gradient_norm": Mean(norm.total, torch.ones_like(norm.total))}
    state.window = merge(state.window, exact({**metrics, **of_norm}))


def call(hooks: Sequence[Hook], state: TrainState, recovery: Recovery) -> None:
    """Call them in order, and again where one met a number that is not finite and `recovery` has the run go on."""
    try:
        for hook in hooks:
            hook(state)
    except NumericsError as error:
        recovery(error, state, state.step, updated=True)
        for hook in hooks:
            if hook.of_weights:
                hook(state)


def accumulate_gradients(
    model: nn.Module,
    objective: Objective,
    microbatches: Sequence[Microbatch],
    real: RealTokens,
    runtime: Runtime,
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
    num_averaged = runtime.averaged_shares
    per_input, per_target = (num_averaged / max(1, count) for count in real)
    for position, micro in enumerate(microbatches, 1):
        _seed_noise(f"{seed}/{micro.number}")
        placed = runtime.place(micro.batch)
        with runtime.synchronise(model, position, len(microbatches)):
            with runtime.autocast():
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


def _clip(optimizer: Optimizer, clip_norm: float | None, runtime: Runtime) -> GradientNorm:
    """The global gradient norm, before clipping to `clip_norm`."""
    norm = runtime.gradient_norm(optimizer.parameters, optimizer.cuts)
    if clip_norm is not None:
        optimizer.scale_gradients((clip_norm / (norm.total + 1e-6)).clamp(max=1.0))  # as torch has it
    return norm


def _check_finite(step: int, norm: GradientNorm, metrics: Metrics, model: nn.Module, runtime: Runtime) -> None:
    if lost := _lost(step, norm, metrics, model, runtime):
        raise lost


def _lost(step: int, norm: GradientNorm, metrics: Metrics, model: nn.Module, runtime: Runtime) -> NumericsError | None:
    """What a step whose gradient is not finite is to be told of with, on all ranks."""
    if torch.isfinite(norm.total):
        return None
    looks = lost_forward(metrics, sparse_layers(model)), lost_backward(norm.own, experts_here(model))
    told = next(filter(any, map(runtime.told, looks)), [])
    ranks = [rank for rank, what in enumerate(told) if what]
    where = f" (first in {told[ranks[0]]}, on rank {', '.join(map(str, ranks))})" if ranks else ""
    return NumericsError(f"step {step}: the gradient norm is {float(norm.total)}{where}", f"{WHEN_LOST} or skip")
