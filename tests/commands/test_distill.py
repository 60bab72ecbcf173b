"""`switchcli distill`: a student on text and on tasks, online and from kept answers, exact resume, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import NoWarnings
from messages import lacking
from safetensors.torch import load_file
from tiny_run import RECIPE, SwitchCLI, lay_out_tuning, write_text
from typer.testing import CliRunner

from switchcli.checkpoint.lock import lock
from switchcli.cli import app
from switchcli.runs import distilling
from switchcli.runs.loading import load_checkpoint
from switchcli.training.distillation import DistillationLoss, Teacher

INTERRUPTED = 75


def weights(run: str | Path, step: int) -> dict[str, torch.Tensor]:
    files = Path(run, f"checkpoints/step-{step:08d}").glob("model-*.safetensors")  # a rank's share in each
    return {name: weight for file in files for name, weight in load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trained`, fine-tuned for two steps on tasks whose files lie beside it. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lay_out_tuning(folder)
        text = (folder / "tune.yaml").read_text()
        for task in ("colour", "last"):
            text = text.replace(f"[{task}.", f"[{folder}/{task}.")
        (folder / "tune.yaml").write_text(text)
        arguments = ["finetune", "tune.yaml", "--model", str(trained), "--out", "run", "--quiet"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    return folder / "run"


def test_without_a_recipe_the_dense_student_is_trained_as_its_teacher_was(
    trained: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    before = (trained / "result.json").read_bytes()
    done = switchcli("distill", "--teacher", trained, "--baseline", dense, "train.steps=4", "--out", "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(Path("a/result.json").read_text())
    said = result["distillation"]
    figure = "held_out/neg_log_perplexity"
    teacher, student, baseline = (said[who]["figures"][figure] for who in ("teacher", "student", "baseline"))
    assert teacher == pytest.approx(json.loads(before)[figure], abs=1e-6)
    assert baseline == pytest.approx(json.loads((dense / "result.json").read_text())[figure], abs=1e-6)
    assert student == pytest.approx(result[figure], abs=1e-6)
    assert said["teacher"]["parameters"] > said["student"]["parameters"] == said["baseline"]["parameters"]
    assert said["compression"] == pytest.approx(1 - said["student"]["parameters"] / said["teacher"]["parameters"])
    kept = (student - baseline) / (teacher - baseline) if teacher > baseline else None
    assert said["gain_kept"] == (None if kept is None else pytest.approx(kept, rel=1e-3))
    assert len(said["inherited"]["fresh"]) == 4
    logged = [record for record in metrics("a") if "teacher_divergence" in record]
    assert logged
    assert all(record["teacher_divergence"] > 0 for record in logged)
    assert (trained / "result.json").read_bytes() == before
    recipe = Path("a/recipe.yaml").read_text()
    assert "num_experts: 1" in recipe
    assert f"teacher: {trained}/checkpoints/step-00000002" in recipe
    for words in ("43 teacher's", "distilled: held-out loss", "compression", "teacher's gain"):
        assert not lacking(done.err, words)


def test_with_a_soft_fraction_of_0_a_fresh_student_is_pretrained_bit_for_bit(
    trained: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    done = switchcli(
        "distill", "--teacher", trained, "distill.soft_fraction=0", "student.kind=random_init", "--out", "a", "-q"
    )
    assert done.code == 0, done.err
    assert equal(weights("a", 2), weights(dense, 2))


@pytest.mark.integration
def test_whole_documents_are_read_as_in_pretraining(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    dense = ("model.num_experts=1", "data.packing=documents", "--out", "dense", "-q")
    assert switchcli("pretrain", trained / "recipe.yaml", *dense).code == 0
    hard = ("distill.soft_fraction=0", "student.kind=random_init", "data.packing=documents", "--out", "a", "-q")
    assert switchcli("distill", "--teacher", trained, *hard).code == 0
    assert equal(weights("a", 2), weights("dense", 2))
    soft = ("data.packing=documents", "--out", "b", "-q")
    assert switchcli("distill", "--teacher", trained, *soft).code == 0


@pytest.mark.integration
def test_a_student_whose_blocks_are_computed_again_learns_the_same_bit_for_bit(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    for what in ("none", "blocks"):
        keys = (f"train.activation_checkpointing={what}", "distill.mode=training", "student.kind=random_init")
        done = switchcli("distill", "--teacher", trained, *keys, "--out", what, "-q")
        assert done.code == 0, done.err
    assert equal(weights("blocks", 2), weights("none", 2))


def test_until_its_start_step_it_is_pretraining_and_then_it_is_not(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    often = (
        "checkpoint.save_every_steps=1",
        "checkpoint.keep_last=5",
        "train.steps=3",
        "student.kind=random_init",
        "-q",
    )
    for name, settings in (("none", ["distill.soft_fraction=0"]), ("late", ["distill.start_step=2"]), ("now", [])):
        done = switchcli("distill", "--teacher", trained, *often, *settings, "--out", name)
        assert done.code == 0, done.err
    assert equal(weights("late", 2), weights("none", 2))
    assert not equal(weights("late", 3), weights("none", 3))
    assert not equal(weights("now", 1), weights("none", 1))


@pytest.mark.integration
def test_the_noise_of_a_student_is_that_of_its_pretraining(
    trained: Path, here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher in training mode draws its own noise after the student's: with no share in the loss it changes none."""
    monkeypatch.setattr(DistillationLoss, "__call__", hard_part(DistillationLoss.__call__))
    fresh = ("student.kind=random_init", "-q")
    assert switchcli("distill", "--teacher", trained, "distill.soft_fraction=0", *fresh, "--out", "a").code == 0
    assert switchcli("distill", "--teacher", trained, "distill.mode=training", *fresh, "--out", "b").code == 0
    # The hard part is here a difference of sums: close, not equal.
    for name, weight in weights("a", 2).items():
        torch.testing.assert_close(weights("b", 2)[name], weight, rtol=1e-3, atol=1e-3)


