"""TrainState through JSON: nothing is rounded, and the window of all ranks counts once."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchcli.checkpoint.saved_state import Best
from switchcli.metric_names import HELD_OUT
from switchcli.training.state import Mean, Metrics, TrainState

CPU = torch.device("cpu")
doubles = st.floats(allow_nan=False, allow_infinity=False)


def double(value: float | list[float]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def restored(text: bytes, with_metrics: bool = True) -> TrainState:
    state = TrainState()
    state.restore(text, CPU, with_metrics)
    return state


@given(
    step=st.integers(0, 2**40),
    targets=st.integers(0, 2**60),
    seconds=st.floats(0, 1e9),
    figures=st.dictionaries(st.sampled_from(["", "cola", "\u2028\xe9"]), doubles),
    total=doubles,
    load=st.lists(st.lists(doubles, min_size=2, max_size=2), min_size=1, max_size=3),
)
def test_a_state_comes_back_bit_by_bit(
    step: int, targets: int, seconds: float, figures: dict[str, float], total: float, load: list[list[float]]
) -> None:
    window: Metrics = {"loss": Mean(double(total), double(3.0)), "load": Mean(double(load), double(1.0))}
    before = TrainState(
        step=step,
        targets_seen=targets,
        seconds=seconds,
        metrics_since_log=window,
        texts={"de": figures},
        bits_per_byte=seconds,
        position=[0, targets, step],
    )
    before.record_evaluation(figures)
    after = restored(before.to_json(window))
    assert (after.step, after.targets_seen, after.seconds) == (step, targets, seconds)
    assert after.eval_metrics == after.first_eval_metrics == figures
    assert after.best == {name: Best(figure, step) for name, figure in figures.items()}
    assert after.evaluated_step == step
    assert (after.texts, after.position) == ({"de": figures}, [0, targets, step])
    assert after.metrics_since_log.keys() == window.keys()
    for name, mean in window.items():
        for ours, theirs in zip(after.metrics_since_log[name], mean, strict=True):
            assert ours.dtype == torch.float64
            assert torch.equal(ours, theirs)
    assert after.to_json(after.metrics_since_log) == before.to_json(window)


def test_the_first_figures_the_last_and_the_best_are_kept_with_their_steps() -> None:
    state = TrainState()
    for step, cola, rte in ((0, -5.0, 50.0), (100, -2.0, 60.0), (200, -3.0, 60.0)):
        state.step = step
        state.record_evaluation({"cola": cola})
        state.record_evaluation({"rte": rte})  # an evaluation may have several parts
    state.step = 250
    after = restored(state.to_json({}))
    assert after == state
    assert after.first_eval_metrics == {"cola": -5.0, "rte": 50.0}
    assert after.eval_metrics == {"cola": -3.0, "rte": 60.0}
    assert (after.step, after.evaluated_step) == (250, 200)
    assert after.best == {"cola": Best(-2.0, 100), "rte": Best(60.0, 200)}  # of equals the last
    after.record_evaluation({"rte": 59.0})
    assert after.eval_metrics == {"rte": 59.0}  # the figures of one evaluation, not of several


def test_a_state_from_before_texts_and_streams_is_read() -> None:
    state = json.loads(TrainState(step=5).to_json({}))
    del state["texts"], state["bits_per_byte"], state["position"], state["skipped_steps"]
    assert restored(json.dumps(state).encode()) == TrainState(step=5)


def test_a_number_that_json_does_not_know_is_not_written() -> None:
    state = TrainState()
    state.eval_metrics[HELD_OUT] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        state.to_json({})


def test_one_rank_takes_the_window_and_the_others_start_from_zero() -> None:
    window = {"load": Mean(double([1.0, 2.0]), double(4.0))}
    text = TrainState().to_json(window)
    assert torch.equal(restored(text).metrics_since_log["load"].total, double([1.0, 2.0]))
    other = restored(text, with_metrics=False).metrics_since_log["load"]
    assert torch.equal(other.total, double([0.0, 0.0]))
    assert other.weight == 0
