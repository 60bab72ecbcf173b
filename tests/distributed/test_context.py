"""DistributedContext: failures of the main rank reach all, integers add up, precision is the recipe's."""

import itertools
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import on_ranks
from tiny_model import a_model

from switchcli.distributed import context as contexts
from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError, DistributedError, SwitchError


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
    """What the first rank raises if the second does not answer: within the time of a step, before that one gives up."""
    contexts.STEP_TIMEOUT = timedelta(seconds=10)
    context = DistributedContext("cpu", "float32")
    if context.rank:
        for _ in range(1200):
            if (folder / "said").exists():
                return ""
            time.sleep(0.1)
        context.any_rank(False)
        return ""
    try:
        context.any_rank(False)
    except SwitchError as error:
        (folder / "said").touch()
        return type(error).__name__
    return "nothing"


def test_a_rank_that_does_not_answer_is_given_up_after_the_time_of_a_step(tmp_path: Path) -> None:
    assert on_ranks(2, without_an_answer, tmp_path) == ["LostRankError", ""]
