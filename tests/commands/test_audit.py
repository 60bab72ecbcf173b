"""`switchcli audit`: an honest run is equal to the bit; what was tampered with in a repeated segment is found."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import lacking
from safetensors.torch import load_file, save_file
from shared_runs import made_once
from shared_runs import switchcli as run_switchcli
from tiny_checkpoint import reseal
from tiny_run import RECIPE, SwitchCLI, lay_out_tuning, records, write_text

KEPT = ("train.steps=6", "log.every_steps=1", "eval.every_steps=2", "checkpoint.save_every_steps=2")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run on it of six steps, which kept the checkpoints of steps 2, 4 and 6."""

    def train(folder: Path) -> None:
        with chdir(folder):
            write_text(Path("text.txt"))
            Path("tiny.yaml").write_text(RECIPE)
            run_switchcli("pretrain", "tiny.yaml", *KEPT, "checkpoint.keep_last=3", "--out", "run")

    return made_once(tmp_path_factory, "audited", train)


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which the test may change."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def audited(switchcli: SwitchCLI, *words: str, code: int = 0) -> dict[str, Any]:
    done = switchcli("audit", "run", "--json", *words)
    assert done.code == code, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


@pytest.mark.parametrize("start", ["0", "2"])
def test_an_honest_run_is_equal_to_the_bit(start: str, here: Path, switchcli: SwitchCLI) -> None:
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    found = audited(switchcli, "--steps", f"{start}:4")
    assert found["segments"][0]["same_machine"]
    assert [segment["verdict"] for segment in found["segments"]] == ["equal"]
    assert found["segments"][0]["tensor_files"] > 0
    steps = [record["step"] for record in records("run")]
    assert found["segments"][0]["records"] == sum(int(start) < step <= 4 or (start, step) == ("0", 0) for step in steps)
    assert found["not_checked"] == ([[0, 2], [4, 6]] if start == "2" else [[4, 6]])
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.integration
def test_segments_are_drawn_among_the_checkpoints(here: Path, switchcli: SwitchCLI) -> None:
    every = audited(switchcli)
    assert [segment["segment"] for segment in every["segments"]] == [[2, 4], [4, 6]]
    assert every["not_checked"] == [[0, 2]]
    one = [audited(switchcli, "--segments", "1", "--seed", str(seed))["segments"] for seed in range(4)]
    draws = {tuple(segment["segment"]) for (segment,) in one}
    assert draws == {(2, 4), (4, 6)}


def another_digit(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = next(line for line in lines if line["step"] == 3 and "loss" in line)
    record["loss"] += 1e-12
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_missing_record(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] != 3))


def another_weight(run: Path) -> None:
    path = run / "checkpoints/step-00000004"
    file = next(path.glob("model-*.safetensors"))
    tensors = load_file(file)
    tensors["embedding"][0, 0] = torch.nextafter(tensors["embedding"][0, 0], torch.tensor(1.0))
    save_file(tensors, file)
    reseal(path)


