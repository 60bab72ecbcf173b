"""`switchcli pretrain --model`: a run that begins with the weights of another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from messages import lacking

from switchcli.errors import CheckpointError
from switchcli.report.console import silent
from switchcli.runs.loading import open_checkpoint


def weights(path: Path):
    found = open_checkpoint(path, silent())
    empty = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in found.tensor_specs("model").items()}
    return found.read("model", empty)


def test_it_begins_with_the_weights_and_the_vocabulary_of_the_checkpoint(switchcli, recipe, trained):
    """On the same text, whose held-out part its path names, the first figure is then the checkpoint's last."""
    again = str(trained / "recipe.yaml")
    done = switchcli("pretrain", again, "--model", trained, "--json", "--out", "on", "train.steps=1")
    assert done.code == 0, done.err
    result, before = json.loads(done.out), json.loads((trained / "result.json").read_text())
    figures = [json.loads(line) for line in Path("on/metrics.jsonl").read_text().splitlines()]
    assert figures[0]["held_out/neg_log_perplexity"] == before["held_out/neg_log_perplexity"]
    assert result["step"] == 1
    assert (Path("on") / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_new_optimizer_takes_another_step_than_one_that_is_carried(switchcli, recipe, trained):
    for kind in ("carry", "reset"):
        done = switchcli("pretrain", recipe, "--model", trained, "--out", kind, f"start.optimizer={kind}", "-q")
        assert done.code == 0, done.err
    carried, reset = weights(Path("carry")), weights(Path("reset"))
    assert any(not torch.equal(carried[name], reset[name]) for name in carried)


def test_it_resumes_without_the_checkpoint_that_it_started_from(switchcli, recipe, trained, tmp_path):
    command = ("pretrain", recipe, "--model", tmp_path / "moving", "--quiet", "checkpoint.save_every_steps=1")
    (tmp_path / "moving").symlink_to(trained)
    assert switchcli(*command, "--out", "whole", "train.steps=3").code == 0
    assert switchcli(*command, "--out", "halves", "train.steps=2").code == 0
    done = switchcli(*command, "--out", "halves", "train.steps=3")
    assert done.code == 0, done.err
    whole, halves = weights(Path("whole")), weights(Path("halves"))
    # The learning rate's last steps depend on how many there are: here none do.
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_run_that_was_killed_before_its_first_save_keeps_its_start(switchcli, recipe):
    """The run that it started from has gone on since."""
    source = ("pretrain", recipe, "--out", "source", "checkpoint.save_every_steps=1", "checkpoint.keep_last=5", "-q")
    assert switchcli(*source, "train.steps=1").code == 0
    command = ("pretrain", recipe, "--model", "source", "--out", "on", "train.steps=1")
    first = switchcli(*command)
    assert first.code == 0, first.err
    start = "source/checkpoints/step-00000001"
    assert f"starting from {start}" in first.err
    shutil.rmtree("on/checkpoints")  # as after a kill before the first save
    assert switchcli(*source, "train.steps=2").code == 0
    again = switchcli(*command)
    assert again.code == 0, again.err
    assert f"starting from {start}" in again.err
    shutil.rmtree("on/checkpoints")
    shutil.rmtree(start)
    gone = switchcli(*command)
    assert gone.code == 0, gone.err
    assert not lacking(gone.err, f"warning {start}")
    assert "starting from source/checkpoints/step-00000002" in gone.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.d_model=64", "model.d_model 64 32"),
        ("model.num_experts=8", "model.num_experts 8 4"),
        ("data.tokenizer={kind: file, path: other.json}", "data.tokenizer other.json tokenizer"),
    ],
)
def test_what_is_not_the_checkpoints_is_refused(switchcli, recipe, trained, change, words):
    other = json.loads((trained / "tokenizer.json").read_text())
    other["model"]["vocab"][-1][0] += "x"
    Path("other.json").write_text(json.dumps(other))
    done = switchcli("pretrain", recipe, "--model", trained, "--out", "on", change)
    assert done.code == 2
    assert not lacking(done.err, words)


def test_no_checkpoint_no_run(switchcli, recipe):
    done = switchcli("pretrain", recipe, "--model", "nowhere", "--out", "on")
    assert done.code == CheckpointError.exit_code
    assert not lacking(done.err, "nowhere checkpoint checkpoints/step-*")
    assert not Path("on").exists()
