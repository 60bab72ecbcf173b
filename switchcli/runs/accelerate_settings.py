"""Warn about settings of `accelerate launch` that differ from the recipe, which decides.

`accelerate launch` passes its options, and those of its configuration file, to the processes that it starts as
environment variables (accelerate 1.15, utils/launch.py). switchcli takes the ranks and the device from accelerate;
everything else is a key of the recipe.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress

from switchcli.distributed.context import DistributedContext, is_set
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console

PRECISIONS = {"bf16": ("bfloat16", "selective"), "no": ("float32", "bfloat16", "selective")}
"""The recipe's precisions that agree with one of accelerate's. Its default is "no", so that "no" asks for nothing."""


def warn_about_settings(recipe: TrainingRecipe | EvalRecipe, context: DistributedContext) -> None:
    """Print on the main rank, to stderr, one line that names the settings of accelerate that the recipe overrides."""
    if not context.is_main:
        return
    if isinstance(recipe, TrainingRecipe):
        conflicts = _conflicts(os.environ, recipe.train.device, recipe.train.precision, "train.")
        conflicts |= _training_conflicts(os.environ, recipe, context.parallel.shard, context.dp_size)
    else:
        conflicts = _conflicts(os.environ, recipe.device, recipe.precision)
    if conflicts:
        asked, decided = ", ".join(conflicts), ", ".join(dict.fromkeys(conflicts.values()))
        Console().warning(f"accelerate asks for {asked}, which is ignored: the recipe decides ({decided})")


def warn_about_ranks(context: DistributedContext) -> None:
    """Print one line to stderr if accelerate was asked for several processes and started this one alone."""
    if context.world == 1 and _asked_for_several(os.environ):
        Console().warning(
            "accelerate was asked for several processes and started one: add `--processes N` at the end of the "
            "command, or start N by `accelerate launch --multi_gpu --num_processes N`, which works without GPUs too"
        )


def _conflicts(environment: Mapping[str, str], device: str, precision: str, prefix: str = "") -> dict[str, str]:
    """Return what accelerate asks for and any recipe decides otherwise, each with the KEY=VALUE that decides.

    `prefix` is what the names of the two keys begin with.
    """
    conflicts = {}
    if device == "cuda" and is_set(environment, "ACCELERATE_USE_CPU"):
        conflicts["the CPU"] = f"{prefix}device={device}"
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS.get(asked, ()):
        conflicts[f"mixed precision {asked}"] = f"{prefix}precision={precision}"
    return conflicts


def _training_conflicts(
    environment: Mapping[str, str], recipe: TrainingRecipe, shard: str, data_ranks: int
) -> dict[str, str]:
    """Return what accelerate asks for and a training recipe decides otherwise, with what decides."""
    train, conflicts = recipe.train, {}
    for name, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
        ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
        ("a parallelism config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ):
        if is_set(environment, variable) and not (name == "FSDP" and shard != "none"):
            conflicts[name] = f"parallel.shard={shard}"
    steps = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    share = train.batch_tokens // data_ranks
    if steps is not None and steps > 1 and steps * (train.microbatch_tokens or share) != share:
        conflicts[f"{steps:g} gradient accumulation steps"] = (
            f"train.microbatch_tokens={json.dumps(train.microbatch_tokens)}"
        )
    norm = _number(environment, "ACCELERATE_GRADIENT_CLIPPING")
    if norm is not None and norm != train.clip_norm:
        conflicts[f"gradient clipping at {norm:g}"] = f"train.clip_norm={json.dumps(train.clip_norm)}"
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    if backend != "no" and not train.compile:
        conflicts[f"torch.compile with {backend}"] = "train.compile=false"
    return conflicts


def _asked_for_several(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` was asked for several processes and started this one alone.

    It sets an address to meet at for more than one process, but ranks only where it uses torchrun (`--multi_gpu`).
    The number that was asked for is not in the environment.
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment
    )


def _number(environment: Mapping[str, str], name: str) -> float | None:
    """Return a number from the environment; None if there is none, or a word such as `auto`."""
    with suppress(KeyError, ValueError):
        return float(environment[name])
    return None
