"""`switchcli launch`: several machines by torchrun and by SLURM, played by processes of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from drill import kill_one
from messages import lacking
from ranks import free_port
from tiny_run import SwitchCLI

LAUNCH = (sys.executable, "-m", "switchcli", "launch")
SKYPILOT = Path(__file__).parents[2] / "scripts" / "skypilot.yaml"
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


@pytest.fixture
def job_script(switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function of the arguments that gives the file of a job script, as `sbatch` would get it."""
    monkeypatch.chdir(tmp_path)

    def write(*arguments: str) -> Path:
        done = switchcli("launch", "--slurm", "--print", *arguments)
        assert done.code == 0, done.err
        script = tmp_path / "job.sh"
        script.write_text(done.out)
        script.chmod(0o755)
        return script

    return write


def two_machines(*arguments: str) -> list["subprocess.Popen[str]"]:
    """Start the agents of two machines with two ranks each."""
    options = ("--torchrun", "--head", "localhost", "--port", str(free_port()), "--nodes", "2", "--ranks", "2", "--")
    command = [*LAUNCH, *options, *arguments]
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]


@pytest.mark.integration
def test_two_machines_of_two_ranks_by_torchrun(recipe: str) -> None:
    machines = two_machines("pretrain", recipe, *KEYS)
    said = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    result = json.loads(Path("run/result.json").read_text())
    assert (result["hardware"]["ranks"], result["step"]) == (4, 4)
    alone = [sys.executable, "-m", "switchcli", "pretrain", recipe, *KEYS[:2], "-q", "--out", "alone", "--json"]
    done = json.loads(subprocess.run(alone, check=True, capture_output=True, timeout=120).stdout)
    assert figure() == pytest.approx(done["held_out/neg_log_perplexity"], abs=1e-5)


