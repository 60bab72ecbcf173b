"""The loop: what a step does and in which order, how it stops, how it fails, and that a run goes on as if never left.

That its gradient is the one meant, on any number of ranks, is in tests/distributed/test_ranks.py.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from doubles import Do, LossAt, Source, trained
from messages import naming
from tiny_model import NOISY, a_model, rows
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopRequest
from switchcli.errors import NumericsError
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.training.callbacks import Callback
from switchcli.training.config import TrainSpec
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import StepLoss, cross_entropy
from switchcli.training.microbatches import Microbatches, RealTokens
from switchcli.training.nonfinite import ALWAYS_STOP
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.optimizers import Optimizer
from switchcli.training.schedules import Linear
from switchcli.training.state import TrainState

STEPS = 6
SCHEDULE = Linear(learning_rate=0.01, warmup_steps=2)


class Run:
    """All that `fit` takes, on a tiny model with dropout and jitter."""

    def __init__(self, model: SwitchTransformer | None = None) -> None:
        self.state = TrainState()
        self.model = a_model(NOISY) if model is None else model
        self.optimizer: Optimizer = Adafactor(min_dim_to_factor=8).build(dict(self.model.named_parameters()))
        self.stop = StopRequest()
        self.objective: Callable[[nn.Module, Batch], StepLoss] = cross_entropy
        self.nonfinite = ALWAYS_STOP
        self.steps_seen: list[int] = []

    def fit(self, *callbacks: Callback, steps: int = STEPS, seed: int = 3, clip_norm: float | None = 1.0) -> bool:
        def noted(step: int, first: int, count: int) -> Batch:
            self.steps_seen.append(step)
            return rows(step, first, count)

        return trained(
            self.state,
            self.model,
            LossAt(lambda step: self.objective),
            Microbatches(Source(noted), 4, 2, 1, 0, 1),
            self.optimizer,
            SCHEDULE,
            DistributedContext("cpu", "float32"),
            callbacks,
            TrainSpec(steps=steps, batch_tokens=1, seed=seed, clip_norm=clip_norm),
            self.stop,
            nonfinite=self.nonfinite,
        )


class Rates(Optimizer):
    """Notes the learning rates, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(dict(model.named_parameters()))
        self.rates: list[float] = []

    def step(self, learning_rate: float) -> None:
        self.rates.append(learning_rate)

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def weights(run: Run) -> torch.Tensor:
    return torch.cat(
        [tensor.flatten().float() for tensor in (*run.model.parameters(), *run.optimizer.state().values())]
    )


def test_every_step_is_taken_once_with_its_own_data_and_rate() -> None:
    run = Run()
    run.optimizer = Rates(run.model)
    assert run.fit()
    assert run.steps_seen == [step for step in range(STEPS) for _ in range(2)]
    assert run.optimizer.rates == [SCHEDULE(step, STEPS) for step in range(STEPS)]
    assert run.state.step == STEPS
    assert run.state.targets_seen == sum(int((rows(step, 0, 4).targets_BT != PAD).sum()) for step in range(STEPS))
    assert run.state.seconds > 0.0


