"""Exact resume: a run with interruptions ends as one without: weights, optimizer, metrics, bit for bit."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from drill import fingerprint
from messages import lacking
from tiny_run import SwitchCLI, lay_out
from typer.testing import CliRunner

from switchcli.checkpoint import checkpoint
from switchcli.cli import app
from switchcli.runs.inputs import text_sets as verb
from switchcli.runs.train import ending
from switchcli.system.lock import lock
from switchcli.system.publish import temporary_path
from switchcli.terminal.safe_text import command_line, program_name

INTERRUPTED, CHECKPOINT = 75, 4
STEPS = 13
MICROBATCHES = 2  # a step, in RECIPE; the log, eval and save intervals there are 3, 5 and 4


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How a run ends that is never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = ["pretrain", lay_out(folder, text), f"train.steps={STEPS}", "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return fingerprint(folder / "run")


class Signals:
    """The objective of training, which at given calls of its own first sends this process signals."""

    def __init__(self, at: dict[int, list[signal.Signals]]) -> None:
        self.calls, self.at = 0, at
        self.objective = verb.cross_entropy

    def __call__(self, *arguments: Any) -> Any:
        if arguments[0].training:
            for number in self.at.get(self.calls, []):
                signal.raise_signal(number)
            self.calls += 1
        return self.objective(*arguments)


def signals_at(monkeypatch: pytest.MonkeyPatch, at: dict[int, list[signal.Signals]]) -> None:
    monkeypatch.setattr(verb, "cross_entropy", Signals(at))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("number", "stops"), [(signal.SIGTERM, [1, 2, 3, 4]), (signal.SIGINT, [5, 6, 11]), (signal.SIGUSR1, [0, 7])]
)
def test_stopped_several_times_it_ends_the_same(
    number: signal.Signals,
    stops: list[int],
    straight: dict[str, str],
    recipe: str,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["pretrain", recipe, f"train.steps={STEPS}", "--out", "run", "--json"]
    done_steps = 0
    for stop in stops:  # in the first microbatch of a step or its second: the step is finished, and no other
        with monkeypatch.context() as patch:
            signals_at(patch, {(stop - done_steps) * MICROBATCHES + stop % 2: [number]})
            done = switchcli(*command)
        done_steps = stop + 1
        assert done.code == INTERRUPTED
        message, to_paste = done.err.splitlines()[-2:]
        assert not lacking(message, f"saved step {done_steps} {STEPS} run same command")
        assert to_paste.strip() == f"{program_name()} {shlex.join(map(str, command))}"
        assert json.loads(done.out) == {"error": message, "exit_code": INTERRUPTED}
        assert (
            checkpoint.Checkpoint.open(checkpoint.checkpoint_path(Path("run/checkpoints"), done_steps)).step
            == done_steps
        )
    assert switchcli(*command).code == 0
    assert fingerprint(Path("run")) == straight


@pytest.mark.integration
def test_blocks_may_be_computed_again_from_one_start_to_the_next(
    straight: dict[str, str], recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pretrain", recipe, f"train.steps={STEPS}", "--out", "run"]
    for what, more in (("none", 3), ("blocks", 4), ("none", 2), ("blocks", None)):
        with monkeypatch.context() as patch:
            signals_at(patch, {} if more is None else {more * MICROBATCHES: [signal.SIGTERM]})
            done = switchcli(*command, f"train.activation_checkpointing={what}")
        assert done.code == (0 if more is None else INTERRUPTED), done.err
    assert fingerprint(Path("run")) == straight


def test_a_stop_after_the_last_step_leaves_the_result_to_the_next_start(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ending, "machine_info", lambda context: signal.raise_signal(signal.SIGTERM))
        assert switchcli("pretrain", recipe, "--out", "run").code == INTERRUPTED
    assert not Path("run/result.json").exists()
    assert switchcli("pretrain", recipe, "--out", "run").code == 0
    assert Path("run/result.json").exists()


def test_a_run_goes_on_with_the_tokenizer_of_its_checkpoint_and_not_with_other_text(
    recipe: str, text: Path, switchcli: SwitchCLI
) -> None:
    tokenizer, own = Path("run/tokenizer.json"), Path("own.txt")
    shutil.copy(text, own)
    keys = ("data.corpora=[{kind: files, paths: [own.txt], sample_by: line}]", "--out", "run")
    assert switchcli("pretrain", recipe, *keys).code == 0
    with own.open("a") as stream:
        stream.write("one more line of the text\n")
    done = switchcli("pretrain", recipe, *keys, "train.steps=3")
    assert (done.code, "other text" in done.err) == (CHECKPOINT, True), done.err
    shutil.copy(text, own)
    sound = tokenizer.read_text()
    edited = json.loads(sound)
    edited["model"]["vocab"][3:] = reversed(edited["model"]["vocab"][3:])
    for steps, damaged in ((3, "{"), (4, json.dumps(edited))):
        tokenizer.write_text(damaged)
        done = switchcli("pretrain", recipe, *keys, f"train.steps={steps}")
        assert (done.code, tokenizer.read_text()) == (0, sound), done.err


def test_the_only_checkpoint_that_a_kill_left_under_another_name_is_resumed(recipe: str, switchcli: SwitchCLI) -> None:
    """The second save of a step moves the first one aside before it takes its name."""
    assert switchcli("pretrain", recipe, "--out", "run").code == 0
    (only,) = Path("run/checkpoints").iterdir()
    aside = temporary_path(only) / "old"
    aside.mkdir(parents=True)
    only.rename(aside / only.name)
    refused = switchcli("pretrain", recipe, "--out", "run", "schedule.learning_rate=0.02")
    assert (refused.code, lacking(refused.err, "run schedule.learning_rate 0.02")) == (2, []), refused.err
    assert only.exists()
    done = switchcli("pretrain", recipe, "--out", "run", "train.steps=3")
    assert (done.code, lacking(done.err, "step 2 3")) == (0, []), done.err


def test_a_run_that_began_with_no_resume_goes_on_without_it(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signals_at(patch, {MICROBATCHES: [signal.SIGTERM]})
        patch.setattr(sys, "argv", ["switchcli", "pretrain", recipe, "--out", "run", "--no-resume"])
        stopped = switchcli("pretrain", recipe, "--out", "run", "--no-resume")
        assert command_line().endswith(f"switchcli pretrain {recipe} --out run")
    assert (stopped.code, lacking(stopped.err, "same command without --no-resume")) == (INTERRUPTED, []), stopped.err


def test_a_folder_in_use_is_refused_by_name(recipe: str, switchcli: SwitchCLI) -> None:
    with lock(Path("run")):
        for option in ("--resume", "--no-resume"):
            done = switchcli("pretrain", recipe, "--out", "run", option)
            assert (done.code, done.out) == (CHECKPOINT, "")
            assert re.fullmatch(rf"error: run: in use .*process {os.getpid()}\b.*--out.*\n", done.err)
    assert switchcli("pretrain", recipe, "--out", "run").code == 0


@pytest.mark.integration
def test_a_stop_during_the_last_save_counts(
    recipe: str, straight: dict[str, str], switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_files, saves = checkpoint.encode_files, []

    def stopped(*arguments: Any) -> Any:
        saves.append(arguments)
        if len(saves) == 4:  # after steps 4, 8, 12, and the last one, 13
            os.kill(os.getpid(), signal.SIGTERM)
        return encode_files(*arguments)

    monkeypatch.setattr(checkpoint, "encode_files", stopped)
    arguments = ("pretrain", recipe, f"train.steps={STEPS}", "--out", "run")
    assert switchcli(*arguments).code == INTERRUPTED
    assert len(saves) == 4
    assert switchcli(*arguments).code == 0
    assert fingerprint(Path("run")) == straight
