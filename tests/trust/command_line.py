"""The verbs with their options and arguments that may name a place, found in the command line itself.

A new verb or option is tried by the parts `urls` and `paths` without a change to them: what takes text is taken to name
a place, but for the few names in NO_PLACES.
"""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
from forked import command, faults
from tiny_run import RECIPE, write_text

from switchcli.cli import Verbs

NO_PLACES = {"texts", "share", "memory", "revision", "key", "gpu", "license_"}
"""Parameters that take other text: what a model reads, a share I/N, a size in bytes, a commit, a key, names."""

SOUND: dict[str, list[str]] = {
    "pretrain": ["{sound}/tiny.yaml", "--out", "made"],
    "finetune": ["{sound}/tune.yaml", "--model", "{sound}/run", "--out", "made"],
    "distill": ["train.steps=2", "--teacher", "{sound}/run", "--out", "made"],
    "eval": ["{sound}/run", "text.sequences=4", "--out", "made"],
    "generate": ["{sound}/run", "red", "--max-tokens", "2"],
    "doctor": ["{sound}/run"],
    "plan": ["{sound}/tiny.yaml"],
    "recipes list": [],
    "recipes show": ["quickstart/switch"],
    "recipes copy": ["quickstart/switch", "made.yaml"],
    "recipes validate": ["{sound}/tiny.yaml"],
    "recipes schema": ["pretrain"],
    "recipes explain": ["train.steps"],
    "data prepare": ["{sound}/tiny.yaml", "--processes", "1"],
    "data tokenizer train": ["{sound}/tiny.yaml", "--out", "made.json"],
    "data tokenizer show": ["{sound}/run"],
    "data tokenizer compare": ["{sound}/run", "--text", "{sound}/text.txt"],
    "convert": ["{sound}/run", "made", "--to", "huggingface"],
    "upcycle": ["{sound}/dense", "made", "--experts", "2"],
    "prune": ["{sound}/run", "made", "--experts", "2", "text.sequences=4"],
    "report": ["{sound}/run"],
    "sweep": ["pretrain", "{sound}/tiny.yaml", "train.steps=2", "--out", "made", "--print"],
    "launch": ["--torchrun", "--ranks", "1", "--print", "--", "pretrain", "{sound}/tiny.yaml"],
}
"""What each verb takes without complaint; a verb that is not here fails the part."""


class Parameter(NamedTuple):
    """An option or argument of a verb that may name a place."""

    verb: str
    name: str
    """`--out` of an option, `checkpoint` of an argument."""
    position: int
    """The index of an argument in the sound command."""

    def __str__(self) -> str:
        return f"{self.verb} {self.name}"

    @property
    def writes(self) -> bool:
        return self.name in ("--out", "--html", "--figures", "destination", "file")

    def with_value(self, value: str, sound: Path) -> list[str]:
        """The sound command with this parameter set to `value`."""
        words = [word.format(sound=sound) for word in SOUND[self.verb]]
        if self.name.startswith("--"):
            if self.name in words:
                place = words.index(self.name)
                del words[place : place + 2]
            words += [self.name, value]
        else:
            words[self.position : self.position + 1] = [value]
        if value == "-" and not self.name.startswith("--"):
            words = [*[word for word in words if word != value], "--", value]
        return [*self.verb.split(), *words]


def parameters() -> Iterator[Parameter]:
    """Every option and argument that takes text or a path."""
    apps = [importlib.import_module(f"switchcli.commands.{name}").app for name in Verbs()]
    for verb, function in (pair for app in apps for pair in _verbs(app)):
        assert verb in SOUND, f"{verb}: a new verb: give it a sound command here"
        position = 0
        for name, hint in get_type_hints(function, include_extras=True).items():
            if get_origin(hint) is not Annotated:
                continue
            kind, about, *_ = get_args(hint)
            is_option = isinstance(about, typer.models.OptionInfo)
            if _takes_text(kind) and name not in NO_PLACES:
                flag = next(iter(about.param_decls or ()), f"--{name.replace('_', '-')}") if is_option else name
                yield Parameter(verb, flag, position)
            position += not is_option


