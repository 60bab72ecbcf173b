"""`switchcli sweep`: parsing of grids and lists; complete, interrupted and failed runs; job arrays.

Most tests of the sweep itself put a small program in the place of its runs (`stub`). tests/commands/test_smoke.py has a
sweep of a real run.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.errors import RecipeError
from switchcli.sweep import sweep_list, sweep_runner
from switchcli.system.lock import lock
from switchcli.terminal.console import Console

SWEEP = (sys.executable, "-m", "switchcli", "sweep")
FAILS = "description=fails"
"""A key that lets a run of `stub` end with exit code 3."""
STUB = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
told = next((word.removeprefix("description=") for word in words if word.startswith("description=")), "completes")
out = pathlib.Path(words[words.index("--out") + 1])
out.mkdir(exist_ok=True)
if told == "saves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if told in ("saves", "hangs"):
    (out / "ready").touch()
    time.sleep(60)
if told == "extends":
    time.sleep(0.5)
    (out / "recipe.yaml").write_text("train: {steps: 30}")
    with (out / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": 24, "loss": 1.5}), file=file)
    time.sleep(1)
if told == "completes":
    (out / "result.json").write_text(json.dumps({"command": ["switchcli", *words]}))
print("error: what the run said last", file=sys.stderr)
sys.exit(3 if told == "fails" else 0)
"""
"""A `switchcli` whose runs end as their description says: complete, with exit code 3, or when they are asked to.

One that extends a run goes on to step 24 of 30.
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put STUB in the place of the runs of sweeps, in a new current folder."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/switchcli.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.chdir(tmp_path)


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


def test_keys_with_many_values_end_at_once_and_a_thousand_runs_are_a_sweep_with_any_number_of_jobs():
    many = [f"{key}=1,2,3,4,5,6,7,8,9" for key in "abcdefghijkl"]
    with pytest.raises(RecipeError) as raised:
        sweep_list.parse_sweep(["pretrain", "quickstart/dense", *many], Path("out"))
    assert not lacking(str(raised.value), "282,429,536,481 1,000")
    grid = ["train.seed=" + ",".join(map(str, range(20))), "train.steps=" + ",".join(map(str, range(1, 51)))]
    assert len(sweep_list.parse_sweep(["pretrain", "quickstart/dense", *grid], Path("out"))) == 1000
    assert len(sweep_runner.available_slots(10**9, 3)) == 3


def test_keys_and_options_after_a_list_follow_the_words_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.write_text("student distill r --teacher {out}/teacher-{train.seed} train.seed=0,1\n")
    overrides = ["train.seed=2", "train.steps=5,9", "--processes", "2", "--top", "2"]
    runs = sweep_list.parse_sweep([str(path), *overrides], Path("OUT"))
    options = ("--processes", "2", "--top", "2")
    assert [(run.name, *run.arguments[1:]) for run in runs] == [
        ("student-2-5", "r", "--teacher", "OUT/teacher-2", "train.seed=2", "train.steps=5", *options),
        ("student-2-9", "r", "--teacher", "OUT/teacher-2", "train.seed=2", "train.steps=9", *options),
    ]


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
        ("a pretend x\n", "runs:1 pretend pretrain finetune"),
        ("a pretrain\n", "runs:1 'a pretrain' RECIPE"),
        ("a pretrain x schedule.learning_rate=0.2,0.1,0.10,1e-1\n", "runs:1 schedule.learning_rate 0.1 0.10 1e-1"),
        ("a/b pretrain x\n", "runs:1 'a/b' folder"),
        ("run.lock pretrain x\n", "runs:1 'run.lock' folder"),
        ("a pretrain x train.seed=0,\n", "runs:1 train.seed= value"),
        ("a pretrain quickstart/dense train.seed=0 train.seed=1\n", "runs:1 train.seed=0,1"),
        ("a pretrain quickstart/dense train.sed=0\n", "a: train.sed seed"),
        ("a pretrain quickstart/dense train.seed=[2,4]\n", "a: train.seed=2,4"),
        ("a pretrain quickstart/dense --modle x\n", "a: --modle --model"),
        ("a pretrain quickstart/dense --no-resume\n", "runs:1 --no-resume archive --out"),
        ("a pretrain quickstart/dense --out b\n", "runs:1 --out sweep"),
        ("a pretrain quickstart/dense --dry-run\n", "runs:1 --dry-run --print"),
        ("b pretrain quickstart/dense\n---\na finetune quickstart/dense --model {out}/b\n", "a: pretrain finetune"),
        ("a finetune quickstart/finetune --model nowhere\n", "a: nowhere"),
        ("a finetune quickstart/finetune --model . --branch-from nowhere@3\n", "a: branch-from nowhere@3"),
        ("a eval . scorin.examples=1\n", "a: scorin scoring"),
        ("a pretrain quickstart/dense train.seed=0,1\n---\nb eval {out}/a\n", "b: out/a"),
        ("a distill x --teacher {out}/b-{train.sed} train.seed=0\n", "runs:1 {train.sed} {out} {train.seed}"),
        ("a eval {out}/b-{seed}\n", "runs:1 {seed} {out}"),
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


@pytest.mark.parametrize(
    "command",
    [
        "finetune quickstart/finetune --model {absolute}/one",
        "finetune quickstart/finetune --model={out}/one",
        "pretrain quickstart/dense --model {out}/one start.keep=weights",
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
    done = switchcli("sweep", "runs", "--out", "out", "--print")
    assert done.code == 0, done.err
    assert not [*sweep_list.missing_runs(sweep_list.parse_sweep(["runs"], Path("out")), Path("out"))]


def swept(switchcli: SwitchCLI, lines: str, *options: object) -> Any:
    """Sweep the runs of a list into `out`, one at a time."""
    Path("runs").write_text(lines)
    return switchcli("sweep", "--out", "out", "--jobs", 1, "runs", *options)


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
def test_a_sweep_goes_on_after_a_failure_says_so_and_skips_what_is_done(switchcli: SwitchCLI) -> None:
    lines = f"bad pretrain quickstart/dense {FAILS}\n---\ngood pretrain quickstart/dense\n"
    first = swept(switchcli, lines, "--json")
    assert first.code == 1
    assert not lacking(first.err, "failed: bad: code 3 error: said last out/bad.log")
    bad, good = json.loads(first.out)["runs"]
    assert ((bad["name"], bad["status"]), (good["name"], good["status"])) == (("bad", "failed"), ("good", "done"))
    assert bad["command"] == ["switchcli", *f"pretrain quickstart/dense {FAILS} --out out/bad --quiet".split()]
    again = swept(switchcli, lines)
    assert not lacking(again.err, "[2/2] good: complete")
    assert again.code == 1


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
def test_the_progress_of_a_run_with_more_steps_begins_with_its_first_new_record(
    switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_runner, "_POLL_SECONDS", 0.05)
    Path("out/a").mkdir(parents=True)
    Path("out/a/recipe.yaml").write_text("train: {steps: 20}")
    Path("out/a/metrics.jsonl").write_text('{"step": 20, "loss": 2.5}\n')
    ended = swept(switchcli, "a pretrain quickstart/dense description=extends\n")
    assert re.findall("loss .*", ended.err) == ["loss 1.5000, step 24 of 30"]


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
def test_what_needs_a_run_that_failed_is_not_begun(switchcli: SwitchCLI) -> None:
    """The folder of the failed run exists already, as on a second attempt."""
    Path("out/one").mkdir(parents=True)
    Path("out-other").mkdir()
    ended = swept(
        switchcli,
        f"one    pretrain quickstart/dense {FAILS}\n"
        "beside finetune quickstart/finetune --model {out}/one\n---\n"
        "tuned  finetune quickstart/finetune --model {out}/one/checkpoints/step-2\n"
        f"other  finetune quickstart/finetune --model {{out}}-other {FAILS}\n---\n"
        "scores eval {out}/tuned\n",
    )
    assert ended.code == 1
    for name, needed in (("beside", "one"), ("tuned", "one"), ("scores", "tuned")):
        assert re.search(rf"failed: {name}: .*\bneeds {needed}$", ended.err, re.M)
        assert not Path(f"out/{name}.log").exists()
    assert not lacking(ended.err, "failed: other: code")


@pytest.fixture
def going(stub: None) -> Callable[[str], tuple[psutil.Popen, psutil.Process]]:
    """Begin a sweep of a run of a kind and a next run. Returns its process and that of the first run, which goes on."""

    def begin(kind: str) -> tuple[psutil.Popen, psutil.Process]:
        script = "import sys; sys.path.remove(sys.argv.pop(1)); from switchcli.cli import main; main()"
        Path("runs").write_text(f"dense pretrain quickstart/dense description={kind}\nnext pretrain quickstart/dense\n")
        options = ["--out", "out", "--jobs", "1", "--quiet", "--json"]
        command = [sys.executable, "-c", script, os.environ["PYTHONPATH"], "sweep", "runs", *options]
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: process.poll() is not None or Path("out/dense/ready").exists())
        return process, process.children()[0]

    return begin


def until(condition: Callable[[], Any]) -> Any:
    while not (found := condition()):
        time.sleep(0.02)
    return found


def assert_stopped(printed: str, exit_code: int) -> None:
    """Assert that the JSON object of a sweep says that it was stopped, and both its runs with it."""
    result = json.loads(printed)
    assert ("stopped" in result["error"], result["exit_code"]) == (True, exit_code)
    assert [(run["name"], run["status"]) for run in result["runs"]] == [("dense", "stopped"), ("next", "stopped")]


@pytest.mark.integration
def test_a_stopped_sweep_waits_until_its_runs_have_saved(going: Any) -> None:
    process, _ = going("saves")
    process.send_signal(signal.SIGTERM)
    result, printed = process.communicate()
    assert process.returncode == 75
    stopped, again = printed.splitlines()
    assert not lacking(stopped, "stopped same command")
    assert not lacking(again, "sweep runs --out")
    assert_stopped(result, 75)


@pytest.mark.integration
def test_a_second_sweep_in_the_folder_of_one_that_goes_on_is_refused(going: Any, switchcli: SwitchCLI) -> None:
    process, _ = going("saves")
    second = swept(switchcli, "dense pretrain quickstart/dense\n")
    assert (second.code, lacking(second.err, f"out: {process.pid} wait --out")) == (4, [])
    assert second.err.count("\n") == 1  # before it names a run
    process.terminate()
    process.communicate()
    assert swept(switchcli, "dense pretrain quickstart/dense\n").code == 0


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
def test_a_run_that_goes_on_is_refused_and_all_others_are_done(switchcli: SwitchCLI) -> None:
    """A sweep that was killed may leave one. What needs its folder is not started."""
    lines = (
        "busy pretrain quickstart/dense\nfree pretrain quickstart/dense\n---\n"
        "tuned finetune quickstart/finetune --model {out}/busy\n"
    )
    with lock(Path("out/busy")):
        ended = swept(switchcli, lines, "--json")
    statuses = {run["name"]: run["status"] for run in json.loads(ended.out)["runs"]}
    assert (ended.code, statuses) == (1, {"busy": "failed", "free": "done", "tuned": "not started"})
    assert not lacking(ended.err, f"failed: busy: {os.getpid()} wait stop same command")
    assert not Path("out/busy.log").exists()
    assert swept(switchcli, lines).code == 0


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_kills_a_run_that_hangs(number: signal.Signals, going: Any) -> None:
    process, run = going("hangs")
    run.suspend()
    until(lambda: run.status() == psutil.STATUS_STOPPED)
    process.send_signal(number)
    until(lambda: is_pending(run, signal.SIGTERM))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    result, printed = process.communicate()
    assert process.returncode == 130
    assert_stopped(result, 130)
    assert not lacking(printed, "without saving")
    assert "Traceback" not in printed
    assert not run.is_running()


def is_pending(process: psutil.Process, number: signal.Signals) -> int:
    """Whether a signal waits for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^ShdPnd:\s*(\w+)", status, re.M)
    assert found
    return int(found[1], 16) >> (number - 1) & 1


