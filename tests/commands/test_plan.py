"""`switchcli plan`: for people, for scripts; and what it refuses."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from messages import lacking
from terminal import switchcli_in_terminal
from tiny_run import SwitchCLI

from switchcli.plan.recipe_plan import plan_recipe
from switchcli.planner.devices import GPUS, RESERVED_FRACTION, UTILIZATION
from switchcli.planner.meshes import Machine
from switchcli.recipe.sizes import SIZES


def planned(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli("plan", *arguments, "--json")
    found: dict[str, Any] = json.loads(done.out)
    fits = found["fits"] if "fits" in found else [row for row in found["sizes"] if row["fits"]]
    assert done.code == (0 if fits else 1)
    assert done.err == "" or re.fullmatch("planning: .*\n", done.err)  # progress, where it takes more than a second
    return found


def test_a_size_in_the_papers_batch(switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "switch-base-128", "--devices", 32, "--memory", "40GiB")
    assert (found["parameters"], found["sequences_per_step"]) == (7_415_217_408, 2048)
    assert (found["inputs_length"], found["targets_length"]) == (512, 114)
    assert found["flops_per_step"] == 3 * 2048 * found["flops_per_sequence"]
    assert found["machine"]["memory_bytes"] == 40 * 2**30
    assert found["machine"]["usable_bytes"] == 36 * 2**30
    best = found["fits"][0]
    assert best["data"] * best["model"] == 32
    assert best["bytes"]["total"] == sum(size for name, size in best["bytes"].items() if name != "total")
    assert best["bytes"]["total"] <= 36 * 2**30
    assert (found["step_seconds"], found["days"]) == (None, None), "the rates of unnamed devices are not known"
    assert {one["kind"] for one in found["refused"]} <= {"rule", "batch", "memory"}


def test_a_recipe_with_keys(recipe: str, switchcli: SwitchCLI) -> None:
    found = planned(switchcli, recipe, "train.batch_tokens=512", "--devices", 2)
    assert (found["sequences_per_step"], found["inputs_length"]) == (16, 32)
    assert {fit["microbatch_tokens"] for fit in found["fits"]} == {128}  # the recipe's
    reasons = {one["reason"] for one in found["refused"]}
    assert not reasons


def test_what_people_see(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("plan", recipe, "--devices", 4)
    assert (done.code, done.err) == (0, "")
    for words in ("Meshes", "buffers", "parameters"):
        assert not lacking(done.out, words)
    full = switchcli("plan", recipe, "--devices", 1, "--memory", "1MB")
    assert full.code == 1, "for a script: nothing fits"
    assert "Meshes" not in full.out
    assert "Refused" in full.out
    assert not lacking(full.out, "GiB device")


def test_muon_is_counted_and_too_much_of_it_is_warned_of(recipe: str, switchcli: SwitchCLI) -> None:
    muon = ("quickstart/switch", "optimizer.kind=muon", "--devices", 1)
    plain, enough, few = (switchcli("plan", *muon, f"train.batch_tokens={size}") for size in (8192, 4096, 2048))
    assert (plain.err, enough.err) == ("", "")  # 0.23 and 0.47 of an expert's training
    assert not lacking(plain.out, "FLOPs optimizer")
    assert not lacking(few.err, "warning 0.938 train.batch_tokens 2,048 3,840 optimizer.kind=adamw")
    found = json.loads(switchcli("plan", *muon, "--json").out)
    # Products of d = 64 with d_ff = 256, or among the four of an attention: 5 (4 d^2 f + 2 d^3) each.
    assert found["optimizer_flops_per_step"] == 5 * (4 * 8 * 2 * (4 * 64**2 * 256 + 2 * 64**3) + 6 * 4 * 6 * 64**3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("switch-cc", "--devices", 2), "switch-cc size recipe switch-c"),
        (("none.yaml", "--devices", 2), "none.yaml switchcli recipes list"),
        (("quickstart/switch", "parallel.expert=8", "--devices", 4), "parallel.expert 8 ranks 4"),
        (("tiny", "--devices", 2, "--memory", "much"), "--memory 'much' size 80GiB"),
        (("tiny", "--devices", 2, "--memory", "80"), "--memory '80' size 80GiB"),
        (("tiny", "--devices", 2, "--memory=-1GiB"), "--memory '-1GiB' size 80GiB"),
        (("tiny", "--gpu", "h10"), "--gpu 'h10' h100 rtx-4090"),
        (("tiny", "--gpu", "a100"), "--gpu 'a100' a100-40gb a100-80gb"),
        (("--gpu", "toaster"), "--gpu 'toaster' mi300x --memory"),
        (("model.size=tiny", "--gpu", "h100"), "model.size argument"),
        (("train.step=3",), "train.step steps"),
        (("parallel.data=3",), "parallel.data 3 ranks 8"),
        (("tiny", "train.batch_tokens=100", "--devices", 2), "train.batch_tokens 100 512"),
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
    every = planned(switchcli, "switch-base-8", "parallel=auto", "--devices", 8)
    assert every["fits"] == planned(switchcli, "switch-base-8", "--devices", 8)["fits"]


def test_a_recipe_whose_model_is_a_checkpoints(tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("plan", tuning, "--devices", 2)
    assert done.code == 2
    assert not lacking(done.err, f"{tuning} model checkpoint's model.size=NAME")
    found = planned(switchcli, tuning, "model.size=switch-tiny-8", "--devices", 2)
    assert found["inputs_length"] == 64


def test_a_known_device(switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "switch-base-8", "--gpu", "H100")
    machine, h100 = found["machine"], GPUS["h100"]
    assert machine["devices"] == 8, "a node, by default"
    assert machine["gpu"] == "h100"
    assert machine["memory_bytes"] == h100.memory_mib * 2**20
    assert machine["usable_bytes"] == int((1 - RESERVED_FRACTION) * machine["memory_bytes"])
    assert machine["flops"] == UTILIZATION * h100.flops
    assert machine["utilization"] == UTILIZATION
    assert "measur" in found["times"]
    assert found["step_seconds"] == pytest.approx(found["flops_per_step"] / (8 * machine["flops"]))
    assert all(fit["bytes"]["total"] <= machine["usable_bytes"] for fit in found["fits"])


def test_the_memory_of_an_option_wins_over_that_of_the_device(switchcli: SwitchCLI) -> None:
    machine = planned(switchcli, "tiny", "--gpu", "h100", "--memory", "40GiB")["machine"]
    assert (machine["memory_bytes"], machine["gpu"]) == (40 * 2**30, "h100")


def test_days(recipe: str, switchcli: SwitchCLI) -> None:
    found = planned(switchcli, recipe, "train.steps=1000", "--gpu", "l4", "--devices", 2)
    assert found["days"] == pytest.approx(1000 * found["step_seconds"] / 86400)
    shown = switchcli("plan", recipe, "train.steps=1000", "--gpu", "l4", "--devices", 2).out
    for words in ("days 1,000", "2 l4", "not measured GPU"):
        assert not lacking(shown, words), words


def test_a_size_has_the_steps_of_the_recipe_for_sizes(switchcli: SwitchCLI) -> None:
    own = planned(switchcli, "t5-small", "--devices", 2)
    base = planned(switchcli, "pretrain/base", "train.microbatch_tokens=null", "--devices", 2)
    assert own["overrides"][0] == "model.size=t5-small"
    same = {"name": "", "overrides": []}
    assert own | same == base | same


@pytest.mark.parametrize("what", [("switch-xxl",), ()])
def test_without_a_fit_the_exit_code_is_1_and_scripts_get_the_plan(
    what: tuple[str, ...], few_sizes: list[str], switchcli: SwitchCLI
) -> None:
    done = switchcli("plan", *what, "--devices", 1, "--memory", "1MB", "--json")
    assert done.code == 1
    assert done.err == "" or re.fullmatch("planning: .*\n", done.err)
    found = json.loads(done.out)
    assert [row["fits"] for row in found.get("sizes", ())] == ([] if what else [[]] * len(few_sizes))
    assert found.get("fits", []) == []


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sizes that fit on one small device, on eight, and only on more than eight. Returns them by their parameters."""
    names = ["switch-xxl", "switch-base-64", "tiny"]
    monkeypatch.setattr("switchcli.plan.recipe_plan.SIZES", {name: SIZES[name] for name in names})
    return names[::-1]


