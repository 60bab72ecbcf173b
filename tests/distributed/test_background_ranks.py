"""Saves in the background of two ranks: the bytes of the foreground's, and one rank's full disk ends both."""

import errno
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doubles import NoWarnings, SaveEvery
from doubles import trained as trained_to_the_end
from ranks import on_ranks
from tiny_model import NOISY, rows

from switchcli.checkpoint import checkpoint
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.errors import SwitchError
from switchcli.model.init import initial_weights
from switchcli.model.transformer import SwitchTransformer
from switchcli.system import publish
from switchcli.system.signals import StopRequest
from switchcli.training import loop
from switchcli.training.checkpointer import DATA, Checkpointer
from switchcli.training.config import CheckpointSpec, TrainSpec
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState

STEPS, EVERY = 24, 8
FULL = (".tmp-00000016", "model")
"""The save that does not fit, on one rank, and its files."""


def slow_down_the_disk(seconds: float, full: bool) -> None:
    """Have a save take many steps. If the disk is `full`, it takes no file of one step's weights."""
    write_new = publish.write_new

    def write_slowly(path: Path, content: bytes | memoryview) -> None:
        time.sleep(seconds)
        if full and path.parent.name.startswith(FULL[0]) and path.name.startswith(FULL[1]):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_new(path, content)

    publish.write_new = write_slowly


def warn(message: str) -> None:
    raise AssertionError(message)


def trained(folder: Path, background: bool, full_on: int | None, parallel: ParallelSpec) -> tuple[str, str, int, int]:
    """How a run ends on this rank: kind, words and code of its error, and the step that it has reached."""
    torch.set_num_threads(1)
    loop.time = SimpleNamespace(perf_counter=lambda: 0.0)  # type: ignore[assignment]  # no clock in state.json
    context = DistributedContext("cpu", "float32", parallel)
    with torch.device("meta"):
        model = SwitchTransformer(NOISY)
    weights = context.parallelize(model)
    weights.load_full(initial_weights(NOISY, 0, weights.experts))
    state, optimizer = TrainState(), Adafactor(min_dim_to_factor=8).build(weights.parameters, weights.layouts)
    settings = CheckpointSpec(keep_last=9, background=background)
    slow_down_the_disk(0.02 * (1 + context.rank), context.rank == full_on)
    saver = Checkpointer(folder, weights, optimizer, context, {DATA: b"{}"}, settings)
    batches, stop = Microbatches(rows, 8, 2, context.dp_rank, context.dp_size), StopRequest()
    callbacks = [SaveEvery(EVERY, saver)]
    spec = TrainSpec(steps=STEPS, batch_tokens=1)
    wrapped, schedule = context.wrap(model), InverseSquareRoot()
    try:
        with saver.background_saves(stop, NoWarnings()):
            if not trained_to_the_end(
                state, wrapped, lambda _: cross_entropy, batches, optimizer, schedule, context, callbacks, spec, stop
            ):
                saver.save(state)
    except SwitchError as error:
        return type(error).__name__, str(error), error.exit_code, state.step
    return "", "", 0, state.step


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.integration
@pytest.mark.parametrize("parallel", [ALONE, ParallelSpec(expert=2)], ids=["data", "experts"])
def test_two_ranks_write_the_bytes_of_the_foreground(parallel: ParallelSpec, tmp_path: Path) -> None:
    for background in (False, True):
        folder = tmp_path / str(background)
        assert on_ranks(2, trained, folder, background, None, parallel) == [("", "", 0, STEPS)] * 2
        assert len(list(folder.glob("step-*/model-*"))) == 2 * STEPS // EVERY
    assert content(tmp_path / "False") == content(tmp_path / "True")


@pytest.mark.integration
@pytest.mark.parametrize("full_on", [0, 1])
def test_a_full_disk_of_one_rank_ends_both(full_on: int, tmp_path: Path) -> None:
    main, other = on_ranks(2, trained, tmp_path, True, full_on, ALONE)
    kind, words, code, step = main
    assert (kind, code) == (("CheckpointError", 4), ("RankError", 4))[full_on]
    assert "No space left on device" in words
    assert ("rank 1" in words) == (full_on == 1)
    assert (other[0], *other[2:]) == ("OtherRankError", 4, step)
    assert 16 <= step <= STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]
    found = checkpoint.latest(tmp_path, warn)
    assert found is not None
    assert found.step == EVERY
