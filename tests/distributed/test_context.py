"""DistributedContext: failures of the main rank reach all, integers add up, precision is the recipe's."""

import itertools
import os
import platform
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import model_of, on_ranks
from tiny_model import SPARSE, a_model, rows

from switchcli.distributed import context as contexts
from switchcli.distributed.context import DistributedContext, HostCopy
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.errors import CheckpointError, DistributedError, SwitchError
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens


def two_ranks() -> dict[str, Any]:
    context = DistributedContext("cpu", "float32")
    model = a_model(seed=context.rank)
    context.wrap(model)
    return {
        "failures": {
            (method, failing): outcome(context, method, failing)
            for method, failing in [("main_only", 0), *itertools.product(("on_all_ranks", "main_first"), (None, 0, 1))]
        },
        "after": context.main_only(lambda: context.rank + 41),
        "sum": context.sum_over_ranks([1, context.rank, 2**40]),
        "from main": context.from_main(7 - context.rank),
        "tensor": context.all_reduce(torch.full((2,), 0.5 + context.rank, dtype=torch.float64)).tolist(),
        "main": context.is_main,
        "weight": model.embedding.detach().numpy(),
    }


class Outcome(NamedTuple):
    """How a rank leaves a method of the context: the error's kind and exit code, if any, and words or a result."""

    error: str
    exit_code: int
    words: str


def outcome(context: DistributedContext, method: str, failing: int | None) -> Outcome:
    def write() -> str:
        if context.rank == failing:
            raise CheckpointError("no space left: free some")
        return f"written by {context.rank}"

    try:
        return Outcome("", 0, getattr(context, method)(write))
    except SwitchError as error:
        return Outcome(type(error).__name__, error.exit_code, str(error))


@pytest.fixture(scope="module")
def main_and_other() -> list[dict[str, Any]]:
    return on_ranks(2, two_ranks)


def test_two_ranks_act_as_one(main_and_other: list[dict[str, Any]]) -> None:
    main, other = main_and_other
    assert (main["after"], other["after"]) == (41, None)
    assert main["sum"] == other["sum"] == [2, 1, 2**41]
    assert main["from main"] == other["from main"] == 7
    assert main["tensor"] == other["tensor"] == [2.0, 2.0]
    assert (main["main"], other["main"]) == (True, False)
    assert (main["weight"] == other["weight"]).all()  # wrapping hands out the main rank's weights


def test_what_a_rank_fails_with_is_said_by_the_main_one(main_and_other: list[dict[str, Any]]) -> None:
    main, other = (rank["failures"] for rank in main_and_other)
    for method in ("on_all_ranks", "main_first"):
        assert main[method, None] == ("", 0, "written by 0")
        assert other[method, None] == ("", 0, "written by 1")
        assert main[method, 1][:2] == ("RankError", 4)
        assert re.search(r"\brank 1\b.*no space left: free some", main[method, 1].words)
        assert other[method, 1][:2] == ("OtherRankError", 4)
    for method in ("main_only", "on_all_ranks", "main_first"):
        assert main[method, 0] == ("CheckpointError", 4, "no space left: free some")
        assert other[method, 0][:2] == ("OtherRankError", 4)  # the main rank's exit code, and no words


def test_autocast_is_bfloat16_only_when_the_recipe_says_so() -> None:
    x = torch.ones(2, 2)
    with DistributedContext("cpu", "float32").autocast():
        assert (x @ x).dtype == torch.float32
    with DistributedContext("cpu", "bfloat16").autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_ranks_that_do_not_see_one_another_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    DistributedContext("cpu", "float32")  # accelerate keeps the first answer of a process: one rank
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match=r"\b2 ranks\b.*\b1\b.*--processes\b.*\btorchrun\b"):
        DistributedContext("cpu", "float32")


def differences_of_ranks(*values_by_rank: dict[str, str]) -> list[tuple[str, int] | None]:
    context = DistributedContext("cpu", "float32")
    return [context.first_difference(values_by_rank[context.rank]), context.first_difference({"a": "equal"})]


@pytest.mark.integration
def test_the_first_difference_among_ranks_has_its_name_and_its_lowest_rank() -> None:
    values = {"a": "1", "b": "2", "c": "3"}
    others = [{**values, "c": "4"}, {**values, "b": "4", "c": "4"}]
    assert on_ranks(3, differences_of_ranks, values, *others) == [[("b", 2), None]] * 3


def without_an_answer(folder: Path) -> str:
    """What the first rank raises if the second does not answer: within the time of a step, before that one gives up.

    In the first step it waits longer.
    """
    contexts.join_ranks("cpu")
    contexts.STEP_TIMEOUT, contexts.FIRST_STEP_TIMEOUT = timedelta(seconds=10), timedelta(minutes=5)
    context = DistributedContext("cpu", "float32")
    if context.rank:
        time.sleep(12)
        context.any_rank(False)
        context.end_first_step()
        for _ in range(1200):
            if (folder / "said").exists():
                return ""
            time.sleep(0.1)
        context.any_rank(False)
        return ""
    context.any_rank(False)  # of the first step: it waits longer
    context.end_first_step()
    try:
        context.any_rank(False)
    except SwitchError as error:
        (folder / "said").touch()
        return type(error).__name__
    return "nothing"


def test_a_rank_that_does_not_answer_is_given_up_after_the_time_of_a_step(tmp_path: Path) -> None:
    assert on_ranks(2, without_an_answer, tmp_path) == ["LostRankError", ""]


def test_a_number_on_its_way_to_the_host_is_read_once_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a CUDA scalar: the event is recorded behind the copy, and waited for before it is read."""
    calls: list[str] = []

    class Event:
        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

    class Scalar:
        is_cuda = True

        def to(self, device: str, non_blocking: bool) -> torch.Tensor:
            calls.append(f"copy to {device}{', without a wait' * non_blocking}")
            return torch.tensor(0.5)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = HostCopy(Scalar())  # type: ignore[arg-type]
    assert calls == ["copy to cpu, without a wait", "record"]
    assert float(copy) == 0.5
    assert calls[2:] == ["wait"]
    assert float(HostCopy(torch.tensor(0.25))) == 0.25


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_freed_tensors_memory_serves_the_next_without_new_pages() -> None:
    """In the main thread of a process of its own, as in a run: of other threads' memory glibc keeps less."""
    script = """
import resource
import torch
from switchcli.distributed.context import DistributedContext
DistributedContext("cpu", "float32")
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
for _ in range(10): torch.ones(2**24)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**14  # 64 MiB: the pages of one of them


def steps_of_shards() -> list[int]:
    """Hooks on the weight that a sharded model returns with its output, after each of three steps."""
    torch.set_num_threads(1)
    context = DistributedContext("cpu", "float32", ParallelSpec(shard="zero3"))
    model, found = model_of(SPARSE, context)[0], []
    for step in range(3):
        batch = rows(step, 0, 2)
        microbatches = [Microbatch(0, batch, RealTokens.of(batch))]
        accumulate_gradients(model.train(), cross_entropy, microbatches, microbatches[0].real, context, "")
        with torch.no_grad():
            found.append(len(model(*rows(step, 0, 2)[:2]).vocabulary.weight_VD._backward_hooks or ()))
    return found


@pytest.mark.integration
def test_no_hooks_pile_up_on_the_weight_of_the_softmax() -> None:
    assert on_ranks(2, steps_of_shards) == [[0, 0, 0]] * 2
