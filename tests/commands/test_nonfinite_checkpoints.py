"""A checkpoint with NaN, infinity or a state that no run wrote is refused by every verb, and JSON never holds NaN."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from messages import lacking
from tiny_checkpoint import reseal
from tiny_run import SwitchCLI, lay_out_tuning

VERBS: dict[str, Sequence[str]] = {
    "eval": ["eval", "bad", "--json"],
    "generate": ["generate", "bad", "a red"],
    "generate with beams": ["generate", "bad", "a red", "--beams", "2", "--json"],
    "convert": ["convert", "bad", "theirs", "--to", "huggingface"],
    "doctor": ["doctor", "bad", "--json"],
    "routing": ["report", "bad", "--routing"],
    "finetune": ["finetune", "tune.yaml", "--model", "bad", "--out", "new"],
    "continued pretraining": ["pretrain", "tiny.yaml", "--model", "bad", "--out", "new"],
    "branch": ["pretrain", "bad/recipe.yaml", "--branch-from", "bad", "train.steps=3", "--out", "new"],
    "resume": ["pretrain", "bad/recipe.yaml", "train.steps=3", "--out", "bad"],
    "teacher": ["distill", "--teacher", "bad", "--out", "new"],
    "student": ["distill", "--teacher", "good", "--student", "bad", "--out", "new"],
    "prune": ["prune", "bad", "new", "--experts", "2"],
}
SLOW = ("teacher", "student", "prune", "branch", "resume", "continued pretraining", "routing", "generate with beams")


def spoil(run: Path, name: str, value: float, group: str = "model") -> None:
    """Set one value of a tensor in the run's last checkpoint."""
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    file = checkpoint / f"{group}-00000.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name].view(-1)[-1:] = torch.tensor([value]).to(tensors[name].dtype)
    safetensors.torch.save_file(tensors, file)
    reseal(checkpoint)


@pytest.fixture
def bad(trained: Path, recipe: str) -> Path:
    """A copy of a run in the current folder, to be spoiled, beside recipes and the run itself."""
    lay_out_tuning(Path())
    shutil.copytree(trained, "bad")
    Path("good").symlink_to(trained)
    return Path("bad")


@pytest.mark.unit(*(verb for verb in VERBS if verb not in SLOW))
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_weight_that_is_not_finite(verb: str, bad: Path, switchcli: SwitchCLI) -> None:
    spoil(bad, "decoder.blocks.1.feed_forward.layer.experts.3.wo", float("nan" if len(verb) % 2 else "-inf"))
    done = switchcli(*VERBS[verb])
    assert done.code == 5, done.err
    said = "model-00000.safetensors", "decoder.blocks.1.feed_forward.layer.experts.3.wo", "NaN or infinity"
    assert not lacking(done.err, " ".join(said)), done.err
    assert "Traceback" not in done.err
    if "--json" in VERBS[verb]:
        assert json.loads(done.out, parse_constant=pytest.fail)["exit_code"] == 5
    assert not Path("theirs").exists()
    assert not list(Path().glob("cache/steps-*"))


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [("optimizer/steps", -1, 4), ("embedding/moment", -1.0, 4), ("embedding/moment", float("nan"), 5)],
)
def test_an_optimizer_state_that_no_run_wrote_ends_a_start(
    name: str, value: float, code: int, bad: Path, switchcli: SwitchCLI
) -> None:
    spoil(bad, name, value, "optimizer")
    done = switchcli("pretrain", "bad/recipe.yaml", "train.steps=3", "--out", "bad")
    assert (done.code, lacking(done.err, f"step-00000002 {name}")) == (code, []), done.err
    done = switchcli("pretrain", "tiny.yaml", "--model", "bad", "start.keep=optimizer", "--out", "new")
    assert (done.code, lacking(done.err, f"step-00000002 {name}")) == (code, []), done.err


def test_weights_whose_products_overflow_give_no_score(bad: Path, switchcli: SwitchCLI) -> None:
    """Each weight is finite, and the loss is not."""
    spoil(bad, "decoder.final_norm.weight", 3e38)
    spoil(bad, "embedding", 3e38)
    done = switchcli("eval", "bad", "--json", "--out", "new")
    assert (done.code, json.loads(done.out, parse_constant=pytest.fail)["exit_code"]) == (5, 5), done.err
    assert not lacking(done.err, "held-out loss nan")
    assert not Path("new").exists()


@pytest.mark.integration
def test_upcycling_refuses_a_weight_that_is_not_finite(dense: Path, bad: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(dense, "dense")
    spoil(Path("dense"), "embedding", float("inf"))
    assert switchcli("upcycle", "dense", "new", "--experts", "2").code == 5
    assert not Path("new").exists()
