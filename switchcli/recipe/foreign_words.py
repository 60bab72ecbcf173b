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
    """The text to type instead.

    `{value}` is the typed value, `{verb}` the command without its arguments, `{command}` the words after `switchcli`.
    """


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
    "batch_size mini_batch_size bs": [
        _key("train.batch_tokens", _ROW),
        _key("scoring.batch_examples"),
        _option("--batch"),
    ],
    "eval_batch_size per_device_eval_batch_size": [_key("scoring.batch_examples"), _option("--batch")],
    "per_device_train_batch_size micro_batch_size microbatch_size": [_key("train.microbatch_tokens", _ROW)],
    "gradient_accumulation gradient_accumulation_steps accumulate_grad accumulate_grad_batches": [
        _key("train.microbatch_tokens", "N, where N is train.batch_tokens / {value} / the number of ranks")
    ],
    "source_length input_length seq_length seq_len sequence_length sequence_len block_size context_length": [
        _key("data.objective.inputs_length"),
        _key("data.inputs_length"),
    ],
    "target_length": [_key("data.targets_length"), _key("data.objective.targets_length")],
    "lr learning_rate": [_key("schedule.learning_rate")],
    "scheduler lr_scheduler lr_scheduler_type lr_schedule": [_key("schedule.kind")],
    "warmup warmup_steps lr_warmup_steps warmup_iters": [_key("schedule.warmup_steps")],
    "warmup_ratio": [_key("schedule.warmup_steps", "N, where N is {value} times train.steps")],
    "optim optimizer": [_key("optimizer.kind")],
    "weight_decay wd": [_key("optimizer.weight_decay", "{value}, with optimizer.kind=adamw")],
    "grad_norm grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val": [_key("train.clip_norm")],
    "dtype mixed_precision": [_key("train.precision"), _key("precision")],
    "bf16 fp16 amp": [_key("train.precision", _HALF), _key("precision", _HALF)],
    "fp32": [_key("train.precision", "float32"), _key("precision", "float32")],
    "o output out_dir output_dir output_path save_dir run_dir logging_dir default_root_dir": [
        _option("--out"),
        Suggestion("DESTINATION", "{verb} SOURCE {value}, as the new folder is the second argument"),
    ],
    "run_name name": [_option("--out", "runs/{value}")],
    "overwrite_output_dir": [Suggestion("--no-resume", "--no-resume")],
    "save_steps save_every save_interval checkpoint_interval": [_key("checkpoint.save_every_steps")],
    "save_total_limit": [_key("checkpoint.keep_last")],
    "eval_steps eval_every eval_interval": [_key("eval.every_steps")],
    "logging_steps log_every log_interval log_every_n_steps": [_key("log.every_steps")],
    "report_to logger": [_key("log.trackers", "[{value}]")],
    "wandb wandb_project": [_key("log.trackers", "[wandb]")],
    "experts moe_experts": [_option("--experts"), _key("model.num_experts")],
    "model_size": [_key("model.size")],
    "tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path": [
        _key("data.tokenizer.path", "{value}, with data.tokenizer.kind=file")
    ],
    "model m model_name model_path model_name_or_path pretrained_model_name_or_path base_model "
    "checkpoint checkpoint_dir checkpoint_path": [
        _option("--model"),
        _option("--teacher"),
        _CHECKPOINT,
    ],
    "teacher_model teacher_model_name_or_path": [_option("--teacher")],
    "resume_from resume_from_checkpoint ckpt_path load_checkpoint": [
        Suggestion("--resume", "--resume, the default: the same command with the same --out goes on"),
        _CHECKPOINT,
    ],
    "dataset dataset_name data data_path data_dir train_file train_path": [
        _key("data.corpora", "'[{{kind: files, paths: [{value}]}}]'"),
        _key("tasks", "[{value}]"),
    ],
    "task tasks task_name": [_key("tasks", "[{value}]")],
    "config config_file config_name config_path c recipe": [
        _option("--on"),
        Suggestion("CHECKPOINT", "{verb} CHECKPOINT {value}, as the recipe follows the checkpoint"),
        Suggestion("RECIPE", "{verb} {value}, as the recipe is the first argument"),
    ],
    "gpu gpus ngpus devices processes nproc nproc_per_node world_size": [
        *map(_option, ("--processes", "--ranks", "--devices"))
    ],
    "nodes nnodes": [Suggestion("train.steps", "switchcli launch --torchrun --nodes {value} -- {command} ...")],
    "device accelerator": [_key("train.device"), _key("device")],
    "use_cpu no_cuda": [_key("train.device", "cpu"), _key("device", "cpu")],
    "num_workers dataloader_num_workers": [_key("train.workers")],
    "torch_compile compile": [_key("train.compile", "true")],
    "gradient_checkpointing activation_checkpointing": [_key("train.activation_checkpointing", "blocks")],
    "tensor_parallel tensor_parallel_size tp tp_size": [_key("parallel.model")],
    "expert_parallel expert_parallel_size ep ep_size": [_key("parallel.expert")],
    "fsdp deepspeed zero": [_key("parallel.shard", "zero3, or zero2")],
    "new_tokens max_length generation_max_length": [_option("--max-tokens"), _key("scoring.decoding.max_tokens")],
    "beam beams beam_size generation_num_beams": [_option("--beams"), _key("scoring.decoding.beams")],
    "prompt input text": [Suggestion("TEXT", "{verb} CHECKPOINT TEXT, as the text follows the checkpoint")],
}
WORDS: Final[Mapping[str, Sequence[Suggestion]]] = MappingProxyType(
    {word: suggestions for words, suggestions in _ROWS.items() for word in words.split()}
)
"""The suggestions for each word of another tool, with `_` for `-`."""
_QUALIFIERS: Final = re.compile(r"(?:(?:n|num|max|total|global|train|use|enable)_)+")
"""What other tools write before a word without changing its meaning: `num_train_epochs`, but not `eval_` or `min_`."""