def hard_part(call):
    def without_the_teacher(self, model, batch):
        object.__setattr__(self, "_settings", self._settings.model_copy(update={"soft_fraction": 0.0}))
        return call(self, model, batch)

    return without_the_teacher


@pytest.mark.unit("mean")
@pytest.mark.parametrize("experts", ["random_init", "mean", "most_used"])
def test_kept_answers_of_all_tokens_teach_what_the_teacher_does(
    experts: str, trained: Path, here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("distill", "--teacher", trained, f"student.experts={experts}", "train.steps=3", "--json")
    online = switchcli(*command, "--out", "online")
    assert online.code == 0, online.err
    kept = ("distill.cache.folder=answers", "distill.cache.top_k=512", "distill.cache.precision=float32")
    asked = switchcli(*command, *kept, "--cache-only", "--out", "none")
    assert asked.code == 0, asked.err
    assert json.loads(asked.out)["bytes"] == sum(path.stat().st_size for path in Path("answers").iterdir())
    assert not Path("none").exists()
    assert not lacking(asked.err, "3 steps 8 rows 512 591kB")
    monkeypatch.setattr(distilling, "load_model", None)  # it is not made again
    offline = switchcli(*command, *kept, "--out", "offline")
    assert offline.code == 0, offline.err
    one, other = (json.loads(done.out)["distillation"] for done in (online, offline))
    assert one["teacher"]["figures"] == other["teacher"]["figures"]
    for name, weight in weights("online", 3).items():  # 2**-24 of a probability, and Adafactor's large first steps
        torch.testing.assert_close(weights("offline", 3)[name], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
def test_kept_answers_serve_another_start_and_more_steps(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    kept = ("distill", "--teacher", trained, "distill.cache.folder=answers", "-q")
    assert switchcli(*kept, "--out", "a").code == 0
    before = sorted(Path("answers").glob("steps-*"))
    assert switchcli(*kept, "student.kind=random_init", "--out", "b").code == 0
    assert sorted(Path("answers").glob("steps-*")) == before
    done = switchcli(*kept, "train.steps=4", "--out", "a")
    assert done.code == 0, done.err
    assert len(sorted(Path("answers").glob("steps-*"))) == 2


@pytest.mark.integration
def test_on_tasks_the_teachers_own_by_default(tuned: Path, trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("distill", "--teacher", tuned, "--baseline", "12.5", "train.steps=4", "--out", "a", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)["distillation"]
    assert said["figure"] == "tasks/average"
    assert said["teacher"]["figures"].keys() >= {"tasks/colour", "tasks/last", "tasks/average"}
    assert said["baseline"]["figures"] == {"tasks/average": 12.5}
    best = json.loads(done.out)["tasks"]
    assert best.keys() == {"colour", "last"}
    offline = switchcli(
        "distill",
        "--teacher",
        tuned,
        "train.steps=4",
        "distill.cache={folder: x, top_k: 512}",
        "--out",
        "b",
        "--json",
    )
    assert offline.code == 0, offline.err
    found = json.loads(offline.out)["distillation"]["student"]["figures"]["held_out/neg_log_perplexity"]
    assert found == pytest.approx(said["student"]["figures"]["held_out/neg_log_perplexity"], abs=1e-3)
    for run in ("a", "b"):
        evaluated = switchcli("eval", run, "--json", "--out", f"eval-{run}")
        assert evaluated.code == 0, evaluated.err
        assert json.loads(evaluated.out)["passes"][0]["tasks"].keys() == {"colour", "last"}


def test_a_student_from_a_checkpoint_begins_where_that_ended(
    tuned: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    """Table 8's other way: the pre-trained student learns the task from the tuned teacher."""
    done = switchcli("distill", "--teacher", tuned, "--student", dense, "--out", "a", "--json")
    assert done.code == 0, done.err
    assert f"path: {dense}/checkpoints/step-00000002" in Path("a/recipe.yaml").read_text()
    assert "inherited" not in json.loads(done.out)["distillation"]


@pytest.mark.integration
def test_a_student_of_a_size_and_a_smaller_sparse_one(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    sparse = switchcli(
        "distill", "--teacher", trained, "model.num_experts=2", "student.experts=most_used", "--out", "s", "--json"
    )
    assert sparse.code == 0, sparse.err
    parameters = json.loads(sparse.out)["distillation"]
    assert parameters["student"]["parameters"] < parameters["teacher"]["parameters"]
    narrow = ("distill", "--teacher", trained, "model.d_ff=16", "--out", "n")
    refused = switchcli(*narrow)
    assert (
        refused.code,
        lacking(refused.err, "d_ff 16 64 student.on_shape_mismatch=random_init student.kind=random_init"),
    ) == (2, [])
    done = switchcli(*narrow, "student.on_shape_mismatch=random_init", "--json")
    assert done.code == 0, done.err
    assert "encoder.blocks.0.feed_forward.layer.wi.weight" in json.loads(done.out)["distillation"]["inherited"]["fresh"]
    large = switchcli("distill", "--teacher", trained, "--student", "tiny", "student.kind=random_init")
    assert large.code == 2
    assert not lacking(large.err, "larger teacher --student model.num_experts")


def test_a_dense_student_is_served_by_transformers(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    """The end of the road: the exported student loads there and gives the logits that it gives here."""
    import transformers

    assert switchcli("distill", "--teacher", trained, "--out", "a", "-q").code == 0
    done = switchcli("convert", "a", "served", "--to", "huggingface")
    assert done.code == 0, done.err
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained("served").eval()
    assert isinstance(theirs, transformers.T5ForConditionalGeneration)
    tokenizer = transformers.AutoTokenizer.from_pretrained("served")
    inputs = tokenizer(["the red <extra_id_0> is not alpha", "blue walk"], return_tensors="pt", padding=True)
    targets = tokenizer(["<extra_id_0> gamma", "run"], return_tensors="pt", padding=True).input_ids
    ours = load_checkpoint(Path("a"), torch.device("cpu"), NoWarnings()).model
    with torch.no_grad():
        expected = theirs(**inputs, labels=targets).logits
        found = ours(inputs.input_ids, targets).logits_BTV
    real = targets != 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


class Stopped:
    """The objective of distillation, which at one call first sends this process a signal."""

    def __init__(self, at: int) -> None:
        self.calls, self.at, self.call = 0, at, DistillationLoss.__call__

    def __get__(self, instance: Any, owner: type) -> Any:
        def call(model: torch.nn.Module, batch: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.call(instance, model, batch)

        return call


@pytest.mark.integration
@pytest.mark.parametrize("answers", [[], ["distill.cache.folder=answers"]], ids=["online", "offline"])
def test_stopped_it_ends_with_the_same_bits(
    answers: list[str], trained: Path, here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("distill", "--teacher", trained, "train.steps=6", *answers, "-q")
    assert switchcli(*command, "--out", "whole").code == 0
    for at in (3, 5):
        with monkeypatch.context() as patch:
            patch.setattr(DistillationLoss, "__call__", Stopped(at))
            done = switchcli(*command, "--out", "parts")
            assert done.code == INTERRUPTED, done.err
    done = switchcli(*command, "--out", "parts")
    assert done.code == 0, done.err
    assert equal(weights("whole", 6), weights("parts", 6))


@pytest.mark.integration
def test_stopped_while_the_teacher_is_asked_it_goes_on(
    trained: Path, here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.training.teacher_cache.MAX_FILE_BYTES", 1)
    command = ("distill", "--teacher", trained, "train.steps=6", "distill.cache.folder=answers", "--out", "a", "-q")
    ask, calls = Teacher.predict, []

    def once_stopped(self: Teacher, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "predict", once_stopped)
        stopped = switchcli(*command)
    assert stopped.code == INTERRUPTED, stopped.err
    assert not lacking(stopped.err, "stopped answers same command")
    assert len(list(Path("answers").glob("steps-*"))) == 2  # the part that it was at is asked for again
    assert switchcli(*command).code == 0
    assert len(list(Path("answers").glob("steps-*"))) == 6


@pytest.mark.integration
def test_a_run_that_has_begun_keeps_its_teacher(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "teacher")
    command = ("distill", "--teacher", "teacher", "--out", "a", "-q")
    assert switchcli(*command, "train.steps=3").code == 0
    more = switchcli("pretrain", "teacher/recipe.yaml", "train.steps=4", "--out", "teacher", "-q")
    assert more.code == 0, more.err
    done = switchcli(*command, "train.steps=5")
    assert done.code == 0, done.err
    assert "teacher: teacher/checkpoints/step-00000002" in Path("a/recipe.yaml").read_text()
    weights_of_it = Path("teacher/checkpoints/step-00000002/model-00000.safetensors")
    shutil.rmtree(weights_of_it.parent)
    gone = switchcli(*command, "train.steps=6")
    assert gone.code == 4
    assert not lacking(gone.err, "teacher/checkpoints/step-00000002 checkpoint.keep_last --no-resume")


@pytest.mark.integration
def test_a_teacher_with_groups_is_measured_in_whole_ones(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    """Groups of 4 sequences, microbatches of 2: it may be asked droplessly alone, and is measured by its capacity."""
    train = ("train.microbatch_tokens=256", "model.router.group_sequences=4", "train.steps=1", "-q")
    assert switchcli("pretrain", trained / "recipe.yaml", *train, "--out", "teacher").code == 0
    small = ("distill", "--teacher", "teacher", "train.microbatch_tokens=64", "--out", "a")
    done = switchcli(*small, "--json")
    assert done.code == 0, done.err
    figure = "held_out/neg_log_perplexity"
    expected = json.loads(Path("teacher/result.json").read_text())[figure]
    assert json.loads(done.out)["distillation"]["teacher"]["figures"][figure] == pytest.approx(expected, abs=1e-5)
    refused = switchcli(*small, "distill.capacity=paper", "--no-resume")
    assert refused.code == 2
    assert not lacking(refused.err, "distill.capacity paper 4 distill.capacity=dropless")
    trains = switchcli(*small, "distill.mode=training", "--no-resume")
    assert (trains.code, "distill.mode=evaluation" in trains.err) == (2, True)


@pytest.mark.integration
def test_the_most_used_experts_of_attentions_too(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    both = ("model.sparse=both", "train.steps=1", "-q")
    assert switchcli("pretrain", trained / "recipe.yaml", *both, "--out", "teacher").code == 0
    command = ("distill", "--teacher", "teacher", "student.experts=most_used", "--out", "a", "-q")
    done = switchcli(*command, "model.num_experts=2")
    assert done.code == 0, done.err
    more = switchcli(*command, "model.num_experts=5", "model.sparse_decoder_layers=[]", "--no-resume")
    assert (more.code, lacking(more.err, "model.num_experts 5 4 student.experts=mean")) == (2, [])


@pytest.mark.integration
def test_a_baseline_may_be_named_when_the_run_is_done(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    command = ("distill", "--teacher", trained, "--out", "a", "--json")
    first = switchcli(*command)
    assert first.code == 0, first.err
    assert "gain_kept" not in json.loads(first.out)["distillation"]
    done = switchcli(*command, "--baseline", "-9.5")
    assert done.code == 0, done.err
    said = json.loads(done.out)["distillation"]
    assert said["baseline"] == {"figures": {"held_out/neg_log_perplexity": -9.5}}
    assert said["gain_kept"] > 0


@pytest.mark.integration
def test_a_teacher_in_the_hugging_face_layout(trained: Path, text: Path, here: Path, switchcli: SwitchCLI) -> None:
    pooled = ("model.balance_reduction=pooled", "train.steps=1", "-q")
    assert switchcli("pretrain", trained / "recipe.yaml", *pooled, "--out", "ours").code == 0
    assert switchcli("convert", "ours", "theirs", "--to", "huggingface").code == 0
    corpus = f"data.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]"
    data = (corpus, "data.held_out_fraction=0.1", "data.objective.inputs_length=512")
    train = (*data, "train.steps=2", "train.batch_tokens=1024", "eval.sequences=2")
    untold = switchcli("distill", "--teacher", "theirs", "--out", "a")
    assert (untold.code, lacking(untold.err, "distill.teacher theirs RECIPE train.steps train.batch_tokens")) == (2, [])
    done = switchcli("distill", "--teacher", "theirs", *train, "--out", "a", "--json", "train.device=cpu")
    assert done.code == 0, done.err
    assert json.loads(done.out)["distillation"]["teacher"]["checkpoint"] == "theirs"
    again = switchcli("distill", "--teacher", "theirs", *train, "train.steps=3", "--out", "a", "train.device=cpu")
    assert (again.code, lacking(again.err, "step 2 3")) == (0, []), again.err


@pytest.mark.integration
def test_notes_that_are_lost_are_made_again_and_complete_answers_need_no_lock(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    kept = ("distill", "--teacher", trained, "distill.cache.folder=answers", "-q")
    assert switchcli(*kept, "--cache-only").code == 0
    note = Path("answers/teacher.json")
    written = json.loads(note.read_text())
    before = written["measured"]["figures"]
    wrong_figures = ({}, {"held_out/neg_log_perplexity": float("nan")}, {"held_out/neg_log_perplexity": "best"})
    wrong = [json.dumps({**written, "measured": {**written["measured"], "figures": one}}) for one in wrong_figures]
    for broken in ("", "{}", '{"measured": {"figures": 1}}', "[" * 100_000, *wrong):
        note.write_text(broken)
        assert switchcli(*kept, "--answers-only").code == 0  # its old name
        assert json.loads(note.read_text())["measured"]["figures"] == before
    with lock(Path("answers")):
        done = switchcli(*kept, "--out", "a", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["distillation"]["teacher"]["figures"] == before
        more = switchcli(*kept, "train.steps=4", "--out", "a")
        assert more.code == 4
        assert not lacking(more.err, "answers in use distill.cache.folder")


@pytest.mark.integration
def test_a_part_that_is_damaged_is_asked_for_again(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    kept = ("distill", "--teacher", trained, "distill.cache.folder=answers", "-q")
    assert switchcli(*kept, "--cache-only").code == 0
    (part,) = Path("answers").glob("steps-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-9] + b"\0" * 9)
    done = switchcli(*kept, "--out", "a")
    assert (done.code, lacking(done.err, f"{part.name} damaged")) == (0, []), done.err
    assert part.read_bytes() == whole


def test_asking_touches_no_runs_folder(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "run")
    (Path("run") / "tokenizer.json").write_text("mine")
    done = switchcli(
        "distill", "--teacher", trained, "distill.cache.folder=answers", "--cache-only", "--out", "run", "-q"
    )
    assert done.code == 0, done.err
    assert (Path("run") / "tokenizer.json").read_text() == "mine"


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_two_ranks_distil_what_one_does_and_resume_exactly(trained: Path, here: Path) -> None:
    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "switchcli", "distill", "--teacher", str(trained), *arguments, "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    kept = "distill.cache.folder=answers"
    run("train.steps=4", "--out", "one")
    run("train.steps=4", "--out", "two", "--processes", "2")
    run("train.steps=4", kept, "--out", "two-offline", "--processes", "2")
    run("train.steps=4", kept, "--out", "one-offline")
    run("train.steps=2", "--out", "parts", "--processes", "2")
    run("train.steps=4", "--out", "parts", "--processes", "2")
    assert equal(weights("two", 4), weights("parts", 4))
    for one, two in (("one", "two"), ("one-offline", "two-offline")):
        for name, weight in weights(one, 4).items():  # the ranks' sums are in another order
            torch.testing.assert_close(weights(two, 4)[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--teacher", "DENSE"], 2, "--teacher num_experts 1 dense sparse --student"),
        (["--teacher", "DENSE", "model.d_ff=32", "student.experts=mean"], 2, "student.experts mean num_experts 1"),
        (["--teacher", "SPARSE", "model.num_experts=8"], 2, "larger teacher --student model.num_experts"),
        (["--teacher", "SPARSE", "model.vocab_size=640"], 2, "model.vocab_size 640 512 --student"),
        (["--teacher", "SPARSE", "distill.soft_fraction=1.5"], 2, "distill.soft_fraction 1.5 1.0"),
        (["--teacher", "SPARSE", "distill.soft_fraction=-1"], 2, "distill.soft_fraction -1 0.0"),
        (["--teacher", "SPARSE", "distill.temperature=0"], 2, "distill.temperature"),
        (["--teacher", "SPARSE", "distill.start_step=2"], 2, "distill.start_step train.steps 2"),
        (["--teacher", "SPARSE", "data.tokenizer={kind: file, path: other.json}"], 2, "data.tokenizer tokenizer"),
        (["tiny.yaml", "--teacher", "SPARSE", "data.tokenizer.vocab_size=480"], 2, "data.tokenizer.vocab_size 480 512"),
        (
            ["tiny.yaml", "--teacher", "SPARSE", "data.tokenizer.num_sentinels=9"],
            2,
            "data.tokenizer.num_sentinels 9 100",
        ),
        (
            ["tiny.yaml", "--teacher", "SPARSE", "data.tokenizer.byte_fallback=true"],
            2,
            "data.tokenizer.byte_fallback true",
        ),
        (["--teacher", "SPARSE", "--student", "OTHER"], 2, "--student tokenizer tokenizer.json"),
        (["--teacher", "SPARSE", "--baseline", "OTHER"], 2, "--baseline tokenizer tokenizer.json"),
        (["--teacher", "SPARSE", "--student", "t5-bse"], 2, "--student t5-bse size t5-base"),
        (["--teacher", "SPARSE", "--student", "tiny", "student.path=DENSE"], 2, "--student tiny size student.path"),
        (["--teacher", "SPARSE", "--student", "nowhere"], 4, "--student nowhere checkpoint"),
        (["--teacher", "nowhere"], 4, "distill.teacher nowhere checkpoint"),
        (["--teacher", "SPARSE", "distill.teacher=DENSE"], 2, "distill.teacher --teacher too"),
        (
            ["--teacher", "SPARSE", "--student", "DENSE", "student.kind=random_init"],
            2,
            "student.kind random_init --student DENSE",
        ),
        (["--teacher", "SPARSE", "--baseline", "nan"], 2, "--baseline nan checkpoint finite"),
        (["--teacher", "SPARSE", "--cache-only"], 2, "--cache-only distill.cache.folder distill.soft_fraction"),
        ([], 2, "distill.teacher missing --teacher CHECKPOINT"),
        (["finetune/glue", "--teacher", "SPARSE"], 2, "recipe switchcli finetune"),
        (["--teacher", "SPARSE", "--out", "."], 2, "distill.teacher folder --out"),
    ],
)
def test_bad_input_is_told_with_its_place_and_way_out(
    arguments: list[str], code: int, words: str, trained: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    Path("SPARSE").symlink_to(trained)
    Path("DENSE").symlink_to(dense)
    other = json.loads((trained / "tokenizer.json").read_text())
    other["model"]["vocab"][-1][0] += "x"
    Path("other.json").write_text(json.dumps(other))
    if "OTHER" in arguments:
        path = dense / "recipe.yaml"
        assert switchcli("pretrain", path, "data.tokenizer.vocab_size=480", "--out", "OTHER", "-q").code == 0
    Path("tiny.yaml").write_text(RECIPE)
    if "." in arguments:
        Path("SPARSE").unlink()
        shutil.copytree(trained, "SPARSE")
    out = [] if "--out" in arguments else ["--out", "a"]
    done = switchcli("distill", *arguments, *out)
    assert done.code == code, done.err
    assert not lacking(done.err, words)
    assert not Path("a/checkpoints").exists()


@pytest.mark.parametrize(
    "tokenizer", ["{kind: train, vocab_size: 512}", "{kind: train}", "{kind: file, path: copy.json}"]
)
def test_the_tokenizer_of_the_teacher_may_be_named(
    tokenizer: str, trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    write_text(Path("text.txt"))
    shutil.copy(trained / "tokenizer.json", "copy.json")
    Path("tiny.yaml").write_text(RECIPE.replace("{kind: train, vocab_size: 512}", tokenizer))
    done = switchcli("distill", "tiny.yaml", "--teacher", trained, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"]["data"]["tokenizer"]["kind"] == "file"


def test_answers_of_another_teacher_or_of_other_batches_are_refused(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    kept = ("distill.cache.folder=answers", "-q")
    assert switchcli("distill", "--teacher", trained, *kept, "--out", "a").code == 0
    again = ("pretrain", trained / "recipe.yaml", "train.seed=5", "--out", "other", "-q")
    assert switchcli(*again).code == 0
    for arguments, words in (
        (["--teacher", "other"], "another teacher"),
        (["--teacher", trained, "train.seed=9"], "batches train.seed train.batch_tokens"),
        (["--teacher", trained, "distill.temperature=2"], "temperature 1.0 2.0"),
        (["--teacher", trained, "distill.cache.top_k=9"], "top_k 64 9"),
    ):
        done = switchcli("distill", *arguments, *kept, "--out", "b")
        assert (done.code, lacking(done.err, f"answers {words} distill.cache.folder")) == (4, []), done.err


def test_a_dry_run_tells_what_it_comes_to(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("distill", "--teacher", trained, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"]["model"]["num_experts"] == 1
    assert not Path("runs").exists()


def test_by_default_its_folder_is_named_after_the_teacher(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "runs/switch")
    assert switchcli("distill", "--teacher", "runs/switch", "-q").code == 0
    assert Path("runs/distill/switch/result.json").exists()
