"""Start N ranks of the same command on this machine, as torchrun would.

accelerate's own launcher starts a single process on a machine without a GPU whatever number it is given; torch's,
which it builds on, does not. `Runtime` finds its ranks as it finds those of any launcher.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from switchcli.errors import DistributedError
from switchcli.parallel import exit_code

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
    logging.disable(logging.CRITICAL)  # the ranks say themselves why they end
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory() as scratch:
        left = Path(scratch) / "exit_code"
        os.environ[exit_code.FILE] = str(left)
        try:
            run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
        except ChildFailedError as failure:
            first = min(failure.failures.values(), key=lambda one: one.timestamp)
            if first.exitcode < 0:
                raise DistributedError(
                    f"rank {first.local_rank} was killed by signal {-first.exitcode}; the others were ended"
                ) from None
            return int(first.exitcode)
        except SignalException as stopped:
            # torch forwarded the signal and forgets how the ranks took it; the main one has noted that.
            if left.exists():
                return int(left.read_text())
            raise DistributedError(
                f"stopped by {stopped.sigval.name}, and the ranks left without saving: the same command goes on from "
                "the last save"
            ) from None
    return 0


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
