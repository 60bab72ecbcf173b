"""The loop: what a step does and in which order, how it stops, how it fails, and that a run goes on as if never left.

That its gradient is the one meant, on any number of ranks, is in tests/distributed/test_ranks.py.
"""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from doubles import Do, FactoringAdafactor, Source, Still, trained
from messages import naming
from tiny_model import NOISY, a_model, rows
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.errors import NumericsError
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loop import Callback, accumulate_gradients
from switchcli.training.loss import StepLoss, cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.optimizers import Optimizer
from switchcli.training.schedules import Linear
from switchcli.training.state import TrainState

STEPS = 2
SCHEDULE = Linear(learning_rate=0.01, warmup_steps=2)


class Run:
    """All that `fit` takes, on a tiny model with dropout and jitter, after so many steps of others."""

    def __init__(self, model: SwitchTransformer | None = None, first: int = 0) -> None:
        self.state = TrainState(step=first)
        self.model = a_model(NOISY) if model is None else model
        self.optimizer: Optimizer = FactoringAdafactor().build(dict(self.model.named_parameters()))
        self.stop = StopRequest()
        self.objective: Callable[[nn.Module, Batch], StepLoss] = cross_entropy
        self.nonfinite: Literal["stop", "skip"] = "stop"
        self.said: list[str] = []
        self.steps_seen: list[int] = []

    def fit(self, *callbacks: Callback, steps: int = STEPS, seed: int = 3, clip_norm: float | None = 1.0) -> bool:
        def noted(step: int, first: int, count: int) -> Batch:
            self.steps_seen.append(step)
            return rows(step, first, count)

        return trained(
            self.state,
            self.model,
            self.objective,
            Microbatches(Source(noted), 4, 2, 0, 1),
            self.optimizer,
            SCHEDULE,
            DistributedContext("cpu", "float32"),
            callbacks,
            TrainSpec(steps=steps, batch_tokens=1, seed=seed, clip_norm=clip_norm, nonfinite=self.nonfinite),
            self.stop,
            on_skip=self.said.append,
        )