@pytest.mark.integration
def test_the_run_of_a_killed_sweep_saves_and_ends(trained: Path, tmp_path: Path) -> None:
    settings = ("train.steps=100000", "log.every_steps=1")
    command = [*SWEEP, "--out", str(tmp_path / "out"), "pretrain", str(trained.with_name("tiny.yaml")), *settings]
    with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
        metrics = tmp_path / "out/tiny/metrics.jsonl"
        until(lambda: process.poll() is not None or (metrics.exists() and '"seconds"' in metrics.read_text()))
        (run,) = process.children()
        process.kill()
    until(lambda: not run.is_running())
    assert "stopped and saved" in (tmp_path / "out/tiny.log").read_text()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("victim")])
def test_a_log_that_is_no_file_fails_its_run(make, tmp_path):
    (tmp_path / "victim").write_text("mine")
    make(tmp_path / "a.log")
    sweep = sweep_runner.Sweep([sweep_list.SweepRun("a", ("pretrain", "x"))], tmp_path, [{}], Console(quiet=True))
    sweep.run()
    assert sweep.outcomes["a"].status == "failed"
    assert not lacking(sweep.outcomes["a"].reason, f"{tmp_path}/a.log --out")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("result", "status"),
    [
        (f'{{"command": {json.dumps(f"switchcli pretrain x {FAILS} --out out/a --quiet".split())}}}', "skipped"),
        (f'{{"command": {json.dumps(f"switchcli pretrain y {FAILS} --out out/a --quiet".split())}}}', "failed"),
        (
            f'{{"command": {json.dumps(f"switchcli pretrain x {FAILS} --out out/a --quiet train.steps=9".split())}}}',
            "failed",
        ),
        ('{"command": null}', "failed"),
        ("{}", "failed"),
        ("[", "failed"),
    ],
    ids=["the same command", "another command", "a longer command", "the Python API", "no command", "damaged"],
)
def test_a_run_is_skipped_only_if_its_result_is_that_of_the_same_command(result: str, status: str) -> None:
    """The verb decides about the others: here it refuses."""
    Path("out/a").mkdir(parents=True)
    Path("out/a/result.json").write_text(result)
    for _ in range(2):  # a refused command completes nothing
        run = sweep_list.SweepRun("a", ("pretrain", "x", FAILS))
        sweep = sweep_runner.Sweep([run], Path("out"), [{}], Console(quiet=True))
        sweep.run()
        assert sweep.outcomes["a"].status == status