class Gradients(Optimizer):
    """Notes the gradients, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(dict(model.named_parameters()))
        self.gradients: list[torch.Tensor] = []

    def step(self, learning_rate: float) -> None:
        gradients = [weight.grad.flatten() for weight in self.parameters.values() if weight.grad is not None]
        self.gradients.append(torch.cat(gradients))

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def gradient(clip_norm: float | None) -> tuple[torch.Tensor, float]:
    """The gradient that the optimizer gets in the first step, and the norm that the run reports."""
    run = Run()
    run.optimizer = Gradients(run.model)
    run.fit(steps=1, clip_norm=clip_norm)
    return run.optimizer.gradients[0], float(run.state.metrics_since_log["gradient_norm"].value())


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.999, 1.001, 2.0, 100.0])
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
    calls: list[tuple[str, int]] = []
    run = Run()
    run.fit(
        Do(2, lambda state: calls.append(("a", state.step))),
        Do(3, lambda state: calls.append(("b", state.step))),
        steps=7,
    )
    assert calls == [("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6), ("a", 7), ("b", 7)]


def test_the_window_gathers_what_the_steps_said_in_float64() -> None:
    run = Run()
    run.fit(steps=3)
    window = run.state.metrics_since_log
    assert window["neg_log_perplexity"].weight == run.state.targets_seen
    assert window["gradient_norm"].weight == 3
    assert window["auxiliary_loss/decoder"].weight == run.state.targets_seen
    assert all(part.dtype == torch.float64 for mean in window.values() for part in mean)


def test_a_run_that_is_left_and_taken_up_again_is_bit_equal_to_one_that_is_not() -> None:
    straight, first = Run(), Run()
    straight.fit()
    assert first.fit(Do(1, lambda state: setattr(first.stop, "requested", state.step == 3))) is False
    assert first.state.step == 3
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


def test_ranks_are_told_the_place_of_each_microbatch_in_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []

    def noted(context: DistributedContext, model: nn.Module, position: int, count: int) -> AbstractContextManager[None]:
        places.append((position, count))
        return nullcontext()

    monkeypatch.setattr(DistributedContext, "synchronize_gradients", noted)
    Run().fit(steps=2)
    assert places == [(1, 2), (2, 2)] * 2


def test_noise_depends_on_the_seed() -> None:
    one, same, other = Run(), Run(), Run()
    one.fit(seed=1)
    same.fit(seed=1)
    other.fit(seed=2)
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))


def test_noise_goes_by_the_number_of_a_microbatch_among_those_of_all_ranks() -> None:
    def gradient(first: int, last: int) -> torch.Tensor:
        model, microbatches = a_model(NOISY).train(), Microbatches(rows, 4, 2, 1, 0, 1)(0)[first:last]
        context, real = DistributedContext("cpu", "float32"), RealTokens(40, 20)
        accumulate_gradients(model, cross_entropy, microbatches, real, context, "seed")
        assert model.embedding.grad is not None
        return model.embedding.grad

    torch.testing.assert_close(gradient(0, 1) + gradient(1, 2), gradient(0, 2))


def test_a_stop_before_the_first_step_does_nothing() -> None:
    run = Run()
    before = weights(run)
    run.stop.requested = True
    assert run.fit() is False
    assert run.state.step == 0
    assert torch.equal(weights(run), before)


def test_a_finished_run_has_nothing_left_to_do() -> None:
    run = Run()
    run.state.step = STEPS
    run.stop.requested = True
    assert run.fit(Do(1, lambda state: pytest.fail("no step, no callback"))) is True


def test_the_model_is_put_into_training() -> None:
    run = Run()
    run.model.eval()
    run.fit(steps=1)
    assert run.model.training


def poisoned(run: Run, step: int) -> None:
    """Make the gradient of `step` (from 1) not a number."""

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        loss = cross_entropy(model, batch)
        return loss._replace(target_sum=loss.target_sum * math.nan) if run.state.step + 1 == step else loss

    run.objective = objective


def test_a_gradient_that_is_no_number_ends_the_run_before_any_callback_sees_the_step() -> None:
    run, seen = Run(), []
    poisoned(run, 3)
    with pytest.raises(NumericsError, match=naming("step 3", "nan", "schedule.learning_rate")) as raised:
        run.fit(Do(1, lambda state: seen.append(state.step)))
    assert raised.value.exit_code == 5
    assert seen == [1, 2]


@pytest.mark.parametrize("every_steps", [4, 100])
def test_it_ends_the_run_also_when_no_callback_is_due(every_steps: int) -> None:
    run, seen = Run(), []
    poisoned(run, 3)
    with pytest.raises(NumericsError, match="step 3"):
        run.fit(Do(every_steps, lambda state: seen.append(state.step)))
    assert seen == []
    assert run.state.step <= 4  # it is looked at one step late at most
    run = Run()
    poisoned(run, 3)
    with pytest.raises(NumericsError, match="step 3"):
        run.fit(steps=3)


def test_the_message_names_the_router_or_else_the_loss_or_else_the_experts_gradient() -> None:
    run = Run(a_model())
    layer = sparse_layers(run.model)["decoder.blocks.1.feed_forward.layer"]
    layer.router.register_forward_hook(lambda module, given, logits: logits * math.nan)
    with pytest.raises(NumericsError, match=naming("nan", "router", "decoder.blocks.1.feed_forward.layer", "rank 0")):
        run.fit()
    run = Run(a_model())
    run.model.decoder.register_forward_hook(lambda module, given, out: (out[0] * math.nan, out[1]))
    with pytest.raises(NumericsError, match=naming("neg_log_perplexity", "rank 0")):
        run.fit()
    run = Run(a_model())
    layer = sparse_layers(run.model)["encoder.blocks.1.feed_forward.layer"]
    layer.experts.wi.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(2), math.inf))
    with pytest.raises(
        NumericsError, match=naming("inf", "encoder.blocks.1.feed_forward.layer.experts.2.wi", "rank 0")
    ):
        run.fit()


def test_a_stop_does_not_hand_out_a_step_that_is_lost() -> None:
    """The caller saves after a stop: what it saves must have been looked at."""
    run = Run()
    poisoned(run, 3)
    objective = run.objective

    def stopping(model: nn.Module, batch: Batch) -> StepLoss:
        run.stop.requested = run.state.step + 1 == 3
        return objective(model, batch)

    run.objective = stopping
    with pytest.raises(NumericsError, match="step 3"):
        run.fit(Do(100, lambda state: None))


def test_a_step_without_any_target_moves_by_the_balance_loss_alone() -> None:
    run = Run(a_model())
    run.optimizer = Rates(run.model)

    def untargeted(model: nn.Module, batch: Batch) -> StepLoss:
        return cross_entropy(model, Batch(batch.inputs_BS, torch.zeros_like(batch.targets_BT)))

    run.objective = untargeted
    run.fit(steps=1)
    norm = run.state.metrics_since_log["gradient_norm"].value()
    assert torch.isfinite(norm)
    assert norm > 0
