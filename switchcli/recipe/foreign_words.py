"""The words of other training tools, as options, keys or values, and what a user of switchcli types instead."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Final, NamedTuple

from switchcli.system import credentials


class Suggestion(NamedTuple):
    """The advice for a word of another tool."""

    needs: str
    """A recipe key (`train.steps`), an option (`--out`) or the name of an argument. The verb must have it."""
    text: str
    """The text to type instead.

    `{value}` is the typed value, `{verb}` the command without its arguments, `{command}` the words after `switchcli`.
    """


def _key(key: str, value: str = "{value}") -> Suggestion:
    return Suggestion(key, f"{key}={value}")


def _option(option: str) -> Suggestion:
    return Suggestion(option, f"{option} {{value}}")


_CHECKPOINT: Final = Suggestion("CHECKPOINT", "{verb} {value}, as the checkpoint is the first argument")
_HALF: Final = "selective, which computes matrix products in bfloat16 and routers in float32"
_ROW: Final = "N, where N is {value} times the tokens of an input sequence"
_EPOCHS: Final = _key("train.steps", "N, as runs have no epochs: N is {value} times the tokens of the data / a batch's")
_EARLY: Final = Suggestion("eval.every_steps", "switchcli.train(..., on_record=...) in Python, which may stop a run")
_PROCESSES: Final = (_option("--processes"), _option("--devices"))
_MODEL: Final = (_option("--model"), _option("--teacher"), _CHECKPOINT)

WORDS: Final[Mapping[str, Sequence[Suggestion]]] = MappingProxyType(
    {
        "max_steps": [_key("train.steps")],
        "epochs": [_EPOCHS],
        "num_train_epochs": [_EPOCHS],
        "batch_size": [_key("train.batch_tokens", _ROW), _key("scoring.batch_examples"), _option("--batch")],
        "per_device_train_batch_size": [_key("train.microbatch_tokens", _ROW)],
        "gradient_accumulation_steps": [
            _key("train.microbatch_tokens", "N, where N is train.batch_tokens / {value} / the number of ranks")
        ],
        "lr": [_key("schedule.learning_rate")],
        "lr_scheduler_type": [_key("schedule.kind", "KIND, such as cosine, linear, or wsd (warmup_stable_decay)")],
        "optim": [_key("optimizer.kind", "KIND: adafactor, adamw or muon")],
        "max_grad_norm": [_key("train.clip_norm")],
        "warmup_ratio": [_key("schedule.warmup_steps", "N, where N is {value} times train.steps")],
        "bf16": [_key("train.precision", _HALF), _key("precision", _HALF)],
        "fp16": [_key("train.precision", _HALF), _key("precision", _HALF)],
        "output_dir": [
            _option("--out"),
            Suggestion("DESTINATION", "{verb} SOURCE {value}, as the new folder is the second argument"),
        ],
        "save_steps": [_key("checkpoint.save_every_steps")],
        "save_total_limit": [_key("checkpoint.keep_last")],
        "load_best_model_at_end": [_key("checkpoint.keep_best")],
        "early_stopping_patience": [_EARLY],
        "early_stopping": [_EARLY],
        "callbacks": [_EARLY],
        "compute_metrics": [_key("tasks", "[{{kind: files, metrics: [...], ...}}]")],
        "eval_steps": [_key("eval.every_steps")],
        "logging_steps": [_key("log.every_steps")],
        "report_to": [_key("log.trackers", "[{value}]")],
        "dataloader_num_workers": [_key("train.workers")],
        "model": _MODEL,
        "model_name_or_path": _MODEL,
        "resume_from_checkpoint": [
            Suggestion("--resume", "--resume, the default: the same command with the same --out goes on"),
            _CHECKPOINT,
        ],
        "dataset": [_key("data.corpora", "'[{{kind: files, paths: [{value}]}}]'"), _key("tasks", "[{value}]")],
        "config": [
            Suggestion("CHECKPOINT", "{verb} CHECKPOINT {value}, as the recipe follows the checkpoint"),
            Suggestion("RECIPE", "{verb} {value}, as the recipe is the first argument"),
        ],
        "gpus": _PROCESSES,
        "nproc_per_node": _PROCESSES,
        "nnodes": [Suggestion("train.steps", "torchrun --nnodes {value} ... -m switchcli {command} ...")],
        "device": [_key("train.device"), _key("device")],
        "gradient_checkpointing": [_key("train.activation_checkpointing", "blocks")],
        "fsdp": [_key("parallel.shard", "zero3, or zero2")],
        "branch": [_option("--branch-from"), _key("start.checkpoint", "RUN start.keep=run")],
        "start.optimizer": [_key("start.keep", "optimizer, or weights for a new optimizer")],
        "max_length": [_option("--max-tokens"), _key("scoring.decoding.max_tokens")],
        "generation_max_length": [_key("scoring.decoding.max_tokens")],
        "generation_num_beams": [_key("scoring.decoding.beams")],
    }
)
"""The suggestions for the words of other tools that users type most, with `_` for `-`."""

PRECISIONS: Final = MappingProxyType(
    {
        **dict.fromkeys(("bf16", "fp16", "16", "bf16-mixed", "16-mixed", "float16", "half", "amp"), "selective"),
        **dict.fromkeys(("fp32", "32", "no", "full", "32-true"), "float32"),
        **dict.fromkeys(("bf16-true",), "bfloat16"),
    }
)
"""Names of precisions in other tools."""
_PLAIN: Final = re.compile(r"[\w./:@%+,=~-]{1,200}")
_NEAR: Final = 0.8
"""Similarity, of difflib, from which an unknown option is taken for a misspelt key."""


def hint(word: str, value: str | None, names: Set[str], verb: str = "") -> str | None:
    """Return what to type instead of an option or a key that a verb does not have, or None if that is not known.

    `names` has the verb's options (`--out`), arguments (`RECIPE`) and recipe keys (`train.steps`), and `verb` is the
    command without its arguments. A value that a shell would not read as it stands, and one with credentials, is
    replaced by a placeholder.
    """
    plain = value is not None and _PLAIN.fullmatch(value) and not credentials.find_credentials(value)
    shown = value if plain and value is not None else "VALUE"
    for needs, text in _suggestions(word.lstrip("-").lower().replace("-", "_"), names):
        if needs in names:
            if needs.endswith("precision"):
                shown = PRECISIONS.get(shown.lower(), shown)
            return text.format(value=shown, verb=verb, command=verb.partition(" ")[2] or "VERB")
    return None


def _suggestions(name: str, names: Set[str]) -> Iterator[Suggestion]:
    """Yield the option that differs only in `_`, the suggestions of the table, and the keys with this last part.

    Without any of these come the keys whose last part is spelt almost so.
    """
    option = f"--{name.replace('_', '-')}"
    if option in names:
        yield _option(option)
    yield from WORDS.get(name, WORDS.get(name.rpartition(".")[2], ()))
    mappings = {known.rpartition(".")[0] for known in names}
    keys = sorted(names - mappings, key=lambda known: (known.count("."), len(known), known))
    options = [known for known in names if known.startswith("--")]
    if name not in WORDS and not difflib.get_close_matches(option, options, n=1, cutoff=_NEAR):
        parts = {known.rpartition(".")[2] for known in keys}
        for part in (name, *difflib.get_close_matches(name, parts, n=2, cutoff=_NEAR)):
            yield from (_key(known) for known in keys if known == part or known.endswith(f".{part}"))
