"""`switchcli finetune`: a run on two small tasks, what it leaves behind, exact resume, freezing, and bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drill import CLOCKS, fingerprint
from messages import lacking
from safetensors.torch import load_file
from terminal import in_terminal
from tiny_run import SwitchCLI, lay_out_tuning
from typer.testing import CliRunner

from switchcli.checkpoint import checkpoint
from switchcli.cli import app
from switchcli.runs import finetuning as verb
from switchcli.training import scoring

STEPS = 9
INTERRUPTED = 75


def metrics(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def weights(run: str | Path, step: int) -> dict[str, torch.Tensor]:
    files = Path(run, f"checkpoints/step-{step:08d}").glob("model-*.safetensors")  # a rank's share in each
    return {name: weight for file in files for name, weight in load_file(file).items()}


def test_a_run_end_to_end(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", tuning, "--model", trained, "train.steps=8", "--out", "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(Path("a/result.json").read_text())
    assert result["verb"] == "finetune"
    assert result["tasks"].keys() == {"colour", "last"}
    colour = result["tasks"]["colour"]
    assert colour["metrics"].keys() == {"accuracy", "macro_f1"}
    assert (colour["num_examples"], round(colour["chance"], 2)) == (14, 33.33)
    assert colour["score"].keys() == {"value", "low", "high"}
    assert colour["best_step"] in (4, 8)

    scored = [record for record in metrics("a") if "tasks/colour" in record]
    assert [record["step"] for record in scored] == [4, 8]
    assert scored[-1]["tasks/colour"] == colour["score"]["value"]
    assert scored[-1]["tasks/average"] == pytest.approx((scored[-1]["tasks/colour"] + scored[-1]["tasks/last"]) / 2)
    assert max(record["tasks/colour"] for record in scored) == colour["best"]

    resolved = Path("a/recipe.yaml").read_text()
    assert f"checkpoint: {trained}/checkpoints/step-00000002" in resolved
    assert "d_model: 32" in resolved  # what the recipe leaves out is the checkpoint's
    assert "expert_dropout: 0.3" in resolved
    for seen in ("colour", "macro_f1", "chance", "which colour:", "generate a", "eval a"):
        assert seen in done.err


def test_a_terminal_shows_the_scores_of_a_task_with_two_metrics_and_what_to_do_next(trained: Path, tuning: str) -> None:
    command = [sys.executable, "-m", "switchcli", "finetune", tuning, "--model", trained, "--out", "a"]
    shown = in_terminal(command, 80)
    assert not shown.faults, shown.text
    for seen in ("accuracy", "macro_f1", "95 % interval", "Next:", "generate a", "eval a"):
        assert seen in shown.text, shown.text


@pytest.mark.integration
def test_the_same_command_and_the_folders_own_recipe_go_on(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    first = switchcli("finetune", tuning, "--model", trained, "--out", "a", "--quiet")
    assert first.code == 0, first.err
    more = switchcli("finetune", "a/recipe.yaml", "train.steps=8", "--out", "a")
    assert more.code == 0, more.err
    assert not lacking(more.err, "step 4 8")
    straight = switchcli("finetune", tuning, "--model", trained, "train.steps=8", "--out", "b", "--quiet")
    assert straight.code == 0
    assert weights("a", 8).keys() == weights("b", 8).keys()
    for name, tensor in weights("b", 8).items():
        assert torch.equal(weights("a", 8)[name], tensor)


class Signals:
    """The objective, which at one call of a training step first sends this process a signal."""

    def __init__(self, call: int) -> None:
        self.calls, self.at, self.objective = 0, call, verb.packed_cross_entropy

    def __call__(self, model: torch.nn.Module, batch: Any) -> Any:
        if model.training:
            if self.calls == self.at:
                signal.raise_signal(signal.SIGTERM)
            self.calls += 1
        return self.objective(model, batch)


@pytest.fixture(scope="module")
def straight(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How a run ends that is never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = [
            "finetune",
            lay_out_tuning(folder),
            "--model",
            str(trained),
            f"train.steps={STEPS}",
            "--out",
            "run",
        ]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return fingerprint(folder / "run")


@pytest.mark.integration
@pytest.mark.parametrize("stops", [[0], [1, 4], [3, 4, 7]])
def test_stopped_it_ends_with_the_same_bits(
    stops: list[int],
    straight: dict[str, str],
    trained: Path,
    tuning: str,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["finetune", tuning, "--model", trained, f"train.steps={STEPS}", "--out", "run"]
    done_steps = 0
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(verb, "packed_cross_entropy", Signals((stop - done_steps) * 2))
            assert switchcli(*command).code == INTERRUPTED
        done_steps = stop + 1
    assert switchcli(*command).code == 0
    assert fingerprint(Path("run")) == straight


@pytest.mark.unit("expert-<lambda>")
@pytest.mark.parametrize(
    ("group", "learns"),
    [
        ("expert", lambda name: ".experts." in name or ".router." in name),
        ("non_expert", lambda name: not (".experts." in name or ".router." in name)),
        ("dense_feed_forward", lambda name: ".feed_forward.layer.w" in name),
    ],
)
def test_only_the_named_weights_learn(
    group: str, learns: Any, trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    done = switchcli("finetune", tuning, "--model", trained, f"update={group}", "--out", "a", "--quiet")
    assert done.code == 0, done.err
    before, after = weights(trained, 2), weights("a", 4)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if learns(name)}


def test_the_optimizer_goes_on_or_begins_anew(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    for name, steps in (("carry", 6), ("reset", 4)):
        assert switchcli("finetune", tuning, "--model", trained, f"start.optimizer={name}", "--out", name).code == 0
        saved = load_file(Path(name) / "checkpoints/step-00000004/optimizer-00000.safetensors")
        assert int(saved["optimizer/steps"]) == steps
    adamw = switchcli("finetune", tuning, "--model", trained, "optimizer.kind=adamw", "--out", "c")
    assert adamw.code == 4
    assert "start.optimizer=reset" in adamw.err


def test_a_hugging_face_folder_is_a_start_too(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "huggingface").code == 0
    refused = switchcli("finetune", tuning, "--model", "theirs", "--out", "a")
    assert (refused.code, "start.optimizer=reset" in refused.err) == (4, True)
    done = switchcli("finetune", tuning, "--model", "theirs", "start.optimizer=reset", "--out", "b", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["step"] == 4


@pytest.mark.integration
def test_a_started_run_keeps_its_start(trained: Path, tuning: str, switchcli: SwitchCLI, tmp_path: Path) -> None:
    """The folder of the pre-training may have newer checkpoints by then, or be gone."""
    shutil.copytree(trained, "pre")
    assert switchcli("finetune", tuning, "--model", "pre", "--out", "a", "--quiet").code == 0
    shutil.rmtree("pre")
    more = switchcli("finetune", tuning, "--model", "pre", "train.steps=6", "--out", "a")
    assert more.code == 0, more.err
    other = switchcli("finetune", tuning, "--model", trained, "train.steps=8", "--out", "a")
    assert other.code == 2
    assert "start.checkpoint" in other.err
    assert "--no-resume" in other.err


def test_a_dry_run_tells_what_it_comes_to(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", tuning, "--model", trained, "--dry-run", "--json")
    assert done.code == 0, done.err
    described = json.loads(done.out)
    assert described["sequences_per_step"] == 4
    assert described["recipe"]["model"]["num_experts"] == 4
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["tasks=[rtee]"], 2, "tasks.0.name rtee rte"),
        (["model.d_model=64"], 2, "model.d_model 64 32"),
        (["model.num_experts=8"], 2, "model.num_experts 8 4"),
        (["eval.every_steps=3"], 2, "eval.every_steps 3 checkpoint.save_every_steps 2"),
        (["update=experts"], 2, "update 'experts' 'expert'"),
        (["tasks.0.target=labels"], 3, "colour.train.jsonl:1 tasks colour column 'labels'"),
        (["tasks.0.labels=[red, green]"], 3, "tasks colour label 2 red green"),
        (["tasks.0.train=[nothing.jsonl]"], 3, "tasks colour nothing.jsonl file"),
        (["tasks.0.metrics=[accuracies]"], 2, "tasks.0.metrics accuracies accuracy"),
        (["tasks.0.metrics=[exact_match]", "tasks.1.name=colour"], 2, "tune.yaml:2 tasks colour two name"),
        (["tasks.0.labels=[red, green, red]"], 2, "tasks.0.labels 'red' 'green' differ"),
        (["tasks.0.metrics=[f1]"], 2, "tasks.0.metrics f1 2 3"),
        (["tasks.0.input=which"], 2, "tasks.0.input 'which' field {text}"),
        (["tasks.0.input='{text} of {text'"], 2, "tasks.0.input {text' braces"),
        (["tasks=[sst2]", "data.folder=sets"], 3, "data.folder sets sst2"),
        (["scoring.decoding.beams=0"], 2, "scoring.decoding.beams 0 1"),
    ],
)
def test_bad_input_is_told_with_its_place_and_way_out(
    overrides: list[str], code: int, words: str, trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
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


def test_an_empty_split_and_long_inputs(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    Path("colour.validation.jsonl").write_text("\n")
    done = switchcli("finetune", tuning, "--model", trained, "--out", "a")
    assert (done.code, lacking(done.err, "error: colour validation examples")) == (3, [])
    row = {"text": "red " * 100, "label": 0, "word": "red"}
    Path("colour.validation.jsonl").write_text(json.dumps(row) + "\n")
    Path("colour.train.jsonl").write_text((json.dumps(row) + "\n") * 5)
    done = switchcli("finetune", tuning, "--model", trained, "--out", "b")
    assert done.code == 0, done.err
    assert re.search(r"^warning: colour: 5 .*\b5 rows.*\b50\.0%.*\b5 .*cut.*data\.inputs_length", done.err, re.M)


def test_characters_that_the_vocabulary_lacks_are_a_warning(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    row = {"text": "\N{SNOWMAN} \N{UMBRELLA}", "label": 0, "word": "red"}
    Path("colour.validation.jsonl").write_text(json.dumps(row) + "\n")
    done = switchcli("finetune", tuning, "--model", trained, "train.steps=2", "--out", "a")
    assert done.code == 0, done.err
    assert re.search(r"^warning: colour: \d+\.\d% .*\bcharacters\b.*\bbyte_fallback\b", done.err, re.M)
    assert "warning: last" not in done.err


@pytest.mark.integration
@pytest.mark.timeout(180)
def test_two_ranks_learn_what_one_does(trained: Path, tuning: str) -> None:
    """The ranks' gradients are added in another order, hence not the same bits."""
    records = []
    for name, options in (("one", []), ("two", ["--processes", "2"])):
        command = [sys.executable, "-m", "switchcli", "finetune", tuning, "--model", str(trained), "--out", name]
        subprocess.run([*command, "train.steps=8", "--quiet", *options], check=True, capture_output=True)
        records.append(metrics(name))
    for one, two in zip(*records, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - CLOCKS - {"layers"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


def test_a_checkpoint_of_another_vocabulary(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    """One whose tokenizer has more pieces than the model has rows, with a manifest that vouches for it."""
    found = checkpoint.Checkpoint.open(trained / "checkpoints/step-00000002")
    recipe = found.document("recipe.yaml").replace(b"vocab_size: 512", b"vocab_size: 300")
    documents = {name: found.document(name) for name in ("state.json", "tokenizer.json")}
    saved = checkpoint.save(Path("odd"), 2, model={}, optimizer={}, documents={**documents, "recipe.yaml": recipe})
    done = switchcli("finetune", tuning, "--model", saved, "--out", "a")
    assert done.code == 4
    assert not lacking(done.err, "error: tokenizer 512 300")


def test_what_is_not_trained_on_or_not_scored_is_told(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    overrides = ["tasks.0.train=[]", "tasks.1.validation=[]"]
    done = switchcli("finetune", tuning, "--model", trained, *overrides, "--out", "a")
    assert done.code == 0, done.err
    assert not lacking(done.err, "colour split train")
    assert not lacking(done.err, "warning: last validation split")
    assert re.search(r"^colour: 14 .*\b\d inputs.*\b64 tokens.*cut$", done.err, re.M)


def test_a_task_whose_examples_are_mostly_cut_is_warned_of(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", tuning, "--model", trained, "data.inputs_length=16", "--out", "a")
    assert done.code == 0, done.err
    assert re.search(r"^warning: colour: .*\b16 tokens.*cut.*data\.inputs_length", done.err, re.M)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a \\ud800 b", "label": 0, "word": "b"}', "surrogate"),
        ('{"text": "a", "label": null, "word": "b"}', "label no answer"),
        ('{"text": "a", "label": [], "word": "b"}', "label no answer"),
    ],
)
def test_a_bad_row_has_its_place(row: str, words: str, trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    with Path("colour.train.jsonl").open("a") as file:
        file.write(row + "\n")
    done = switchcli("finetune", tuning, "--model", trained, "--out", "a")
    assert done.code == 3
    assert not lacking(done.err, f"error: colour.train.jsonl:61 tasks colour {words}")


def test_a_start_within_the_runs_own_folder(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    shutil.copytree(trained, "pre")
    done = switchcli("finetune", tuning, "--model", "pre", "--out", "pre", "--no-resume")
    assert (done.code, lacking(done.err, "start.checkpoint pre folder --out")) == (2, [])
    assert Path("pre/checkpoints").is_dir()


def test_a_recipe_of_another_verb(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", "quickstart/switch", "verb=pretrain", "--model", trained, "--out", "a")
    assert (done.code, lacking(done.err, "recipe switchcli pretrain finetune")) == (2, [])
    done = switchcli("pretrain", "finetune/glue")
    assert (done.code, lacking(done.err, "recipe switchcli finetune pretrain")) == (2, [])
    done = switchcli("doctor", "finetune/glue")
    assert (done.code, done.err.count("\n")) == (2, 1)


@pytest.mark.integration
@pytest.mark.parametrize("at", [4, 8, 9])
def test_stopped_while_it_is_scored_it_ends_with_the_same_bits(
    at: int,
    straight: dict[str, str],
    trained: Path,
    tuning: str,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scoring takes longer than a scheduler waits: the step is saved at once, and the next start has the scores."""
    command = ["finetune", tuning, "--model", trained, f"train.steps={STEPS}", "--out", "run"]
    asked = scoring.TaskPredictor.__call__

    def stop_at(self: Any, exam: Any, stop: Any, *show: Any) -> Any:
        if (metrics("run")[-1]["step"], exam.task.name) == (at, "last"):
            signal.raise_signal(signal.SIGTERM)
        return asked(self, exam, stop, *show)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.TaskPredictor, "__call__", stop_at)
        done = switchcli(*command)
    assert done.code == INTERRUPTED
    assert not lacking(done.err, f"saved step {at} {STEPS} same command")
    assert switchcli(*command).code == 0
    assert fingerprint(Path("run")) == straight


def test_files_that_are_not_there_are_all_named(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli(
        "finetune", tuning, "--model", trained, "tasks=[rte, sst2, squad]", "data.folder=sets", "--out", "a"
    )
    assert done.code == 3
    assert not lacking(done.err, "error: data.folder sets rte sst2 squad sets/glue/rte/train.jsonl")


def test_a_key_of_a_schedule_leaves_its_kind(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    text = Path("tune.yaml").read_text().replace("schedule: {kind: constant, learning_rate: 0.01}\n", "")
    Path("tune.yaml").write_text(text)
    done = switchcli("finetune", tuning, "--model", trained, "schedule.learning_rate=0.02", "--dry-run", "--json")
    assert done.code == 0, done.err
    schedule = json.loads(done.out)["recipe"]["schedule"]
    assert (schedule["kind"], schedule["learning_rate"]) == ("constant", 0.02)


@pytest.mark.integration
@pytest.mark.parametrize("key", ["eval.sequences", "eval.capacity", "scoring.examples", "scoring.decoding.beams"])
def test_what_the_best_checkpoint_is_chosen_by_does_not_change_within_a_run(
    key: str, trained: Path, tuning: str, switchcli: SwitchCLI
) -> None:
    command = ("finetune", tuning, "--model", trained, "--out", "a")
    assert switchcli(*command, "train.steps=2").code == 0
    refused = switchcli(*command, "train.steps=3", f"{key}=3")
    assert refused.code == 2
    assert key in refused.err
    assert "again" in refused.err
    assert "--no-resume" in refused.err
    free = ("eval.every_steps=2", "scoring.draws=10", "log.every_steps=1", "checkpoint.keep_last=1")
    assert switchcli(*command, "train.steps=3", *free).code == 0


@pytest.mark.integration
def test_a_run_is_not_resumed_with_other_examples_to_score(trained: Path, tuning: str, switchcli: SwitchCLI) -> None:
    command = ("finetune", tuning, "--model", trained, "--out", "a")
    assert switchcli(*command, "train.steps=2").code == 0
    path = Path("colour.validation.jsonl")
    rows = path.read_text()
    path.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    refused = switchcli(*command, "train.steps=3")
    assert refused.code == 4
    assert "examples" in refused.err
    path.write_text(rows)
    assert switchcli(*command, "train.steps=3").code == 0


@pytest.mark.integration
def test_a_run_whose_checkpoints_do_not_know_their_examples_is_resumed(
    trained: Path, tuning: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions up to 0.1 wrote such checkpoints."""
    from switchcli.runs.trainer import Trainer

    command = ("finetune", tuning, "--model", trained, "--out", "a")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_examples_identity", lambda self: {})
        assert switchcli(*command, "train.steps=2").code == 0
    done = switchcli(*command, "train.steps=3")
    assert done.code == 0, done.err
