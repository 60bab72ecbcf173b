"""Options of other training tools, and what a user of switchcli types instead.

Each option has suggestions. The first one whose key, option or argument the verb has is taken.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import typer

from switchcli import credentials
from switchcli.commands import _completion


class Suggestion(NamedTuple):
    """The advice for an option of another tool."""

    needs: str
    """A recipe key (`train.steps`), an option (`--out`) or the name of an argument. The verb must have it."""
    text: str
    """The text to type instead.

    `{value}` is the value that was typed, `{verb}` the command without its arguments, `{command}` the words after
    `switchcli`.
    """


def _key(key: str, value: str = "{value}") -> Suggestion:
    return Suggestion(key, f"{key}={value}")


def _option(option: str, value: str = "{value}") -> Suggestion:
    return Suggestion(option, f"{option} {value}")


_CHECKPOINT: Final = Suggestion("CHECKPOINT", "{verb} {value}, as the checkpoint is the first argument")
_TASKS: Final = _key("tasks", "[{value}]")
_BATCH: Final = _key("train.batch_tokens", "N, where N is {value} times the tokens of an input sequence")
_RANK_BATCH: Final = _key(
    "train.batch_tokens", "N, where N is {value} times the ranks times the tokens of an input sequence"
)
_EPOCHS: Final = _key(
    "train.steps", "N, as runs have no epochs: N is {value} times the tokens of the data / train.batch_tokens"
)
_HALF: Final = "selective, which computes matrix products in bfloat16 and routers in float32"

_ROWS: Final[Mapping[str, Sequence[Suggestion]]] = {
    # Length
    "steps max-steps num-steps train-steps num-train-steps max-iters train-iters iterations": [_key("train.steps")],
    "epochs num-epochs max-epochs num-train-epochs": [_EPOCHS],
    # Batches
    "batch-size bs train-batch-size global-batch-size": [_BATCH, _key("scoring.batch_examples"), _option("--batch")],
    "per-device-train-batch-size": [_RANK_BATCH],
    "eval-batch-size per-device-eval-batch-size": [_key("scoring.batch_examples"), _option("--batch")],
    "micro-batch-size microbatch-size": [
        _key("train.microbatch_tokens", "N, where N is {value} times the tokens of an input sequence")
    ],
    "gradient-accumulation-steps accumulate-grad-batches": [
        _key("train.microbatch_tokens", "N, where N is train.batch_tokens / {value} / the number of ranks")
    ],
    "max-seq-length max-source-length seq-length sequence-length block-size context-length": [
        _key("data.objective.inputs_length"),
        _key("data.inputs_length"),
    ],
    "max-target-length": [_key("data.targets_length"), _key("data.objective.targets_length")],
    # Learning rate and optimizer
    "lr learning-rate max-lr": [_key("schedule.learning_rate")],
    "lr-scheduler-type lr-scheduler lr-schedule": [_key("schedule.kind")],
    "warmup-steps num-warmup-steps lr-warmup-steps": [_key("schedule.warmup_steps")],
    "warmup-ratio": [_key("schedule.warmup_steps", "N, where N is {value} times train.steps")],
    "optim optimizer": [_key("optimizer.kind")],
    "weight-decay wd": [_key("optimizer.weight_decay", "{value}, with optimizer.kind=adamw")],
    "max-grad-norm clip-grad grad-clip gradient-clip-val": [_key("train.clip_norm")],
    "dropout": [_key("model.dropout")],
    # Numbers
    "seed": [_key("train.seed")],
    "precision dtype mixed-precision": [_key("train.precision"), _key("precision")],
    "bf16 fp16 amp": [_key("train.precision", _HALF), _key("precision", _HALF)],
    "fp32": [_key("train.precision", "float32"), _key("precision", "float32")],
    # Outputs and logs
    "o output out-dir output-dir save-dir run-dir logging-dir default-root-dir": [
        _option("--out"),
        Suggestion("DESTINATION", "{verb} SOURCE {value}, as the new folder is the second argument"),
    ],
    "run-name name": [_option("--out", "runs/{value}")],
    "overwrite-output-dir": [Suggestion("--no-resume", "--no-resume")],
    "save-steps save-every save-interval checkpoint-interval": [_key("checkpoint.save_every_steps")],
    "save-total-limit": [_key("checkpoint.keep_last")],
    "eval-steps eval-every eval-interval": [_key("eval.every_steps")],
    "logging-steps log-every log-interval log-every-n-steps": [_key("log.every_steps")],
    "report-to logger": [_key("log.trackers", "[{value}]")],
    "wandb": [_key("log.trackers", "[wandb]")],
    # Model
    "num-experts n-experts experts moe-experts": [_option("--experts"), _key("model.num_experts")],
    "model-size size": [_key("model.size")],
    "tokenizer tokenizer-name tokenizer-name-or-path": [
        _key("data.tokenizer.path", "{value}, with data.tokenizer.kind=file")
    ],
    "model m model-name model-path model-name-or-path pretrained-model-name-or-path checkpoint checkpoint-dir": [
        _option("--model"),
        _option("--teacher"),
        _CHECKPOINT,
    ],
    "resume-from resume-from-checkpoint ckpt-path load-checkpoint": [
        Suggestion(
            "--resume", "--resume, the default: the same command with the same --out goes on from the last checkpoint"
        ),
        _CHECKPOINT,
    ],
    # Data
    "dataset dataset-name data data-path data-dir train-file train-data train-path": [
        _key("data.corpora", "'[{{kind: files, paths: [{value}]}}]'"),
        _TASKS,
    ],
    "task tasks task-name": [_TASKS],
    "config config-file config-name config-path c recipe": [
        _option("--on"),
        Suggestion("CHECKPOINT", "{verb} CHECKPOINT {value}, as the recipe follows the checkpoint"),
        Suggestion("RECIPE", "{verb} {value}, as the recipe is the first argument"),
    ],
    # Machines
    "gpus n-gpus num-gpus ngpus devices num-devices nproc num-processes nproc-per-node world-size": [
        *map(_option, ("--processes", "--ranks", "--devices"))
    ],
    "nnodes num-nodes nodes": [Suggestion("train.steps", "switchcli launch --torchrun --nodes {value} -- {command}")],
    "device accelerator": [_key("train.device"), _key("device")],
    "num-workers dataloader-num-workers": [_key("train.workers")],
    "torch-compile compile": [_key("train.compile", "true")],
    "gradient-checkpointing activation-checkpointing": [_key("train.activation_checkpointing", "blocks")],
    "tensor-parallel-size tensor-parallel tp tp-size": [_key("parallel.model")],
    "expert-parallel-size expert-parallel ep ep-size": [_key("parallel.expert")],
    "fsdp deepspeed zero": [_key("parallel.shard", "zero3, or zero2")],
    # Answers
    "max-tokens max-new-tokens max-length": [_option("--max-tokens"), _key("scoring.decoding.max_tokens")],
    "num-beams beam beams beam-size": [_option("--beams"), _key("scoring.decoding.beams")],
    "prompt input text": [Suggestion("TEXT", "{verb} CHECKPOINT TEXT, as the text follows the checkpoint")],
}
HINTS: Final[Mapping[str, Sequence[Suggestion]]] = MappingProxyType(
    {flag: suggestions for flags, suggestions in _ROWS.items() for flag in flags.split()}
)
"""The suggestions for each option of another tool, without its dashes and with `-` for `_`."""

VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("train", "fit"), "pretrain (from text) or finetune (on tasks)"),
        **dict.fromkeys(("sft", "fine-tune", "tune"), "finetune"),
        **dict.fromkeys(("test", "evaluate", "score"), "eval"),
        **dict.fromkeys(("predict", "inference", "infer", "sample", "chat"), "generate"),
        **dict.fromkeys(("export", "import"), "convert"),
        **dict.fromkeys(("config", "configs", "recipe"), "recipes"),
        **dict.fromkeys(("tokenize", "preprocess", "prepare"), "data prepare"),
        **dict.fromkeys(("tokenizer", "tokenizers"), "data tokenizer"),
        **dict.fromkeys(("check", "verify"), "doctor or recipes validate"),
    }
)
"""The command of switchcli for a verb of another tool."""

_PRECISIONS: Final = MappingProxyType(
    {
        **dict.fromkeys(("bf16", "fp16", "16", "bf16-mixed", "16-mixed", "float16", "half"), "selective"),
        **dict.fromkeys(("fp32", "32", "no", "full", "32-true"), "float32"),
        **dict.fromkeys(("bf16-true", "bfloat16"), "bfloat16"),
    }
)
"""Names of precisions in other tools."""
_PLAIN: Final = re.compile(r"[\w./:@%+,=~-]{1,200}")
_NEAR: Final = 0.8
"""Similarity, of difflib, from which an unknown option is taken for a misspelling of another one."""
_PLACEHOLDER: Final = "VALUE"


def flag_hint(context: typer.Context, flag: str, arguments: Sequence[str]) -> str | None:
    """Return what to type instead of an option, one of the `arguments`, that the command does not have, if known."""
    return hint(flag, _typed_value(flag, arguments), verb_of(context), _accepted_names(context))


def verb_of(context: typer.Context) -> str:
    """Return the command without its arguments: `switchcli data prepare`."""
    return f"switchcli{context.command_path.removeprefix(context.find_root().command_path)}"


def _accepted_names(context: typer.Context) -> set[str]:
    """Return the options, the arguments and the recipe keys that a command takes: `--out`, `RECIPE`, `train.steps`."""
    command: Any = context.command
    names = {*_completion.recipe_keys(command.name)}
    for parameter in command.get_params(context):
        if parameter.param_type_name == "option":
            names.update(parameter.opts, parameter.secondary_opts)
        else:
            names.update(re.findall("[A-Z]+", parameter.metavar))
    return names


def hint(flag: str, value: str | None, verb: str, names: Set[str]) -> str | None:
    """Return what to type instead of an option that a verb does not have, or None if that is not known.

    `verb` is the command without its arguments, `switchcli pretrain`. `names` has its options (`--out`), its arguments
    (`RECIPE`) and its recipe keys (`train.steps`). A value that a shell would not read as it stands, and one with
    credentials, is replaced by a placeholder.
    """
    plain = value is not None and _PLAIN.fullmatch(value) and not credentials.find_credentials(value)
    shown = value if plain and value is not None else _PLACEHOLDER
    for needs, text in _suggestions(flag, names):
        if needs in names:
            if needs.endswith("precision"):
                shown = _PRECISIONS.get(shown.lower(), shown)
            return text.format(value=shown, verb=verb, command=f"{verb.partition(' ')[2]} ...")
    return None


def _suggestions(flag: str, names: Set[str]) -> Iterator[Suggestion]:
    """Yield the option that differs only in `_`, the table's suggestions, and the shortest keys of the same name.

    Those of similar options of the table (`--step`) come for one that is not similar to an option of the verb.
    """
    name = flag.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in names:
        yield _option(f"--{name}")
    yield from HINTS.get(name, ())
    if name not in HINTS and not difflib.get_close_matches(f"--{name}", names, n=1, cutoff=_NEAR):
        for similar in difflib.get_close_matches(name, HINTS, n=3, cutoff=_NEAR):
            yield from HINTS[similar]
    key = name.replace("-", "_")
    mappings = {known.rpartition(".")[0] for known in names}
    same = [known for known in names - mappings if known == key or known.endswith(f".{key}")]
    yield from map(_key, sorted(same, key=lambda known: (known.count("."), len(known))))


def _typed_value(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of an option as typed in `arguments`, `--steps 10` or `--steps=10`; None if there is none."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag:
            following = arguments[position + 1 : position + 2]
            return following[0] if following and not re.match(r"-[^\d.]|-$", following[0]) else None
    return None