class Noted(Still):
    """Notes the learning rates and the gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(dict(model.named_parameters()))
        self.rates: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def step(self, learning_rate: float) -> None:
        self.rates.append(learning_rate)
        gradients = [weight.grad.flatten() for weight in self.parameters.values() if weight.grad is not None]
        self.gradients.append(torch.cat(gradients))


def weights(run: Run) -> torch.Tensor:
    return torch.cat(
        [tensor.flatten().float() for tensor in (*run.model.parameters(), *run.optimizer.state().values())]
    )


def test_every_step_is_taken_once_with_its_own_data_and_rate() -> None:
    run = Run()
    run.optimizer = Noted(run.model)
    assert run.fit()
    assert run.steps_seen == [step for step in range(STEPS) for _ in range(2)]
    assert run.optimizer.rates == [SCHEDULE(step, STEPS) for step in range(STEPS)]
    assert run.state.step == STEPS
    assert run.state.targets_seen == sum(int((rows(step, 0, 4).targets_BT != PAD).sum()) for step in range(STEPS))
    assert run.state.seconds > 0.0


def gradient(clip_norm: float | None) -> tuple[torch.Tensor, float]:
    """The gradient that the optimizer gets in the first step, and the norm that the run reports."""
    run = Run()
    run.optimizer = Noted(run.model)
    run.fit(steps=1, clip_norm=clip_norm)
    return run.optimizer.gradients[0], float(run.state.metrics_since_log["gradient_norm"].value())


@pytest.mark.parametrize("ratio", [0.01, 0.999, 1.001, 100.0])
def test_a_gradient_is_scaled_down_to_the_bound_and_never_up(ratio: float) -> None:
    plain, norm = gradient(None)
    assert norm == pytest.approx(float(plain.norm()), rel=1e-5)
    clipped, reported = gradient(ratio * norm)
    assert reported == pytest.approx(norm, rel=1e-6)  # the norm before clipping
    if ratio > 1:
        assert torch.equal(clipped, plain)
    else:
        torch.testing.assert_close(clipped, ratio * plain, rtol=1e-4, atol=0)


def test_callbacks_are_called_in_their_order_after_the_steps_that_they_are_due_at() -> None:
    calls: list[tuple[int, int]] = []
    every_two, every_three = (
        Do(every, lambda state, every=every: calls.append((every, state.step))) for every in (2, 3)
    )
    Run(first=3).fit(every_two, every_three, steps=5)
    assert calls == [(2, 4), (2, 5), (3, 5)]
    calls.clear()
    Run(first=5).fit(every_two, every_three, steps=7)
    assert calls == [(2, 6), (3, 6), (2, 7), (3, 7)]


def test_the_window_gathers_what_the_steps_said_in_float64() -> None:
    run = Run()
    run.fit()
    window = run.state.metrics_since_log
    assert window["neg_log_perplexity"].weight == run.state.targets_seen
    assert window["gradient_norm"].weight == STEPS
    assert window["auxiliary_loss/decoder"].weight == run.state.targets_seen
    assert all(part.dtype == torch.float64 for mean in window.values() for part in mean)


def test_a_run_that_is_left_and_taken_up_again_is_bit_equal_to_one_that_is_not() -> None:
    straight, first = Run(), Run()
    straight.fit()
    assert first.fit(Do(1, lambda state: setattr(first.stop, "requested", state.step == 1))) is False
    assert first.state.step == 1
    torch.manual_seed(1234)  # no generator carries over
    second = Run()
    second.model.load_state_dict(first.model.state_dict())
    for name, tensor in first.optimizer.state().items():
        second.optimizer.state()[name].copy_(tensor)
    second.state = first.state
    assert second.fit() is True
    assert torch.equal(weights(second), weights(straight))
    assert second.state.metrics_since_log.keys() == straight.state.metrics_since_log.keys()
    for name, mean in straight.state.metrics_since_log.items():
        assert all(torch.equal(*pair) for pair in zip(second.state.metrics_since_log[name], mean, strict=True)), name


def test_noise_depends_on_the_seed() -> None:
    one, same, other = Run(), Run(), Run()
    for run, seed in ((one, 1), (same, 1), (other, 2)):
        run.fit(seed=seed, steps=1)
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))


def test_noise_goes_by_the_number_of_a_microbatch_among_those_of_all_ranks() -> None:
    def gradient(first: int, last: int) -> torch.Tensor:
        model, microbatches = a_model(NOISY).train(), Microbatches(rows, 4, 2, 0, 1)(0)[first:last]
        context, real = DistributedContext("cpu", "float32"), RealTokens(40, 20)
        accumulate_gradients(model, cross_entropy, microbatches, real, context, "seed")
        assert model.embedding.grad is not None
        return model.embedding.grad

    torch.testing.assert_close(gradient(0, 1) + gradient(1, 2), gradient(0, 2))


@pytest.mark.parametrize("first", [0, STEPS])
def test_a_run_that_is_to_stop_or_has_finished_takes_no_step(first: int) -> None:
    run = Run(first=first)
    before = weights(run)
    run.stop.requested = True
    assert run.fit(Do(1, lambda state: pytest.fail("no step, no callback"))) is (first == STEPS)
    assert run.state.step == first
    assert torch.equal(weights(run), before)


def poisoned(run: Run, step: int) -> None:
    """Make the gradient of `step` (from 1) not a number."""

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        loss = cross_entropy(model, batch)
        return loss._replace(target_sum=loss.target_sum * math.nan) if run.state.step + 1 == step else loss

    run.objective = objective


def test_a_gradient_that_is_no_number_ends_the_run_before_any_callback_sees_the_step() -> None:
    run, seen = Run(), []
    poisoned(run, 2)
    with pytest.raises(NumericsError, match=naming("step 2", "nan", "schedule.learning_rate")) as raised:
        run.fit(Do(1, lambda state: seen.append(state.step)))
    assert raised.value.exit_code == 5
    assert seen == [1]


@pytest.mark.parametrize(("every_steps", "steps"), [((2,), 4), ((100,), 4), ((), 1)])
def test_it_ends_the_run_also_when_no_callback_is_due(every_steps: tuple[int, ...], steps: int) -> None:
    run, seen = Run(), []
    poisoned(run, 1)
    with pytest.raises(NumericsError, match="step 1"):
        run.fit(*(Do(every, lambda state: seen.append(state.step)) for every in every_steps), steps=steps)
    assert seen == []
    assert run.state.step <= 2  # it is looked at one step late at most


def lose_in_router(model: SwitchTransformer) -> None:
    layer = sparse_layers(model)["decoder.blocks.1.feed_forward"]
    layer.router.register_forward_hook(lambda module, given, logits: logits * math.nan)


def lose_in_decoder(model: SwitchTransformer) -> None:
    model.decoder.register_forward_hook(lambda module, given, out: (out[0] * math.nan, out[1]))


def lose_in_expert(model: SwitchTransformer) -> None:
    for stack in ("encoder", "decoder"):  # the backward pass comes to the decoder first
        layer = sparse_layers(model)[f"{stack}.blocks.1.feed_forward"]
        layer.experts.wi.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(2), math.inf))


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (lose_in_router, ("nan", "router", "decoder.blocks.1.feed_forward")),
        (lose_in_decoder, ("neg_log_perplexity",)),
        (lose_in_expert, ("inf", "decoder.blocks.1.feed_forward.layer.experts.2.wi")),
    ],
)
def test_the_message_names_the_router_or_else_the_loss_or_else_the_experts_gradient(
    lose: Callable[[SwitchTransformer], None], words: tuple[str, ...]
) -> None:
    run = Run(a_model())
    lose(run.model)
    with pytest.raises(NumericsError, match=naming(*words, "rank 0")):
        run.fit()


def test_a_stop_does_not_hand_out_a_step_that_is_lost() -> None:
    """The caller saves after a stop: what it saves must have been looked at."""
    run = Run()
    poisoned(run, 1)
    objective = run.objective

    def stopping(model: nn.Module, batch: Batch) -> StepLoss:
        run.stop.requested = True
        return objective(model, batch)

    run.objective = stopping
    with pytest.raises(NumericsError, match="step 1"):
        run.fit(Do(100, lambda state: None))


def test_a_step_without_any_target_moves_by_the_balance_loss_alone() -> None:
    run = Run(a_model())
    run.optimizer = Still(dict(run.model.named_parameters()))

    def untargeted(model: nn.Module, batch: Batch) -> StepLoss:
        return cross_entropy(model, Batch(batch.inputs_BS, torch.zeros_like(batch.targets_BT)))

    run.objective = untargeted
    run.fit(steps=1)
    norm = run.state.metrics_since_log["gradient_norm"].value()
    assert torch.isfinite(norm)
    assert norm > 0
