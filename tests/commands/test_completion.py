"""Completion by the protocol of each shell: the shell starts the command with the typed words in its environment."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from switchcli.cli import app

COMMAND = Path(sys.executable).with_name("switchcli")


def variables(shell: str, line: str) -> dict[str, str]:
    """Return what the script of a shell has in the environment to complete the last word of `switchcli LINE`."""
    environment = {"_SWITCHCLI_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        words = ["switchcli", *line.replace("=", " = ").split(" ")]  # bash splits words at =
        words = [word for word in words[:-1] if word] + ([] if line.endswith("=") else [words[-1]])
        return environment | {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return environment | {"_TYPER_COMPLETE_ARGS": f"switchcli {line}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], list[str]]:
    """A function that returns the candidates of a shell for the last word of `switchcli LINE`."""

    def candidates(shell: str, line: str) -> list[str]:
        for name, value in variables(shell, line).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            app(prog_name="switchcli")
        printed = capsys.readouterr()
        assert not printed.err
        text = printed.out.strip()
        if shell == "zsh":
            text = "" if text == "_files" else text.removeprefix("_arguments '*: :((").removesuffix("))'")
            return [line.partition('":"')[0].strip('"') for line in text.splitlines()]
        return [line.partition("\t")[0] for line in text.splitlines()]

    return candidates


Ask = Callable[[str, str], list[str]]
CASES: dict[str, Callable[[list[str]], bool]] = {
    "pre": lambda found: found == ["pretrain"],
    "pretrain --res": lambda found: found == ["--resume"],
    "pretrain quick": lambda found: found == ["quickstart/dense", "quickstart/switch"],
    "pretrain ": lambda found: "quickstart/switch" in found and "quickstart/finetune" not in found,
    "finetune quickstart/": lambda found: found == ["quickstart/finetune"],
    "sweep pretrain quickstart/sw": lambda found: found == ["quickstart/switch"],
    "recipes show quickstart/sw": lambda found: found == ["quickstart/switch"],
    "convert a b --to h": lambda found: found == ["huggingface", "hf"],
    "pretrain fine": lambda found: not found,
    "pretrain mine.yaml quick": lambda found: not found,
    "pretrain a --model runs/": lambda found: not found,
}
"""What is typed, and a check of the candidates. Where there are none, the shell completes paths."""
OF_ALL_SHELLS = ("pre", "pretrain quick")


@pytest.mark.parametrize(
    ("shell", "line"), [*(("bash", line) for line in CASES), *product(("zsh", "fish"), OF_ALL_SHELLS)]
)
def test_words(shell: str, line: str, ask: Ask) -> None:
    found = ask(shell, line)
    assert CASES[line](found), found


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_installed_script(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    script = """\
source ~/.bashrc
ask() {  # the words that readline passes for a line
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    $(complete -p switchcli | sed 's/.*-F \\([^ ]*\\).*/\\1/') switchcli; echo "${COMPREPLY[*]}"
}
ask switchcli pre
ask switchcli pretrain quickstart/sw
"""
    install = f"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 {COMMAND} --install-completion bash"
    subprocess.run(["bash", "-c", install], env=environment, capture_output=True, check=True)
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["pretrain", "quickstart/switch"], done.stderr
