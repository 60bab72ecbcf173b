"""A rank that is gone, told in words."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from switchcli.errors import LostRankError


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """What torch raises when ranks do not find one another, or one is gone, as LostRankError."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's failures have no type of their own; DistError is that of the rendezvous and of NCCL.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "Timed out" not in str(error):
            raise
        cause = str(error).splitlines()[0].split(". ")[0]
        raise LostRankError(
            f"the other ranks cannot be reached ({cause}; one has ended, or the network is down: see what each printed)"
        ) from error
