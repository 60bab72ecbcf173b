"""Bad input under `--processes`: one rank says it for all, and the code is that of its kind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from messages import lacking
from ranks import free_port, on_ranks
from tiny_run import RECIPE, SwitchCLI, lay_out_tuning, write_text

from switchcli.cli import app, main
from switchcli.errors import DataError, OtherRankError, RecipeError, SwitchError


def two_ranks(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "switchcli", "pretrain", *arguments, "--processes", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("processes", "code", "words"), [(2, 0, ""), (3, 2, "train.batch_tokens 256 8 3 ranks try")])
def test_a_dry_run_says_whether_the_ranks_can_share_the_batch(
    processes: int, code: int, words: str, recipe: str, switchcli: SwitchCLI
) -> None:
    done = switchcli("pretrain", recipe, "--dry-run", "--processes", processes)
    assert (done.code, lacking(done.err, words)) == (code, [])


@pytest.mark.parametrize(("options", "said"), [((), "starting 2 ranks on the CPU\n"), (("--quiet",), "")])
def test_one_line_says_how_many_ranks_start_on_which_devices(
    options: tuple[str, ...], said: str, recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.runs.job.job.launch", lambda processes, arguments: 5)
    assert switchcli("pretrain", recipe, "--processes", 2, *options) == (5, "", said)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train.batch_tokens=32", "train.microbatch_tokens=null"], 2, "train.batch_tokens 32 1 2 ranks 64"),
        (["data.corpora=[{kind: files, paths: [none.txt]}]"], 3, "data.corpora none.txt no such"),
    ],
)
@pytest.mark.integration
def test_one_message_for_all_ranks(arguments: list[str], code: int, words: str, recipe: str) -> None:
    done = two_ranks(recipe, *arguments, "--out", "run", "--json")
    assert done.returncode == code
    *notes, error = done.stderr.splitlines()
    assert all(note.startswith(("starting 2 ranks ", "preparing text ")) for note in notes)
    assert error.startswith("error: ")
    assert not lacking(error, words)
    assert json.loads(done.stdout)["exit_code"] == code
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("ranks", "keys", "words"),
    [
        (1, "parallel.expert=2", "parallel.expert 2 ranks 1 --processes parallel.expert=1"),
        (2, "parallel.data=4", "parallel.data 4 ranks 2 --processes"),
        (2, "parallel.expert=4", "parallel.expert 4 ranks 2 --processes parallel.expert=2"),
        (2, "parallel.model=4", "parallel.model 4 ranks 2 --processes parallel.model=2"),
        (2, "parallel={data: 2, model: 2}", "parallel.data parallel.model 2 ranks --processes 4"),
        (2, "parallel={expert: 2, model: 2}", "parallel.expert 2 ranks data 1 --processes 4 parallel.expert=1"),
        (2, "model.num_experts=1 parallel.expert=2", "parallel.expert 2 model.num_experts 1"),
        (2, "model.sparse=both parallel.model=2", "parallel.model 2 attention model.sparse"),
        (6, "parallel.expert=3", "parallel.expert 3 model.num_experts 4 1 2"),
        (6, "parallel={data: 6, expert: 4}", "parallel.expert 4 parallel.data 6 2"),
        (6, "parallel.model=3", "model.num_heads 4 parallel.model 3 1"),
        (6, "parallel={auto: true, model: 2}", "parallel.auto data model expert shard"),
    ],
)
def test_a_mesh_that_is_not_of_these_ranks_or_this_model_starts_none(
    ranks: int, keys: str, words: str, recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchcli.runs.job.job.launch", None)
    done = switchcli("pretrain", recipe, *re.split(r" (?=[\w.]+=)", keys), *(["--processes", ranks] * (ranks > 1)))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert not lacking(done.err, words)


@pytest.mark.integration
def test_a_run_whose_mesh_is_chosen_by_the_plan(recipe: str) -> None:
    """On two ranks, with a text filled in at the end by all of them; on one it goes on."""
    keys = ["parallel=auto", "--out", "run", "--json"]
    done = two_ranks(recipe, "train.steps=2", *keys)
    assert done.returncode == 0, done.stderr
    mesh = json.loads(done.stdout)["mesh"]
    assert mesh["data"] * mesh["model"] == 2
    axes = ", ".join(f"{axis} {mesh[axis]}" for axis in ("data", "model", "expert"))
    assert re.search(rf"^parallel: .*{axes}", done.stderr, re.M)
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, "train.steps=4", *keys]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(alone.stdout)["mesh"] == {"data": 1, "model": 1, "expert": 1, "shard": "none"}, alone.stderr
    assert json.loads(alone.stdout)["step"] == 4


def test_no_mesh_fits(recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.runs.devices.mesh_choice.machine_bytes", lambda: 2**20)
    done = switchcli("pretrain", recipe, "parallel=auto", "train.device=cpu")
    assert done.code == 2
    assert re.search(r"parallel\.auto: .* 1 ranks .* [\d.]+ GiB ", done.err)
    assert not lacking(done.err, "train.microbatch_tokens switchcli plan")


@pytest.mark.parametrize(
    "other",
    [
        "parallel.expert=2",
        *(pytest.param(key, marks=pytest.mark.nightly) for key in ("train.seed=1", "parallel.model=2")),
    ],
)
@pytest.mark.integration
def test_ranks_that_are_told_different_things(other: str, recipe: str) -> None:
    """Each started by hand, as on two machines."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "switchcli", "pretrain", recipe, "--out", "run", "-q", *keys],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, keys in enumerate([[], [other]])
    ]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert not lacking(said[0], "error: ranks same recipe KEY=VALUE")
    assert said[1] == ""
    assert not Path("run/checkpoints").exists()


