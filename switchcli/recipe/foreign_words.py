"""The words of other training tools, and the key or option that a word that is not known may mean."""

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train.steps": "max_steps num_train_epochs num_epochs epochs",
        "train.batch_tokens": "batch_size",
        "train.microbatch_tokens": "per_device_train_batch_size micro_batch_size gradient_accumulation_steps",
        "schedule.learning_rate": "lr",
        "schedule.kind": "lr_scheduler_type lr_scheduler",
        "schedule.warmup_steps": "warmup_ratio",
        "optimizer.kind": "optim",
        "train.clip_norm": "max_grad_norm",
        "data.corpora": "datasets dataset_name",
        "tasks": "datasets dataset_name",
        "data.held_out_fraction": "val_set_size",
        "data.inputs_length": "sequence_len max_seq_length max_length",
        "data.objective.inputs_length": "sequence_len max_seq_length max_length",
        "data.packing": "sample_packing",
        "train.precision=selective": "bf16 fp16",
        "precision=selective": "bf16 fp16",
        "train.activation_checkpointing=blocks": "gradient_checkpointing",
        "parallel.shard": "fsdp deepspeed",
        "--processes": "nproc_per_node",
        "update": "adapter",
        "--model": "model_name_or_path base_model",
        "--teacher": "model_name_or_path base_model",
        "distill.teacher": "model_name_or_path base_model",
        "start.checkpoint": "model_name_or_path base_model",
        "--out": "output_dir",
        "--resume": "resume_from_checkpoint",
        "log.every_steps": "logging_steps",
        "log.trackers": "report_to",
        "eval.every_steps": "eval_steps",
        "checkpoint.save_every_steps": "save_steps",
        "checkpoint.keep_last": "save_total_limit",
        "checkpoint.keep_best": "load_best_model_at_end",
    }
)
"""The words of other tools for a key, a key with its value, or an option. docs/how-to/other-tools.md has each."""
SIMILAR: Final = 0.8
"""Similarity, of difflib, from which a word is taken for a misspelling of another one."""


def translated(word: str, names: Collection[str]) -> str | None:
    """Return the key or option among `names` for a word of another tool, which may be the last part of a key, or None.

    A key may have a value, as in `train.precision=selective`.
    """
    found = (ours for ours, theirs in WORDS.items() if _last_part(word) in theirs.split())
    return next((ours for ours in found if ours.partition("=")[0] in names), None)


def nearest(word: str, names: Collection[str]) -> str | None:
    """Return the shortest of the keys and options `names` whose last part is that of `word`, or nearly so, or None.

    For an option, options come before keys; for a key, keys.
    """
    by_part: dict[str, str] = {}
    option = word.startswith("--")
    far_first = sorted(names, key=lambda name: (name.startswith("--") == option, -name.count("."), -len(name)))
    for name in far_first:
        by_part[_last_part(name)] = name
    close = difflib.get_close_matches(_last_part(word), by_part, n=1, cutoff=SIMILAR)
    return by_part[close[0]] if close else None


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").replace("-", "_")
