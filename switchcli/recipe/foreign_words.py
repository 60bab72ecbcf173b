"""The words of other training tools, as options, keys or values, and what a user of switchcli types instead."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Final, NamedTuple

from switchcli import credentials


class Suggestion(NamedTuple):
    """The advice for a word of another tool."""

    needs: str
    """A recipe key (`train.steps`), an option (`--out`) or the name of an argument. The verb must have it."""
    text: str
    """The text to type instead. `{value}` is the typed value, and `{verb}` the command without its arguments."""


def _key(key: str, value: str = "{value}") -> Suggestion:
    return Suggestion(key, f"{key}={value}")


def _option(option: str, value: str = "{value}") -> Suggestion:
    return Suggestion(option, f"{option} {value}")


_CHECKPOINT: Final = Suggestion("CHECKPOINT", "{verb} {value}, as the checkpoint is the first argument")
_HALF: Final = "selective, which computes matrix products in bfloat16 and routers in float32"
_ROW: Final = "N, where N is {value} times the tokens of an input sequence"

_ROWS: Final[Mapping[str, Sequence[Suggestion]]] = {
    "steps iters iterations": [_key("train.steps")],
    "epochs": [_key("train.steps", "N, as runs have no epochs: N is {value} times the tokens of the data / a batch's")],
    "batch_size bs": [_key("train.batch_tokens", _ROW), _key("scoring.batch_examples"), _option("--batch")],
    "eval_batch_size": [_key("scoring.batch_examples"), _option("--batch")],
    "micro_batch_size": [_key("train.microbatch_tokens", _ROW)],
    "gradient_accumulation accumulate_grad": [
        _key("train.microbatch_tokens", "N, where N is train.batch_tokens / {value} / the number of ranks")
    ],
    "source_length seq_length sequence_length block_size context_length": [
        _key("data.objective.inputs_length"),
        _key("data.inputs_length"),
    ],
    "target_length": [_key("data.targets_length"), _key("data.objective.targets_length")],
    "lr learning_rate": [_key("schedule.learning_rate")],
    "scheduler scheduler_type lr_schedule": [_key("schedule.kind")],
    "warmup": [_key("schedule.warmup_steps")],
    "warmup_ratio": [_key("schedule.warmup_steps", "N, where N is {value} times train.steps")],
    "optim optimizer": [_key("optimizer.kind")],
    "wd": [_key("optimizer.weight_decay", "{value}, with optimizer.kind=adamw")],
    "grad_norm grad_clip clip_grad gradient_clip": [_key("train.clip_norm")],
    "dtype mixed_precision": [_key("train.precision"), _key("precision")],
    "bf16 fp16 amp": [_key("train.precision", _HALF), _key("precision", _HALF)],
    "fp32": [_key("train.precision", "float32"), _key("precision", "float32")],
    "o output out_dir output_dir save_dir run_dir": [
        _option("--out"),
        Suggestion("DESTINATION", "{verb} SOURCE {value}, as the new folder is the second argument"),
    ],
    "save_steps save_every": [_key("checkpoint.save_every_steps")],
    "save_total_limit": [_key("checkpoint.keep_last")],
    "eval_steps": [_key("eval.every_steps")],
    "logging_steps log_every log_interval": [_key("log.every_steps")],
    "report_to logger wandb": [_key("log.trackers", "[wandb]")],
    "num_experts experts": [_option("--experts"), _key("model.num_experts")],
    "model_size": [_key("model.size")],
    "tokenizer": [_key("data.tokenizer.path", "{value}, with data.tokenizer.kind=file")],
    "model m checkpoint": [_option("--model"), _option("--teacher"), _CHECKPOINT],
    "resume_from": [
        Suggestion("--resume", "--resume, the default: the same command with the same --out goes on"),
        _CHECKPOINT,
    ],
    "dataset data": [_key("data.corpora", "'[{{kind: files, paths: [{value}]}}]'"), _key("tasks", "[{value}]")],
    "task": [_key("tasks", "[{value}]")],
    "config c recipe": [
        _option("--on"),
        Suggestion("CHECKPOINT", "{verb} CHECKPOINT {value}, as the recipe follows the checkpoint"),
        Suggestion("RECIPE", "{verb} {value}, as the recipe is the first argument"),
    ],
    "gpus devices processes nproc world_size": [*map(_option, ("--processes", "--ranks", "--devices"))],
    "accelerator": [_key("train.device"), _key("device")],
    "num_workers": [_key("train.workers")],
    "torch_compile": [_key("train.compile", "true")],
    "checkpointing": [_key("train.activation_checkpointing", "blocks")],
    "tensor_parallel tp": [_key("parallel.model")],
    "expert_parallel ep": [_key("parallel.expert")],
    "fsdp deepspeed zero": [_key("parallel.shard", "zero3, or zero2")],
    "new_tokens max_length": [_option("--max-tokens"), _key("scoring.decoding.max_tokens")],
    "beam beams": [_option("--beams"), _key("scoring.decoding.beams")],
    "prompt input text": [Suggestion("TEXT", "{verb} CHECKPOINT TEXT, as the text follows the checkpoint")],
}
WORDS: Final[Mapping[str, Sequence[Suggestion]]] = MappingProxyType(
    {word: suggestions for words, suggestions in _ROWS.items() for word in words.split()}
)
"""The suggestions for each word of another tool, with `_` for `-`. A longer word may contain it: `num_train_epochs`."""

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
"""Similarity, of difflib, from which an unknown option is taken for a misspelling of another one."""


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
            return text.format(value=shown, verb=verb)
    return None


def _suggestions(name: str, names: Set[str]) -> Iterator[Suggestion]:
    """Yield the option that differs only in `_`, then the suggestions of the table, and keys with this last part.

    Of the table comes the word itself, or else the longest one within `name`, or else one of a similar spelling.
    """
    option = f"--{name.replace('_', '-')}"
    if option in names:
        yield _option(option)
    yield from WORDS.get(name, ())
    mappings = {known.rpartition(".")[0] for known in names}
    same = [known for known in names - mappings if known == name or known.endswith(f".{name}")]
    yield from map(_key, sorted(same, key=lambda known: (known.count("."), len(known))))
    within = [word for word in WORDS if word != name and re.search(rf"(?:\A|[_.]){word}(?:\Z|_)", name)]
    similar = difflib.get_close_matches(name, WORDS, n=3, cutoff=_NEAR)
    if name in WORDS or difflib.get_close_matches(option, names, n=1, cutoff=_NEAR):
        similar = []
    for word in [*sorted(within, key=len, reverse=True), *similar]:
        yield from WORDS[word]
