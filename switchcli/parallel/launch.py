"""Start N ranks of the same command on this machine, as torchrun would.

accelerate's own launcher starts a single process on a machine without a GPU whatever number it is given; torch's,
which it builds on, does not. `Runtime` finds its ranks as it finds those of any launcher.
"""

import logging
import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from switchcli.errors import DistributedError, Interrupted

SAVING_SECONDS = 300
"""How long the ranks may take to save after a signal before they are killed."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m switchcli ARGUMENTS` as `processes` ranks and return the exit code that they agree on.

    A rank that fails ends the others; the code is that of the rank that failed first, as it printed why.
    """
    options = [
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--shutdown-timeout={SAVING_SECONDS}",
        "-m",
        "switchcli",
        *arguments,
    ]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves why they fail
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as failure:
        first = min(failure.failures.values(), key=lambda one: one.timestamp)
        code: int = first.exitcode
        if code < 0:
            raise DistributedError(
                f"rank {first.local_rank} was killed by signal {-code}; the others were ended"
            ) from None
        return code
    except SignalException as stopped:
        raise Interrupted(f"the ranks were stopped by signal {stopped.sigval}") from None
    return 0


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
