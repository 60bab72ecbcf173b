"""TrainState through JSON: nothing is rounded, and the window of all ranks counts once."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchcli.train.metrics import Mean, Metrics
from switchcli.train.state import TrainState

CPU = torch.device("cpu")
doubles = st.floats(allow_nan=False, allow_infinity=False)


def double(value: float | list[float]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def restored(text: bytes, with_window: bool = True) -> TrainState:
    state = TrainState()
    state.restore(text, CPU, with_window)
    return state


@given(
    step=st.integers(0, 2**40),
    targets=st.integers(0, 2**60),
    seconds=st.floats(0, 1e9),
    held_out=st.none() | doubles,
    total=doubles,
    load=st.lists(st.lists(doubles, min_size=2, max_size=2), min_size=1, max_size=3),
)
def test_a_state_comes_back_bit_by_bit(
    step: int, targets: int, seconds: float, held_out: float | None, total: float, load: list[list[float]]
) -> None:
    window: Metrics = {"loss": Mean(double(total), double(3.0)), "load": Mean(double(load), double(1.0))}
    before = TrainState(step, targets, seconds, held_out, window)
    after = restored(before.to_json(window))
    assert (after.step, after.targets_seen, after.seconds) == (step, targets, seconds)
    assert after.held_out_neg_log_perplexity == held_out
    assert after.window.keys() == window.keys()
    for name, mean in window.items():
        for ours, theirs in zip(after.window[name], mean, strict=True):
            assert ours.dtype == torch.float64
            assert torch.equal(ours, theirs)
    assert after.to_json(after.window) == before.to_json(window)


def test_one_rank_takes_the_window_and_the_others_start_from_zero() -> None:
    window = {"load": Mean(double([1.0, 2.0]), double(4.0))}
    text = TrainState().to_json(window)
    assert torch.equal(restored(text).window["load"].total, double([1.0, 2.0]))
    other = restored(text, with_window=False).window["load"]
    assert torch.equal(other.total, double([0.0, 0.0]))
    assert other.weight == 0


def test_the_first_held_out_figure_is_kept_and_the_last_has_its_step() -> None:
    state = TrainState()
    for step, figure in ((0, -5.0), (100, -2.0), (200, -3.0)):
        state.step = step
        state.note_held_out(figure)
    state.step = 250
    after = restored(state.to_json({}))
    assert (after.first_held_out_neg_log_perplexity, after.held_out_neg_log_perplexity) == (-5.0, -3.0)
    assert (after.step, after.held_out_step) == (250, 200)


def test_the_text_is_json_that_any_program_reads() -> None:
    text = TrainState(step=3, held_out_neg_log_perplexity=-1.5).to_json({})
    assert json.loads(text) == {
        "step": 3,
        "targets_seen": 0,
        "seconds": 0.0,
        "held_out_neg_log_perplexity": -1.5,
        "held_out_step": None,
        "first_held_out_neg_log_perplexity": None,
        "window": {},
    }


def test_a_number_that_json_does_not_know_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        TrainState(held_out_neg_log_perplexity=math.nan).to_json({})
