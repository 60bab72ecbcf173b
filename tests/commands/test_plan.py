"""`switchcli plan`: for people, for scripts, as a page; and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SwitchCLI
from messages import lacking


def planned(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli("plan", *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_a_size_in_the_papers_batch(switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "switch-base-128", "--devices", 32, "--memory", "40GiB")
    assert (found["parameters"], found["sequences_per_step"]) == (7_415_217_408, 2048)
    assert (found["inputs_length"], found["targets_length"]) == (512, 114)
    assert found["flops_per_step"] == 3 * 2048 * found["flops_per_sequence"]
    assert found["machine"]["memory_bytes"] == 40 * 2**30
    best = found["fits"][0]
    assert best["data"] * best["model"] == 32
    assert best["bytes"]["total"] == sum(size for name, size in best["bytes"].items() if name != "total")
    assert best["bytes"]["total"] <= 40 * 2**30
    assert best["seconds"]["step"] == min(fit["seconds"]["step"] for fit in found["fits"])
    assert best["bound_by"] in best["seconds"]
    calls = {call["what"]: call for call in best["collectives"]}
    assert calls["encoder tokens, there"]["kind"] == "all_to_all"
    assert {one["kind"] for one in found["refused"]} <= {"rule", "batch", "memory"}


def test_a_trillion_parameters_take_no_memory(switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "switch-c", "--devices", 2048)
    assert found["parameters"] == 1_571_308_972_448
    assert found["fits"]
    assert all(fit["bytes"]["total"] <= 80 * 2**30 for fit in found["fits"])


def test_a_recipe_with_keys(recipe: str, switchcli: SwitchCLI) -> None:
    found = planned(switchcli, recipe, "train.batch_tokens=512", "--devices", 2)
    assert (found["sequences_per_step"], found["inputs_length"]) == (16, 32)
    assert {fit["microbatch_tokens"] for fit in found["fits"]} == {128}  # the recipe's
    reasons = {one["reason"] for one in found["refused"]}
    assert not reasons


def test_blocks_that_are_computed_again(recipe: str, switchcli: SwitchCLI) -> None:
    plain, again = (
        planned(switchcli, recipe, f"train.activation_checkpointing={what}", "--devices", 2)
        for what in ("none", "blocks")
    )
    assert (plain["activation_checkpointing"], again["activation_checkpointing"]) == ("none", "blocks")
    assert again["flops_per_step"] == plain["flops_per_step"]  # the model's
    for one in plain["fits"]:
        other = next(
            fit for fit in again["fits"] if all(fit[key] == one[key] for key in ("data", "expert", "model", "shard"))
        )
        assert other["bytes"]["activations"] < one["bytes"]["activations"]
        assert other["seconds"]["compute"] > one["seconds"]["compute"]
    assert "activation checkpointing" in switchcli("plan", recipe, "--devices", 2).out


def test_what_people_see(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("plan", recipe, "--devices", 4)
    assert (done.code, done.err) == (0, "")
    for words in ("Meshes", "bound by", "Collectives data", "parameters"):
        assert not lacking(done.out, words)
    full = switchcli("plan", recipe, "--devices", 4, "--memory", "1MB")
    assert full.code == 0
    assert not lacking(full.out, "meshes fit")
    assert "Refused" in full.out
    assert not lacking(full.out, "GiB device")


def test_a_page(recipe: str, switchcli: SwitchCLI) -> None:
    assert switchcli("plan", recipe, "--devices", 2, "--html", "plan.html").code == 0
    page = Path("plan.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<table>") == page.count("</table>") == 3
    assert "script" not in page
    assert "://" not in page
    refused = switchcli("plan", recipe, "--devices", 2, "--html", "nowhere/plan.html")
    assert refused.code == 4
    assert "nowhere/plan.html" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("switch-cc", "--devices", 2), "switch-cc size recipe switch-c"),
        (("quickstart/swich", "--devices", 2), "quickstart/swich size recipe quickstart/switch"),
        (("xyzzyx", "--devices", 2), "xyzzyx size recipe switchcli recipes list"),
        (("none.yaml", "--devices", 2), "none.yaml switchcli recipes list"),
        (("quickstart/switch", "parallel.expert=8", "--devices", 4), "parallel.expert 8 ranks 4"),
        (("quickstart/switch", "parallel.data=2", "--devices", 4), "parallel.data 2 ranks 4"),
        (("tiny", "--devices", 0), "--devices 0 1"),
        (("tiny", "--devices", -3), "--devices -3 1"),
        (("tiny", "--devices", 2, "--node-devices", 0), "--node-devices 0 1"),
        (("tiny", "--devices", 2, "--memory", "much"), "--memory 'much' size 80GiB"),
        (("tiny", "--devices", 2, "--memory", "0GiB"), "--memory '0GiB' size 80GiB"),
        (("tiny", "--devices", 2, "--memory=-1GiB"), "--memory '-1GiB' size 80GiB"),
        (("tiny", "--devices", 2, "--flops", 0), "--flops 0 3e11"),
        (("tiny", "--devices", 2, "--network", "nan"), "--network nan 0"),
        (("tiny", "--devices", 2, "--bandwidth", "inf"), "--bandwidth inf 0"),
        (("tiny", "model.num_expert=3", "--devices", 2), "model.num_expert num_experts"),
        (("tiny", "train.batch_tokens=100", "--devices", 2), "train.batch_tokens 100 512"),
        (("tiny", "data.objective.inputs_length=x", "--devices", 2), "data.objective.inputs_length"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: tuple[object, ...], words: str, switchcli: SwitchCLI) -> None:
    done = switchcli("plan", *arguments)
    assert (done.code, done.out) == (2, "")
    assert not lacking(done.err, words)
    assert done.err.count("\n") == 1


def test_what_the_recipe_says_of_the_mesh_is_kept_to(switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "switch-base-8", "parallel.expert=4", "--devices", 8)
    assert {fit["expert"] for fit in found["fits"]} == {4}
    assert {refusal["expert"] for refusal in found["refused"]} <= {4}
    found = planned(switchcli, "switch-base-8", "parallel.model=2", "parallel.shard=zero3", "--devices", 8)
    assert {(fit["data"], fit["model"], fit["shard"]) for fit in found["fits"]} == {(4, 2, "zero3")}
    ordered = ("parallel.reduction=ordered", "train.microbatch_tokens=16384")
    (fit,) = planned(switchcli, "switch-base-8", *ordered, "--devices", 8)["fits"]
    assert (fit["data"], fit["expert"], fit["model"], fit["shard"]) == (8, 1, 1, "none")
    assert fit["bytes"]["gradients"] == 4 * fit["bytes"]["weights"]  # eight microbatches: sums of 4, 2 and 1, and one
    every = planned(switchcli, "switch-base-8", "parallel=auto", "--devices", 8)
    assert every["fits"] == planned(switchcli, "switch-base-8", "--devices", 8)["fits"]


def test_by_default_there_is_a_node_of_eight(switchcli: SwitchCLI) -> None:
    assert planned(switchcli, "tiny")["machine"]["devices"] == 8


def test_a_recipe_whose_model_is_a_checkpoints(tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("plan", tuning, "--devices", 2)
    assert done.code == 2
    assert not lacking(done.err, f"{tuning} model checkpoint's model.size=NAME")
    found = planned(switchcli, tuning, "model.size=switch-tiny-8", "--devices", 2)
    assert found["inputs_length"] == 64


def test_a_recipe_that_trains_nothing(switchcli: SwitchCLI, tmp_path: Path) -> None:
    file = tmp_path / "measure.yaml"
    file.write_text("verb: eval\ntasks: [rte]\n")
    done = switchcli("plan", file, "--devices", 2)
    assert done.code == 2
    assert not lacking(done.err, f"{file} switchcli eval")
