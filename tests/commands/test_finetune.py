"""`switchcli finetune`: a run on two small tasks, what it leaves behind, freezing, and bad input."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from drill import fingerprint, tensors
from messages import lacking
from safetensors.torch import load_file
from tiny_run import SwitchCLI, records

from switchcli.training import scoring

INTERRUPTED = 75


def test_a_run_end_to_end(trained: Path, tuned: Path) -> None:
    result = json.loads((tuned / "result.json").read_text())
    assert result["verb"] == "finetune"
    assert result["tasks"].keys() == {"colour", "last"}
    colour = result["tasks"]["colour"]
    assert colour["metrics"].keys() == {"accuracy", "macro_f1"}
    assert (colour["num_examples"], round(colour["chance"], 2)) == (
        14,
        32.41,
    )  # less than 1 in 3: the labels differ in number
    assert colour["score"].keys() == {"value", "low", "high"}
    assert colour["best_step"] in (1, 2)

    scored = [record for record in records(tuned) if "tasks/colour" in record]
    assert [record["step"] for record in scored] == [1, 2]
    assert scored[-1]["tasks/colour"] == colour["score"]["value"]
    assert scored[-1]["tasks/average"] == pytest.approx((scored[-1]["tasks/colour"] + scored[-1]["tasks/last"]) / 2)
    assert max(record["tasks/colour"] for record in scored) == colour["best"]

    resolved = (tuned / "recipe.yaml").read_text()
    assert f"checkpoint: {trained}/checkpoints/step-00000002" in resolved
    assert "d_model: 32" in resolved  # what the recipe leaves out is the checkpoint's
    assert "expert_dropout: 0.3" in resolved


def test_only_the_named_weights_learn(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    keys = ("update=expert", "train.steps=2", "eval.every_steps=2")
    done = switchcli("finetune", tuning, "--model", trained, *keys, "--out", "a", "--quiet")
    assert done.code == 0, done.err
    before, after = tensors(trained, "model"), tensors(Path("a"), "model")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if ".experts." in name or ".router." in name}


def test_the_optimizer_goes_on_or_begins_anew(trained: Path, tuned: Path, tuning: str, switchcli: SwitchCLI) -> None:
    command = ("finetune", tuning, "--model", trained, "train.steps=2", "eval.every_steps=2", "--out")
    assert switchcli(*command, "new", "start.keep=weights").code == 0
    for run, steps in ((tuned, 4), (Path("new"), 2)):
        saved = load_file(run / "checkpoints/step-00000002/optimizer-00000.safetensors")
        assert int(saved["optimizer/steps"]) == steps
    adamw = switchcli(*command, "other", "optimizer.kind=adamw")
    assert adamw.code == 4
    assert "start.keep=weights" in adamw.err


@pytest.mark.integration
def test_a_hugging_face_folder_is_a_start_too(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "huggingface").code == 0
    command = ("finetune", tuning, "--model", "theirs", "eval.every_steps=2")
    refused = switchcli(*command, "start.keep=optimizer", "--out", "a")
    assert (refused.code, "start.keep=weights" in refused.err) == (4, True)
    done = switchcli(*command, "train.steps=2", "--out", "b", "--json")
    assert (done.code, lacking(done.err, "starting theirs optimizer start.keep weights")) == (0, []), done.err
    assert json.loads(done.out)["step"] == 2
    assert (yaml.safe_load(Path("b/recipe.yaml").read_text())["start"]["keep"]) == "weights"
    shutil.rmtree("theirs")
    done = switchcli(*command, "train.steps=4", "--out", "b", "--json")
    assert (done.code, json.loads(done.out)["step"]) == (0, 4), done.err


@pytest.mark.integration
def test_a_started_run_keeps_its_start(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    """The folder of the pre-training may have newer checkpoints by then, or be gone."""
    shutil.copytree(trained, "pre")
    command = ("finetune", tuning, "eval.every_steps=2", "--out", "a", "--model")
    assert switchcli(*command, "pre", "train.steps=2").code == 0
    shutil.rmtree("pre")
    more = switchcli(*command, "pre", "train.steps=3")
    assert more.code == 0, more.err
    assert not lacking(more.err, "step 2 3")
    other = switchcli(*command, trained, "train.steps=4")
    assert other.code == 2
    assert not lacking(other.err, "start.checkpoint --no-resume")


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["tasks=[rtee]"], 2, "tasks.0.name rtee rte"),
        (["model.d_model=64"], 2, "model.d_model 64 32"),
        (["model.num_experts=2"], 2, "model.num_experts 2 4 prune --experts"),
        (["update=experts"], 2, "update 'experts' 'expert'"),
        (["tasks.0.target=labels"], 3, "colour.train.jsonl:1 tasks colour column 'labels'"),
        (["tasks.0.labels=[red, green]"], 3, "tasks colour label 2 red green"),
        (["tasks=[rte, sst2, squad]", "data.folder=sets"], 3, "data.folder rte sst2 squad sets/glue/rte/train.jsonl"),
        (["tasks.0.train=[nothing.jsonl]"], 3, "tasks colour nothing.jsonl file"),
        (["tasks.0.train=[table.csv]"], 3, "table.csv JSON Lines"),
        (["tasks.0.metrics=[accuracies]"], 2, "tasks.0.metrics accuracies accuracy"),
        (["tasks.0.metrics=[exact_match]", "tasks.1.name=colour"], 2, "tune.yaml:2 tasks colour two name"),
        (["tasks.0.labels=[red, green, red]"], 2, "tasks.0.labels 'red' 'green' differ"),
        (["tasks.0.metrics=[f1]"], 2, "tasks.0.metrics f1 2 3"),
        (["tasks.1.metrics=[exact_match, pearson]"], 3, "last.train.jsonl:1 word number pearson"),
        (["tasks.0.input='{text} of {text'"], 2, "tasks.0.input {text' braces"),
    ],
)
def test_bad_input_is_told_with_its_place_and_way_out(
    overrides: list[str], code: int, words: str, trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    Path("table.csv").write_text("text,label,word\nred,0,red\n")
    done = switchcli("finetune", tuning, "--model", trained, *overrides, "--out", "a")
    assert done.code == code, done.err
    assert not lacking(done.err, words)
    assert "Traceback" not in done.err


def test_bleu_without_its_extra_is_refused_before_any_work(
    trained: Path, tuning: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    for command in (
        ["finetune", tuning, "tasks.0.metrics=[bleu]", "--model", trained, "--out", "a"],
        ["eval", trained, "tasks=[wmt14_en_de]", "--out", "a"],
    ):
        done = switchcli(*command)
        assert done.code == 2
        assert not lacking(done.err, "tasks bleu sacrebleu pip install 'switchcli[tasks]'")
        assert len(done.err.strip().splitlines()) == 1
        assert not Path("a").exists()


def test_no_model_named(tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", tuning, "--out", "a")
    assert (done.code, "--model CHECKPOINT" in done.err) == (2, True)
    done = switchcli("finetune", tuning, "--model", "nothing/there", "--out", "a")
    assert (done.code, lacking(done.err, "nothing/there checkpoint checkpoints/step-*")) == (4, [])


def test_what_of_the_tasks_is_cut_unknown_or_not_there_is_told(
    trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    Path("colour.validation.jsonl").write_text("\n")
    done = switchcli("finetune", tuning, "--model", trained, "--out", "a")
    assert (done.code, lacking(done.err, "error: colour validation examples")) == (3, [])
    long = {"text": "red " * 100, "label": 0, "word": "red"}
    Path("colour.train.jsonl").write_text((json.dumps(long) + "\n") * 5)
    strange = {"text": "\N{SNOWMAN} \N{UMBRELLA}", "label": 0, "word": "red"}
    Path("colour.validation.jsonl").write_text(json.dumps(strange) + "\n")
    keys = ("train.steps=2", "eval.every_steps=2", "tasks.1.validation=[]")
    done = switchcli("finetune", tuning, "--model", trained, *keys, "--out", "b")
    assert done.code == 0, done.err
    assert "without a right answer" not in done.err
    assert re.search(r"^warning: colour: 5 .*\b5 rows.*\b50\.0%.*\b5 .*data\.inputs_length.*truncated", done.err, re.M)
    assert re.search(r"^warning: inputs of colour: \d+\.\d% .*\bcharacters\b.*\bbyte_fallback\b", done.err, re.M)
    assert not lacking(done.err, "warning: last validation split")
    odd = ("tasks.0.labels=[\N{SNOWMAN}, red]", "train.steps=2", "eval.every_steps=2", "tasks.1.validation=[]")
    done = switchcli("finetune", tuning, "--model", trained, *odd, "--out", "c")
    assert not lacking(done.err, "warning: colour labels \N{SNOWMAN} byte_fallback"), done.err


def test_rows_without_an_answer_and_answers_that_the_vocabulary_lacks_are_told(
    trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    rows = [{"text": "red", "word": None}, {"text": "red", "word": "\N{SNOWMAN} \N{UMBRELLA}"}]
    Path("last.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = switchcli("finetune", tuning, "--model", trained, "train.steps=2", "eval.every_steps=2", "--out", "b")
    assert done.code == 0, done.err
    assert not lacking(done.err, "last: 1 examples 1 more right answer")
    assert re.search(r"^warning: answers of last: \d+\.\d% .*\bbyte_fallback\b", done.err, re.M)


@pytest.mark.parametrize(("shared", "warned"), [(2, False), (3, True)])
def test_inputs_that_are_trained_on_and_scored_are_told(
    shared: int, warned: bool, trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    """Two of a hundred may be: benchmarks have some."""
    train, scored = (
        [{"text": f"{name} {number}", "label": 0, "word": "red"} for number in range(100)] for name in ("red", "blue")
    )
    Path("colour.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    rows = [*train[:shared], *scored[shared:]]
    Path("colour.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("train.steps=2", "eval.every_steps=2", "scoring.examples=100", "tasks.1.validation=[]")
    done = switchcli("finetune", tuning, "--model", trained, *keys, "--out", "a")
    assert done.code == 0, done.err
    assert bool(re.search(r"^warning: colour: 3 of its 100 inputs", done.err, re.M)) == warned, done.err


def test_a_run_goes_on_with_files_that_were_renamed_and_not_with_others(
    trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    keys = ("train.steps=1", "eval.every_steps=2")
    assert switchcli("finetune", tuning, "--model", trained, *keys, "--out", "a").code == 0
    Path("colour.train.jsonl").rename("renamed.jsonl")
    moved = ("--model", trained, "tasks.0.train=[renamed.jsonl]", "eval.every_steps=2", "train.steps=2")
    done = switchcli("finetune", tuning, *moved, "--out", "a")
    assert done.code == 0, done.err
    assert not lacking(done.err, "going on from step 1 of 2")
    done = switchcli("finetune", tuning, "--branch-from", "a", *moved[2:4], "train.steps=3", "--out", "b")
    assert not lacking(done.err, "data goes on where"), done.err
    with Path("renamed.jsonl").open("a") as file:
        file.write(json.dumps({"text": "red", "label": 0, "word": "red"}) + "\n")
    done = switchcli("finetune", tuning, *moved[:-1], "train.steps=3", "--out", "a")
    assert (done.code, lacking(done.err, "other text")) == (4, []), done.err


def test_a_task_that_is_only_scored_is_told(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    keys = ("tasks.0.train=[]", "train.steps=2", "eval.every_steps=2")
    done = switchcli("finetune", tuning, "--model", trained, *keys, "--out", "a")
    assert done.code == 0, done.err
    assert not lacking(done.err, "colour split train")
    assert re.search(r"colour: 14 .*\b\d .*data\.inputs_length=64 .*truncated", done.err, re.M)


def test_a_start_within_the_runs_own_folder(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "pre")
    done = switchcli("finetune", tuning, "--model", "pre", "--out", "pre", "--no-resume")
    assert (done.code, lacking(done.err, "start.checkpoint pre folder --out")) == (2, [])
    assert Path("pre/checkpoints").is_dir()


@pytest.mark.integration
def test_stopped_while_it_is_scored_it_ends_with_the_same_bits(
    trained: Path, tuned: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scoring takes longer than a scheduler waits: the step is saved at once, and the next start has the scores."""
    monkeypatch.chdir(tmp_path)
    command = ["finetune", tuned / "recipe.yaml", "--model", trained, "--out", "run"]
    asked = scoring.TaskPredictor.__call__

    def stop_at(self: Any, exam: Any, stop: Any, *show: Any) -> Any:
        if (records("run")[-1]["step"], exam.task.name) == (1, "last"):
            signal.raise_signal(signal.SIGTERM)
        return asked(self, exam, stop, *show)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.TaskPredictor, "__call__", stop_at)
        done = switchcli(*command)
    assert done.code == INTERRUPTED
    assert not lacking(done.err, "saved step 1 2 same command")
    assert switchcli(*command).code == 0
    assert fingerprint(Path("run")) == fingerprint(tuned)


@pytest.mark.integration
def test_what_the_best_checkpoint_is_chosen_by_does_not_change_within_a_run(
    trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    command = ("finetune", tuning, "--model", trained, "--out", "a", "eval.every_steps=2")
    assert switchcli(*command, "train.steps=2").code == 0
    for key in ("eval.sequences", "eval.capacity", "scoring.examples", "scoring.decoding.beams"):
        refused = switchcli(*command, "train.steps=3", f"{key}=3")
        assert refused.code == 2
        assert not lacking(refused.err, f"{key} --no-resume")
        assert "back to" in refused.err or "leave it out" in refused.err
    path = Path("colour.validation.jsonl")
    rows = path.read_text()
    path.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    refused = switchcli(*command, "train.steps=3")
    assert refused.code == 4
    assert "examples" in refused.err
    path.write_text(rows)
    free = ("log.every_steps=1", "checkpoint.keep_last=1")
    assert switchcli(*command, "train.steps=3", *free).code == 0