def end_of_rank(arguments: list[str]) -> tuple[str, int]:
    """How a command ends on a rank that reads from a folder of its own, as on a machine of its own: error and code."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    os.chdir(f"machine{os.environ['RANK']}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", leave)
        try:
            app(arguments, standalone_mode=False)
        except OtherRankError as error:
            return "", error.exit_code
        except SwitchError as error:
            return str(error), error.exit_code
        except SystemExit as end:
            return "", int(end.code or 0)
    return "", 0


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of two machines with equal copies of all data, which differ in their times."""
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for seconds, folder in enumerate(folders):
        folder.mkdir()
        write_text(folder / "text.txt")
        (folder / "tiny.yaml").write_text(RECIPE)
        lay_out_tuning(folder)
        for path in folder.iterdir():
            os.utime(path, (seconds, seconds))
    return folders


OWN_TEXT = "text.corpora=[{kind: files, paths: [text.txt], sample_by: line}]"


@pytest.mark.parametrize(
    ("command", "file", "name"),
    [
        (["pretrain", "tiny.yaml"], "text.txt", "the text"),
        pytest.param(["pretrain", "tiny.yaml", "data.access=stream"], "text.txt", "text", marks=pytest.mark.nightly),
        pytest.param(
            ["finetune", "tune.yaml"], "last.train.jsonl", "the training examples of last", marks=pytest.mark.nightly
        ),
        (["finetune", "tune.yaml"], "colour.validation.jsonl", "the examples of colour to score"),
        (["eval", OWN_TEXT], "text.txt", "the text"),
    ],
)
@pytest.mark.integration
def test_ranks_that_read_different_data_end_before_the_first_step(
    command: list[str], file: str, name: str, machines: list[Path], trained: Path, tmp_path: Path
) -> None:
    verb, *arguments = command
    model = {"pretrain": [], "finetune": ["--model", str(trained)], "eval": [str(trained)]}[verb]
    arguments = [verb, *model, *arguments, "--out", str(tmp_path / "out"), "--quiet"]
    assert on_ranks(2, end_of_rank, arguments) == [("", 0), ("", 0)]
    shutil.rmtree(tmp_path / "out")
    path = machines[1] / file
    path.write_text("RED".join(path.read_text().rsplit("red", 1)))
    (error, code), other = on_ranks(2, end_of_rank, arguments)
    assert (code, other) == (3, ("", 3))
    assert not lacking(error, f"{name}: rank 1 rank 0 copy")
    assert not list(tmp_path.glob("out/checkpoints/*"))


def test_more_ranks_than_devices(recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.runs.job.job.launch", lambda processes, arguments: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    done = switchcli("pretrain", recipe, "train.device=auto", "--processes", 2)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "--processes 2 1 CUDA train.device=cpu")
    assert switchcli("pretrain", recipe, "--processes", 2).code == 0  # on cpu


def test_tasks_of_srun_do_not_train_alone(recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    done = switchcli("pretrain", recipe)
    assert (done.code, done.out) == (6, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "srun 2 MASTER_ADDR MASTER_PORT torchrun")


@pytest.mark.parametrize(
    ("rank", "error", "said"),
    [
        ("0", DataError("none.txt: no such file"), "error: none.txt: no such file\n"),
        ("1", OtherRankError(3), ""),
        ("1", RecipeError("no CUDA here"), "error: rank 1: no CUDA here\n"),
    ],
)
def test_which_rank_speaks(
    rank: str,
    error: DataError | RecipeError | OtherRankError,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    left: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("switchcli.cli.app", fail)
    monkeypatch.setattr(os, "_exit", left.append)
    main()
    assert left == [error.exit_code]
    assert capsys.readouterr().err == said
