"""HostGroup: what all ranks agree on, do for one another or say, over a group of host processes of its own.

It never waits for a device. A group is for one thread at a time: its messages are told apart by their order alone.
"""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, final

import torch
import torch.distributed as dist

from switchcli.distributed.gather import all_gather
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.signals import run_interruptibly
from switchcli.errors import OtherRankError, RankError, SwitchError

T = TypeVar("T")


@final
class HostGroup:
    """All `world` ranks, of which this is number `rank`; a rank waits for the others as long as the group says.

    Every method raises DistributedError when another rank is gone.
    """

    def __init__(self, rank: int, world: int, timeout: timedelta) -> None:
        """Made on all ranks in the same order."""
        self._rank, self._world, self._group = rank, world, None
        if world > 1:
            with explain_lost_ranks():
                self._group = run_interruptibly(lambda: dist.new_group(backend="gloo", timeout=timeout))

    def sum(self, values: Sequence[int]) -> list[int]:
        """The integers, summed position by position over all ranks."""
        if self._group is None:
            return list(values)
        summed = torch.tensor(values, dtype=torch.int64)
        with explain_lost_ranks():
            dist.all_reduce(summed, group=self._group)
        return [int(value) for value in summed]

    def from_main(self, value: int) -> int:
        """The main rank's value, on every rank."""
        return self.sum([value if self._rank == 0 else 0])[0]

    def main_only(self, action: Callable[[], T]) -> T | None:
        """What `action` returns on the main rank, None on the others, which wait for it.

        Raises:
            SwitchError: the action's own, on the main rank.
            OtherRankError: on the others, when the action raised one.
        """
        result = None
        try:
            if self._rank == 0:
                result = action()
        except SwitchError as error:
            self.from_main(error.exit_code)
            raise
        if code := self.from_main(0):
            raise OtherRankError(code)
        return result

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """What `action`, which writes, returns on this rank; each waits for the others.

        Raises:
            SwitchError: on the main rank, when that of any rank raised one, its own first.
            OtherRankError: on the others.
        """
        failure = None
        try:
            result = action()
        except SwitchError as error:
            failure = error
        told = [
            json.loads(one) for one in self.all_gather_text(json.dumps(failure and [failure.exit_code, str(failure)]))
        ]
        failed = [(rank, *one) for rank, one in enumerate(told) if one is not None]
        if not failed:
            return result
        rank, code, words = failed[0]
        if self._rank != 0:
            raise OtherRankError(code) from failure
        if failure is not None:
            raise failure
        raise RankError(rank, code, words)

    def all_gather_text(self, text: str) -> list[str]:
        """The texts of all ranks, in order, on each of them."""
        if self._group is None:
            return [text]
        raw = text.encode()
        sizes = self.sum([len(raw) if rank == self._rank else 0 for rank in range(self._world)])
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        texts = torch.empty(self._world * max(sizes), dtype=torch.uint8)
        all_gather(texts, padded, self._group)
        rows = texts.view(self._world, -1)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]
