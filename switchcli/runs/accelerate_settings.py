"""Warn about settings of `accelerate launch` that differ from the recipe, which decides.

`accelerate launch` passes its options, and those of its configuration file, to the processes that it starts as
environment variables (accelerate 1.15, utils/launch.py). switchcli takes the ranks and the device from accelerate;
everything else is a key of the recipe.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from switchcli.distributed.context import DistributedContext, is_set
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console

PRECISIONS = {"bf16": ("bfloat16", "selective"), "no": ("float32", "bfloat16", "selective")}
"""The recipe's precisions that agree with each of accelerate's. All agree with "no", which is accelerate's default."""


def warn_about_settings(recipe: TrainingRecipe | EvalRecipe, context: DistributedContext) -> None:
    """Print one line on the main rank that names the settings of accelerate that the recipe overrides."""
    if not context.is_main:
        return
    environment = {**_launch_options(_parents_words()), **os.environ}
    if isinstance(recipe, TrainingRecipe):
        conflicts = _conflicts(os.environ, recipe.train.device, recipe.train.precision, "train.")
        conflicts |= _training_conflicts(environment, recipe, context.parallel.shard, context.dp_size)
    else:
        conflicts = _conflicts(os.environ, recipe.device, recipe.precision)
    if conflicts:
        requested = ", ".join(conflicts)
        decided_by = ", ".join(dict.fromkeys(conflicts.values()))  # several settings may depend on one key
        Console().warning(f"accelerate asks for {requested}, which is ignored: the recipe decides ({decided_by})")


def _launch_options(words: Sequence[str]) -> dict[str, str]:
    """Return variables for options of `accelerate launch` that it passes on with DeepSpeed alone."""
    if not any("accelerate" in word for word in words):
        return {}
    found = re.findall(r" --(gradient[_-](?:accumulation[_-]steps|clipping))[ =](\S+)", " ".join(words))
    return {f"ACCELERATE_{name.replace('-', '_').upper()}": value for name, value in found}


def _parents_words() -> list[str]:
    """Return the command line of the process that started this one; empty where the system does not show it."""
    with suppress(OSError):
        return Path(f"/proc/{os.getppid()}/cmdline").read_text("utf-8", "replace").split("\0")
    return []


def warn_about_ranks(context: DistributedContext) -> None:
    """Print one line if accelerate was asked for several processes and started only this one."""
    if context.world == 1 and _several_were_requested(os.environ):
        Console().warning(
            "accelerate was asked for several processes and started one: add `--processes N` at the end of the "
            "command, or start N by `accelerate launch --multi_gpu --num_processes N`, which works without GPUs too"
        )


def _conflicts(environment: Mapping[str, str], device: str, precision: str, prefix: str = "") -> dict[str, str]:
    """Return each device or precision setting of accelerate that differs from the recipe, with the KEY=VALUE it obeys.

    `prefix` is the start of the names of both keys: `train.` in a training recipe.
    """
    conflicts = {}
    if device == "cuda" and is_set(environment, "ACCELERATE_USE_CPU"):
        conflicts["the CPU"] = f"{prefix}device={device}"
    requested = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS.get(requested, ()):
        conflicts[f"mixed precision {requested}"] = f"{prefix}precision={precision}"
    return conflicts


def _training_conflicts(
    environment: Mapping[str, str], recipe: TrainingRecipe, shard: str, dp_size: int
) -> dict[str, str]:
    """Return each other setting of accelerate that differs from a training recipe, with the KEY=VALUE it obeys."""
    train = recipe.train
    conflicts = {}
    for name, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
        ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
        ("a parallelism config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ):
        if is_set(environment, variable) and not (name == "FSDP" and shard != "none"):
            conflicts[name] = f"parallel.shard={shard}"
    steps = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    tokens_per_rank = train.batch_tokens // dp_size
    microbatch_tokens = train.microbatch_tokens or tokens_per_rank
    if steps is not None and steps > 1 and steps * microbatch_tokens != tokens_per_rank:
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


def _several_were_requested(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` was asked for several processes and started only this one.

    For more than one process it sets MASTER_PORT, but WORLD_SIZE only if it uses torchrun (`--multi_gpu`). The number
    of processes is not in the environment.
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment
    )


def _number(environment: Mapping[str, str], name: str) -> float | None:
    """Return a number from the environment. Return None if it is not set, or set to a word such as `auto`."""
    with suppress(KeyError, ValueError):
        return float(environment[name])
    return None