def another_recipe(run: Path) -> None:
    path = run / "checkpoints/step-00000004"
    text = (path / "recipe.yaml").read_text()
    assert "seed: 0" in text
    (path / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    reseal(path)


def other_data(run: Path) -> None:
    text = run.parent / "text.txt"
    text.write_text(text.read_text().replace("alpha", "gamma", 1))


def an_optimizer_that_forgot(run: Path) -> None:
    path = run / "checkpoints/step-00000004"
    file = next(path.glob("optimizer-*.safetensors"))
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    reseal(path)


TAMPERING: dict[Callable[[Path], None], str] = {
    another_digit: "step 3 loss",
    a_missing_record: "step 3",
    another_weight: "step 4 model",
    another_recipe: "train.seed",
    other_data: "text",
    an_optimizer_that_forgot: "step 4 optimizer",
}


@pytest.mark.unit("another_digit")
@pytest.mark.parametrize("tamper", TAMPERING)
def test_tampering_is_found_in_a_repeated_segment(
    tamper: Callable[[Path], None], here: Path, switchcli: SwitchCLI
) -> None:
    tamper(Path("run"))
    found = audited(switchcli, "--steps", "2:4", code=1)
    assert found["segments"][0]["verdict"] == "differs"
    assert not lacking(found["segments"][0]["difference"], TAMPERING[tamper])
    assert not found["sound"]
    done = switchcli("audit", "run", "--steps", "2:4")
    assert done.code == 1
    for line in ("2 4 differs", "not checked 0 2 4 6"):
        assert not lacking(done.out, line)


@pytest.mark.integration
@pytest.mark.parametrize("tamper", [another_digit, a_missing_record])
def test_tampering_is_found_where_the_run_began(
    tamper: Callable[[Path], None], here: Path, switchcli: SwitchCLI
) -> None:
    tamper(Path("run"))
    found = audited(switchcli, "--steps", "0:4", code=1)
    assert not lacking(found["segments"][0]["difference"], "step 3")


@pytest.mark.integration
def test_what_lies_outside_is_said_to_be_unchecked(here: Path, switchcli: SwitchCLI) -> None:
    another_digit(Path("run"))
    found = audited(switchcli, "--steps", "4:6")
    assert found["sound"]
    assert found["not_checked"] == [[0, 4]]


@pytest.mark.integration
@pytest.mark.parametrize(("by", "verdict"), [(0.009, "close"), (0.011, "differs")])
def test_on_another_machine_losses_may_differ_a_little(
    by: float, verdict: str, here: Path, switchcli: SwitchCLI
) -> None:
    machines = machines_of(4)
    machines[0][1]["hardware"]["threads_per_rank"] += 1
    save_machines(4, machines)
    lines = records("run")
    for line in lines:
        if "loss" in line:
            line["loss"] += by
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = audited(switchcli, "--steps", "2:4", code=int(verdict == "differs"))
    (segment,) = found["segments"]
    assert (segment["same_machine"], segment["verdict"]) == (False, verdict)
    assert segment["machine_difference"] == "threads_per_rank: 2 in the run, 1 here"
    assert segment["machine_difference"] in switchcli("audit", "run", "--steps", "2:4").out


def test_a_run_that_moved_is_compared_with_the_machine_of_each_step(here: Path, switchcli: SwitchCLI) -> None:
    (begin, now), *_ = machines_of(6)
    other = {**now, "versions": {**now["versions"], "torch": "0.1"}}
    save_machines(4, [[begin, other]])
    save_machines(6, [[begin, other], [4, now]])
    found = audited(switchcli, "--segments", "2")["segments"]
    assert [(one["segment"], one["same_machine"]) for one in found] == [([2, 4], False), ([4, 6], True)]
    difference = f'torch: "0.1" in the run, "{torch.__version__}" here'
    assert [one["machine_difference"] for one in found] == [difference, None]
    save_machines(6, [[begin, now], [5, other]])
    assert [one["same_machine"] for one in audited(switchcli, "--steps", "4:6")["segments"]] == [False]


def state_file(step: int) -> Path:
    return Path(f"run/checkpoints/step-{step:08}/state.json")


def machines_of(step: int) -> list[Any]:
    machines: list[Any] = json.loads(state_file(step).read_text())["machines"]
    return machines


def save_machines(step: int, machines: list[Any]) -> None:
    state = json.loads(state_file(step).read_text())
    state_file(step).write_text(json.dumps({**state, "machines": machines}))
    reseal(state_file(step).parent)


@pytest.mark.integration
def test_without_checkpoints_the_first_steps_are_repeated(here: Path, switchcli: SwitchCLI) -> None:
    shutil.rmtree("run/checkpoints")
    found = audited(switchcli)
    assert [segment["segment"] for segment in found["segments"]] == [[0, 1]]
    assert found["segments"][0] | {"records": 0} == {
        **{"segment": [0, 1], "verdict": "equal", "records": 0, "tensor_files": 0, "difference": None},
        **{"same_machine": True, "machine_difference": None},
    }
    assert found["not_checked"] == [[1, 6]]


@pytest.mark.integration
def test_a_run_of_ranks_is_repeated_by_one_process(here: Path, switchcli: SwitchCLI) -> None:
    """With the microbatches of the ranks, which seed dropout, losses are equal but for rounding."""
    command = [sys.executable, "-m", "switchcli", "pretrain", "tiny.yaml", *KEPT, "checkpoint.keep_last=3"]
    for name, key in (("two", "parallel.expert=2"), ("unknown", "train.microbatch_tokens=null")):
        subprocess.run([*command, key, "--processes", "2", "-q", "--out", name], check=True, capture_output=True)
    done = switchcli("audit", "two", "--json", "--steps", "2:4")
    assert done.code == 0, done.err
    assert json.loads(done.out)["segments"][0]["verdict"] == "close"
    refused = switchcli("audit", "unknown", "--steps", "2:4")
    assert (refused.code, lacking(refused.err, "unknown 2 ranks train.microbatch_tokens")) == (2, [])


@pytest.mark.integration
def test_no_segment_crosses_the_step_at_which_a_run_was_extended(here: Path, switchcli: SwitchCLI) -> None:
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_steps=[5,8]")
    assert switchcli("pretrain", "tiny.yaml", *KEPT, *keep, "--out", "more", "-q").code == 0
    assert switchcli("pretrain", "tiny.yaml", *KEPT, *keep, "train.steps=10", "--out", "more", "-q").code == 0
    found = json.loads(switchcli("audit", "more", "--json").out)
    assert [segment["segment"] for segment in found["segments"]] == [[8, 10]]
    assert found["sound"]
    for end in (7, 8):
        refused = switchcli("audit", "more", "--steps", f"5:{end}")
        assert (refused.code, lacking(refused.err, f"--steps 5:{end} train.steps")) == (2, [])
    assert json.loads(switchcli("audit", "more", "--json", "--steps", "8:9").out)["sound"]


@pytest.mark.integration
def test_the_beginning_of_an_extended_run_had_other_rates_than_its_recipe_gives(
    here: Path, switchcli: SwitchCLI
) -> None:
    cosine = ("schedule={kind: cosine, learning_rate: 0.01, warmup_steps: 1}", "checkpoint.keep_last=1")
    for steps in (6, 40):
        assert (
            switchcli("pretrain", "tiny.yaml", *KEPT, *cosine, f"train.steps={steps}", "--out", "more", "-q").code == 0
        )
    done = switchcli("audit", "more", "--steps", "0:4", "--json")
    (segment,) = json.loads(done.out)["segments"]
    assert (done.code, segment["verdict"]) == (1, "differs")
    assert not lacking(segment["difference"], "step 3 learning_rate extended")


@pytest.mark.integration
def test_a_branch_is_repeated_from_where_it_began(here: Path, switchcli: SwitchCLI) -> None:
    words = ("--branch-from", "run", "--out", "branch", "-q")
    done = switchcli("pretrain", "tiny.yaml", *KEPT, "train.steps=9", *words)
    assert done.code == 0, done.err
    found = json.loads(switchcli("audit", "branch", "--json", "--steps", "6:7").out)
    assert [(one["segment"], one["verdict"]) for one in found["segments"]] == [([6, 7], "equal")]
    assert (found["not_checked"], found["sound"]) == ([[7, 9]], True)
    refused = switchcli("audit", "branch", "--steps", "0:7")
    assert (refused.code, lacking(refused.err, "--steps 0 6 8")) == (2, [])
    first, *_ = Path("branch/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("branch/metrics.jsonl").write_text(first)
    for folder in Path("branch/checkpoints").glob("step-*[!6]"):
        shutil.rmtree(folder)
    begun = switchcli("audit", "branch")
    assert (begun.code, lacking(begun.err, "branch step 6 nothing")) == (4, [])


@pytest.mark.integration
def test_a_run_that_keeps_the_best_scores_is_repeated_too(here: Path, switchcli: SwitchCLI) -> None:
    recipe = lay_out_tuning(here)
    keys = ("train.steps=8", "checkpoint.save_every_steps=4", "log.every_steps=1")
    done = switchcli("finetune", recipe, "--model", "run", "start.keep=weights", *keys, "--out", "tuned", "-q")
    assert done.code == 0, done.err
    found = json.loads(switchcli("audit", "tuned", "--json", "--steps", "4:8").out)
    assert [(one["segment"], one["verdict"]) for one in found["segments"]] == [([4, 8], "equal")]


@pytest.mark.integration
def test_without_checkpoints_and_a_result_the_machine_is_unknown(here: Path, switchcli: SwitchCLI) -> None:
    Path("run/result.json").unlink()
    shutil.rmtree("run/checkpoints")
    found = audited(switchcli)
    assert (found["segments"][0]["verdict"], found["segments"][0]["same_machine"]) == ("equal", None)


def test_a_run_that_has_taken_no_step_is_not_called_equal(here: Path, switchcli: SwitchCLI) -> None:
    shutil.rmtree("run/checkpoints")
    first, *_ = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text(first)
    for words in ((), ("--steps", "0:1")):
        done = switchcli("audit", "run", "--json", *words)
        assert (done.code, lacking(done.err, "run step 0 nothing")) == (4, [])


def test_a_signal_ends_an_audit_that_has_no_part_to_keep(
    here: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.system.signals.StopRequest.__enter__", lambda self: self.request() or self)
    done = switchcli("audit", "run", "--steps", "2:4")
    assert (done.code, lacking(done.err, "segment nothing")) == (130, []), done.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("nowhere", 4, "nowhere run"),
        ("run --steps 1:4", 2, "--steps 1 0 2 4"),
        ("run --steps 2:7", 2, "--steps 2 6"),
        ("run --steps 4:4", 2, "--steps 4 6"),
        ("run --steps 2-4", 2, "--steps A:B"),
    ],
)
def test_bad_input_is_told_with_its_fix(words: str, code: int, told: str, here: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("audit", *words.split())
    assert (done.code, lacking(done.err, told)) == (code, []), done.err