def _verbs(group: typer.Typer, words: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    words = f"{words} {group.info.name}".strip() if isinstance(group.info.name, str) else words
    for one in group.registered_commands:
        assert one.callback is not None
        yield f"{words} {one.name or one.callback.__name__}".strip(), inspect.unwrap(one.callback)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _verbs(inner.typer_instance, words)


def _takes_text(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType, list):
        return any(map(_takes_text, get_args(kind)))
    return kind in (str, Path)


# Keys of recipes

CORPUS = "data.corpora=[{{kind: files, paths: [{0}], sample_by: line}}]"
TASK = "tasks=[{{{{kind: files, name: own, {}: [{{0}}], input: '{{{{{{{{text}}}}}}}}', target: label}}}}]"
KEYS: dict[str, tuple[str, str]] = {
    "data.corpora.paths": ("pretrain", CORPUS),
    "data.corpora.path of hub": ("pretrain", "data.corpora=[{{kind: hub, path: {0}}}]"),
    "data.corpora.data_files": ("pretrain", "data.corpora=[{{kind: hub, path: {sound}/texts, data_files: {0}}}]"),
    "data.corpora.data_files, a list": ("pretrain", "data.corpora=[{{kind: hub, path: x/y, data_files: [{0}]}}]"),
    "data.tokenizer.path": ("pretrain", "data.tokenizer={{kind: file, path: {0}}}"),
    "data.tokenizer.path of hub": ("pretrain", "data.tokenizer={{kind: hub, path: {0}}}"),
    "start.checkpoint": ("pretrain", "start.checkpoint={0}"),
    "data.folder": ("finetune", "data.folder={0}"),
    "tasks.train": ("finetune", TASK.format("train")),
    "tasks.validation": ("finetune", TASK.format("validation")),
    "tasks.test": ("finetune", TASK.format("test")),
    "distill.teacher": ("distill", "distill.teacher={0}"),
    "distill.baseline": ("distill", "distill.baseline={0}"),
    "distill.cache.folder": ("distill", "distill.cache.folder={0}"),
    "student.path": ("distill", "student={{kind: checkpoint, path: {0}}}"),
    "text.corpora.paths": ("eval", f"text.{CORPUS.removeprefix('data.')}"),
}
"""For each name a verb and the override that sets it to {0}, a string of YAML."""


def set_key(key: str, value: str, sound: Path) -> list[str]:
    """The sound command of a verb with a key of the recipe set to `value`, a string of YAML in quotes."""
    verb, override = KEYS[key]
    words = [word.format(sound=sound) for word in SOUND[verb]]
    if key == "distill.teacher":
        words = words[:1] + words[3:]
    return [verb, *words, override.format(value, sound=sound)]


TUNING = """\
tasks:
  - {kind: files, name: own, train: [FOLDER/train.jsonl], validation: [FOLDER/validation.jsonl], input: "say {text}",
     target: label, labels: [red, green], metrics: [accuracy]}
data: {inputs_length: 32, targets_length: 32}
train: {steps: 2, batch_tokens: 128, device: cpu}
eval: {every_steps: 2, sequences: 4}
scoring: {batch_examples: 4, draws: 10, decoding: {max_tokens: 4}}
checkpoint: {save_every_steps: 2}
"""


def lay_out(folder: Path) -> None:
    """Lay out what the sound commands name: texts, recipes and runs. The folder is the current one."""
    write_text(Path("text.txt"))
    Path("texts").mkdir()
    Path("texts/text.txt").write_text("red green\n" * 40)
    Path("tiny.yaml").write_text(RECIPE.replace("[text.txt]", f"[{folder}/text.txt]"))
    for split in ("train", "validation"):
        Path(f"{split}.jsonl").write_text('{"text": "which", "label": "red"}\n' * 16)
    Path("tune.yaml").write_text(TUNING.replace("FOLDER", str(folder)))
    made = [
        ["pretrain", "tiny.yaml", "--out", "run"],
        ["pretrain", "tiny.yaml", "model.num_experts=1", "--out", "dense"],
    ]
    assert not (wrong := faults(len(made), lambda number: command(*made[number]).fault([0]))), wrong