@pytest.mark.integration
@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("newer", ["mine.yaml", "below.yaml", "result.json"])
def test_a_run_whose_recipe_was_written_since_is_left_to_its_verb(newer: str) -> None:
    """The verb refuses."""
    result = Path("out/a/result.json")
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"command": f"switchcli pretrain mine.yaml {FAILS} --out out/a --quiet".split()}))
    Path("mine.yaml").write_text("extends: below.yaml\n")
    Path("below.yaml").write_text("train: {steps: 1}\n")
    for path in (result, Path("mine.yaml"), Path("below.yaml")):
        os.utime(path, (2000, 2000) if path.name == newer else (1000, 1000))
    sweep = sweep_runner.Sweep(
        [sweep_list.SweepRun("a", ("pretrain", "mine.yaml", FAILS))], Path("out"), [{}], Console(quiet=True)
    )
    sweep.run()
    assert sweep.outcomes["a"].status == ("skipped" if newer == "result.json" else "failed")


@pytest.mark.usefixtures("stub")
def test_a_complete_run_whose_teacher_was_trained_since_has_a_warning(switchcli: SwitchCLI) -> None:
    lines = "teacher pretrain quickstart/switch\n---\nstudent distill --teacher {out}/teacher\n"
    assert swept(switchcli, lines).code == 0
    done = swept(switchcli, lines)
    assert (done.code, "warning" in done.err) == (0, False), done.err
    later = time.time() + 60
    os.utime("out/teacher/result.json", (later, later))
    done = swept(switchcli, lines)
    assert (done.code, lacking(done.err, "warning: student teacher --no-resume")) == (0, []), done.err


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.runs").write_text("a pretrain quickstart/dense\n", encoding="utf-8-sig")
    assert [run.name for run in sweep_list.parse_sweep([str(tmp_path / "mine.runs")], tmp_path)] == ["a"]


