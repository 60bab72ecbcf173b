"""`switchcli pretrain`: what a run prints and leaves behind, and what happens when it is started again."""

import json
import math
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from drill import fingerprint
from messages import lacking
from tiny_run import SwitchCLI, records
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.runs.inputs import text_sets as verb
from switchcli.runs.train.training_task import TrainingTask
from switchcli.terminal.safe_text import program_name
from switchcli.training.loss import Objective, StepLoss

RESULT_KEYS = {
    "verb", "run", "step", "seconds", "tokens_per_second", "input_tokens", "target_tokens", "flops_per_sequence",
    "held_out/neg_log_perplexity", "held_out/first_neg_log_perplexity", "held_out/bits_per_byte",
    "held_out/loss", "held_out/first_loss", "command", "hardware", "versions", "mesh", "samples", "learned",
    "parameters", "dense_parameters", "expert_parameters", "active_parameters",
}  # fmt: skip


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_two_steps_end_to_end(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", recipe, "--out", "runs/a", "--json")
    assert done.code == 0
    assert not lacking(done.err, "evaluating at the end saving checkpoint")  # every 5 and 4 steps, of which it has 2
    assert done.out.count("\n") == 1
    result = json.loads(done.out)
    assert result.keys() == RESULT_KEYS
    assert result == json.loads(Path("runs/a/result.json").read_text())
    assert result["step"] == 2
    assert result["input_tokens"] == 2 * 256
    assert result["held_out/first_neg_log_perplexity"] < result["held_out/neg_log_perplexity"] < 0

    assert names("runs/a") == {
        "recipe.yaml", "tokenizer.json", "metrics.jsonl", "result.json", "run.lock", "checkpoints",
    }  # fmt: skip
    assert names("runs/a/checkpoints") == {"step-00000002"}
    assert names("runs/a/checkpoints/step-00000002") == {
        "MANIFEST", "model.json", "recipe.yaml", "tokenizer.json", "data.json", "state.json",
        "model-00000.safetensors", "optimizer-00000.safetensors",
    }  # fmt: skip
    first, logged, last = records("runs/a")
    held_out = {f"held_out/{name}" for name in ("neg_log_perplexity", "loss", "bits_per_byte", "dropped_fraction")}
    assert first.keys() == {"step", *held_out}
    assert last.keys() == {"step", *held_out}
    assert 0 < last["held_out/bits_per_byte"] == result["held_out/bits_per_byte"] < first["held_out/bits_per_byte"]
    assert logged["loss"] == -logged["neg_log_perplexity"]
    assert last["held_out/loss"] == result["held_out/loss"] == -result["held_out/neg_log_perplexity"]
    assert {"step", "neg_log_perplexity", "learning_rate", "gradient_norm", "dropped_fraction"} <= logged.keys()

    for verb_with_arguments in (
        "finetune quickstart/finetune --model runs/a",
        "distill --teacher runs/a",
        "report runs/a",
        "pretrain runs/a/recipe.yaml train.steps=4",
    ):
        assert f"    {program_name()} {verb_with_arguments}" in done.err
    lines = done.err.splitlines()
    assert not lacking(next(line for line in lines if "2 steps" in line), "2 steps of 256 tokens 512")
    assert any("runs/a" in line and "Ctrl-C" in line for line in lines)
    assert not lacking(done.err, "2/2 held-out loss")
    assert "perplexity" not in done.err
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in done.err  # no terminal: no colours, no bar
    guesses, experts = (result["learned"][key] for key in ("guesses", "experts"))
    assert guesses["tokens"] > 10
    assert 0 <= guesses["first"] <= guesses["first_five"] <= 1
    assert 0 < guesses["most_frequent"] <= guesses["five_most_frequent"] <= 1
    assert all(len(example["guesses"]) == 5 for example in guesses["examples"])
    assert sum(expert["share"] for expert in experts["experts"]) == pytest.approx(1)
    assert len(result["samples"]) == 2
    for sample in result["samples"]:
        assert sample.keys() == {"input", "target", "prediction"}
        assert "<extra_id_0>" in sample["input"]
        assert sample["target"].startswith("<extra_id_0>")


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++") or " " in sys.prefix, reason="torch cannot compile here")
def test_compiled_it_ends_about_where_it_does_uncompiled(trained: Path, tmp_path: Path) -> None:
    """In a process of its own: what torch compiles it keeps. Nothing is said but by us, samples are decoded as ever."""
    command = [sys.executable, "-m", "switchcli", "pretrain", trained.with_name("tiny.yaml"), "train.compile=true"]
    command += ["--quiet", "--json", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # torch built for CUDA logs that there is none.
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (done.returncode, said) == (0, [])
    compiled, plain = json.loads(done.stdout), json.loads((trained / "result.json").read_text())
    assert compiled["held_out/loss"] == pytest.approx(plain["held_out/loss"], abs=1e-3)


@pytest.mark.integration
def test_where_torch_itself_finds_no_compiler_compiling_is_refused(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the test before leaves out where it is skipped; with a cache in which nothing is compiled yet."""
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, "train.compile=true", "--out", "runs/a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not lacking(done.stderr, "error: train.compile torch.compile g++ train.compile=false")
    assert "Traceback" not in done.stderr


def test_on_a_cpu_a_compiled_run_says_what_it_is_meant_for(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistributedContext, "compile", lambda *_: None)
    done = switchcli("pretrain", recipe, "train.compile=true", "train.steps=1", "train.device=cpu", "--out", "runs/a")
    assert done.code == 0
    assert not lacking(done.err, "train.compile GPUs CPU")


def test_without_json_stdout_is_empty_and_quiet_says_nothing(recipe: str, switchcli: SwitchCLI) -> None:
    loud = switchcli("pretrain", recipe)
    assert (loud.code, loud.out) == (0, "")
    assert loud.err
    assert Path("runs/tiny/result.json").exists()  # runs/RECIPE where no --out is given
    assert switchcli("pretrain", recipe, "--quiet", "--out", "b") == (0, "", "")


def test_what_the_recipe_written_says_is_the_same_run(begun: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", "a/recipe.yaml", "--out", "b").code == 0
    timed = {"seconds", "tokens_per_second", "flops_per_second", "data_wait_fraction", "seconds_left"}
    untimed = [
        [{key: value for key, value in record.items() if key not in timed} for record in records(run)] for run in "ab"
    ]
    assert untimed[0] == untimed[1]
    assert Path("a/recipe.yaml").read_text() == Path("b/recipe.yaml").read_text()


def test_a_finished_run_is_done_at_once_with_the_same_result(
    begun: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = json.loads(Path("a/result.json").read_text())
    monkeypatch.setattr(verb, "cross_entropy", None)  # nothing is trained or evaluated again
    before = Path("a/metrics.jsonl").read_text()
    again = switchcli("pretrain", begun, "--out", "a", "--json")
    assert again.code == 0
    named = {"run": "", "command": []}  # by the command that was run last
    assert json.loads(again.out) | named == first | named
    assert Path("a/metrics.jsonl").read_text() == before


@pytest.mark.integration
@pytest.mark.parametrize(
    "overrides",
    [
        ("data.packing=documents",),
        ("data.objective={kind: prefix_lm, inputs_length: 32, targets_length: 32, text_length: 32}",),
    ],
)
def test_every_objective_trains_and_is_evaluated_as_in_training(
    overrides: tuple[str, ...], recipe: str, switchcli: SwitchCLI
) -> None:
    done = switchcli("pretrain", recipe, *overrides, "--out", "a", "--json")
    assert done.code == 0, done.err
    measured = switchcli("eval", "a", "--out", "b", "--json")
    assert measured.code == 0, measured.err
    figure = json.loads(measured.out)["passes"][0]["held_out"]["text"]["neg_log_perplexity"]
    assert figure == pytest.approx(json.loads(done.out)["held_out/neg_log_perplexity"], rel=1e-5)


@pytest.mark.integration
def test_a_run_that_is_lost_ends_and_names_the_policy_that_goes_on(recipe: str, switchcli: SwitchCLI) -> None:
    """Such a rate makes the weights too large for the next step, which finds that out, and all later ones do."""
    huge = ["schedule.kind=constant", "schedule.learning_rate=1e30", "--out", "runs/a", "--json"]
    lost = switchcli("pretrain", recipe, *huge)
    assert lost.code == 5
    assert not lacking(json.loads(lost.out)["error"], "train.nonfinite=skip")
    long = ["train.steps=30", "eval.every_steps=30", "train.nonfinite=skip", "--no-resume"]
    skipped = switchcli("pretrain", recipe, *huge, *long)
    assert skipped.code == 5
    assert not lacking(json.loads(skipped.out)["error"], "step 12 10 train.nonfinite=skip")


@pytest.mark.integration
def test_a_step_that_is_lost_is_left_out_where_it_is_asked_for(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingTask, "training_loss", lost_at_first)
    done = switchcli("pretrain", recipe, "train.nonfinite=skip", "--out", "runs/a", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["skipped_steps"] == [1]
    assert not lacking(done.err, "warning: step 1 batch train.nonfinite")
    assert not lacking(done.err, "steps left out 1 2")
    assert {"step": 1, "skipped_steps": [1]} in records("runs/a")
    reported = switchcli("report", "runs/a", "--html", "a.html", "--json")
    assert not lacking(" ".join(json.loads(reported.out)["notes"]), "runs/a batches 1 train.nonfinite")


def lost_at_first(task: TrainingTask) -> Objective:
    """The loss of a run on text, which is not a number in the first forward pass."""
    calls = count()

    def loss(model: nn.Module, batch: Batch) -> StepLoss:
        found = task.run_data.objective(model, batch)
        return found._replace(target_sum=found.target_sum * (1.0 if next(calls) else math.nan))

    return loss


@pytest.mark.integration
def test_with_muon_a_resumed_run_has_the_bits_of_one_that_is_not(recipe: str, switchcli: SwitchCLI) -> None:
    muon = (recipe, "optimizer.kind=muon", "schedule={kind: constant, learning_rate: 0.01}")
    straight = switchcli("pretrain", *muon, "train.steps=4", "--out", "straight", "--json")
    assert straight.code == 0, straight.err
    result = json.loads(straight.out)
    assert result["held_out/loss"] < result["held_out/first_loss"]
    assert not lacking(straight.err, "warning Muon 2.08 train.batch_tokens 256 optimizer.kind=adamw")
    for steps in (2, 4):
        assert switchcli("pretrain", *muon, f"train.steps={steps}", "--out", "resumed", "-q").code == 0
    assert fingerprint(Path("resumed"))["model"] == fingerprint(Path("straight"))["model"]
    assert fingerprint(Path("resumed"))["optimizer"] == fingerprint(Path("straight"))["optimizer"]


def test_no_resume_sets_the_old_run_aside(begun: str, switchcli: SwitchCLI) -> None:
    for number in (1, 2):
        done = switchcli("pretrain", begun, f"train.seed={number}", "--no-resume", "--out", "a")
        assert done.code == 0
        assert not lacking(done.err, f"run a a.before-{number}")
    assert "seed: 0" in Path("a.before-1/recipe.yaml").read_text()
    assert "seed: 2" in Path("a/recipe.yaml").read_text()
    assert len(records("a")) == 3


def test_a_changed_recipe_is_refused_and_nothing_is_touched(begun: str, switchcli: SwitchCLI) -> None:
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    for key in ("train.seed=1", "model.d_model=16", "optimizer={kind: adamw}", "data.held_out_fraction=0.2"):
        done = switchcli("pretrain", begun, key, "--out", "a")
        assert (done.code, done.out) == (2, "")
        assert not lacking(done.err, f"error: {key.partition('=')[0]} --out --no-resume")
        assert done.err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before


def test_dry_run_prints_a_recipe_that_can_be_run(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", recipe, "model.num_experts=2", "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    Path("resolved.yaml").write_text(json.dumps(json.loads(done.out)["recipe"]))
    assert switchcli("pretrain", "resolved.yaml", "--dry-run", "--json").out == done.out
    shown = switchcli("pretrain", "resolved.yaml", "--dry-run").out
    assert not lacking(shown, f"parameters {json.loads(done.out)['parameters']:,}")
    assert shown.count("\n") < 25