@pytest.mark.integration
def test_every_size(few_sizes: list[str], switchcli: SwitchCLI) -> None:
    found = planned(switchcli, "--gpu", "l4", "--devices", 8)
    rows = found["sizes"]
    assert [row["name"] for row in rows] == few_sizes
    assert [bool(row["fits"]) for row in rows] == [True, True, False]
    assert rows[0]["devices_needed"] == 1 < rows[1]["devices_needed"] <= 8 < rows[2]["devices_needed"]
    for row in rows[:2]:
        assert row["days"] == pytest.approx(row["steps"] * row["step_seconds"] / 86400)
        check_overrides(row, "l4", 8)
    assert rows[2]["overrides"] == []
    for devices in (rows[2]["devices_needed"], rows[2]["devices_needed"] // 2):
        fits = planned(switchcli, "switch-xxl", "--gpu", "l4", "--devices", devices)["fits"]
        assert bool(fits) == (devices == rows[2]["devices_needed"])


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("parallel.auto=true",),
        ("parallel.shard=zero3",),
    ],
)
def test_the_keys_of_one_recipe_give_its_first_mesh(keys: tuple[str, ...], switchcli: SwitchCLI) -> None:
    recipe, devices = "quickstart/switch", ("--gpu", "l4", "--devices", 4)
    found = planned(switchcli, recipe, *keys, *devices)
    assert found["devices_needed"] == 1
    again = planned(switchcli, recipe, *found["overrides"], *devices)
    assert again["fits"] == found["fits"][:1]
    shown = switchcli("plan", recipe, *keys, *devices).out
    (line,) = re.findall("^.*parallel.data=.*$", shown, re.MULTILINE)
    assert shlex.split(line) == found["overrides"]