def test_slots_are_gpus_else_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep_runner.available_slots(None, 9)] == ["0", "2"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep_runner.available_slots(3, 9)] == ["0", "2", "0"]
    monkeypatch.setattr(sweep_runner, "available_processors", lambda: 3)
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert sweep_runner.available_slots(None, 9) == [{"OMP_NUM_THREADS": "1"}] * 3
        assert sweep_runner.available_slots(None, 1) == [{"OMP_NUM_THREADS": "3"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep_runner.available_slots(2, 9) == [{}, {}]


def test_the_commands_of_a_sweep_are_printed_for_a_shell_and_for_scripts(
    tmp_path: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = swept(
        switchcli, "a pretrain quickstart/dense 'model={size: tiny}' 'description=\"{text} of {out}\"'\n", "--print"
    )
    words = "'model={size: tiny}' 'description=\"{text} of out\"'"  # the name without a value is left to the key
    assert done.out == f"switchcli pretrain quickstart/dense {words} --out out/a --quiet\n"
    done = switchcli("sweep", "pretrain", "quickstart/dense", "train.seed=0,1", "--print", "--json")
    assert [run["name"] for run in json.loads(done.out)["runs"]] == ["0", "1"]


@pytest.mark.parametrize("name", ["paper/table1/small.runs", "recipes/paper/table1/small.runs"])
def test_a_list_that_ships_is_found_by_its_name_from_any_folder(
    name: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = switchcli("sweep", name, "--print")
    assert done.code == 0, done.err
    assert done.out.count("\n") >= 2
    assert switchcli("sweep", "paper/table1/smal.runs", "--print").code == 2


def test_a_sweep_in_the_current_folder_knows_its_runs_by_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for argument, name in (("./one", "one"), (f"{tmp_path}/one@3", "one"), ("quickstart/dense", None), ("one", None)):
        assert sweep_list.named_run(argument, Path()) == name
    needy = sweep_list.SweepRun("two", ("finetune", "x", "--model", f"{tmp_path}/one"))
    assert sweep_list.needed_runs(needy, Path()) == ["one"]
