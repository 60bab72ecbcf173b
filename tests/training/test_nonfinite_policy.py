"""What a run does when a number is not finite: by each policy, what it leaves out and what it then is like.

That all ranks do the same, at every place where a number may be lost, is in tests/distributed/test_nonfinite_ranks.py.
"""

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from checkpointed_run import idle
from doubles import Do, KeepingConsole
from messages import naming
from test_loop import Run, poisoned, weights

from switchcli.errors import NumericsError
from switchcli.training.config import NonfiniteSpec
from switchcli.training.nonfinite import NonFiniteHandler
from switchcli.training.state import TrainState

ERROR = NumericsError("step 5: it is lost", "mend it")


def handler(
    policy: str,
    said: list[str],
    restore: Callable[[TrainState], bool] = lambda state: False,
    note_skipped: Callable[[Mapping[str, object]], None] = lambda record: None,
    **settings: int,
) -> NonFiniteHandler:
    """A handler whose warnings are added to `said`."""
    console, run = KeepingConsole(), SimpleNamespace(restore=restore, note_skipped=note_skipped)
    console.warnings = said
    return NonFiniteHandler(NonfiniteSpec.model_validate({"policy": policy, **settings}), run, console)


def test_a_run_that_skips_a_step_is_the_run_without_its_batch() -> None:
    run, like, seen, said = Run(), Run(), list[int](), list[str]()
    poisoned(run, 1)
    records: list[Mapping[str, object]] = []
    run.nonfinite = handler("skip", said, note_skipped=records.append)
    assert run.fit(Do(1, lambda state: seen.append(state.step)))
    idle(like.optimizer, like.state, range(1, 2))
    like.fit()
    assert torch.equal(weights(run), weights(like))
    assert run.state.skipped_steps == [(1, 1)]
    assert records == [{"step": 1, "skipped_steps": [(1, 1)]}]
    assert seen == [1, 2]
    assert int(run.state.metrics_since_log["gradient_norm"].weight) == 1
    assert len(said) == 1
    assert re.search(naming("step 1", "nan", "decoder.final_norm.weight"), said[0])
    assert re.search(r"step 1\b.*step 1\b.*\b1\b.*\b10\b.*train\.nonfinite", said[0])


@pytest.mark.integration
def test_a_run_that_rolls_back_is_the_run_without_the_batches_since_its_checkpoint() -> None:
    run, like, saved, said = Run(), Run(), dict[str, torch.Tensor](), list[str]()

    def tensors() -> dict[str, torch.Tensor]:
        return {**dict(run.model.named_parameters()), **run.optimizer.state()}

    def save(state: TrainState) -> None:
        saved.update({name: tensor.detach().clone() for name, tensor in tensors().items()})

    @torch.no_grad()
    def restore(state: TrainState) -> bool:
        for name, tensor in tensors().items():
            tensor.copy_(saved[name])
        state.step, state.seconds = 2, 0.0
        return True

    poisoned(run, 4)
    run.nonfinite = handler("roll_back", said, restore)
    assert run.fit(Do(2, save), steps=6)
    idle(like.optimizer, like.state, range(3, 5))
    like.fit(steps=6)
    assert torch.equal(weights(run), weights(like))
    assert run.state.skipped_steps == [(3, 4)]
    assert run.state.step == 6
    assert re.search(r"step 2\b.*steps 3\b.*\b4\b.*train\.nonfinite", said[0])


class Noted(Do):
    """A callback that is not of the weights."""

    depends_on_weights = False


def test_callbacks_that_are_of_the_weights_are_called_again_where_one_meets_such_a_number() -> None:
    """With the weights of before: an evaluation that was of the lost ones is of these now, and is saved with them."""
    run, calls, back, others = Run(first=2), list[int](), list[int](), list[tuple[str, int]]()

    def look(state: TrainState) -> None:
        calls.append(state.step)
        if calls.count(4) == 1 and state.step == 4:
            raise ERROR

    def restore(state: TrainState) -> bool:
        back.append(state.step)
        state.step = 2
        return True

    run.nonfinite = handler("roll_back", [], restore)
    noted = Noted(2, lambda state: others.append(("log", state.step)))
    evaluated = Do(2, lambda state: others.append(("evaluation", state.step)))
    assert run.fit(noted, evaluated, Do(2, look), steps=4)
    assert calls == [4, 4]
    assert others == [("log", 4), ("evaluation", 4), ("evaluation", 4)]
    assert back == [4]
    assert run.state.skipped_steps == [(3, 4)]


@pytest.mark.parametrize(("policy", "updated"), [("stop", False), ("stop", True), ("skip", True), ("roll_back", False)])
def test_what_cannot_be_gone_on_from_ends_the_run(policy: str, updated: bool) -> None:
    """An update that is made cannot be skipped, and without a checkpoint there is nothing to go back to."""
    state = TrainState(step=4)
    nonfinite = handler(policy, [])
    with pytest.raises(NumericsError, match="step 5: it is lost: mend it"):
        nonfinite(ERROR, state, 5, updated)
    assert state == TrainState(step=4)


def test_a_run_that_is_lost_too_often_ends_and_says_how_often() -> None:
    state, nonfinite = TrainState(step=4), handler("skip", [], at_most=2)
    for step in (5, 6):
        nonfinite(ERROR, state, step, updated=False)
    assert state.step == 6
    for at_most in (2, 1):  # which may have been lowered meanwhile
        nonfinite = handler("skip", [], at_most=at_most)
        with pytest.raises(NumericsError, match=rf"step 5\b.*\b2\b.*train\.nonfinite\.at_most\b\D+{at_most}\b"):
            nonfinite(ERROR, state, 7, updated=False)