@pytest.mark.integration
def test_a_rank_that_dies_on_one_of_two_machines_and_all_start_again(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    keys = (*KEYS[:-1], run, "train.steps=24", "checkpoint.save_every_steps=4")
    machines = two_machines("pretrain", recipe, *keys)
    kill_one(run, machines[0])
    said = [machine.communicate(timeout=150)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert json.loads(Path("run/result.json").read_text())["step"] == 24


@pytest.mark.integration
def test_tasks_of_slurm_train_together_and_a_failure_ends_the_job(
    recipe: str, job: dict[str, str], job_script: Callable[..., Path]
) -> None:
    command = ("--ranks", "2", "--nodes", "2", "--", "pretrain", recipe, *KEYS)
    done = subprocess.run([job_script(*command)], env=job, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("run/result.json").read_text())["hardware"]["ranks"] == 4
    assert not Path("scontrol.log").exists()
    refused = subprocess.run(
        [job_script(*command, "train.seed=9")], env=job, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 2
    assert not lacking(refused.stderr, "error: run train.seed 0 9 --out --no-resume")


@pytest.mark.integration
def test_a_job_whose_time_is_over_saves_and_goes_back_into_the_queue(
    recipe: str, job: dict[str, str], job_script: Callable[..., Path]
) -> None:
    script = job_script("--", "pretrain", recipe, *KEYS, "train.steps=100000", "checkpoint.save_every_steps=5")
    process = subprocess.Popen([script], env=job, stderr=subprocess.PIPE, text=True)
    while not list(Path("run").glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    for task in Path("tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert Path("scontrol.log").read_text() == "requeue 7\n"


@pytest.mark.integration
def test_a_job_that_cannot_be_requeued_does_not_end_well(
    job: dict[str, str], job_script: Callable[..., Path], tmp_path: Path
) -> None:
    for tool, code in (("srun", 75), ("scontrol", 1)):
        (tmp_path / "tools" / tool).write_text(f"#!/bin/sh\nexit {code}\n")
    script = job_script("--", "pretrain", "x")
    done = subprocess.run([script], env=job, capture_output=True, text=True, check=False)
    assert (done.returncode, lacking(done.stderr, "not requeued submit")) == (75, [])


@pytest.mark.integration
def test_a_task_has_the_processors_that_the_job_asked_for(
    job: dict[str, str], job_script: Callable[..., Path], tmp_path: Path
) -> None:
    """srun takes them from this variable."""
    (tmp_path / "tools" / "srun").write_text("#!/bin/sh\necho cpus $SRUN_CPUS_PER_TASK\n")
    script = job_script("--", "pretrain", "x")
    done = subprocess.run([script], env={**job, "SLURM_CPUS_PER_TASK": "6"}, capture_output=True, text=True, check=True)
    assert done.stdout == "cpus 6\n"


@pytest.mark.integration
@pytest.mark.parametrize(("restarts", "code"), [("2", 0), ("3", 75)])
def test_a_job_that_is_stopped_as_soon_as_it_begins_does_not_come_back_for_ever(
    job: dict[str, str], job_script: Callable[..., Path], tmp_path: Path, restarts: str, code: int
) -> None:
    """The job's ranks are stopped because one fails on another machine."""
    stopped = tmp_path / "tools" / "srun"
    stopped.write_text("#!/bin/sh\nexit 75\n")
    environment = {**job, "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run([job_script("--", "pretrain", "x")], env=environment, capture_output=True, check=False)
    assert (done.returncode, Path("scontrol.log").exists()) == (code, code == 0)


def test_what_a_job_asks_for_is_in_its_script(job_script: Callable[..., Path]) -> None:
    script = job_script("--nodes", "4", "--ranks", "2", "--time", "1:00", "--sbatch=--partition=a", "--", "eval", "run")
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00", "--partition=a"} <= {*lines}
    assert {"--signal=USR1@300", "--requeue"} <= {*lines}


@pytest.mark.parametrize("time", ["30", "24:00:00", "2-12:00:00", "UNLIMITED"])
def test_a_time_limit_in_any_form_of_sbatch_is_in_the_job_script(time: str, job_script: Callable[..., Path]) -> None:
    assert f"\n#SBATCH --time={time}\n" in job_script("--time", time, "--", "pretrain", "x").read_text()


@pytest.mark.integration
def test_ranks_of_torchrun_import_the_package_from_a_clone_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone is the current folder. From any other folder no module is imported."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = (*LAUNCH, "--torchrun", "--print", "--", "pretrain", "x")
    for folder, is_safe in ((Path(__file__).parents[2], False), (tmp_path, True)):
        printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
        assert ("PYTHONSAFEPATH=1" in printed.split()) == is_safe


@pytest.mark.parametrize("verb", [("pretrain",), ("data", "prepare")])
def test_no_word_adds_a_line_to_a_job_script(verb: tuple[str, ...], job_script: Callable[..., Path]) -> None:
    plain = job_script("--sbatch=--comment=a", "--", *verb, "a", "description=a").read_text()
    evil = "a\nreboot\r\nJOB\n$(reboot) `reboot` ; reboot"
    script = job_script(f"--sbatch=--comment={evil}", "--", *verb, evil, f"description={evil}").read_text()
    assert script.count("\n") == plain.count("\n")
    assert not [line for line in script.splitlines() if line.startswith(("reboot", "JOB", "$"))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--slurm --torchrun"),
        (("--slurm", "--torchrun"), "--slurm --torchrun"),
        (("--torchrun", "--nodes", "2"), "--head"),
        (("--slurm",), "sbatch --print"),
        (("--slurm", "--head", "h"), "--head --slurm"),
        (("--torchrun", "--time", "1:00"), "--time --torchrun"),
        (("--slurm", "--sbatch=--array=1-3"), "--sbatch --array"),
        *(
            (("--slurm", "--time", time), "--time hours:minutes:seconds")
            for time in ("1:00\nreboot", "1:00\r", "1 --wrap=x", "1:2:3:4", "-1", "\u0661")
        ),
        (("--slurm", "--partition=a", "--print"), "--partition=a --sbatch"),
        (("--torchrun", "--", "prune"), "prune pretrain"),
        (("--slurm", "--print", "--", "pretrain", "x", "--no-resume"), "--no-resume --out"),
        (("--slurm", "--print", "--", "data", "tokenizer"), "data prepare --slurm"),
        (("--torchrun", "--print", "--", "data", "prepare"), "data prepare --slurm"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(
    options: tuple[str, ...], words: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    refused = switchcli("launch", *options, "--", "pretrain", "x")
    assert refused.code in (2, 6)
    assert not lacking(refused.err, words)
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pretrain x", "x recipes list"),
        ("pretrain quickstart/dense train.stepz=4", "train.stepz steps"),
        ("pretrain quickstart/dense --model none", "model none"),
        ("pretrain quickstart/dense --dry-run", "--dry-run launch"),
    ],
)
@pytest.mark.parametrize("launcher", ["--slurm", "--torchrun"])
def test_a_command_that_no_rank_could_run_is_not_launched(
    launcher: str, command: str, words: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = switchcli("launch", launcher, "--ranks", "1", "--", *command.split())
    assert (refused.code, lacking(refused.err, words)) == (2, [])


@pytest.mark.parametrize(("ranks", "code", "words"), [(2, 9, ""), (4, 2, "train.batch_tokens 8 ranks try 16384")])
def test_a_batch_that_the_ranks_cannot_share_is_not_submitted(
    ranks: int, code: int, words: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = switchcli("launch", "--slurm", "--nodes", 2, "--ranks", ranks, "--", "pretrain", "quickstart/switch")
    assert (done.code, lacking(done.err, words)) == (code, [])


def test_the_skypilot_file_is_yaml_and_runs_what_is_here() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert "switchcli launch --torchrun" in task["run"]
    assert task["envs"]["ARGUMENTS"].split()[0] == "pretrain"


@pytest.mark.integration
def test_the_tasks_of_a_slurm_array_prepare_a_share_each(
    recipe: str, job: dict[str, str], job_script: Callable[..., Path], tmp_path: Path
) -> None:
    corpora = ", ".join("{kind: files, paths: [text.txt], sample_by: line}" for _ in range(2))
    keys = (recipe, f"data.corpora=[{corpora}]", "--json")
    command = [job_script("--nodes", "2", "--", "data", "prepare", *keys)]
    assert "#SBATCH --array=1-2" in command[0].read_text()
    array = {"SWITCHCLI_CACHE": str(tmp_path / "cache")}
    whole = []
    for task in ("1", "2"):
        environment = {**job, **array, "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        whole.append(json.loads(done.stdout)["complete"])
    assert whole == [False, True]
    assert "--requeue" not in command[0].read_text()
    environment = {**job, "SLURM_ARRAY_TASK_ID": "1", "SWITCHCLI_CACHE": ""}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0
