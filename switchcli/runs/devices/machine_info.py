"""The hardware and the versions that a result was made with."""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from switchcli import __version__
from switchcli.distributed.context import DistributedContext
from switchcli.system.processor import available_processors, processor_name
from switchcli.system.user_files import read_regular


def machine_info(context: DistributedContext) -> dict[str, Any]:
    """Return the hardware and the versions, for results."""
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
            "source": source_digest(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
        },
    }


@cache
def source_digest() -> str:
    """Return a digest of the package's code: a checkout that somebody edits keeps its version."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = read_regular(path, 2**24)
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