def test_a_batch_that_the_devices_cannot_share(few_sizes: list[str], switchcli: SwitchCLI) -> None:
    none = switchcli("plan", "--devices", 12)
    assert not lacking(none.out, "train.batch_tokens 12 ranks")
    assert none.code == 1


def check_overrides(row: dict[str, Any], gpu: str, devices: int) -> None:
    """Check that the keys of a size, pasted behind any recipe, give its mesh and its numbers."""
    vocab_size = plan_recipe(row["name"], [], Machine.of_gpu(devices, gpu)).recipe.model.vocab_size
    own = [*row["overrides"], f"model.vocab_size={vocab_size}"]  # where the tokenizer of the recipe is another one
    for recipe, keys in (("pretrain/base", row["overrides"]), ("quickstart/switch", own), ("pretrain/local", own)):
        plan = plan_recipe(recipe, keys, Machine.of_gpu(devices, gpu))
        assert plan.to_json()["fits"] == row["fits"][:1], recipe


def test_what_people_see_of_every_size(few_sizes: list[str], switchcli: SwitchCLI) -> None:
    done = switchcli("plan", "--gpu", "l4", "--devices", 8)
    assert done.code == 0
    assert done.err == "" or re.fullmatch("planning: .*\n", done.err)
    for words in ("tiny 1 8 x 1", "switch-base-64", "switch-xxl 201G -", "8 l4", "switchcli plan SIZE"):
        assert not lacking(done.out, words), words


@pytest.mark.integration
def test_a_terminal_breaks_no_line_of_keys_to_paste(tmp_path: Path) -> None:
    shown = switchcli_in_terminal(["plan", "tiny", "--gpu", "l4"], 40, tmp_path)
    (line,) = re.findall(r"^model\.size=tiny .*$", shown.text.replace("\r", ""), re.MULTILINE)
    assert len(line) > 40
    assert switchcli_in_terminal(["plan", "tiny", "--gpu", "l4"], 80, tmp_path).text.count("\n") < 40, "tables"
