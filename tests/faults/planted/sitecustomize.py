"""What Python runs first in every process that has this folder in its PYTHONPATH: a fault planted in one rank.

`PLANTED` says what happens to which rank, in which phase, and which file notes the moment. The command and the package
stay as they are.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = 3
"""The step of the run in which faults of a step come."""
LATE_SECONDS = 4
"""How long after the start a fault of the start comes: the others wait for this rank by then."""


def plant(fault: str, phase: str, moment: Path) -> None:
    from switchcli.checkpoint import checkpoint
    from switchcli.distributed import expert_parallel
    from switchcli.distributed.context import DistributedContext
    from switchcli.runs.train import ending
    from switchcli.runs.train.callbacks import ValidationCallback
    from switchcli.training import loop

    def act() -> None:
        if phase == "start":
            time.sleep(LATE_SECONDS)
        moment.write_text(repr(time.time()))
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "exit":
            os._exit(3)
        elif fault == "raise":
            raise ValueError("planted")
        elif fault == "memory":
            raise MemoryError
        elif fault == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault == "stop the launcher":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)  # the signal comes back in this step

    # Each is called on every rank.
    places: dict[str, tuple[Any, str, int]] = {
        "start": (DistributedContext, "__init__", 1),
        "step": (loop, "accumulate_gradients", STEP),
        "all-to-all": (expert_parallel, "_all_to_all", 30),
        "save": (checkpoint, "encode_files", 1),
        "evaluation": (ValidationCallback, "__call__", 2),  # the first one comes before the first step
        "end": (ending, "sample", 1),
    }
    owner, name, count = places[phase]
    setattr(owner, name, before(getattr(owner, name), act, count))


def before(function: Callable[..., Any], act: Callable[[], None], count: int) -> Callable[..., Any]:
    """The function, with `act` before its call number `count`."""
    calls = 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            act()
        return function(*arguments, **named)

    return called


if "PLANTED" in os.environ and "switchcli" not in sys.modules:
    planted = json.loads(os.environ["PLANTED"])
    if os.environ.get("RANK") == str(planted["rank"]):
        plant(planted["fault"], planted["phase"], Path(planted["moment"]))
