"""Reading the folder of a run, whole or not."""

import json
from pathlib import Path

import numpy as np
import pytest
from messages import lacking
from report_folders import FLOPS, LAYERS, STEPS, TOKENS, a_run, logged

from switchcli.errors import CheckpointError
from switchcli.metric_names import HELD_OUT, HELD_OUT_LOSS, LOSS
from switchcli.metric_names import HELD_OUT_BITS as BITS
from switchcli.report import runs
from switchcli.report.runs import read

RECIPE = {"train": {"steps": 100, "batch_tokens": TOKENS, "seed": 3}}


def test_a_whole_run(tmp_path: Path) -> None:
    run = read(a_run(tmp_path / "a", experts=3), RECIPE)
    assert run.notes == ()
    assert (run.verb, run.step, run.steps, run.seed) == ("pretrain", 100, 100, 3)
    assert run.curves[HELD_OUT].steps.tolist() == [*range(0, 101, 10)]
    assert run.curves[HELD_OUT].values[-1] == -3.0
    assert run.curves[HELD_OUT_LOSS].values[-1] == run.curves[LOSS].values[-1] == 3.0  # although no loss was logged
    assert run.curves[BITS].values[-1] == 1.5
    assert run.flops_per_step == FLOPS
    assert run.curves["input_tokens"].values[-1] == STEPS * TOKENS  # an integer in the file
    assert run.seconds.at(run.curves[HELD_OUT].steps).tolist() == [step / 2 for step in range(0, 101, 10)]
    assert run.loads.keys() == {*LAYERS}
    assert run.loads[LAYERS[0]].tokens.tolist() == [[100, 200, 300]] * 10


@pytest.mark.parametrize(("of", "words"), [(100, "no result.json step 40 100"), (None, "result.json more step 40 100")])
def test_a_run_that_has_not_all_its_steps_is_read_to_where_it_is(tmp_path: Path, of: int | None, words: str) -> None:
    """It goes on, or it was done and was given more steps."""
    run = read(a_run(tmp_path / "a", steps=40, of=of), RECIPE)
    assert (run.step, run.result) == (40, {})
    (note,) = run.notes
    assert not lacking(note, f"{run.name} {words}")


@pytest.mark.parametrize("line", [3, 21])
def test_a_torn_line_is_left_out_with_its_place(tmp_path: Path, line: int) -> None:
    folder = a_run(tmp_path / "a", experts=2)
    whole = read(folder, RECIPE).curves["neg_log_perplexity"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    torn = [one[: len(one) // 2] if number == line else one for number, one in enumerate(lines, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(torn))
    run = read(folder, RECIPE)
    (note,) = run.notes
    assert not lacking(note, f"{folder}/metrics.jsonl line {line} whole")
    lost = len(whole.steps) - len(run.curves["neg_log_perplexity"].steps)
    lost += 11 - len(run.curves[HELD_OUT].steps)
    assert lost == 1


def test_steps_that_were_left_out_are_told(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        for left_out in ([5], [5, 8, 12]):  # the last says all
            file.write(json.dumps({"step": 60, "skipped_steps": left_out}) + "\n")
    (note,) = read(folder, RECIPE).notes
    assert not lacking(note, f"{folder} batches 5 8 12 train.nonfinite")
    for strange in ({"a": 1}, [[1]], ["1", "\x1b"], None, "12"):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 61, "skipped_steps": strange}) + "\n")
        assert read(folder, RECIPE).notes == ()


def test_what_a_resumed_run_did_again_counts_once(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, HELD_OUT: -9.0}) + "\n")
    curve = read(folder, RECIPE).curves[HELD_OUT]
    assert curve.steps.tolist() == [*range(0, 101, 10)]
    assert curve.values[5] == -9.0


def test_of_a_long_file_some_lines_have_their_layers_and_all_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LAYER_LINES", 20)
    folder = a_run(tmp_path / "a", experts=4)
    lines = [json.dumps(logged(step, -float(step), 4, 0.5)) for step in range(1, 101)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read(folder, RECIPE)
    assert run.curves["neg_log_perplexity"].values.tolist() == [-float(step) for step in range(1, 101)]
    assert run.loads[LAYERS[0]].steps.tolist() == [*range(1, 101, 5)]
    assert run.notes == ()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{folder}: .*\bno run\b"):
            read(folder, {})


@pytest.mark.parametrize("text", ["[1]", "{", "", "null", "[" * 100_000])
def test_a_result_that_is_none_is_left_out(tmp_path: Path, text: str) -> None:
    folder = a_run(tmp_path / "a")
    (folder / "result.json").write_text(text)
    run = read(folder, RECIPE)
    assert not lacking(run.notes[0], f"{folder}/result.json JSON left out")
    assert run.step == 100


@pytest.mark.parametrize(
    "record",
    [
        {"step": "x", HELD_OUT: 1.0},
        {"step": 110, HELD_OUT: "x", "layers": [1], "texts": 3},
        {"step": 110, "layers": {"a": 1, "b": {"load": "x", "entropy": None}}},
        {"step": 110, "layers": {LAYERS[0]: {"load": [1, 2, 3], "entropy": 1.0}}},
        {"step": 110, HELD_OUT: None},
    ],
)
def test_figures_of_another_kind_are_passed_over(tmp_path: Path, record: dict[str, object]) -> None:
    folder = a_run(tmp_path / "a", experts=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    run = read(folder, {"train": 3})
    assert run.curves[HELD_OUT].values[-1] == -3.0
    assert run.steps is None


def test_a_damaged_file_is_told_of_once(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{\n" * 500 + json.dumps({"step": -1}) + "\n" + json.dumps({"step": 110, HELD_OUT: np.nan}) + "\n")
    (note,) = read(folder, RECIPE).notes
    file, rest = note.split("metrics.jsonl: ")
    assert file == f"{folder}/"
    whole, step, finite = rest.split(";")
    assert not lacking(whole, "22 whole 499")
    assert not lacking(step, "522 step")
    assert not lacking(finite, f"523 {HELD_OUT} finite")


@pytest.mark.parametrize("name", ["result.json", "tokenizer.json"])
def test_a_file_of_terabytes_is_not_read_to_its_end(tmp_path: Path, name: str) -> None:
    folder = a_run(tmp_path / "a", experts=2)
    (folder / "tokenizer.json").touch()
    with (folder / name).open("r+b") as file:
        file.truncate(200 << 30)  # a sparse file: it takes no room
    run = read(folder, RECIPE)
    assert run.curves.keys() == read(a_run(tmp_path / "b", experts=2), RECIPE).curves.keys()
    assert name == "tokenizer.json" or not lacking("\n".join(run.notes), f"{folder}/{name}")
