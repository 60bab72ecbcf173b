"""Help of every verb, and the version."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from messages import lacking
from terminal import ELLIPSIS
from tiny_run import SwitchCLI

from switchcli import __version__
from switchcli.cli import app
from switchcli.commands._options import DOCS
from switchcli.commands._parsing import accepted_names
from switchcli.recipe import library

ROOT = Path(__file__).resolve().parents[2]

VERBS = [
    *("pretrain", "finetune", "distill", "eval", "generate", "doctor", "plan"),
    *("recipes", "data", "convert", "upcycle", "prune", "report", "sweep"),
]


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the words and the command of every verb and of every group, the root with no words."""
    yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


def examples(epilog: str) -> list[str]:
    """The commands that a verb's help shows."""
    return [line.strip() for line in epilog.replace(r"\[", "[").splitlines() if line.startswith("  ")]


COMMANDS = dict(commands(typer.main.get_command(app)))
EXAMPLES = [example for command in COMMANDS.values() for example in dict.fromkeys(examples(command.epilog or ""))]


def context_of(line: str) -> Any:
    """Return the context of the verb of a command, with its parsed values. Raises an error for wrong usage."""
    words = shlex.split(re.split(" [<>|] ", line)[0])
    assert words[0] == "switchcli"
    context = COMMANDS[""].make_context("switchcli", words[1:])
    while getattr(context.command, "commands", None):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_a_sentence_two_examples_and_a_page(words: str, switchcli: SwitchCLI) -> None:
    command = COMMANDS[words]
    sentence = inspect.cleandoc(command.help).split("\n\n")[0]
    assert re.fullmatch(r"[A-Z][^\n]*\.", sentence), sentence
    assert not re.search(r"(?<!neg)\. [A-Z]", sentence), "one sentence"
    found = examples(command.epilog)
    assert len(found) == 2
    assert all(
        example.startswith(f"switchcli {words}".strip() + " ") or example == f"switchcli {words}" for example in found
    )
    page = re.search(f"^More: {DOCS.format(page='(.+)')}$", command.epilog, re.MULTILINE)
    assert page, "the page that explains more"
    if (ROOT / "docs").is_dir():  # the documentation is not in the package
        assert (ROOT / f"docs/{page[1]}.md").is_file()
    done = switchcli(*words.split(), "--help")
    for line in (*found, page[0]):
        assert f" {line} " in done.out, "on a line of its own in 80 columns"
    assert "\x1b" not in done.out


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_is_described_and_short(words: str, switchcli: SwitchCLI) -> None:
    context = COMMANDS[words].make_context("switchcli", [], resilient_parsing=True)
    for parameter in COMMANDS[words].get_params(context):
        assert re.fullmatch(r"[A-Z].*\.", parameter.help), f"{parameter.name}: a description"
        shown = parameter.default is not None and parameter.show_default and not parameter.is_flag
        assert not (shown and "efault" in parameter.help), f"{parameter.name}: the default is shown twice"
    text = switchcli(*words.split(), "--help").out
    assert max(map(len, text.splitlines())) <= 80
    assert ELLIPSIS not in text
    assert not re.search(r"<(bool|int|float|str|path|list|file)|range\b|x[<>]=|\d{7}|\{|\[\[", text)
    assert re.search(r"^ Usage: ", text, re.MULTILINE)


@pytest.mark.parametrize("example", dict.fromkeys(EXAMPLES))
def test_every_example_can_be_copied(example: str) -> None:
    context = context_of(example)
    name = context.command.name
    typed = [context.params.get(part) or () for part in ("recipe", "model", "arguments", "overrides")]
    words = [word for part in typed for word in ([part] if isinstance(part, str) else part)]
    if name == "sweep":
        name, *words = words
    for word in words:
        key, is_override, _ = word.partition("=")
        if is_override:
            assert key in accepted_names(context), f"{name} has no key {key}"
        elif re.match(r"(quickstart|pretrain|finetune|distill)/", word):
            assert word in library.recipe_names()


def test_every_verb_is_listed_and_h_is_help(switchcli: SwitchCLI) -> None:
    listed = switchcli("--help")
    assert (listed.code, listed.err) == (0, "")
    assert [verb for verb in VERBS if verb not in listed.out] == []
    assert switchcli("plan", "-h") == switchcli("plan", "--help")


def test_verbs_are_listed_in_the_order_of_a_users_work() -> None:
    listed = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert listed[: len(VERBS)] == VERBS


def test_defaults_shown_in_help_are_the_defaults() -> None:
    assert context_of("switchcli generate m").params["top_p"] == 1.0
    assert context_of("switchcli generate m --top-p 1").params == context_of("switchcli generate m").params


def test_version(switchcli: SwitchCLI) -> None:
    assert switchcli("--version") == (0, f"switchcli {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("plan --bogus --json", "--bogus plan -h"),
        ("pretrain quickstart/dense --processes x", "--processes pretrain -h"),
        ("pretrain quickstart/dense --json --out", "--out pretrain -h"),
        ("bogus", "bogus switchcli -h"),
        ("data bogus", "bogus data -h"),
        ("convert a", "DESTINATION convert -h"),
        ("convert a b", "Choose from: switchcli, huggingface"),
        ("convert a b --to onnx", "--to 'onnx' huggingface"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(words: str, told: str, switchcli: SwitchCLI) -> None:
    done = switchcli(*words.split())
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert not lacking(done.err, told)
    assert "Value error" not in done.err
    assert "--json" not in words or json.loads(done.out)["exit_code"] == 2


def test_no_verb_shows_the_help(switchcli: SwitchCLI) -> None:
    done = switchcli()
    assert done.code == 2
    assert "Usage" in done.out


@pytest.mark.integration
@pytest.mark.parametrize(("target", "code", "said"), [("/dev/full", 4, "error: standard output "), ("&-", 0, "")])
def test_an_output_that_cannot_be_written_is_told_in_one_line(target: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m switchcli recipes list >{target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") <= 1
