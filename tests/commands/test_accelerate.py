"""Commands under `accelerate launch`: the recipe decides, one line says so, and ranks are found or asked for."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from messages import lacking
from tiny_run import SwitchCLI

NO_TEXT = "data.corpora=[{kind: files, paths: [none.txt]}]"
"""Ends a run soon after its ranks have met."""
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}
"""What `accelerate launch --cpu` sets where no option asks for more."""
DOCUMENTED = {
    "one process": ("--num_processes 1", "", 1),
    "several processes": ("--multi_gpu --num_processes 2", "", 2),
    "two processes on the CPU": ("--cpu --num_processes 1", "--processes 2", 2),
}
"""Options of `accelerate launch`, options of switchcli, and the ranks that come of them."""


def warnings(
    switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch, recipe: str, environment: Mapping[str, str], *keys: str
) -> list[str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = switchcli("pretrain", recipe, NO_TEXT, *keys, "--quiet", "--json")
    assert (done.code, json.loads(done.out)["exit_code"]) == (3, 3)
    return [line for line in done.err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("environment", "keys", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "bf16 train.precision"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "ACCELERATE_USE_FSDP parallel.shard"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "ACCELERATE_USE_DEEPSPEED parallel.shard"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, [], "4 train.microbatch_tokens"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, [], "1.0 train.clip_norm"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "INDUCTOR train.compile"),
    ],
)
def test_what_accelerate_asks_for_and_the_recipe_does_not_is_said_in_one_line(
    environment: dict[str, str],
    keys: list[str],
    words: str,
    recipe: str,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (line,) = warnings(switchcli, monkeypatch, recipe, LAUNCHED | environment, *keys)
    assert not lacking(line, words), line


@pytest.mark.parametrize(
    ("environment", "keys"),
    [
        ({}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["train.precision=selective"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["parallel.shard=zero3"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, []),
    ],
)
def test_settings_that_agree_with_the_recipe_are_not_mentioned(
    environment: dict[str, str],
    keys: list[str],
    recipe: str,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not warnings(switchcli, monkeypatch, recipe, LAUNCHED | environment, *keys)


def test_one_process_of_several_is_told_how_to_get_the_others(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert not warnings(switchcli, monkeypatch, recipe, meeting)  # as a cluster may set them, without accelerate
    (line,) = warnings(switchcli, monkeypatch, recipe, LAUNCHED | meeting)
    assert not lacking(line, "--processes --multi_gpu --num_processes"), line


def test_an_evaluation_names_its_own_keys(
    trained: Path, tmp_path: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = switchcli("eval", trained, "--out", "evaluated", "--json")
    assert (done.code, type(json.loads(done.out))) == (0, dict)
    assert [lacking(line, "bf16 precision") for line in done.err.splitlines() if "warning" in line] == [[]]


def launched(options: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "-m", "switchcli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name == "one process")) for name in DOCUMENTED]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_documented_command_starts_its_ranks(name: str, device: str, recipe: str) -> None:
    options, ours, ranks = DOCUMENTED[name]
    if device == "cuda" and ("--cpu" in options or torch.cuda.device_count() < ranks):
        pytest.skip(f"needs {ranks} CUDA devices, for a command that uses them")
    assert f"accelerate launch {options} -m switchcli pretrain mine.yaml {ours}".strip() in PAGE
    arguments = ("pretrain", recipe, f"train.device={device}", "--out", "run", "--json", *ours.split())
    done = launched(options, *arguments)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["hardware"]["ranks"], "warning: accelerate" in done.stderr) == (ranks, False)


PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "many-gpus.md").read_text(encoding="utf-8")


@pytest.mark.integration
def test_the_launcher_and_its_configuration_file_do_not_change_a_run(recipe: str) -> None:
    Path("accelerate.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: FSDP, fsdp_config: {fsdp_version: 2}, "
        "mixed_precision: bf16, num_machines: 1, num_processes: 2, main_process_port: 0}"
    )
    done = launched("--config_file accelerate.yaml", "pretrain", recipe, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"]["ranks"] == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: accelerate")]
    assert not lacking(line, "bf16 train.precision ACCELERATE_USE_FSDP=true parallel.shard")
