"""Several machines by torchrun, and the templates of SLURM jobs, played by processes of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from drill import kill_one
from messages import lacking
from ranks import free_port

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "recipes" / "cluster"
PAGE = (ROOT / "docs" / "how-to" / "many-gpus.md").read_text(encoding="utf-8")
KEYS = ("train.batch_tokens=512", "parallel.expert=4", "-q", "--out", "run")
SRUN = """\
import os, subprocess, sys
words = sys.argv[1:]
num_tasks = 1
if words[0].startswith("-"):
    assert words.pop(0) == "--kill-on-bad-exit=1"
    num_tasks = 4
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2),
        "SLURM_STEP_NUM_TASKS": str(num_tasks), "SLURM_STEP_NODELIST": "localhost,elsewhere"})
    for rank in range(num_tasks)
]
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SBATCH = """\
import os, subprocess, sys
first, last = map(int, sys.argv[1].removeprefix("--array=").split("-"))
for task in range(first, last + 1):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
    subprocess.run(["bash", *sys.argv[2:]], env={**os.environ, **array}, check=True)
"""

Job = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """`srun` starts one task or four on this machine, `scontrol` notes what it is told, and `sbatch` runs an array."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, program in (("srun", SRUN), ("sbatch", SBATCH)):
        (tools / f"{name}.py").write_text(program)
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tools}/{name}.py" "$@"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >>scontrol.log\n')
    (tools / "switchcli").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m switchcli "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return tools


@pytest.fixture
def job(tools: Path) -> Job:
    """A function of a command and of variables that starts the command as SLURM would."""

    def start(*command: str, **variables: str) -> "subprocess.Popen[str]":
        slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6", "MASTER_PORT": str(free_port())}
        environment = {**os.environ, **slurm, **variables, "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def run_job(*arguments: str) -> tuple[str, ...]:
    return ("bash", str(TEMPLATES / "run.sbatch"), *arguments)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Return the exit code of a job, and what it printed."""
    out, said = process.communicate(timeout=280)
    return process.returncode, out, said


def result(run: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "result.json").read_text())
    return found


def two_machines(*arguments: str) -> list["subprocess.Popen[str]"]:
    """Start the agents of two machines with two ranks each, as the page of many GPUs says."""
    options = "--rdzv-backend c10d --rdzv-id mine --max-restarts 3 -m switchcli"
    assert options in PAGE
    meeting = f"--nnodes 2 --nproc-per-node 2 --rdzv-endpoint localhost:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", *meeting.split(), *options.split(), *arguments]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]


