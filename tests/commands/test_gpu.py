"""The main line on a CUDA device: what a CPU cannot vouch for. Skipped where there is none.

Each run is a process of its own: accelerate keeps the first device that a process asked for.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def switchcli(*arguments: str) -> str:
    command = [sys.executable, "-m", "switchcli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "selective"])
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_trains_saves_and_goes_on(optimizer: str, precision: str, recipe: str) -> None:
    keys = ["train.device=cuda", f"train.precision={precision}", "train.clip_norm=1.0", f"optimizer.kind={optimizer}"]
    command = ["pretrain", recipe, *keys, "--out", "a", "--json"]
    switchcli(*command, "train.steps=2")
    result = json.loads(switchcli(*command, "train.steps=12", "train.activation_checkpointing=blocks"))
    assert result["step"] == 12
    assert result["held_out/neg_log_perplexity"] > result["held_out/first_neg_log_perplexity"]
    switchcli("generate", "a", "the red <extra_id_0> is blue", "--device", "cuda")


def test_one_device_goes_on_from_anothers_checkpoint(recipe: str) -> None:
    for steps, device in [(2, "cpu"), (4, "cuda"), (6, "cpu")]:
        done = switchcli("pretrain", recipe, f"train.steps={steps}", f"train.device={device}", "--out", "a", "--json")
        assert json.loads(done)["step"] == steps


@pytest.mark.parametrize("precision", ["float32", "selective"])
def test_a_model_is_fine_tuned_and_scored(precision: str, trained: Path, tuning: str) -> None:
    keys = ["train.device=cuda", f"train.precision={precision}", "--model", str(trained), "--out", "a"]
    switchcli("finetune", tuning, *keys)
    result = json.loads(switchcli("finetune", tuning, *keys, "train.steps=8", "--json"))
    assert result["step"] == 8
    scored = json.loads(switchcli("eval", "a", "device=cuda", "scoring.decoding.beams=2", "--json"))
    assert scored["passes"][0]["tasks"].keys() == result["tasks"].keys()


@pytest.mark.parametrize("answers", [[], ["distill.answers.folder=answers"]], ids=["online", "kept answers"])
@pytest.mark.parametrize("precision", ["float32", "selective"])
def test_a_student_learns_from_its_teacher(precision: str, answers: list[str], trained: Path, tmp_path: Path) -> None:
    keys = ["train.device=cuda", f"train.precision={precision}", "train.steps=4", *answers]
    command = ["distill", "--teacher", str(trained), *keys, "--out", str(tmp_path / "a"), "--json"]
    said = json.loads(switchcli(*[key.replace("=answers", f"={tmp_path}/answers") for key in command]))
    assert said["step"] == 4
    assert said["distillation"]["student"]["figures"].keys() == said["distillation"]["teacher"]["figures"].keys()
