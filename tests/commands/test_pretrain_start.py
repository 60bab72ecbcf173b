"""`switchcli pretrain --model`: a run that begins with the weights of another."""

import json
import shutil
from pathlib import Path

import pytest
from messages import lacking

from switchcli.errors import CheckpointError


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


@pytest.mark.integration
def test_a_run_that_was_killed_before_its_first_save_keeps_its_start(switchcli, begun):
    """The run that it started from has gone on since, and is gone at last."""
    command = ("pretrain", begun, "--model", "a", "--out", "on", "train.steps=1", "start.keep=weights")
    first = switchcli(*command)
    assert first.code == 0, first.err
    start = "a/checkpoints/step-00000002"
    assert f"starting from {start}" in first.err
    shutil.rmtree("on/checkpoints")  # as after a kill before the first save
    more = ("train.steps=3", "checkpoint.keep_last=5", "checkpoint.save_every_steps=1")
    assert switchcli("pretrain", begun, "--out", "a", *more).code == 0
    again = switchcli(*command)
    assert again.code == 0, again.err
    assert f"starting from {start}" in again.err
    shutil.rmtree(start)
    resumed = switchcli(*command[:-2], "train.steps=2", "start.keep=weights")
    assert resumed.code == 0, "a run that has saved does not need its start"
    shutil.rmtree("on/checkpoints")
    gone = switchcli(*command)
    assert gone.code == CheckpointError.exit_code
    assert not lacking(gone.err, start)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.d_model=64", "model.d_model 64 32"),
        ("model.num_experts=8", "model.num_experts 8 4"),
        ("data.tokenizer={kind: file, path: other.json}", "data.tokenizer other.json tokenizer"),
        ("data.tokenizer.byte_fallback=true", "data.tokenizer.byte_fallback true false"),
        ("data.tokenizer.num_sentinels=50", "data.tokenizer.num_sentinels 50 100"),
    ],
)
def test_what_is_not_the_checkpoints_is_refused(switchcli, recipe, trained, change, words):
    other = json.loads((trained / "tokenizer.json").read_text())
    other["model"]["vocab"][-1][0] += "x"
    Path("other.json").write_text(json.dumps(other))
    done = switchcli("pretrain", recipe, "--model", trained, "--out", "on", change)
    assert done.code == 2
    assert not lacking(done.err, words)


@pytest.mark.parametrize(("verb", "option"), [("pretrain", "--model"), ("distill", "--teacher")])
def test_a_missing_checkpoint_hides_no_misspelt_key(verb, option, switchcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = switchcli(verb, "quickstart/dense", option, "none", "train.steps=2", "--out", "on")
    assert (missing.code, missing.err.count("\n")) == (4, 1), missing.err
    misspelt = switchcli(verb, "quickstart/dense", option, "none", "train.step=2", "--out", "on")
    assert (misspelt.code, misspelt.err.count("\n")) == (2, 2), misspelt.err
    assert not lacking(misspelt.err, "train.step steps")
    assert not lacking(misspelt.err, f"{option} none")
