"""`switchcli sweep`: parsing of grids and lists; complete, interrupted and failed runs; job arrays."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.report.console import Console
from switchcli.runs import sweep_list, sweep_runner

FAILS = "'data.corpora=[{kind: files, paths: [none.txt]}]'"
"""What lets a run end with exit code 3."""
SWEEP = (sys.executable, "-m", "switchcli", "sweep")


def test_commas_part_values_outside_brackets_and_quotes():
    assert sweep_list.split_values("2,4") == ["2", "4"]
    assert sweep_list.split_values("[rte,cola]") == ["[rte,cola]"]
    assert sweep_list.split_values("{kind: a, b: [1,2]},{kind: c}") == ["{kind: a, b: [1,2]}", "{kind: c}"]
    assert sweep_list.split_values('"a,b",c') == ['"a,b"', "c"]
    assert sweep_list.split_values("") == [""]


def test_a_grid_names_its_runs_by_what_varies():
    runs = sweep_list.parse_sweep(
        ["pretrain", "quickstart/switch", "model.num_experts=2,4", "train.seed=0,1"], Path("runs")
    )
    assert [run.name for run in runs] == ["2-0", "2-1", "4-0", "4-1"]
    assert runs[2].arguments == ("pretrain", "quickstart/switch", "model.num_experts=4", "train.seed=0")
    assert [run.name for run in sweep_list.parse_sweep(["pretrain", "quickstart/switch"], Path("runs"))] == ["switch"]


def test_a_list_has_stages_and_fills_in_what_its_runs_know(tmp_path):
    path = tmp_path / "runs"
    path.write_text(
        "# what stands after # is not read\n"
        "teacher pretrain quickstart/switch train.seed=0,1  # nor this\n\n---\n"
        "student distill r --teacher {out}/teacher-{train.seed} 'student={kind: random_init}' train.seed=0,1\n"
        "scores eval {out}/teacher-0\n"
    )
    runs = sweep_list.parse_sweep([str(path), "train.steps=5"], Path("runs/t"))
    assert [(run.name, run.stage) for run in runs] == [
        ("teacher-0", 0),
        ("teacher-1", 0),
        ("student-0", 1),
        ("student-1", 1),
        ("scores", 1),
    ]
    assert runs[3].arguments[2:] == (
        "--teacher",
        "runs/t/teacher-1",
        "student={kind: random_init}",
        "train.seed=1",
        "train.steps=5",
    )
    assert runs[4].arguments == ("eval", "runs/t/teacher-0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "runs: run"),
        ("dense\n", "runs:1 'dense' run"),
        ("a pretrain x\na pretrain y\n", "two runs a"),
        ("a pretrain 'x\n", "runs:1 quotation"),
        ("a pretend x\n", "pretend pretrain finetune"),
        ("a/b pretrain x\n", "runs:1 'a/b' folder"),
        (".. pretrain x\n", "runs:1 '..' folder"),
        ("a pretrain x train.seed=0,\n", "train.seed= value"),
        ("a pretrain quickstart/dense train.seed=0 train.seed=1\n", "runs:1 train.seed=0,1"),
        ("a pretrain quickstart/dense train.sed=0\n", "a: train.sed seed"),
        ("a pretrain quickstart/dens\n", "a: quickstart/dense"),
        ("a pretrain quickstart/dense train.steps=no\n", "a: train.steps integer"),
        ("a pretrain quickstart/dense train.seed=[2,4]\n", "a: train.seed=2,4"),
        ("a pretrain quickstart/dense --modle x\n", "a: --modle --model"),
        ("b pretrain quickstart/dense\n---\na finetune quickstart/dense --model {out}/b\n", "a: pretrain finetune"),
        ("a finetune quickstart/finetune --model nowhere\n", "a: nowhere"),
        ("a finetune quickstart/finetune --model . --branch-from nowhere@3\n", "a: branch-from nowhere@3"),
        ("a distill --teacher . --baseline nowhere\n", "a: baseline nowhere"),
        ("a distill --teacher . --student nowhere\n", "a: student nowhere"),
        ("a distill --teacher . train.sed=0\n", "a: train.sed seed"),
        ("a eval . scorin.draws=1\n", "a: scorin scoring"),
        (
            "a pretrain quickstart/dense\n---\nb finetune quickstart/finetune --model {out}/a train.sed=0\n",
            "b: train.sed",
        ),
        (f"a pretrain quickstart/dense train.seed={','.join(map(str, range(1001)))}\n", "runs:1 1,001 1,000"),
        ("#" * 2**20 + "\n", "runs 1,048,576"),
    ],
)
def test_a_list_that_says_no_runs_is_refused(text, words, tmp_path, switchcli):
    path = tmp_path / "runs"
    path.write_text(text)
    ended = switchcli("sweep", path, "--out", tmp_path / "out")
    assert ended.code == 2
    assert not lacking(ended.err, words)
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if "list" not in words:
        assert switchcli("sweep", path, "--out", tmp_path / "out", "--print").code == 2


@pytest.mark.parametrize(
    "command",
    [
        "finetune quickstart/finetune --model {absolute}/one",
        "finetune quickstart/finetune --model={out}/one",
        "pretrain quickstart/dense --branch-from {out}/one@3",
        "pretrain quickstart/dense --branch-from .@3",
        "distill --teacher {out}/one --student tiny --baseline -1.5",
        "distill --teacher {out}/one --student {absolute}/one --baseline {out}/one/checkpoints/step-3",
    ],
)
def test_a_run_may_name_one_of_an_earlier_stage_a_size_or_a_metric(
    command: str, tmp_path: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text(
        f"one pretrain quickstart/dense\n---\ntwo {command.replace('{absolute}', str(tmp_path / 'out'))}\n"
    )
    done = switchcli("sweep", "runs", "--out", "out", "--slurm")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("sweep pretrain <(cat tiny.yaml) train.seed=0,1 --slurm", 2),
        ("sweep pretrain <(cat tiny.yaml) train.seed=0,1 --print", 2),
        ("sweep <(echo a pretrain /dev/stdin) --print", 2),
        ("sweep <(echo a pretrain tiny.yaml) --print", 0),
        ("launch --slurm --print -- pretrain <(cat tiny.yaml)", 2),
    ],
)
def test_a_pipe_is_a_list_of_runs_and_no_recipe_of_a_later_run(command: str, code: int, recipe: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(SWEEP[:-1])} {command}"], check=False, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert code == 0 or not lacking(done.stderr, "pipe file")


def test_keys_of_a_command_that_the_shell_repeats_are_refused(switchcli):
    """bash makes three words of train.seed={0..2}."""
    done = switchcli("sweep", "pretrain", "quickstart/dense", "train.seed=0", "train.seed=1", "train.seed=2", "--print")
    assert done.code == 2
    assert not lacking(done.err, "train.seed=0,1,2")


def test_a_thousand_runs_are_a_sweep_with_any_number_of_jobs(switchcli):
    twenty = ",".join(map(str, range(20)))
    grid = ("train.seed=" + twenty, "train.steps=" + ",".join(map(str, range(1, 51))))
    done = switchcli("sweep", "pretrain", "quickstart/dense", *grid, "--print", "--jobs", "1000000000")
    assert (done.code, done.out.count("\n")) == (0, 1000)
    assert len(sweep_runner.available_slots(10**9, 3)) == 3


def test_keys_with_many_values_end_at_once(switchcli):
    grid = [f"{key}=1,2,3,4,5,6,7,8,9" for key in "abcdefghijkl"]
    done = switchcli("sweep", "pretrain", "quickstart/dense", *grid)
    assert done.code == 2
    assert not lacking(done.err, "282,429,536,481 1,000")


@pytest.mark.integration
def test_a_sweep_goes_on_after_a_failure_says_so_and_skips_what_is_done(tmp_path):
    path = tmp_path / "runs"
    short = "train.steps=2 schedule.warmup_steps=1 eval.sequences=16"
    path.write_text(f"bad pretrain quickstart/dense {FAILS}\n---\ngood pretrain quickstart/dense {short}\n")
    first = _sweep(path, tmp_path)
    assert first.returncode == 1
    assert not lacking(first.stderr, "failed: bad: code 3 none.txt")
    assert json.loads((tmp_path / "out/good/result.json").read_text())["step"] == 2
    assert not lacking((tmp_path / "out/good.log").read_text(), f"completed: switchcli pretrain {tmp_path}/out/good")
    again = _sweep(path, tmp_path)
    assert not lacking(again.stderr, "[2/2] good: complete")
    assert again.returncode == 1


@pytest.mark.integration
def test_a_run_whose_log_cannot_be_written_stops_no_other(tmp_path):
    (tmp_path / "out/blocked.log").mkdir(parents=True)
    path = tmp_path / "runs"
    path.write_text(f"blocked pretrain quickstart/dense\nother pretrain quickstart/dense {FAILS}\n")
    ended = _sweep(path, tmp_path)
    assert ended.returncode == 1
    assert not lacking(ended.stderr, "failed: blocked: blocked.log --out")
    assert not lacking(ended.stderr, "failed: other: code 3")


def test_keys_after_a_list_take_the_place_of_its_own(tmp_path):
    path = tmp_path / "runs"
    path.write_text(
        "teacher pretrain quickstart/switch train.seed=0,1\n---\n"
        "student distill r --teacher {out}/teacher-{train.seed} train.seed=0,1\nscores eval {out}/teacher-2\n"
    )
    runs = sweep_list.parse_sweep([str(path), "train.seed=2", "train.steps=5"], Path("out"))
    assert [(run.name, *run.arguments) for run in runs] == [
        ("teacher-2", "pretrain", "quickstart/switch", "train.seed=2", "train.steps=5"),
        ("student-2", "distill", "r", "--teacher", "out/teacher-2", "train.seed=2", "train.steps=5"),
        ("scores", "eval", "out/teacher-2"),
    ]


def test_a_run_that_none_makes_is_asked_for_before_any_begins(tmp_path):
    path = tmp_path / "runs"
    path.write_text("one pretrain quickstart/dense\n---\ntuned finetune quickstart/finetune --model {out}/one-0\n")
    ended = _sweep(path, tmp_path)
    assert ended.returncode == 2
    assert not lacking(ended.stderr, f"error: tuned: {tmp_path}/out/one-0")
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_what_needs_a_run_that_failed_is_not_begun(tmp_path):
    path = tmp_path / "runs"
    path.write_text(
        f"one    pretrain quickstart/dense {FAILS}\n---\n"
        "tuned  finetune quickstart/finetune --model {out}/one/checkpoints/step-2\n"
        "other  finetune quickstart/finetune --model {out}-other\n---\n"
        "scores eval {out}/tuned\n"
    )
    (tmp_path / "out-other").mkdir()
    ended = _sweep(path, tmp_path)
    assert ended.returncode == 1
    assert re.search(r"failed: tuned: .*\bneeds one$", ended.stderr, re.M)
    assert re.search(r"failed: scores: .*\bneeds tuned$", ended.stderr, re.M)
    assert not lacking(ended.stderr, "failed: other: code")
    assert not (tmp_path / "out/tuned.log").exists()


@pytest.mark.integration
def test_a_stopped_sweep_saves_and_goes_on(tmp_path):
    path = tmp_path / "runs"
    path.write_text("one pretrain quickstart/dense train.steps=100000 eval.sequences=16 log.every_steps=1\n")
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--jobs", "1", "--quiet", str(path)]
    metrics = tmp_path / "out/one/metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as going:
        until(lambda: going.poll() is not None or (metrics.exists() and '"seconds"' in metrics.read_text()))
        going.send_signal(signal.SIGTERM)
        _, printed = going.communicate()
    assert going.returncode == 75
    stopped, again = printed.splitlines()
    assert not lacking(stopped, "stopped same command")
    assert not lacking(again, "sweep --out")
    assert list((tmp_path / "out/one/checkpoints").glob("step-*"))


def begin(tmp_path, *options):
    """A sweep of one run, and the process of the run."""
    path = tmp_path / "runs"
    path.write_text("one pretrain quickstart/dense train.steps=100000 eval.sequences=16 log.every_steps=1\n")
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--jobs", "1", str(path), *options]
    going = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    return going, until(lambda: (tmp_path / "out/one.log").exists() and going.children())[0]


def until(condition):
    while not (found := condition()):
        time.sleep(0.05)
    return found


def is_pending(process, number):
    """Whether a signal waits for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^ShdPnd:\s*(\w+)", status, re.M)[1], 16) >> (number - 1) & 1