@pytest.mark.integration
def test_two_machines_of_two_ranks_by_torchrun(recipe: str) -> None:
    machines = two_machines("pretrain", recipe, "train.steps=4", *KEYS)
    said = [machine.communicate(timeout=280)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    together = result()
    assert (together["hardware"]["ranks"], together["step"]) == (4, 4)
    alone = [sys.executable, "-m", "switchcli", "pretrain", recipe, "train.steps=4", KEYS[0], "-q", "--out", "alone"]
    subprocess.run(alone, check=True, capture_output=True, timeout=280)
    assert together["held_out/loss"] == pytest.approx(result("alone")["held_out/loss"], abs=1e-5)


@pytest.mark.integration
def test_a_rank_that_dies_on_one_of_two_machines_and_all_start_again(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keys = (*KEYS[:-1], run, "train.steps=24", "checkpoint.save_every_steps=4")
    machines = two_machines("pretrain", recipe, *keys)
    kill_one(run, machines[0])
    said = [machine.communicate(timeout=280)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert result()["step"] == 24


@pytest.mark.integration
def test_tasks_of_slurm_train_together_and_a_failure_ends_the_job(recipe: str, job: Job) -> None:
    command = run_job("pretrain", recipe, "train.steps=4", *KEYS)
    assert ended(job(*command))[0] == 0
    assert result()["hardware"]["ranks"] == 4
    code, _, said = ended(job(*command, "train.seed=9"))
    assert (code, Path("scontrol.log").exists()) == (2, False)
    assert not lacking(said, "error: run train.seed 0 9 --out --no-resume")


@pytest.mark.integration
def test_a_job_whose_time_is_over_saves_goes_back_into_the_queue_and_ends(recipe: str, job: Job) -> None:
    command = run_job("pretrain", recipe, "train.steps=60", "checkpoint.save_every_steps=5", *KEYS)
    process = job(*command)
    while not list(Path("run").glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for task in Path("tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    code, _, said = ended(process)
    assert (code, Path("scontrol.log").read_text(), Path("run/result.json").exists()) == (0, "requeue 7\n", False), said
    code, _, said = ended(job(*command, SLURM_RESTART_COUNT="1"))
    assert (code, Path("scontrol.log").read_text(), result()["step"]) == (0, "requeue 7\n", 60), said


@pytest.mark.integration
@pytest.mark.parametrize("template", ["run", "sweep"])
def test_a_job_that_cannot_be_requeued_does_not_end_well(template: str, job: Job, tools: Path) -> None:
    for tool, code in (("srun", 75), ("scontrol", 1)):
        (tools / tool).write_text(f"#!/bin/sh\nexit {code}\n")
    code, _, said = ended(job("bash", str(TEMPLATES / f"{template}.sbatch"), "pretrain", "quickstart/dense"))
    assert (code, lacking(said, "not requeued submit")) == (75, [])


@pytest.mark.integration
@pytest.mark.parametrize(("restarts", "code"), [("2", 0), ("3", 75)])
def test_a_job_that_is_stopped_as_soon_as_it_begins_does_not_come_back_for_ever(
    restarts: str, code: int, job: Job, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's ranks are stopped because one fails on another machine. A task has the processors of the job."""
    monkeypatch.chdir(tmp_path)
    (tools / "srun").write_text("#!/bin/sh\necho cpus $SRUN_CPUS_PER_TASK\nexit 75\n")
    found, out, _ = ended(job(*run_job("pretrain", "x"), SLURM_RESTART_COUNT=restarts))
    assert (found, out, Path("scontrol.log").exists()) == (code, "cpus 6\n", code == 0)


@pytest.mark.integration
def test_an_array_runs_each_line_of_a_list_on_the_ranks_of_its_node(recipe: str, job: Job, tmp_path: Path) -> None:
    """Two ranks in the place of eight. A word with a space stays one word."""
    text = (TEMPLATES / "sweep.sbatch").read_text()
    assert text.count("--processes 8 ") == 1
    (tmp_path / "sweep.sbatch").write_text(text.replace("--processes 8 ", "--processes 2 "))
    (tmp_path / "study.runs").write_text(
        f"dense  pretrain {recipe} model.num_experts=1 'description=$(touch run) it''s' train.seed=0,1\n---\n"
        f"branch pretrain {recipe} model.num_experts=1 train.steps=4 --branch-from {{out}}/dense-1\n"
    )
    code, _, said = ended(job("sbatch", "--array=1-3", "sweep.sbatch", "study.runs", "--out", "study"))
    assert (code, Path("scontrol.log").exists(), Path("run").exists()) == (0, False, False), said
    ended_runs = [result(f"study/{name}") for name in ("dense-0", "dense-1", "branch")]
    assert [(run["hardware"]["ranks"], run["step"]) for run in ended_runs] == [(2, 2), (2, 2), (2, 4)]


def test_a_stopped_task_of_an_array_goes_back_into_the_queue_alone(
    job: Job, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tools / "srun").write_text("#!/bin/sh\nexit 75\n")
    (tools / "switchcli").write_text("#!/bin/sh\necho switchcli a\n")
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    assert ended(job("bash", str(TEMPLATES / "sweep.sbatch"), "study.runs", **array))[0] == 0
    assert Path("scontrol.log").read_text() == "requeue 40_1\n"


@pytest.mark.parametrize("template", ["run", "sweep"])
def test_the_page_of_many_gpus_shows_the_templates(template: str) -> None:
    assert (TEMPLATES / f"{template}.sbatch").read_text(encoding="utf-8") in PAGE


def test_the_skypilot_file_is_yaml_and_runs_what_is_here() -> None:
    task = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    assert "torchrun" in task["run"]
    assert task["envs"]["ARGUMENTS"].split()[0] == "pretrain"
