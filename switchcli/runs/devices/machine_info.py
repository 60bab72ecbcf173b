"""The hardware and the versions that a result was made with."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from switchcli import __version__
from switchcli.distributed.context import DistributedContext
from switchcli.system.processor import available_processors, processor_name


def machine_info(context: DistributedContext) -> dict[str, Any]:
    """Return the hardware and the versions, for results and checkpoints."""
    cuda = context.device.type == "cuda"
    return {
        "hardware": {
            "device": torch.cuda.get_device_name(context.device) if cuda else processor_name(),
            "ranks": context.world,
            "cores": os.cpu_count(),
            "available_processors": available_processors(),
            "threads_per_rank": torch.get_num_threads(),
        },
        "versions": {
            "switchcli": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
        },
    }
