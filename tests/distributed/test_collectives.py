"""Collectives: all_gather under both names that torch has given it, that of torch 2.13 and that of older versions."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from switchcli.distributed.collectives import all_gather
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ALONE

Gathered = tuple[list[list[int]], list[str], bool]


def gathered(context: DistributedContext, old_torch: bool) -> Gathered:
    """Gather a matrix and a text; also return whether torch 2.13's name was called."""
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls the older name deprecated
        if hasattr(dist, "all_gather_single"):
            new_name = dist.all_gather_single
            patch.setattr(
                dist, "all_gather_single", lambda *given, **named: called.append("") or new_name(*given, **named)
            )
            if old_torch:
                patch.delattr(dist, "all_gather_single")  # torch 2.11 has none
        own = torch.arange(6).view(3, 2) + 100 * context.rank
        found = own.new_empty(6, 2)
        all_gather(found, own, None)
        texts = context.all_gather_text("main" if context.rank == 0 else "second rank")
    return found.tolist(), texts, bool(called)


def both_ways() -> list[Gathered]:
    context = DistributedContext("cpu", "float32", ALONE)
    return [gathered(context, old_torch) for old_torch in (False, True)]


def test_gathering_is_the_same_under_the_new_and_the_old_name() -> None:
    rows = [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]
    new_name = hasattr(dist, "all_gather_single")
    assert on_ranks(2, both_ways) == [[(rows, ["main", "second rank"], used) for used in (new_name, False)]] * 2
