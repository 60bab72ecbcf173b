"""Help of every verb, and the version."""

import shlex
import subprocess
import sys

import pytest
import typer
from conftest import SwitchCLI

from switchcli import __version__
from switchcli.cli import app

VERBS = [
    *("pretrain", "finetune", "distill", "eval", "generate", "doctor", "plan"),
    *("recipes", "data", "convert", "upcycle", "prune", "report"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_is_listed(verb: str, switchcli: SwitchCLI) -> None:
    for option in ("--help", "-h"):
        done = switchcli(verb, option)
        assert (done.code, done.err) == (0, "")
        assert "Usage" in done.out
    assert verb in switchcli("--help").out


def test_verbs_are_listed_in_the_order_of_a_users_work() -> None:
    listed = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert listed[: len(VERBS)] == VERBS


def test_version(switchcli: SwitchCLI) -> None:
    assert switchcli("--version") == (0, f"switchcli {__version__}\n", "")


def test_no_verb_shows_the_help(switchcli: SwitchCLI) -> None:
    done = switchcli()
    assert done.code == 2
    assert "Usage" in done.out


@pytest.mark.parametrize(("target", "code", "said"), [("/dev/full", 4, "error: standard output "), ("&-", 0, "")])
def test_an_output_that_cannot_be_written_is_told_in_one_line(target: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m switchcli recipes list >{target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") <= 1
