"""All attacks; and with a guard taken out they succeed, and without harm they get through: the check can fail."""

import contextlib
import os
import pickle
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import pytest
import shown
import torch
from forked import Done, command

from switchcli import credentials
from switchcli.checkpoint import manifest, tensor_file
from switchcli.commands import _exit, _tokenizers
from switchcli.commands import recipes as recipes_verb
from switchcli.convert import config as configs
from switchcli.convert import weight_files
from switchcli.data.prepare import store
from switchcli.data.tokenizer import tokenizer
from switchcli.recipe import resolve, yaml_nodes
from switchcli.report import console, html_page
from switchcli.runs import trainer
from switchcli.user_files import open_regular

ANY_NAME = re.compile(r".*", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    attacks.lay_out(folder)
    return folder


@pytest.mark.integration
def test_every_attack_is_blocked(tmp_path: Path) -> None:
    found = list(attacks.rows(tmp_path, long=False))
    assert not [row for row in found if row.lost]
    assert sum(row.trials for row in found) >= 60


def unpickling(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader that tries whether what it is to read is a pickle, as many do."""

    def first(path: Any, *rest: Any, **words: Any) -> Any:
        with contextlib.suppress(Exception):
            pickle.loads(Path(path).read_bytes())
        return read(path, *rest, **words)

    return first


def same(text: str) -> str:
    return text


@contextlib.contextmanager
def unexplained(where: str, fault: str) -> Any:
    yield


def anything(self: manifest.Manifest, folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


LOAD, READ, MACHINE, STORED = torch.load, store._read, trainer.machine_info, weight_files._stored
UNPICKLE = [
    (manifest, "read_small", unpickling(manifest.read_small)),
    (tensor_file, "safe_open", unpickling(tensor_file.safe_open)),
    (configs, "read_json", unpickling(configs.read_json)),
    (tokenizer, "read_file", unpickling(tokenizer.read_file)),
    (torch, "load", lambda path, **words: LOAD(path, **{**words, "weights_only": False, "mmap": False})),
    (store, "_read", lambda content, path: unpickling(lambda path: READ(content, path))(path)),
]
READS_RECIPES = (yaml_nodes, "_refuse", lambda source, where: None)
SAYS = [(module, "one_line", same) for module in (console, _exit, recipes_verb, _tokenizers)]
GUARDS: dict[str, tuple[dict[str, Any], list[str], list[tuple[Any, str, Any]]]] = {
    "no unpickling": (attacks.PICKLES, [name for name in attacks.PICKLES if name != "pytorch_model.bin"], UNPICKLE),
    "asking before": (
        attacks.PICKLES,
        ["pytorch_model.bin"],
        [*UNPICKLE, (weight_files, "_stored", lambda folder, unpickle: STORED(folder, True))],
    ),
    "plain names in a manifest": (
        attacks.PATHS,
        ["../ in a manifest", "a folder in a manifest"],
        [(manifest, "_FILE_NAME", ANY_NAME)],
    ),
    "no links": (
        attacks.PATHS,
        ["weights that are a link", "a manifest that is a link"],
        [(module, "open_regular", lambda path, follow_links: open_regular(path)) for module in (manifest, tensor_file)],
    ),
    "files that the manifest names": (
        attacks.PATHS,
        ["a recipe that no manifest names"],
        [(manifest.Manifest, "read", anything)],
    ),
    "a recipe by itself": (
        attacks.PATHS,
        ["a checkpoint's recipe that extends another"],
        [(resolve, "parse_saved", lambda document, where: resolve.load(where))],
    ),
    "plain names in an index": (
        attacks.PATHS,
        ["../ in an index", "an absolute path in an index"],
        [(weight_files, "_FILE_NAME", ANY_NAME)],
    ),
    "YAML": (
        attacks.YAML,
        ["a tag of YAML's own", "a tag that calls"],
        [READS_RECIPES],
    ),
    "digits": (attacks.YAML, ["a number of a million digits"], [(yaml_nodes, "MAX_DIGITS", 10**9)]),
    "ids": (attacks.TOKENIZERS, ["ids by the billion"], [(tokenizer, "_MAX_IDS", 2**40)]),
    "words for what a tokenizer cannot do": (
        attacks.TOKENIZERS,
        ["nothing for what is unknown", "rules that are none"],
        [(tokenizer, "_library_errors", unexplained)],
    ),
    "one_line": (
        shown.TERMINALS,
        [
            "in text",
            "in pieces of a tokenizer",
            "in names and words of runs",
            "in the name of a copy",
            "in the name of a run that is none",
        ],
        SAYS,
    ),
    "names of keys": (shown.TERMINALS, ["in the name of a recipe"], [*SAYS, (yaml_nodes, "display_key", str)]),
    "escaped pages": (shown.PAGES, [*shown.PAGES][:2], [(html_page, "_text", same)]),
    "no environment": (
        shown.SECRETS,
        ["HF_TOKEN while training"],
        [(trainer, "machine_info", lambda context: {**MACHINE(context), "environment": dict(os.environ)})],
    ),
    "no password": (
        shown.SECRETS,
        ["a password in a URL"],
        [(credentials, "find_credentials", lambda place: None)],
    ),
}
"""By the guard: the attacks that succeed when it is taken out, and how it is."""


@pytest.mark.unit(
    "no unpickling-weights",
    "plain names in a manifest-../ in a manifest",
    "no links-weights that are a link",
    "YAML-a tag that calls",
    "one_line-in names and words of runs",
    "no password-a password in a URL",
    "ids-ids by the billion",
    "plain names in an index-../ in an index",
)
@pytest.mark.parametrize(
    ("guard", "name"), [(guard, name) for guard, (_, names, _) in GUARDS.items() for name in names]
)
def test_without_its_guard_it_succeeds(guard: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, _, patches = GUARDS[guard]
    for owner, attribute, instead in patches:
        monkeypatch.setattr(owner, attribute, instead)
    assert attacks.tried(folder, group[name], name)


def test_sound_files_get_through(folder: Path) -> None:
    """What is refused of the same files with harm is not refused for something else."""
    for harmless in (
        lambda: attacks.blocked(command(*attacks.GENERATE)),
        lambda: attacks.blocked(command(*attacks.RESUME)),
        lambda: attacks.blocked(command(*attacks.CONVERT)),
        attacks.header(lambda found: None),
        attacks.moved(0),
        attacks.yaml("description: word\n", "anything"),
    ):
        (said,) = attacks.tried(folder, harmless, "harmless")
        assert "exit code 0" in said


@pytest.mark.parametrize(
    "harm",
    [
        lambda: Path("/var/tmp/switchcli-audit").touch(),
        lambda: Path("/var/tmp/switchcli-audit").write_bytes(b""),
        lambda: socket.socket().connect(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("localhost", 80),
        lambda: subprocess.run(["true"], check=True),
        lambda: os.system("true"),
        lambda: pickle.loads(pickle.dumps(Path())),
    ],
)
def test_the_audit_sees(harm: Callable[[], object], folder: Path) -> None:
    def act() -> Done:
        with contextlib.suppress(OSError):
            harm()
        return Done(0, "", "")

    try:
        assert attacks.tried(folder, lambda: shown.audited(act), "harm")
        assert not attacks.tried(folder, lambda: shown.audited(lambda: Done(0, "", "")), "nothing")
    finally:
        Path("/var/tmp/switchcli-audit").unlink(missing_ok=True)
