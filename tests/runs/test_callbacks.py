"""Hooks: when they are due, what a record says, that alarms reach the console, held-out figures."""

import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubles import KeepingConsole, Records, StopAfter, a_run
from messages import naming
from tiny_model import a_model, rows
from torch import nn

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.errors import NumericsError
from switchcli.metric_names import HELD_OUT
from switchcli.runs.train import callbacks
from switchcli.runs.train.callbacks import EvaluationCallback, LogCallback, ValidationCallback
from switchcli.spec import PAD
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.training.loss import StepLoss
from switchcli.training.state import Mean, Metrics, TrainState
from switchcli.training.validation import HeldOutText

NO_STOP = StopRequest()
EVEN = [10.0, 10.0, 10.0]


def double(value: float | list[list[float]]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def window(load: list[list[float]]) -> Metrics:
    """The metrics of ten steps."""
    tokens_L = double(load).sum(1)
    return {
        "neg_log_perplexity": Mean(double(-30.0), double(10.0)),
        "gradient_norm": Mean(double(5.0), double(10.0)),
        "layer_load": Mean(double(load), double(4.0)),
        "layer_dropped_fraction": Mean(torch.zeros_like(tokens_L), tokens_L),
    }


class Mixed(BatchSource):
    def batch(self, step: int, first: int, count: int) -> Batch:
        raise AssertionError("nothing is trained")

    def record(self, step: int) -> Mapping[str, Any]:
        return {"mixture": {"de": step / 100}}


class Written:
    """A Log with what it wrote and what it warned of."""

    def __init__(self, state: TrainState, every_steps: int = 10) -> None:
        log, console = Records(), KeepingConsole()
        self.records, self.warnings = log.written, console.warnings
        self.loader = SimpleNamespace(seconds_waited=2.0)
        """Its seconds: by steps for their batches, from the start on."""
        run = a_run(
            DistributedContext("cpu", "float32"),
            log,
            state=state,
            source=Mixed(),
            console=console,
            every_steps=every_steps,
            batch_tokens=512,
            flops_per_step=10**6,
            layers=("first", "second"),
        )
        self.log = LogCallback(run, self.loader, ())

    def after(self, load: list[list[float]]) -> list[str]:
        """The warnings of one more window."""
        told = len(self.warnings)
        self.log(
            TrainState(
                step=10 * (len(self.records) + 1), metrics_since_log=window(load), seconds=len(self.records) + 1.0
            )
        )
        return self.warnings[told:]


@pytest.mark.parametrize(
    ("step", "calls"),
    # Due at 5, 10 and 12; an evaluation that is due at the step itself is still to come.
    [(0, 3), (1, 3), (5, 3), (6, 2), (10, 2), (11, 1), (12, 1)],
)
def test_the_time_left_counts_the_evaluations_to_come(step: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(EvaluationCallback):
        def evaluate(self, state: TrainState) -> None:
            pass

    slow = Slow(5, "score")
    assert slow.seconds_left(step, 12) == 0.0  # nothing is measured yet
    times = iter([1.0, 4.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(times))
    slow(TrainState())
    assert slow.seconds_left(step, 12) == 3.0 * calls


def test_a_record_holds_means_rates_and_times_and_empties_the_window() -> None:
    state = TrainState(step=20, seconds=4.0)
    written = Written(state)
    state.step, state.seconds, state.targets_seen = 30, 9.0, 777
    state.metrics_since_log = window([[3.0, 0.0], [1.0, 2.0]])
    written.loader.seconds_waited += 0.25
    written.log(state)
    assert state.metrics_since_log == {}
    assert written.records == [
        {
            "step": 30,
            "neg_log_perplexity": -3.0,
            "loss": 3.0,
            "gradient_norm": 0.5,
            "max_load": 2.0,
            "dead_experts": 1.0,
            "layers": {
                "first": {"load": [3, 0], "dropped_fraction": 0.0, "max_load": 2.0, "load_entropy": 0.0},
                "second": {
                    "load": [1, 2],
                    "dropped_fraction": 0.0,
                    "max_load": pytest.approx(4 / 3),
                    "load_entropy": pytest.approx(math.log(3) - 2 / 3 * math.log(2)),
                },
            },
            "learning_rate": 0.01,
            "targets_seen": 777,
            "input_tokens": 30 * 512,
            "seconds": 9.0,
            "tokens_per_second": 1024.0,
            "flops_per_second": 2e6,
            "data_wait_fraction": 0.05,
            "seconds_left": 35.0,
            "mixture": {"de": 0.3},
        }
    ]


def test_dead_experts_are_named_once() -> None:
    written = Written(TrainState())
    dead = [[10.0, 0.0, 11.0, 0.0], [5.0, 5.0, 5.0, 5.0]]
    (said,) = [warning for _ in range(12) for warning in written.after(dead)]
    assert re.search(naming("first", "100 steps", "[1, 3]"), said)
    assert written.records[0]["dead_experts"] == 2


@pytest.mark.parametrize(
    ("fractions", "told_after"),
    [
        ([0.5, 0.5, 0.5, 0.5], 2),
        ([0.5, 0.0, 0.5, 0.0, 0.5], None),
        ([0.05, 0.11, 0.11, 0.0, 0.9, 0.9], 3),
        ([0.09] * 5, None),
    ],
)
def test_steps_that_wait_for_their_batches_in_two_windows_on_end_are_told_of_once(
    fractions: list[float], told_after: int | None
) -> None:
    written = Written(TrainState())
    told = []
    for number, fraction in enumerate(fractions, 1):
        written.loader.seconds_waited += fraction  # of the second that each window takes
        if warnings := written.after([EVEN, EVEN]):
            told.append((number, *warnings))
    assert [record["data_wait_fraction"] for record in written.records] == pytest.approx(fractions)
    if told_after is None:
        assert told == []
    else:
        ((number, warning),) = told
        assert number == told_after
        share = f"{fractions[number - 1]:.0%}"
        assert re.search(naming(share, "$SWITCHCLI_CACHE", "data.access=prepared"), warning)


def a_validation(
    model: nn.Module, log: Records, texts: Mapping[str, HeldOutText], stop: StopRequest | StopAfter = NO_STOP
) -> ValidationCallback:
    run = a_run(DistributedContext("cpu", "float32"), log, model=model, texts=texts, every_steps=5)
    return ValidationCallback(run, stop)


ONE = {"": HeldOutText(lambda first, count: rows(9, first, count), 4, 100)}
DE = HeldOutText(lambda first, count: rows(9, first, count), 4, 100)
FR = HeldOutText(lambda first, count: rows(8, first, count), 2, None)


def test_held_out_notes_its_figure_in_the_state_and_in_the_record() -> None:
    state, log = TrainState(step=5), Records()
    a_validation(a_model(), log, ONE)(state)
    num_targets = int((ONE[""].rows(0, 4).targets_BT != PAD).sum())
    bits = -state.eval_metrics[HELD_OUT] / math.log(2) * num_targets / 100
    assert -4.5 < state.eval_metrics[HELD_OUT] < -3.0  # about ln 37 at the start
    assert log.written == [
        {
            "step": 5,
            "held_out/neg_log_perplexity": state.eval_metrics[HELD_OUT],
            "held_out/loss": -state.eval_metrics[HELD_OUT],
            "held_out/dropped_fraction": pytest.approx(0.0, abs=0.5),
            "held_out/bits_per_byte": pytest.approx(bits),
        }
    ]
    assert state.bits_per_byte == pytest.approx(bits)
    assert state.texts == {
        "": {"neg_log_perplexity": state.eval_metrics[HELD_OUT], "bits_per_byte": pytest.approx(bits)}
    }


def test_texts_are_noted_one_by_one_and_together_by_their_targets() -> None:
    state, log, model = TrainState(step=5), Records(), a_model()
    a_validation(model, log, {"de": DE, "fr": FR})(state)
    alone = {}
    for label, text in (("de", DE), ("fr", FR)):
        other = TrainState(step=5)
        a_validation(model, Records(), {"": text})(other)
        alone[label] = other.texts[""]
    assert state.texts == alone
    assert alone["de"].keys() == {"neg_log_perplexity", "bits_per_byte"}
    assert alone["fr"].keys() == {"neg_log_perplexity"}
    assert alone["de"]["neg_log_perplexity"] != alone["fr"]["neg_log_perplexity"]
    weights = [int((text.rows(0, text.num_rows).targets_BT != PAD).sum()) for text in (DE, FR)]
    values = [figures["neg_log_perplexity"] for figures in alone.values()]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    assert state.eval_metrics[HELD_OUT] == pytest.approx(mean, rel=1e-6)
    (record,) = log.written
    assert record["texts"] == state.texts
    assert "held_out/bits_per_byte" not in record  # of one of them the bytes are not known


@pytest.mark.parametrize("seen", [0, 2])
def test_a_stop_ends_an_evaluation_between_two_batches_and_notes_nothing(seen: int) -> None:
    """The stop comes within the first text or the second."""
    stop, log = StopAfter(seen), Records()
    before = TrainState(step=4, eval_metrics={HELD_OUT: -2.0}, evaluated_step=4, texts={"de": {}}, bits_per_byte=1.0)
    state, texts = before.model_copy(update={"step": 5}), {"de": DE, "fr": FR}
    validation = a_validation(a_model(), log, texts, stop)
    with pytest.raises(StopTraining):
        validation(state)
    assert (stop.looked, log.written, state) == (seen + 1, [], before.model_copy(update={"step": 5}))
    assert validation.is_pending(state, 20)
    assert not validation.is_pending(before, 20)  # not due
    again = a_validation(a_model(), log, texts)
    again(state)
    assert (state.evaluated_step, len(log.written)) == (5, 1)
    assert not again.is_pending(state, 20)


def test_a_held_out_figure_that_is_no_number_ends_the_run_before_it_is_noted() -> None:
    model, state, log = a_model(), TrainState(step=5, eval_metrics={HELD_OUT: -2.0}), Records()
    with torch.no_grad():
        model.embedding.fill_(math.nan)
    with pytest.raises(NumericsError, match=naming("step 5", "held-out", "nan")) as raised:
        a_validation(model, log, ONE)(state)
    assert raised.value.exit_code == 5
    assert state.eval_metrics[HELD_OUT] == -2.0
    assert log.written == []


def test_a_held_out_set_without_a_target_is_no_reason_to_stop() -> None:
    def nothing(model: nn.Module, batch: Batch) -> StepLoss:
        return StepLoss(torch.zeros(()), None, {"neg_log_perplexity": Mean(double(0.0), double(0.0))})

    state = TrainState(step=5)
    a_validation(a_model(), Records(), {"": ONE[""]._replace(objective=nothing)})(state)
    assert state.eval_metrics[HELD_OUT] == 0.0