@pytest.mark.integration
def test_the_run_of_a_killed_sweep_saves_and_ends(tmp_path):
    going, run = begin(tmp_path)
    metrics = tmp_path / "out/one/metrics.jsonl"
    until(lambda: metrics.exists() and '"seconds"' in metrics.read_text())
    going.kill()
    going.communicate()
    until(lambda: not run.is_running())
    assert "stopped and saved" in (tmp_path / "out/one.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_kills_a_run_that_hangs(number, tmp_path):
    going, run = begin(tmp_path)
    run.suspend()
    until(lambda: run.status() == psutil.STATUS_STOPPED)
    going.send_signal(number)
    until(lambda: is_pending(run, signal.SIGTERM))
    assert going.poll() is None
    going.send_signal(signal.SIGINT)
    _, printed = going.communicate()
    assert going.returncode == 130
    assert not lacking(printed, "without saving")
    assert "Traceback" not in printed
    assert not run.is_running()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("victim")])
def test_a_log_that_is_no_file_fails_its_run(make, tmp_path):
    (tmp_path / "victim").write_text("mine")
    make(tmp_path / "a.log")
    sweep = sweep_runner.Sweep([sweep_list.SweepRun("a", ("pretrain", "x"))], tmp_path, [{}], Console(quiet=True))
    sweep.run()
    assert sweep.outcomes["a"].status == "failed"
    assert not lacking(sweep.outcomes["a"].reason, f"{tmp_path}/a.log --out")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    ("log", "status"),
    [
        (None, "skipped"),
        ("completed: switchcli pretrain x train.steps=2 --out {out}/a --quiet\nwarning: none\n", "skipped"),
        ("completed: switchcli pretrain x train.steps=1 --out {out}/a --quiet\n", "failed"),
        ("completed: switchcli pretrain y train.steps=2 --out {out}/a --quiet\n", "failed"),
    ],
)
def test_a_complete_run_of_another_command_is_not_skipped(log, status, tmp_path):
    """Its verb decides: here it refuses, as there is no such recipe."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text("{}")
    if log is not None:
        (tmp_path / "a.log").write_text(log.format(out=tmp_path))
    run = sweep_list.SweepRun("a", ("pretrain", "x", "train.steps=2"))
    sweep = sweep_runner.Sweep([run], tmp_path, [{}], Console(quiet=True))
    sweep.run()
    assert sweep.outcomes["a"].status == status
    again = sweep_runner.Sweep([run], tmp_path, [{}], Console(quiet=True))
    again.run()
    assert again.outcomes["a"].status == status, "a refused command completes nothing"


def test_slots_are_gpus_else_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep_runner.available_slots(None, 9)] == ["0", "2"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep_runner.available_slots(3, 9)] == ["0", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sweep_runner, "available_processors", lambda: 3)
    assert sweep_runner.available_slots(None, 9) == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep_runner.available_slots(2, 9) == [{}, {}]


@pytest.mark.integration
def test_the_result_for_scripts_has_command_and_status_of_each_run(tmp_path):
    short = ("train.steps=2", "schedule.warmup_steps=1", "eval.sequences=16")
    grid = ("pretrain", "quickstart/dense", *short, "train.device=cpu,cuda", "--jobs", "1", "--json", "--quiet")
    done = subprocess.run([*SWEEP, "--out", "out", *grid], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    first, second = json.loads(done.stdout)["runs"]
    assert (first["name"], first["status"]) == ("cpu", "done")
    assert (second["name"], second["status"]) == ("cuda", "failed")
    assert first["command"][:3] == ["switchcli", "pretrain", "quickstart/dense"]


def test_a_run_that_needs_one_of_its_stage_that_failed_does_not_start(tmp_path):
    """The folder of the failed run exists already, as on a second attempt."""
    (tmp_path / "out/a").mkdir(parents=True)
    path = tmp_path / "runs"
    path.write_text(f"a pretrain quickstart/dense {FAILS}\nb finetune quickstart/finetune --model {{out}}/a\n")
    ended = _sweep(path, tmp_path)
    assert re.search(r"failed: b: needs a$", ended.stderr, re.M)


def test_a_sweep_for_slurm_needs_its_runs_too(tmp_path):
    path = tmp_path / "runs"
    path.write_text("b distill quickstart/distill --teacher {out}/a\n")
    done = subprocess.run([*SWEEP, str(path), "--slurm"], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert not lacking(done.stderr, "runs/sweep/a")


def test_the_commands_of_a_sweep_are_printed_for_scripts(tmp_path):
    done = subprocess.run(
        [*SWEEP, "pretrain", "quickstart/dense", "train.seed=0,1", "--print", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert [run["name"] for run in json.loads(done.stdout)["runs"]] == ["0", "1"]


def test_the_commands_of_a_sweep_are_printed_for_a_shell(tmp_path):
    path = tmp_path / "runs"
    path.write_text("a pretrain quickstart/dense 'model={size: tiny}'\n")
    done = subprocess.run([*SWEEP, str(path), "--print", "--out", "o"], check=True, capture_output=True, text=True)
    assert done.stdout == "switchcli pretrain quickstart/dense 'model={size: tiny}' --out o/a --quiet\n"


def test_a_sweep_for_slurm_is_a_script_with_an_array_for_each_stage(tmp_path):
    """`sbatch` writes down its arguments and the job; a task of an array runs its own run."""
    path = tmp_path / "runs"
    path.write_text(
        "a pretrain quickstart/dense train.seed=0,1\n---\nb distill quickstart/distill --teacher {out}/a-0\n"
    )
    script = subprocess.run([*SWEEP, str(path), "--slurm", "--out", "o"], check=True, capture_output=True, text=True)
    tools = {
        "sbatch": 'n=$(ls | grep -c "^job"); echo "$@" >"arguments-$n"; cat >"job-$n"; echo "$((40 + n))"',
        "srun": 'shift; echo "$@" >>ran; exit "$CODE"',
        "scontrol": 'echo "$@" >>requeued',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = ["bash", "-s", "--", "--partition=a"]
    subprocess.run(arguments, input=script.stdout, text=True, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "arguments-0").read_text() == "--parsable --partition=a\n"
    assert (tmp_path / "arguments-1").read_text() == "--parsable --dependency=afterany:40 --partition=a\n"
    assert "#SBATCH --array=0-1" in (tmp_path / "job-0").read_text()
    for task, code in (("1", "0"), ("0", "75")):
        task_environment = {**environment, "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "40", "CODE": code}
        subprocess.run(["bash", "job-0"], check=True, cwd=tmp_path, env=task_environment)
    ran = (tmp_path / "ran").read_text().splitlines()
    assert [line.split()[-4:] for line in ran] == [
        ["train.seed=1", "--out", "o/a-1", "--quiet"],
        ["train.seed=0", "--out", "o/a-0", "--quiet"],
    ]
    assert (tmp_path / "requeued").read_text() == "requeue 40_0\n"


def _sweep(path, tmp_path):
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--jobs", "1", str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["paper/table1/small.runs", "recipes/paper/table1/small.runs"])
def test_a_list_that_ships_is_found_by_its_name_from_any_folder(
    name: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = switchcli("sweep", name, "--print")
    assert done.code == 0, done.err
    assert done.out.count("\n") >= 2
    assert switchcli("sweep", "paper/table1/smal.runs", "--print").code == 2
