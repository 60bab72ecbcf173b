"""`switchcli distill`: a student on text and on tasks, and bad input."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from doubles import NoWarnings
from drill import tensors
from messages import lacking
from tiny_run import RECIPE, TUNING, SwitchCLI, records, write_text

from switchcli.model.config import STACKS
from switchcli.runs.inputs.loading import load_checkpoint

ANSWERS = """\
tasks:
  - {kind: files, name: answers, train: [train.jsonl], validation: [held_out.jsonl], input: "{input}", target: output}
"""


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_recipe_the_dense_student_is_trained_as_its_teacher_was(
    trained: Path, dense: Path, distilled: Path, here: Path, switchcli: SwitchCLI
) -> None:
    """A baseline may be named when the run is complete."""
    before = (trained / "result.json").read_bytes()
    assert "gain_kept" not in json.loads((distilled / "result.json").read_text())["distillation"]
    shutil.copytree(distilled, "a")
    done = switchcli("distill", "--teacher", trained, "--baseline", dense, "--out", "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(Path("a/result.json").read_text())
    said = result["distillation"]
    figure = "held_out/neg_log_perplexity"
    teacher, student, baseline = (said[who]["metrics"][figure] for who in ("teacher", "student", "baseline"))
    assert teacher == pytest.approx(json.loads(before)[figure], abs=1e-6)
    assert baseline == pytest.approx(json.loads((dense / "result.json").read_text())[figure], abs=1e-6)
    assert student == pytest.approx(result[figure], abs=1e-6)
    assert said["teacher"]["parameters"] > said["student"]["parameters"] == said["baseline"]["parameters"]
    assert said["compression"] == pytest.approx(1 - said["student"]["parameters"] / said["teacher"]["parameters"])
    kept = (student - baseline) / (teacher - baseline) if teacher > baseline else None
    assert said["gain_kept"] == (None if kept is None else pytest.approx(kept, rel=1e-3))
    assert len(said["student_init"]["random_init"]) == 4
    logged = [record for record in records("a") if "teacher_divergence" in record]
    assert logged
    assert all(record["teacher_divergence"] > 0 for record in logged)
    assert (trained / "result.json").read_bytes() == before
    recipe = Path("a/recipe.yaml").read_text()
    assert "num_experts: 1" in recipe
    assert f"teacher: {trained}/checkpoints/step-00000002" in recipe
    for words in ("distilled: held-out loss", "compression", "teacher's gain"):
        assert not lacking(done.err, words)
    assert ("distill.soft_fraction=0" in done.err) == (student > teacher)


@pytest.mark.unit("default")
@pytest.mark.parametrize("packing", ["default", "documents"])
def test_without_the_teachers_share_it_is_pretraining_bit_for_bit(
    packing: str, trained: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    keys = ["data.packing=documents"] if packing == "documents" else []
    if keys:
        dense = Path("dense")
        assert switchcli("pretrain", trained / "recipe.yaml", "model.num_experts=1", *keys, "--out", dense).code == 0
    command = (
        "distill",
        "--teacher",
        trained,
        "student.kind=random_init",
        "checkpoint.save_every_steps=1",
        *keys,
        "-q",
    )
    assert switchcli(*command, "distill.soft_fraction=0", "--out", "none").code == 0
    assert equal(tensors(Path("none"), "model"), tensors(dense, "model"))
    assert switchcli(*command, "--out", "some").code == 0
    assert not equal(tensors(Path("some"), "model"), tensors(Path("none"), "model"))
    without, with_teacher = (
        record["flops_per_second"] / record["tokens_per_second"]
        for out in ("none", "some")
        for record in records(out)
        if "flops_per_second" in record
    )
    assert without < 0.9 * with_teacher


@pytest.mark.integration
def test_on_tasks_the_teachers_own_by_default(tuned: Path, dense: Path, here: Path, switchcli: SwitchCLI) -> None:
    """Table 8's way: a student that is pre-trained learns the tasks from the tuned teacher."""
    command = ("distill", "--teacher", tuned, "--student", dense, "--baseline", "12.5")
    done = switchcli(*command, "--out", "a", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)["distillation"]
    assert said["metric"] == "tasks/average"
    assert said["teacher"]["metrics"].keys() >= {"tasks/colour", "tasks/last", "tasks/average"}
    assert said["baseline"]["metrics"] == {"tasks/average": 12.5}
    assert "student_init" not in said
    assert json.loads(done.out)["tasks"].keys() == {"colour", "last"}
    assert f"path: {dense}/checkpoints/step-00000002" in Path("a/recipe.yaml").read_text()
    evaluated = switchcli("eval", "a", "--json", "--out", "scores")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["passes"][0]["tasks"].keys() == {"colour", "last"}


