"""What `train.nonfinite: skip` leaves out, and when it ends the run all the same.

That all ranks do the same, at every place where a number may be lost, is in tests/distributed/test_nonfinite_ranks.py.
"""

import math
import re

import pytest
import torch
from checkpointed_run import idle
from doubles import Do
from messages import naming
from test_loop import Run, poisoned, weights
from torch import nn

from switchcli.data.batch import Batch
from switchcli.errors import NumericsError
from switchcli.training.loss import StepLoss, cross_entropy
from switchcli.training.state import TrainState


def test_a_run_that_skips_a_step_is_the_run_without_its_batch() -> None:
    run, like, seen = Run(), Run(), list[int]()
    poisoned(run, 1)
    run.nonfinite = "skip"
    assert run.fit(Do(1, lambda state: seen.append(state.step)))
    idle(like.optimizer, like.state, range(1, 2))
    like.fit()
    assert torch.equal(weights(run), weights(like))
    assert run.state.skipped_steps == [1]
    assert seen == [1, 2]
    assert int(run.state.metrics_since_log["gradient_norm"].weight) == 1
    (said,) = run.said
    assert re.search(naming("step 1", "nan", "decoder.final_norm.weight"), said)
    assert re.search(r"step 1\b.*step 1\b.*\b1\b.*\b10\b.*train\.nonfinite", said)


def test_a_callback_that_meets_such_a_number_ends_the_run() -> None:
    """An update that is made cannot be skipped."""

    def look(state: TrainState) -> None:
        raise NumericsError("step 1: it is lost", "mend it")

    run = Run()
    run.nonfinite = "skip"
    with pytest.raises(NumericsError, match="step 1: it is lost: mend it"):
        run.fit(Do(1, look))
    assert (run.said, run.state.skipped_steps) == ([], [])


def test_a_run_that_never_recovers_ends_and_says_how_many_steps_it_left_out() -> None:
    def lost(model: nn.Module, batch: Batch) -> StepLoss:
        loss = cross_entropy(model, batch)
        return loss._replace(target_sum=loss.target_sum * math.nan)

    run = Run()
    run.objective, run.nonfinite = lost, "skip"
    with pytest.raises(NumericsError, match=r"step 11\b.*\b10\b.*train\.nonfinite"):
        run.fit(steps=20)
    assert run.state.skipped_steps == [*range(1, 11)]
