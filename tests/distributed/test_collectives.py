"""Collectives: all_gather under both names that torch has given it, that of torch 2.13 and that of older versions."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from switchcli.distributed.collectives import all_gather
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ALONE


def gathered(old_torch: bool) -> tuple[list[list[int]], list[str], bool]:
    """Gather a matrix and a text on two ranks; also return whether torch 2.13's name was called."""
    called = False
    if hasattr(dist, "all_gather_single"):
        new_name = dist.all_gather_single
        if old_torch:
            del dist.all_gather_single  # the module's attribute: torch 2.11 has none
        else:

            def counted(*arguments: object, **named: object) -> object:
                nonlocal called
                called = True
                return new_name(*arguments, **named)

            dist.all_gather_single = counted
    context = DistributedContext("cpu", "float32", ALONE)
    own = torch.arange(6).view(3, 2) + 100 * context.rank
    found = own.new_empty(6, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls the older name deprecated
        all_gather(found, own, None)
        texts = context.all_gather_text("main" if context.rank == 0 else "second rank")
    return found.tolist(), texts, called


@pytest.mark.parametrize("old_torch", [False, True])
def test_gathering_is_the_same_under_the_new_and_the_old_name(old_torch: bool) -> None:
    rows = [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]
    new_name = hasattr(dist, "all_gather_single") and not old_torch
    assert on_ranks(2, gathered, old_torch) == [(rows, ["main", "second rank"], new_name)] * 2
