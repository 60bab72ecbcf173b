"""Collectives: all_gather on tensors, HostGroup for control values and text, and the error of a rank that is gone."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, TypeVar, cast, final

import torch
import torch.distributed as dist

from switchcli.errors import LostRankError, OtherRankError, RankError, SwitchError
from switchcli.system.signals import run_interruptibly

T = TypeVar("T")


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Raise LostRankError for what torch raises when ranks do not meet, or when another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        # DistError is raised by the rendezvous and by NCCL. Gloo raises a plain RuntimeError: only its text tells.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "Timed out" not in str(error):
            raise
        cause = str(error).splitlines()[0].split(". ")[0]
        raise LostRankError(
            f"the other ranks cannot be reached ({cause}; one has ended, or the network is down: see what each printed)"
        ) from error


def all_gather(output: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Write the tensors of all ranks into `output`, in the order of the ranks, on every rank. Collective.

    torch has renamed this collective; this function calls the name that the installed torch has.

    Args:
        output: [R * n, ...] for R ranks, contiguous. Gloo accepts no separate dim for the ranks.
        local: [n, ...] of the same dtype and device, with the same n on every rank; contiguous.
        group: the ranks; None for all of them.

    Raises:
        LostRankError: another rank is gone.
    """
    # torch 2.12 and older have only the second name, and 2.13 deprecates it. The name is looked up at each call because
    # tests replace the function to count calls.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with explain_lost_ranks():
        gather(output, local, group=group)


@final
class HostGroup:
    """A gloo group of all ranks for integers, text and errors on the host. It never waits for a device.

    Only one thread may use a group at a time, because calls are matched by their order alone. Every method is a
    collective and raises LostRankError when another rank is gone. With a single process nothing is sent.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta) -> None:
        """Create the group. All ranks must create their groups in the same order.

        Args:
            rank: this process's number among the `world_size` ranks.
            world_size: the number of ranks.
            timeout: how long one call waits for the other ranks.
        """
        self.rank = rank
        self.size = world_size
        self.group: dist.ProcessGroup | None = None
        if world_size > 1:
            with explain_lost_ranks():
                group = run_interruptibly(lambda: dist.new_group(backend="gloo", timeout=timeout))
            self.group = cast(dist.ProcessGroup, group)  # this rank is in it

    def sum(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise sum over all ranks of equally many integers (int64)."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        with explain_lost_ranks():
            dist.all_reduce(total, group=self.group)
        return [int(value) for value in total]

    def from_main(self, value: int) -> int:
        """Return the main rank's value on every rank."""
        return self.sum([value if self.rank == 0 else 0])[0]

    def main_only(self, action: Callable[[], T]) -> T | None:
        """Return what `action` returns on the main rank, and None on the others, which wait until it is done.

        Raises:
            SwitchError: on the main rank, if `action` raised it.
            OtherRankError: on the others, with the exit code of that error.
        """
        result = None
        try:
            if self.rank == 0:
                result = action()
        except SwitchError as error:
            self.from_main(error.exit_code)
            raise
        if exit_code := self.from_main(0):  # 0: the action succeeded
            raise OtherRankError(exit_code)
        return result

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Return what `action` returns on this rank, once it has returned on all of them.

        Raises:
            SwitchError: on the main rank, if its own action raised it.
            RankError: on the main rank, if the action of another rank failed; it names the lowest such rank.
            OtherRankError: on the other ranks, if the action of any rank failed.
        """
        failure: SwitchError | None = None
        try:
            result = action()
        except SwitchError as error:
            failure = error
        report = None if failure is None else [failure.exit_code, str(failure)]
        reports = [json.loads(text) for text in self.all_gather_text(json.dumps(report))]
        failed_rank = next((rank for rank, entry in enumerate(reports) if entry is not None), None)
        if failed_rank is None:
            return result
        exit_code, message = reports[failed_rank]
        if self.rank != 0:
            raise OtherRankError(exit_code) from failure
        if failure is not None:
            raise failure
        raise RankError(failed_rank, exit_code, message)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all ranks, in the order of the ranks, on every rank."""
        if self.group is None:
            return [text]
        raw = text.encode()
        # The bytes of each rank's text: every rank adds its own number at its own index, and zeros elsewhere.
        sizes = self.sum([len(raw) if rank == self.rank else 0 for rank in range(self.size)])
        # all_gather takes tensors of equal length, so each text is padded to the longest one.
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        gathered = torch.empty(self.size * max(sizes), dtype=torch.uint8)
        all_gather(gathered, padded, self.group)
        by_rank = gathered.view(self.size, -1)  # [R, longest text]
        return [bytes(row[:size].tolist()).decode() for row, size in zip(by_rank, sizes, strict=True)]


ONE_RANK: Final = HostGroup(0, 1, timedelta())
"""The group of a single process."""
