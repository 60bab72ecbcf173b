"""Warn about settings of `accelerate launch` that the recipe decides.

`accelerate launch` passes its options, and those of its configuration file, to the processes that it starts as
environment variables (accelerate 1.15, utils/launch.py). switchcli takes the ranks and the device from accelerate;
everything else is a key of the recipe.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from switchcli.distributed.context import RECIPE_DECIDES, DistributedContext
from switchcli.report.console import Console
from switchcli.training.config import Precision

EVAL_KEYS: Final[Mapping[str, str]] = MappingProxyType({"ACCELERATE_MIXED_PRECISION": "precision"})
"""The variables that an evaluation does not take over, and its keys that decide instead."""
OFF: Final = ("", "no", "false", "0")
"""Values that ask for nothing."""
PRECISIONS: Final = {"bf16": ("bfloat16", "selective")}
"""The recipe's precisions that agree with one of accelerate's."""


def warn_about_settings(
    precision: Precision, context: DistributedContext, keys: Mapping[str, str] = RECIPE_DECIDES
) -> None:
    """Print one line on the main rank that names the settings of accelerate that the recipe's `keys` override.

    Another line says that accelerate was asked for several processes and started only this one: for several it sets
    MASTER_PORT, but WORLD_SIZE only if it uses torchrun (`--multi_gpu`).
    """
    environment, console = os.environ, Console()
    if not context.is_main:
        return
    ignored = {name: key for name, key in keys.items() if environment.get(name, "").lower() not in OFF}
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "1":
        ignored.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if precision in PRECISIONS.get(environment.get("ACCELERATE_MIXED_PRECISION", "").lower(), ()):
        ignored.pop("ACCELERATE_MIXED_PRECISION", None)
    if context.parallel.shard != "none":
        ignored.pop("ACCELERATE_USE_FSDP", None)
    if ignored:
        asked = ", ".join(f"{name}={environment[name]} ({key})" for name, key in ignored.items())
        console.warning(f"accelerate asks for what the recipe decides, so it is ignored: {asked}")
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        console.warning(
            "accelerate was asked for several processes and started one: add `--processes N` at the end of the "
            "command, or start N by `accelerate launch --multi_gpu --num_processes N`, which works without GPUs too"
        )
