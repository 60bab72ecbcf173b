"""`switchcli prune`: fewer experts, measured before and after on the same text or tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import NoWarnings
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.runs.inputs.loading import load_checkpoint

LAYERS = ["encoder.blocks.1.feed_forward", "decoder.blocks.1.feed_forward"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result_of(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli("prune", *arguments, "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def test_what_it_says_is_what_eval_finds(trained: Path, switchcli: SwitchCLI) -> None:
    result = result_of(switchcli, trained, "small", "--experts", 2, "text.sequences=8")
    assert result["capacity"] == "dropless"
    assert result["experts"] == {"before": 4, "after": 2}
    assert result["held_out"]["text"].keys() == {"sequences", "before", "after", "bits_per_byte"}
    assert result["bytes"] == {when: 4 * number for when, number in result["parameters"].items()}
    whole, small = (load_checkpoint(path, torch.device("cpu"), NoWarnings()) for path in (trained, Path("small")))
    for when, one in (("before", whole), ("after", small)):
        assert result["parameters"][when] == sum(weight.numel() for weight in one.model.parameters())
    assert list(result["layers"]) == LAYERS
    for name, layer in result["layers"].items():
        assert 0.25 < layer["wo"] < 1
        gone = [load for expert, load in enumerate(layer["load"]) if expert not in layer["kept"]]
        assert layer["lost_fraction"] == pytest.approx(sum(gone) / sum(layer["load"]))
        rows_ED = whole.model.get_parameter(f"{name}.layer.router.weight")
        assert torch.equal(small.model.get_parameter(f"{name}.layer.router.weight"), rows_ED[layer["kept"]])
    done = switchcli("eval", "small", "eval.capacity=[dropless]", "text.sequences=8", "--json")
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["passes"]
    assert one["held_out"]["text"]["neg_log_perplexity"] == pytest.approx(result["held_out"]["text"]["after"], rel=1e-6)


@pytest.mark.integration
def test_a_fine_tuned_run_on_its_tasks(tuned: Path, switchcli: SwitchCLI) -> None:
    result = result_of(switchcli, tuned, "small", "--experts", 2, "eval.capacity=[paper]", "scoring.examples=3")
    assert {name: task["sequences"] for name, task in result["held_out"].items()} == {"colour": 3, "last": 3}
    assert result["capacity"] == "paper"
    assert switchcli("generate", "small", "which colour: red").code == 0


@pytest.mark.integration
def test_a_switch_folder_in_the_hugging_face_layout(trained: Path, text: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "huggingface", "--quiet").code == 0
    alone = switchcli("prune", "theirs", "small", "--experts", 2)
    assert (alone.code, lacking(alone.err, "theirs tasks=[rte] text.corpora=[...]")) == (2, [])
    corpus = f"text.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]"
    result = result_of(
        switchcli, "theirs", "small", "--experts", 2, corpus, "text.held_out_fraction=0.5", "text.sequences=1"
    )
    assert (
        result["experts"]["after"]
        == load_checkpoint(Path("small"), torch.device("cpu"), NoWarnings()).handle.spec.num_experts
    )
    assert result["next"] == "pretrain (or finetune) RECIPE --model small start.keep=weights --out FOLDER"
    assert not Path("small/recipe.yaml").exists()


@pytest.mark.unit("keys0")
@pytest.mark.parametrize(
    "keys",
    [
        ["model.sparse=both", "model.router.kind=top_k"],
        ["model.sparse=attention", "model.router.kind=no_token_left_behind"],
        ["model.router.kind=expert_choice", "model.decoder_router.kind=switch"],
    ],
)
def test_every_kind_of_layer_and_router(keys: list[str], recipe: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", recipe, "train.steps=1", *keys, "--out", "run", "--quiet").code == 0
    done = switchcli("prune", "run", "small", "--experts", 2, "text.sequences=4", "--json")
    assert done.code == 0, done.err
    assert (not lacking(done.err, "warning: expert_choice load")) == ("expert_choice" in keys[0])
    assert len(json.loads(done.out)["layers"]) == (4 if "both" in keys[0] else 2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--experts", "4"], 2, "--experts 4 2"),
        (["--experts", "5"], 2, "--experts 5 4 2"),
        (["--experts", "1"], 2, "--experts 1 2 switchcli distill"),
        (["--experts", "2", "eval.capacity=[paper, dropless]"], 2, "eval.capacity paper dropless one"),
        (["--experts", "2", "text.sequnces=3"], 2, "text.sequnces sequences"),
        ([], 2, "--experts"),
    ],
)
def test_refused(arguments: list[str], code: int, words: str, trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("prune", trained, "small", *arguments)
    assert (done.code, lacking(done.err, words)) == (code, []), done.err
    assert not Path("small").exists()


@pytest.mark.integration
def test_a_dense_model_and_too_few_experts_for_the_router(dense: Path, recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("prune", dense, "small", "--experts", 2)
    assert (done.code, lacking(done.err, "dense experts sparse")) == (4, []), done.err
    keys = ("model.router={kind: top_k, k: 3}", "train.steps=1")
    assert switchcli("pretrain", recipe, *keys, "--out", "run", "--quiet").code == 0
    done = switchcli("prune", "run", "small", "--experts", 2)
    assert (done.code, lacking(done.err, "router.k 3 num_experts 2")) == (2, []), done.err


@pytest.mark.integration
def test_a_converted_model_is_not_told_what_it_was_not_trained_on(tuned: Path, switchcli: SwitchCLI) -> None:
    """Neither the whole one nor the smaller one: how they were trained is not known."""
    assert switchcli("convert", tuned, "theirs", "--to", "huggingface", "--quiet").code == 0
    Path("mine.jsonl").write_text('{"text": "the red walk", "word": "walk"}\n' * 3)
    task = "tasks=[{kind: files, name: mine, input: '{text}', target: word, validation: [mine.jsonl]}]"
    done = switchcli("prune", "theirs", "small", "--experts", 2, task)
    assert (done.code, "warning" in done.err) == (0, False), done.err
