"""The verbs with their options and arguments that may name a place, found in the command line itself.

A new verb or option is tried by test_odd_paths without a change to it: what takes text is taken to name a place, but
for the few names in NO_PLACES.
"""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from switchcli.cli import Verbs

NO_PLACES = {"texts", "share", "memory", "revision", "key", "gpu", "license_"}
"""Parameters that take other text: what a model reads, a share I/N, a size in bytes, a commit, a key, names."""

SOUND: dict[str, str] = {
    "pretrain": "tiny.yaml --out made",
    "finetune": "tune.yaml --model run train.steps=2 scoring.decoding.max_tokens=2 --out made",
    "distill": "train.steps=2 --teacher run --out made",
    "eval": "run text.sequences=4 --out made",
    "generate": "run red --max-tokens 2",
    "doctor": "run",
    "plan": "tiny.yaml",
    "recipes list": "",
    "recipes show": "quickstart/switch",
    "recipes copy": "quickstart/switch made.yaml",
    "recipes validate": "tiny.yaml",
    "recipes schema": "pretrain",
    "recipes explain": "train.steps",
    "data prepare": "tiny.yaml --processes 1",
    "data tokenizer train": "tiny.yaml --out made.json",
    "data tokenizer show": "run",
    "convert": "run made --to huggingface",
    "upcycle": "dense made --experts 2",
    "prune": "run made --experts 2 text.sequences=4",
    "report": "run",
    "sweep": "pretrain tiny.yaml train.steps=2 --out made --print",
}
"""What each verb takes without complaint, in the folder of `harness.lay_out`; one that is not here fails the tests."""


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

    def with_value(self, value: str) -> list[str]:
        """The sound command with this parameter set to `value`."""
        words = SOUND[self.verb].split()
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


CORPUS = "data.corpora=[{{kind: files, paths: [{0}], sample_by: line}}]"
TASK = "tasks=[{{{{kind: files, name: own, {}: [{{0}}], input: '{{{{text}}}}', target: label}}}}]"
KEYS: dict[str, tuple[str, str]] = {
    "data.corpora.paths": ("pretrain", CORPUS),
    "data.corpora.path of hub": ("pretrain", "data.corpora=[{{kind: hub, path: {0}}}]"),
    "data.corpora.data_files, a list": ("pretrain", "data.corpora=[{{kind: hub, path: x/y, data_files: [{0}]}}]"),
    "data.tokenizer.path": ("pretrain", "data.tokenizer={{kind: file, path: {0}}}"),
    "data.tokenizer.path of hub": ("pretrain", "data.tokenizer={{kind: hub, path: {0}}}"),
    "start.checkpoint": ("pretrain", "start.checkpoint={0}"),
    "data.folder": ("finetune", "data.folder={0}"),
    "tasks.train": ("finetune", TASK.format("train")),
    "tasks.test": ("finetune", TASK.format("test")),
    "distill.teacher": ("distill", "distill.teacher={0}"),
    "distill.baseline": ("distill", "distill.baseline={0}"),
    "student.path": ("distill", "student={{kind: checkpoint, path: {0}}}"),
    "text.corpora.paths": ("eval", f"text.{CORPUS.removeprefix('data.')}"),
}
"""For each name a verb and the override that sets it to {0}, a string of YAML."""


def set_key(key: str, value: str) -> list[str]:
    """The sound command of a verb with a key of the recipe set to `value`, a string of YAML in quotes."""
    verb, override = KEYS[key]
    words = SOUND[verb].replace("--teacher run ", "" if key == "distill.teacher" else "--teacher run ").split()
    return [verb, *words, override.format(value)]
