"""The commands of README.md and docs/: each is one of switchcli's, and the pages run as they are written.

A page runs in an empty folder, in a terminal. Blocks with a title become files, and shell blocks run in order, with a
`switchcli` that adds overrides for a few steps at the end of a training command. `<!-- not run: REASON -->` above a
block leaves it out.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fork_server
import pytest
import typer
from blocks import ROOT, Block, Command, blocks_of, commands_of, overrides_in, pages
from terminal import in_terminal

from switchcli.cli import app
from switchcli.errors import RecipeError, SwitchError
from switchcli.recipe import key_index, library, yaml_nodes
from switchcli.recipe.foreign_words import WORDS
from switchcli.recipe.schema import resolve_standalone
from switchcli.recipe.sizes import SIZES

SHELL = ("bash", "sh", "shell", "console")
PAGES = pages()
RECIPE_VERBS = ("pretrain", "finetune", "distill", "eval")
EAGER = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
"""An error in the syntax of a command line."""
SMALL = {
    **dict.fromkeys(
        ("pretrain", "finetune", "distill"),
        "train.steps=4 log.every_steps=2 eval.every_steps=2 eval.sequences=8 checkpoint.save_every_steps=2 "
        "schedule.warmup_steps=2",
    ),
    "eval": "scoring.examples=4",
}
"""The overrides that the tests add to the commands of each verb."""
SMALL["finetune"] += f" {SMALL['eval']} scoring.decoding.max_tokens=8"


# Every command is one of switchcli's


def parse(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the verb, and the values of its parameters, as the command line reads the words.

    Raises an error of the command line, or RecipeError, for what it would refuse.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("switchcli", list(words), resilient_parsing=False)
    arguments = [*getattr(context, "_protected_args", []), *context.args]
    verb: list[str] = []
    while hasattr(command, "commands"):
        name, command, arguments = command.resolve_command(context, arguments)
        verb.append(name)
        context = command.make_context(name, arguments, parent=context)
        arguments = [*getattr(context, "_protected_args", []), *context.args]
    return verb, dict(context.params)


def faults_of(command: Command) -> list[str]:
    """Return what is wrong with a command: options, recipe names, keys and values."""
    if EAGER & {*command.words}:
        return []
    try:
        verb, values = parse(command.words)
    except SystemExit:
        return []
    except SwitchError as error:
        return [str(error)]
    words = list(command.words)
    if verb[0] == "sweep":
        rest = list(values.get("arguments") or [])
        if not rest or Path(rest[0]).suffix or rest[0] not in RECIPE_VERBS:
            return []
        verb, words = [rest[0]], rest
        values = {"recipe": rest[1] if len(rest) > 1 and "=" not in rest[1] else None}
    name, overrides = values.get("recipe"), overrides_in(words)
    if verb[0] in ("distill", "eval") and name is None:
        name = next((word for word in values.get("arguments") or [] if "=" not in word), None)
    faults = _key_faults(verb[0], overrides)
    if "model" in values and values["model"] is not None:
        overrides.append(f"start.checkpoint={values['model']}")
    return [*faults, *_recipe_faults(verb[0], name, overrides)]


def _key_faults(verb: str, overrides: Sequence[str]) -> list[str]:
    known = {info.key for info in key_index.keys(verb if verb in RECIPE_VERBS else None)}
    keys = [override.partition("=")[0] for override in overrides]
    return [f"{key}: no such key" for key in keys if key_index.normalize(key) not in known]


def _recipe_faults(verb: str, name: str | None, overrides: Sequence[str]) -> list[str]:
    """Resolve a recipe that ships or that the page has written, with values that no shell variable is part of."""
    if name is None or "$" in name or verb not in (*RECIPE_VERBS, "plan", "data", "doctor"):
        return []
    if verb in ("plan", "doctor") and (name in SIZES or (Path(name).is_dir() or name.startswith("runs/"))):
        return []
    if not Path(name).is_file() and Path(name).suffix in library.SUFFIXES:
        return []  # a file of the reader's own
    plain = [override for override in overrides if "$" not in override and not re.search(r"=[^\[{'\"]*,", override)]
    return _errors_of(name, plain)


def _errors_of(name: str, overrides: Sequence[str] = ()) -> list[str]:
    try:
        resolve_standalone(name, overrides)
    except RecipeError as error:
        return list(error.lines)
    return []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    faults: list[str] = []
    for block in blocks_of(page):
        if block.title is not None:
            _write(block, tmp_path)
        if block.language in SHELL:
            for command in commands_of(block):
                faults += [f"{command}\n    {fault}" for fault in faults_of(command)]
        elif block.language == "python":
            ast.parse(block.text, f"{page}:{block.line}")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_is_valid(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        if block.title is None:
            continue
        _write(block, tmp_path)
        if block.title.endswith(".yaml") and _is_recipe(Path(block.title)):
            assert _errors_of(block.title) == [], f"{page}:{block.line}"


def _is_recipe(path: Path) -> bool:
    root = yaml_nodes.read_file(path).value
    top = {info.key for info in key_index.all_keys() if "." not in info.key}
    return isinstance(root, dict) and bool(root) and {*root} <= top


def _write(block: Block, folder: Path) -> None:
    assert block.title is not None
    path = folder / block.title
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


def test_shell_blocks_have_the_language_bash() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            name = f"{page}:{block.line}"
            assert block.language not in ("sh", "shell", "console", "zsh"), f"{name}: write bash"
            assert block.language or "switchcli " not in block.text, f"{name}: write bash, or text for output"
            assert not re.search(r"^\$ ", block.text, re.MULTILINE) or block.language != "bash", f"{name}: no prompts"


def test_the_page_for_users_of_other_tools_names_keys_that_exist_here_and_there() -> None:
    text = (ROOT / "docs/how-to/other-tools.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    fields: Set[str] | None = None
    if f"`Trainer` ({'.'.join(version('transformers').split('.')[:2])})" in text:  # other releases have other fields
        from transformers import Seq2SeqTrainingArguments

        fields = Seq2SeqTrainingArguments.__dataclass_fields__.keys()
    known = {info.key for info in key_index.all_keys()}
    for theirs, *_, ours in rows:
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)", ours):
            assert key_index.normalize(key) in known, key
        if fields is not None and "TRL's" not in theirs and "model_name" not in theirs and "_dataset" not in theirs:
            for name in re.findall(r"`([a-z]+_[a-z_0-9]+)", theirs.replace("`warmup_ratio` before 5", "")):
                assert name in fields, name


def test_the_words_that_a_hint_translates_are_on_the_page_beside_the_key() -> None:
    lines = (ROOT / "docs/how-to/other-tools.md").read_text(encoding="utf-8").splitlines()
    for ours, theirs in WORDS.items():
        for word in theirs.split():
            assert any(re.search(rf"`[^`|]*\b{word}\b.*{re.escape(ours)}\b", line) for line in lines), (word, ours)


# The pages run


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with a `switchcli` that adds `SMALL` to the commands that it gets, and has a fork run them."""
    folder = tmp_path_factory.mktemp("scripts")
    sockets = Path(tempfile.mkdtemp())  # the path of a socket is short
    server = subprocess.Popen(
        [sys.executable, fork_server.__file__, str(sockets / "s")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    script = folder / "switchcli"
    script.write_text(
        f"#!{sys.executable} -SE\n"
        f"import re, sys\n{fork_server.CLIENT.format(path=str(sockets / 's'))}"
        f"small = {SMALL!r}\n"
        "words = sys.argv[1:]\n"
        "named = [word for word in words if word in small]\n"
        "if words and words[0] in (*small, 'sweep') and named and '--print' not in words:\n"
        "    words += small[named[0]].split()\n"
        "    words = [re.sub(r'@[0-9]+$', '@2', word) for word in words]  # RUN@STEP: such a run has steps 2 and 4\n"
        "ask(words)\n"
    )
    script.chmod(0o755)
    for name in ("python", "python3"):  # not a link, which would not find the environment's packages
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / name).chmod(0o755)
    while not (sockets / "s.ready").exists() and server.poll() is None:
        time.sleep(0.05)
    yield folder
    server.kill()
    server.wait()
    shutil.rmtree(sockets)


def run(block: Block, folder: Path, scripts: Path, columns: int) -> None:
    """Run a shell block in a terminal, and fail with its page, line, command and the end of its output."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(scripts), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    shown = in_terminal(["bash", "-euxo", "pipefail", "-c", block.text], columns, folder, environment)
    if shown.faults:
        last = [line for line in shown.text.splitlines() if line.startswith("+ ")][-1:]
        end = "\n".join(shown.text.splitlines()[-40:])
        pytest.fail(f"{block.page}:{block.line}: {'; '.join(shown.faults)}\n  {last}\n{end}", pytrace=False)


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "columns"), [
    *((page, 80) for page in PAGES if any(
        block.language == "bash" and block.not_run is None for block in blocks_of(page)
    )),
    ("README.md", 120),
])  # fmt: skip
def test_a_page_runs_in_a_terminal_as_it_is_written(page: str, columns: int, scripts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    for block in blocks_of(page):
        if block.not_run is not None:
            continue
        if block.title is not None:
            _write(block, folder)
        elif block.language == "bash":
            run(block, folder, scripts, columns)