@pytest.mark.integration
def test_answers_that_generate_writes_are_a_task_to_fine_tune_a_student_on(
    tuned: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    texts = [json.loads(line)["text"] for line in (tuned.parent / "last.train.jsonl").read_text().splitlines()]
    inputs = [f"last word: {text}" for text in texts]
    asked = switchcli("generate", tuned, *inputs, "--beams", 2, "--max-tokens", 6, "--batch", 16, "--json")
    assert asked.code == 0, asked.err
    answers = json.loads(asked.out)["answers"]
    assert [answer["input"] for answer in answers] == inputs
    for name, part in {"train": answers[10:], "held_out": answers[:10]}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in part))
    Path("answers.yaml").write_text(TUNING.replace(TUNING[TUNING.index("tasks:") : TUNING.index("data:")], ANSWERS))
    done = switchcli("finetune", "answers.yaml", "--model", dense, "--out", "a", "--json")
    assert done.code == 0, done.err
    assert not lacking(done.err, "answers: 50 examples")
    assert json.loads(done.out)["tasks"].keys() == {"answers"}


@pytest.mark.integration
def test_a_student_that_learns_from_its_own_answers_goes_on_as_if_it_had_not_stopped(
    tuned: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    """A step with its answers has no cross-entropy of targets, as there are none."""
    command = ("distill", "--teacher", tuned, "--student", dense, "distill.targets=student", "log.every_steps=1", "-q")
    keys = ("schedule.kind=constant", "eval.every_steps=4")
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert switchcli(*command, *keys, f"train.steps={steps}", "--out", out).code == 0
    assert equal(tensors(Path("whole"), "model"), tensors(Path("parts"), "model"))
    logged = [record for record in records("whole") if "gradient_norm" in record]
    assert ["loss" in record for record in logged] == [False] * 4
    assert all(record["teacher_divergence"] > 0 for record in logged)


@pytest.mark.integration
def test_a_smaller_sparse_student_has_the_most_used_experts_and_one_of_another_width_is_refused(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    sparse = ("distill", "--teacher", trained, "model.num_experts=2", "student.experts=most_used", "--out", "s")
    done = switchcli(*sparse, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)["distillation"]
    assert said["student"]["parameters"] < said["teacher"]["parameters"]
    refused = switchcli("distill", "--teacher", trained, "model.d_ff=16", "--out", "n")
    assert (refused.code, lacking(refused.err, "d_ff 16 64 student.kind=random_init")) == (2, [])


@pytest.mark.integration
def test_experts_side_by_side_from_the_teacher(trained: Path, dense: Path, here: Path, switchcli: SwitchCLI) -> None:
    """The table has what the wider feed-forward costs."""
    wide = ("distill", "--teacher", trained, "student.experts=concat", "model.d_ff=128", "--json", "--out")
    done = switchcli(*wide, "a", "--baseline", dense)
    assert done.code == 0, done.err
    assert not lacking(done.err, "student parameters FLOPs/token tokens/s")
    said = json.loads(done.out)["distillation"]
    matrices = {f"{stack}.blocks.{{}}.feed_forward.layer.{name}.weight" for stack in STACKS for name in ("wi", "wo")}
    assert set(said["student_init"]["from_experts"]) == {name.format(1) for name in matrices}
    assert set(said["student_init"]["widened"]) == {name.format(0) for name in matrices}
    assert not said["student_init"]["random_init"]
    # Two matrices of 64 more hidden units, in two blocks of each stack, for each token of inputs and of targets.
    file = load_checkpoint(Path("a"), torch.device("cpu"), NoWarnings()).handle.model_file
    tokens = 2 * (file.inputs_length + file.targets_length)
    more = 2 * 2 * 64 * 32 * tokens / file.inputs_length
    flops = {role: said[role]["flops_per_token"] for role in ("teacher", "student", "baseline")}
    assert flops["teacher"] == flops["baseline"] == pytest.approx(flops["student"] - more, abs=1)


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_join_the_experts_that_one_process_does(
    ranks: int, trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    wide = ("distill", "--teacher", trained, "student.experts=concat", "model.d_ff=128", "model.dropout=0")
    wide = (*wide, "train.steps=1", "schedule.warmup_steps=1", "train.microbatch_tokens=64", "-q", "--out")
    done = switchcli(*wide, "one")
    assert done.code == 0, done.err
    command = [sys.executable, "-m", "switchcli", *map(str, wide), "many", "--processes", str(ranks)]
    assert subprocess.run(command, check=False).returncode == 0
    many, one = (tensors(Path(run), "model") for run in ("many", "one"))
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
def test_a_path_beside_fine_experts_is_joined_too_and_never_left_out_unsaid(
    trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    """A student that is narrower than the teacher's d_ff of 64 fits, as the teacher has no dense feed-forward."""
    keys = ("model.shared_d_ff=16", "model.expert_d_ff=24", "model.sparse_every=1", "train.steps=1")
    assert switchcli("pretrain", trained.with_name("tiny.yaml"), *keys, "--out", "fine", "-q").code == 0
    words = ("distill", "--teacher", "fine", "--out", "a", "train.steps=1", "schedule.warmup_steps=1")
    refused = switchcli(*words, "student.experts=most_used", "model.d_ff=24")
    assert (refused.code, lacking(refused.err, "most_used 16 fine student.experts=concat")) == (2, [])
    done = switchcli(*words, "student.experts=concat", "model.d_ff=40", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["distillation"]["student_init"]
    assert (len(found["from_experts"]), found["random_init"]) == (8, [])


def test_a_dense_student_is_served_by_transformers(distilled: Path, here: Path, switchcli: SwitchCLI) -> None:
    """The end of the road: the exported student loads there and gives the logits that it gives here."""
    import transformers

    done = switchcli("convert", distilled, "served", "--to", "huggingface")
    assert done.code == 0, done.err
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained("served").eval()
    assert isinstance(theirs, transformers.T5ForConditionalGeneration)
    tokenizer = transformers.AutoTokenizer.from_pretrained("served")
    inputs = tokenizer(["the red <extra_id_0> is not alpha", "blue walk"], return_tensors="pt", padding=True)
    targets = tokenizer(["<extra_id_0> gamma", "run"], return_tensors="pt", padding=True).input_ids
    ours = load_checkpoint(distilled, torch.device("cpu"), NoWarnings()).model
    with torch.no_grad():
        expected = theirs(**inputs, labels=targets).logits
        found = ours(inputs.input_ids, targets).logits_BTV
    real = targets != 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.integration
def test_a_run_that_has_begun_keeps_its_teacher(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "teacher")
    command = ("distill", "--teacher", "teacher", "--out", "a", "-q")
    assert switchcli(*command).code == 0
    more = switchcli("pretrain", "teacher/recipe.yaml", "train.steps=3", "--out", "teacher", "-q")
    assert more.code == 0, more.err
    done = switchcli(*command, "train.steps=3")
    assert done.code == 0, done.err
    assert done.err == ""
    assert "teacher: teacher/checkpoints/step-00000002" in Path("a/recipe.yaml").read_text()
    shutil.rmtree("teacher/checkpoints/step-00000002")
    gone = switchcli(*command, "train.steps=4")
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
    assert json.loads(done.out)["distillation"]["teacher"]["metrics"][figure] == pytest.approx(expected, abs=1e-5)
    refused = switchcli(*small, "eval.capacity=paper", "--no-resume")
    assert refused.code == 2
    assert not lacking(refused.err, "eval.capacity paper 4 eval.capacity=dropless")


@pytest.mark.integration
def test_a_teacher_in_the_hugging_face_layout(trained: Path, text: Path, here: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "huggingface").code == 0
    corpus = f"data.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]"
    data = (corpus, "data.held_out_fraction=0.1", "data.objective.inputs_length=512")
    train = (*data, "train.steps=1", "train.batch_tokens=1024", "eval.sequences=2")
    untold = switchcli("distill", "--teacher", "theirs", "--out", "a")
    assert (untold.code, lacking(untold.err, "distill.teacher theirs RECIPE train.steps train.batch_tokens")) == (2, [])
    done = switchcli("distill", "--teacher", "theirs", *train, "--out", "a", "--json", "train.device=cpu")
    assert done.code == 0, done.err
    assert json.loads(done.out)["distillation"]["teacher"]["checkpoint"] == "theirs"


BAD = {
    "--teacher DENSE": (2, "--teacher num_experts 1 dense sparse --student"),
    "T model.num_experts=8": (2, "larger teacher --student model.num_experts"),
    "T student.experts=concat model.d_ff=320": (2, "model.d_ff 320 5 experts 4 256 or less"),
    "T student.experts=concat model.d_ff=100": (2, "model.d_ff 100 concat multiple 64 try 64"),
    "T student.experts=concat model.num_experts=2": (2, "concat 2 experts model.num_experts=1"),
    "--teacher DENSE student.experts=concat": (2, "concat DENSE no experts"),
    "T student.experts=concat model.d_ff=128 model.num_layers=1": (2, "num_layers 1 2 student.kind"),
    "T model.vocab_size=640": (2, "model.vocab_size 640 512 --student"),
    "T data.tokenizer.kind=file data.tokenizer.path=other.json": (2, "data.tokenizer tokenizer"),
    "tiny.yaml T data.tokenizer.vocab_size=480": (2, "data.tokenizer.vocab_size 480 512"),
    "T --student OTHER": (2, "--student tokenizer tokenizer.json"),
    "T --student t5-bse": (2, "--student t5-bse size t5-base"),
    "T --student tiny student.path=DENSE": (2, "--student tiny size student.path"),
    "T --student nowhere": (4, "--student nowhere checkpoint"),
    "--teacher nowhere": (4, "distill.teacher nowhere checkpoint"),
    "T distill.teacher=DENSE": (2, "distill.teacher --teacher too"),
    "T --student DENSE student.kind=random_init": (2, "student.kind random_init --student DENSE"),
    "T --baseline nan": (2, "--baseline nan checkpoint finite"),
    "T distill.targets=student": (2, "distill.targets student data tasks"),
    "T distill.beta=0.9": (2, "distill beta loss=forward_kl loss=jsd"),
    "T model.d_model=16 student.experts=concat": (2, "model.d_model 16 32 concat"),
    "T --baseline 3.25": (2, "--baseline 3.25 loss -3.25"),
    "": (2, "distill.teacher missing --teacher CHECKPOINT"),
    "finetune/glue T": (2, "recipe switchcli finetune"),
    "T --out SPARSE": (2, "distill.teacher folder --out"),
    "T verb=x": (2, "verb distill x"),
}
"""Arguments of `distill`, where `T` is `--teacher SPARSE`, and the exit code and the words of the answer."""


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_told_with_its_place_and_way_out(
    line: str, trained: Path, dense: Path, here: Path, switchcli: SwitchCLI
) -> None:
    arguments, (code, words) = shlex.split(re.sub(r"\bT\b", "--teacher SPARSE", line)), BAD[line]
    Path("SPARSE").symlink_to(trained)
    Path("DENSE").symlink_to(dense)
    other = json.loads((trained / "tokenizer.json").read_text())
    other["model"]["vocab"][-1][0] += "x"
    Path("other.json").write_text(json.dumps(other))
    if "OTHER" in arguments:
        path = dense / "recipe.yaml"
        assert switchcli("pretrain", path, "data.tokenizer.vocab_size=480", "--out", "OTHER", "-q").code == 0
    Path("tiny.yaml").write_text(RECIPE)
    if "--out" in arguments:
        Path("SPARSE").unlink()
        shutil.copytree(trained, "SPARSE")
    out = [] if "--out" in arguments else ["--out", "a"]
    done = switchcli("distill", *arguments, *out)
    assert done.code == code, done.err
    assert not lacking(done.err, words)
    assert not Path("a/checkpoints").exists()


@pytest.mark.parametrize("tokenizer", ["{kind: train}", "{kind: file, path: copy.json}"])
def test_the_tokenizer_of_the_teacher_may_be_named(
    tokenizer: str, trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    write_text(Path("text.txt"))
    shutil.copy(trained / "tokenizer.json", "copy.json")
    Path("tiny.yaml").write_text(RECIPE.replace("{kind: train, vocab_size: 512}", tokenizer))
    done = switchcli("distill", "tiny.yaml", "--teacher", trained, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["recipe"]["data"]["tokenizer"]["kind"] == "file"


@pytest.mark.parametrize("differs", [False, True])
def test_another_dropout_than_its_teachers_is_told(
    differs: bool, trained: Path, here: Path, switchcli: SwitchCLI
) -> None:
    teachers = yaml.safe_load((trained / "recipe.yaml").read_text())["model"].get("dropout", 0.0)
    key = f"model.dropout={teachers + differs / 4}"
    done = switchcli("distill", "--teacher", trained, "train.steps=1", key, "--out", "a")
    assert done.code == 0, done.err
    assert ("dropout" in done.err) == differs


def test_by_default_its_folder_is_named_after_the_teacher(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "runs/switch")
    assert switchcli("distill", "--teacher", "runs/switch", "train.steps=1", "-q").code == 0
    assert Path("runs/distill/switch/result.json").exists()