PRECISIONS: Final = MappingProxyType(
    {
        **dict.fromkeys(("bf16", "fp16", "16", "bf16-mixed", "16-mixed", "float16", "half", "amp"), "selective"),
        **dict.fromkeys(("fp32", "32", "no", "full", "32-true"), "float32"),
        **dict.fromkeys(("bf16-true",), "bfloat16"),
    }
)
"""Names of precisions in other tools."""
_PLAIN: Final = re.compile(r"[\w./:@%+,=~-]{1,200}")
_NEAR: Final = 0.88
"""Similarity, of difflib, from which an unknown option is taken for a misspelling of another one.

`step` is one of `steps`, and `sp_size` and `eval_accumulation_steps` are none of `tp_size` and
`gradient_accumulation_steps`.
"""


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
            elif needs == "log.trackers" and shown.lower() == "none":
                shown = ""
            return text.format(value=shown, verb=verb, command=verb.partition(" ")[2] or "VERB")
    return None


def _suggestions(name: str, names: Set[str]) -> Iterator[Suggestion]:
    """Yield the option that differs only in `_`, then the suggestions of the table, and keys with this last part.

    Of the table comes the word itself, or else the word without qualifiers, or else one of a similar spelling.
    """
    option = f"--{name.replace('_', '-')}"
    if option in names:
        yield _option(option)
    last = name.rpartition(".")[2]
    word = last if last in WORDS else _QUALIFIERS.sub("", last, count=1)
    yield from WORDS.get(word, ())
    mappings = {known.rpartition(".")[0] for known in names}
    same = [known for known in names - mappings if known == name or known.endswith(f".{name}")]
    yield from map(_key, sorted(same, key=lambda known: (known.count("."), len(known))))
    if word not in WORDS and not difflib.get_close_matches(option, names, n=1, cutoff=_NEAR):
        for similar in difflib.get_close_matches(word, WORDS, n=3, cutoff=_NEAR):
            yield from WORDS[similar]
