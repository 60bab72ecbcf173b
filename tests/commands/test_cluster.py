"""Several machines: torchrun's agents, each with ranks of its own, and SLURM's tasks, played by processes here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from drill import kill_one
from messages import lacking
from ranks import free_port

CLUSTER = Path(__file__).parents[2] / "scripts" / "cluster"
KEYS = ("train.steps=4", "train.batch_tokens=512", "parallel.expert=4", "-q", "--out", "run")
SRUN = """\
import os, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [
    subprocess.Popen(sys.argv[2:], env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2),
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost,elsewhere"})
    for rank in range(4)
]
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def job(recipe: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a job: `srun` starts four tasks of this machine, `scontrol` writes down what it is told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun.py").write_text(SRUN)
    (tools / "srun").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tools}/srun.py" "$@"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >>scontrol.log\n')
    (tools / "switchcli").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m switchcli "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "MASTER_PORT": str(free_port())}


def figure() -> float:
    return json.loads(Path("run/result.json").read_text())["held_out/neg_log_perplexity"]


def two_machines(*arguments: str) -> list["subprocess.Popen[str]"]:
    """Two agents of two ranks each."""
    machine = {"PYTHON": sys.executable, "HEAD": "localhost", "PORT": str(free_port()), "NODES": "2", "RANKS": "2"}
    command = [CLUSTER / "torchrun", *arguments]
    environment = {**os.environ, **machine}
    return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]


@pytest.mark.slow
def test_two_machines_of_two_ranks_by_torchrun(recipe: str) -> None:
    machines = two_machines("pretrain", recipe, *KEYS)
    said = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    result = json.loads(Path("run/result.json").read_text())
    assert (result["hardware"]["ranks"], result["step"]) == (4, 4)
    alone = [sys.executable, "-m", "switchcli", "pretrain", recipe, *KEYS[:2], "-q", "--out", "alone", "--json"]
    done = json.loads(subprocess.run(alone, check=True, capture_output=True, timeout=120).stdout)
    assert figure() == pytest.approx(done["held_out/neg_log_perplexity"], abs=1e-5)


@pytest.mark.slow
def test_a_rank_that_dies_on_one_of_two_machines_and_all_start_again(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keys = (*KEYS[:-1], run, "train.steps=24", "checkpoint.save_every_steps=4")
    machines = two_machines("pretrain", recipe, *keys)
    kill_one(run, machines[0])
    said = [machine.communicate(timeout=150)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert json.loads(Path("run/result.json").read_text())["step"] == 24


@pytest.mark.slow
def test_tasks_of_slurm_train_together_and_a_failure_ends_the_job(recipe: str, job: dict[str, str]) -> None:
    command = [CLUSTER / "slurm", "pretrain", recipe, *KEYS]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("run/result.json").read_text())["hardware"]["ranks"] == 4
    assert not Path("scontrol.log").exists()
    refused = subprocess.run(
        [*command, "train.seed=9"], env=job, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 2
    assert not lacking(refused.stderr, "error: run train.seed 0 9 --out --no-resume")


@pytest.mark.slow
def test_a_job_whose_time_is_over_saves_and_goes_back_into_the_queue(recipe: str, job: dict[str, str]) -> None:
    command = [CLUSTER / "slurm", "pretrain", recipe, *KEYS, "train.steps=100000", "checkpoint.save_every_steps=5"]
    process = subprocess.Popen(command, env=job, stderr=subprocess.PIPE, text=True)
    while not list(Path("run").glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for task in Path("tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert Path("scontrol.log").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("restarts", "code"), [("2", 0), ("3", 75)])
def test_a_job_that_is_stopped_as_soon_as_it_begins_does_not_come_back_for_ever(
    job: dict[str, str], tmp_path: Path, restarts: str, code: int
) -> None:
    """As one that is stopped because a rank fails on another machine."""
    stopped = tmp_path / "stopped"
    stopped.write_text("#!/bin/sh\nexit 75\n")
    stopped.chmod(0o755)
    environment = {**job, "SWITCHCLI": str(stopped), "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run([CLUSTER / "slurm"], env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, Path("scontrol.log").exists()) == (code, code == 0)


def test_the_skypilot_file_is_yaml_and_runs_what_is_here() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert "scripts/cluster/torchrun $ARGUMENTS" in task["run"]
    assert task["envs"]["ARGUMENTS"].split()[0] == "pretrain"


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_prepare_a_share_each(recipe: str, job: dict[str, str], tmp_path: Path) -> None:
    corpora = ", ".join("{kind: files, paths: [text.txt], sample_by: line}" for _ in range(2))
    command = [CLUSTER / "slurm-prepare", recipe, f"data.corpora=[{corpora}]", "--json"]
    array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in {"MIN": "1", "MAX": "2", "COUNT": "2"}.items()}
    array["SWITCHCLI_CACHE"] = str(tmp_path / "cache")
    whole = []
    for task in ("1", "2"):
        environment = {**job, **array, "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        whole.append(json.loads(done.stdout)["whole"])
    assert whole == [False, True]
    odd = {"SLURM_ARRAY_TASK_MAX": "3"}  # --array 1,3 or 1-3:2
    for change in ({"SWITCHCLI_CACHE": ""}, {"SLURM_ARRAY_TASK_MIN": "0"}, odd):
        environment = {**job, **array, "SLURM_ARRAY_TASK_ID": "1", **change}
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0
