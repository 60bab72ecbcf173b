"""`switchcli eval`: scores, predictions, held-out figures, sweeps; the same on one rank and on two."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.errors import DataError

OTHER = 'kind: files, name: other, test: [last.train.jsonl], validation: [last.validation.jsonl], input: "{text}"'
"""Keys of a task that the fine-tuned run does not have."""


@pytest.fixture
def here(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shared fine-tuned run, which is then `tuned`. Nobody writes into it."""
    monkeypatch.chdir(tuned.parent)
    return tuned.parent


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_fine_tuned_run_is_scored_on_its_tasks_as_in_training(
    here: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    done = switchcli("eval", "tuned", "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((tmp_path / "a/result.json").read_text())
    (one,) = result["passes"]
    assert one["capacity"] == {"text": "paper", "tasks": "dropless"}
    trained = json.loads(Path("tuned/result.json").read_text())
    for task in ("colour", "last"):
        assert one["tasks"][task]["score"]["value"] == trained["tasks"][task]["score"]["value"]
        assert one["targets"][task]["neg_log_perplexity"] < 0
        assert len(one["targets"][task]["layers"]) == 2
        predicted = lines(tmp_path / f"a/predictions/{task}.jsonl")
        assert len(predicted) == 14
        assert predicted[0].keys() == {"number", "input", "target", "prediction", "correct"}
        assert [line["number"] for line in predicted] == list(range(14))
    labels = one["tasks"]["colour"]["labels"]
    assert labels.keys() == {"red", "green", "blue"}
    assert sum(label["examples"] for label in labels.values()) == 14
    shown = switchcli("eval", "tuned", "--out", tmp_path / "b").out
    assert re.search(r"^labels of colour\nlabel .* precision +recall .*\nred .* 5 ", shown, re.M), shown
    right = sum(line["correct"] for line in predicted)
    assert one["tasks"]["last"]["score"]["value"] == pytest.approx(100 * right / 14)


def test_a_sweep_over_capacities(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    done = switchcli("eval", "tuned", "eval.capacity=[0.5, paper, dropless]", "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    passes = json.loads(done.out)["passes"]
    assert [one["capacity"] for one in passes] == [{"text": c, "tasks": c} for c in (0.5, "paper", "dropless")]
    dropped = [one["targets"]["last"]["dropped_fraction"] for one in passes]
    assert dropped[0] > dropped[1] >= dropped[2] == 0
    assert (tmp_path / "a/capacity-0.5/predictions/last.jsonl").exists()


def test_a_pre_trained_run_is_measured_on_its_text(
    trained: Path, here: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    done = switchcli("eval", trained, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["tokenizer"] == hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest()
    (one,) = result["passes"]
    last = json.loads((trained / "result.json").read_text())["held_out/neg_log_perplexity"]
    assert one["held_out"]["text"]["neg_log_perplexity"] == pytest.approx(last, rel=1e-6)
    assert one["tasks"] == {}


@pytest.mark.unit("prepared")
@pytest.mark.parametrize("access", ["prepared", "stream"])
def test_other_text_than_the_checkpoint_saw_is_told(
    access: str, recipe: str, text: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the recipe's own text has changed: text of another name is meant to be other text."""
    monkeypatch.chdir(tmp_path)
    own = Path("own.txt")
    shutil.copy(text, own)
    corpora = "data.corpora=[{kind: files, paths: [own.txt], sample_by: line}]"
    keys = (corpora, f"data.access={access}", "train.steps=1")
    assert switchcli("pretrain", recipe, *keys, "--out", "run").code == 0

    def told(*arguments: str) -> bool:
        done = switchcli("eval", "run", *arguments, "--out", "measured")
        assert done.code == 0, done.err
        name = "other.txt" if arguments else "own.txt"
        assert f"text: {name}; 10.0% held out; inputs of 32 tokens\n" in done.out
        return "the text is not the one" in done.err

    def out_of_reach(corpora: object) -> None:
        raise DataError("no network")

    with monkeypatch.context() as patch:  # the shards of a hub are not needed
        patch.setattr("switchcli.runs.inputs.text_sets.source_shards_of", out_of_reach)
        assert not told()
    os.utime(own, ns=(0, 0))
    assert not told(), "a copy is the same text"
    shutil.copy(own, "other.txt")
    with Path("other.txt").open("a") as stream:
        stream.write("\n\none more paragraph\n")
    assert not told("text.corpora=[{kind: files, paths: [other.txt], sample_by: line}]")
    Path("other.txt").replace(own)
    assert told()


@pytest.mark.integration
def test_a_hugging_face_folder(here: Path, text: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    assert switchcli("convert", "tuned", tmp_path / "theirs", "--to", "huggingface").code == 0
    assert switchcli("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "switchcli").code == 0
    for folder in ("theirs", "ours"):  # the text that it was trained on is not known
        alone = switchcli("eval", tmp_path / folder)
        assert (alone.code, lacking(alone.err, f"{tmp_path / folder} tasks=[rte] text.corpora=[...]")) == (2, [])
    named = f"text.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]"
    keys = [f"tasks=[{{{OTHER}, target: word}}]", "scoring.examples=2", "scoring.decoding.max_tokens=3"]
    done = switchcli("eval", tmp_path / "theirs", *keys, "text.sequences=2", named, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["passes"]
    assert one["held_out"]["text"]["neg_log_perplexity"] < 0
    assert one["tasks"].keys() == {"other"}
    # Examples that are packed into a row would share the slots that transformers gives each of them.
    assert one["capacity"] == {"text": "dropless", "tasks": "dropless"}
    done = switchcli("eval", tmp_path / "theirs", "text.sequences=2", named, "--out", tmp_path / "b", "--json")
    assert json.loads(done.out)["passes"][0]["capacity"]["text"] == "paper"


@pytest.mark.integration
def test_a_small_text_may_be_held_out_as_a_whole(
    trained: Path, text: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text(text.read_text()[:20_000])
    corpora = ("text.corpora=[{kind: files, paths: [small.txt]}]", "text.sequences=4")
    done = switchcli("eval", trained, *corpora, "text.held_out_fraction=1", "--out", "a")
    assert done.code == 0, done.err
    refused = switchcli("eval", trained, *corpora, "text.held_out_fraction=0.0001", "--out", "b")
    assert (refused.code, lacking(refused.err, "text.held_out_fraction 0.0001 all")) == (3, [])


@pytest.mark.integration
def test_text_that_the_vocabulary_lacks_has_a_warning_and_no_bits_per_byte(
    trained: Path, text: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = text.read_text().split()[:4000]
    for share, is_told in ((2, True), (40, False)):
        strange = ["\N{SNOWMAN}" if number % share == 0 else word for number, word in enumerate(words)]
        Path(f"{share}.txt").write_text("\n\n".join(" ".join(strange[at : at + 40]) for at in range(0, 4000, 40)))
        keys = (
            f"text.corpora=[{{kind: files, paths: [{share}.txt]}}]",
            "text.held_out_fraction=0.5",
            "text.sequences=4",
        )
        done = switchcli("eval", trained, *keys, "--json", "--out", f"e{share}")
        assert done.code == 0, done.err
        assert (not lacking(done.err, "warning: text characters byte_fallback")) == is_told
        (one,) = json.loads(done.out)["passes"]
        assert ("bits_per_byte" in one["held_out"]["text"]) != is_told


@pytest.mark.integration
def test_rows_of_text_have_the_length_that_is_asked_for(
    trained: Path, text: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converted checkpoint does not know the rows that it was trained on, so they must not be taken as given."""
    monkeypatch.chdir(tmp_path)
    assert switchcli("convert", trained, "theirs", "--to", "huggingface").code == 0
    corpus = f"text={{corpora: [{{kind: files, paths: [{text}], sample_by: line}}], held_out_fraction: 0.1}}"
    losses = []
    for length in (32, 64):
        keys = [corpus, "text.sequences=4", "eval.capacity=[dropless]", f"data.inputs_length={length}"]
        for folder in ("theirs", trained):
            done = switchcli("eval", folder, *keys, "--json", "--out", f"e{length}")
            assert done.code == 0, done.err
            (one,) = json.loads(done.out)["passes"]
            assert one["held_out"]["text"]["loss"] == -one["held_out"]["text"]["neg_log_perplexity"]
            losses.append(one["held_out"]["text"]["loss"])
    short_theirs, short, long_theirs, long = losses
    assert short_theirs == pytest.approx(short, abs=1e-4)
    assert long_theirs == pytest.approx(long, abs=1e-4)
    assert short != pytest.approx(long, abs=1e-4)


def test_malformed_answers_are_explained_and_labels_can_be_compared_instead(
    here: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    colour = "tasks=[colour]"
    generated = switchcli("eval", "tuned", colour, "scoring.decoding.max_tokens=1", "--out", tmp_path / "a")
    assert generated.code == 0, generated.err
    assert not lacking(generated.err, "warning: colour red green blue 100%")
    assert not lacking(generated.err, "scoring.by=likelihood max_tokens")
    chosen = switchcli("eval", "tuned", colour, "scoring.by=likelihood", "--out", tmp_path / "b", "--json")
    assert chosen.code == 0, chosen.err
    assert "red, green, blue" not in chosen.err
    (one,) = json.loads(chosen.out)["passes"]
    assert one["tasks"]["colour"]["malformed"] == 0.0
    assert one["tasks"]["colour"]["score"]["low"] is not None
    predicted = lines(tmp_path / "b/predictions/colour.jsonl")
    assert {line["prediction"] for line in predicted} <= {"red", "green", "blue"}


def rounded(value: Any) -> Any:
    """Sums over ranks are added up in another order."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


@pytest.mark.integration
def test_two_ranks_give_the_predictions_of_one(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    command = ["eval", "tuned", "scoring.batch_examples=3", "--quiet", "--out"]
    assert switchcli(*command, tmp_path / "one").code == 0
    two = [sys.executable, "-m", "switchcli", *command, str(tmp_path / "two"), "--processes", "2"]
    subprocess.run(two, check=True, capture_output=True)
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        result = json.loads((folder / "result.json").read_text())
        scores = [(one["tasks"], rounded(one["targets"])) for one in result["passes"]]
        written.append((scores, {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}))
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tuned", "tasks=[rtee]"], 2, "tasks.0.name rtee rte"),
        (["tuned", "tasks=[unlike]"], 2, "tasks.0.name unlike colour last"),
        (["tuned", "tasks=colour"], 2, "tasks list 'colour' tasks=[colour]"),
        (["tuned", "quickstart/switch"], 2, "quickstart/switch pretrain `verb: eval` text.corpora=[...] tasks=[...]"),
        (["tuned", "tasks=[]"], 2, "tuned/checkpoints/step-00000002 tasks=[rte] text.corpora=[...]"),
        (["tuned", "scoring.split=test"], 2, "scoring.split test colour last"),
        (["tuned", "scoring.by=likelihood"], 2, "scoring.by last tasks=[colour] scoring.by=generation"),
        (["tuned", "tuned/recipe.yaml"], 2, "tuned/recipe.yaml finetune `verb: eval` tasks=[...] scores"),
        (["nothing"], 4, "nothing checkpoint checkpoints/step-*"),
        (["tuned", "tasks=[sst2]", "data.folder=sets"], 3, "data.folder sst2 sets/glue/sst2/validation.jsonl"),
    ],
)
def test_bad_input(arguments: list[str], code: int, words: str, here: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("eval", *arguments)
    assert done.code == code, done.err
    assert not lacking(done.err, words)
    assert "Traceback" not in done.err


@pytest.mark.integration
def test_control_characters_of_a_prediction_stay_harmless(
    here: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchcli.data.tokenizer.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2J red \u202e\x9b")
    done = switchcli("eval", "tuned", "--out", tmp_path)
    assert done.code == 0
    written = (tmp_path / "predictions/last.jsonl").read_text()
    for text in (written, done.out, done.err):
        assert not set(text) & {"\x1b", "\u202e", "\x9b"}
    assert lines(tmp_path / "predictions/last.jsonl")[0]["prediction"] == "\x1b[2J red \u202e\x9b"


def test_the_runs_settings_hold_unless_others_are_given(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    overrides = ("scoring.decoding.max_tokens=3", "eval.capacity=paper", "tasks=[last]")
    done = switchcli("eval", "tuned", *overrides, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["recipe"]["scoring"]["decoding"]["max_tokens"] == 3
    assert result["recipe"]["scoring"]["batch_examples"] == 4
    assert result["passes"][0]["capacity"]["tasks"] == "paper"


@pytest.mark.integration
def test_a_task_of_the_runs_own_by_its_name(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    keys = [f"tasks=[last, {{{OTHER}, target: word}}]", "scoring.examples=3"]
    done = switchcli("eval", "tuned", *keys, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["passes"][0]["tasks"].keys() == {"last", "other"}
    assert not lacking(done.err, "warning: tuned/checkpoints/step-00000002 trained other switchcli finetune")
    again = switchcli("eval", "tuned", *keys, "eval.capacity=[paper, 1.0]", "--out", tmp_path / "a")
    assert again.code == 0
    assert not (tmp_path / "a/predictions").exists()
    assert (tmp_path / "a.before-1/predictions/last.jsonl").exists()  # another evaluation is set aside
    assert not lacking(again.err, f"{tmp_path}/a {tmp_path}/a.before-1")
    assert switchcli("eval", "tuned", *keys, "eval.capacity=[paper, 1.0]", "--out", tmp_path / "a").code == 0
    assert not (tmp_path / "a.before-2").exists()  # the same one is replaced


def test_a_task_without_the_split_is_told(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    tasks = 'tasks=[last, {kind: files, name: other, test: [last.train.jsonl], input: "{text}", target: word}]'
    done = switchcli("eval", "tuned", tasks, "--out", tmp_path / "a")
    assert done.code == 0
    assert not lacking(done.err, "warning: other validation split")
    for seen in ("last", "held-out text", "no skill"):
        assert seen in done.out


def test_out_of_memory_is_told_with_a_way_out(
    here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("switchcli.training.scoring.generate", full)
    done = switchcli("eval", "tuned")
    assert done.code == 1
    assert "scoring.batch_examples" in done.err
    assert "Traceback" not in done.err


def test_where_it_is_written(trained: Path) -> None:
    from switchcli.runs.evaluate.eval_job import default_out

    assert default_out(trained) == Path("runs/eval/run")
    assert default_out(trained / "checkpoints/step-00000002") == Path("runs/eval/run-step-00000002")
    assert default_out(Path("runs/s0/glue")) == Path("runs/eval/s0/glue")


def test_where_it_cannot_be_written_is_known_before_the_work(
    here: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    monkeypatch.setattr("switchcli.training.scoring.generate", None)
    done = switchcli("eval", "tuned", "--out", tmp_path / "mine")
    assert (done.code, lacking(done.err, f"{tmp_path}/mine evaluation --out")) == (4, [])
    run = sorted(Path("tuned").rglob("*"))
    done = switchcli("eval", "tuned", "--out", "tuned")
    assert (done.code, lacking(done.err, "tuned evaluation --out"), sorted(Path("tuned").rglob("*"))) == (4, [], run)
    done = switchcli("eval", "tuned", "--out", tmp_path / "mine/thesis.tex/below")
    assert (done.code, "--out" in done.err) == (4, True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]


def test_stopped_it_writes_nothing_and_says_how_to_start_again(
    here: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.training.scoring.generate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    done = switchcli("eval", "tuned", "--out", tmp_path / "a")
    assert (done.code, lacking(done.err, "SIGTERM same command again")) == (130, [])
    assert not list(tmp_path.iterdir())


def test_a_run_whose_checkpoints_are_all_damaged_is_no_reason_to_write_elsewhere(
    trained: Path, tmp_path: Path, switchcli: SwitchCLI
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for manifest in (tmp_path / "run/checkpoints").glob("*/MANIFEST"):
        manifest.write_text("damaged")
    done = switchcli("eval", tmp_path / "run")
    assert (done.code, lacking(done.err, "restore name another checkpoint")) == (4, [])
    assert "--out" not in done.err
