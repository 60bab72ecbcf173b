"""Ranks: those of torchrun and of srun, and the warning of one that waits for the others."""

import time

import pytest
from messages import lacking

from switchcli.distributed import rendezvous
from switchcli.distributed.rendezvous import join_srun, warn_of_waiting
from switchcli.errors import DistributedError

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("a-1,b", "a-1"), ("n1.site", "n1.site"), ("n[1,3]", "n1"), ("n[12]", "n12")],
)
def test_a_task_of_srun_is_a_rank(nodes: str, first: str) -> None:
    environment = {**SRUN, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "1234567"}
    join_srun(environment)
    assert environment.items() >= {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": first, "MASTER_PORT": "24567",
    }.items()  # fmt: skip


@pytest.mark.parametrize(("tasks", "machine", "here"), [("2(x2)", "1", "2"), ("3,1", "1", "1"), ("3,1", "0", "3")])
def test_the_tasks_of_this_machine_share_its_processors(tasks: str, machine: str, here: str) -> None:
    environment = {**SRUN, "SLURM_STEP_NODELIST": "a", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": machine}
    join_srun(environment)
    assert environment["LOCAL_WORLD_SIZE"] == here


def test_where_the_tasks_meet_may_be_given_and_must_be_known() -> None:
    environment = {**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_STEP_NODELIST": "b"}
    join_srun(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("a", "1")
    for nodes in ({}, {"SLURM_STEP_NODELIST": "rack[0-1]node[0-7]"}):
        with pytest.raises(DistributedError, match=r"srun\b.*\b4 tasks\b.*\bMASTER_ADDR\b.*\bMASTER_PORT\b"):
            join_srun({**SRUN, **nodes})
    with pytest.raises(DistributedError, match=r"\bSLURM_JOB_ID\b.*'x'.*\bMASTER_PORT\b"):
        join_srun({**SRUN, "SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": "x"})
    with pytest.raises(DistributedError, match=r"srun\b.*\b2 tasks\b.*\bMASTER_ADDR\b"):
        join_srun({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # a shell that salloc gave
    ],
)
def test_what_is_no_task_of_several_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    join_srun(environment)
    assert environment == before


SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29555"}


def warning_of_a_rank(
    changed: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a rank prints while it waits so many seconds for the others."""
    monkeypatch.setattr(rendezvous, "WAITING_SECONDS", 0.1)
    monkeypatch.delenv("SWITCHCLI_LAUNCHER", raising=False)
    for name, value in {**SECOND_OF_TWO, **changed}.items():
        monkeypatch.setenv(name, value)
    with warn_of_waiting():
        time.sleep(seconds)
    time.sleep(0.2)
    return capsys.readouterr().err


def test_a_rank_that_waits_for_others_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = warning_of_a_rank({}, 0.3, monkeypatch, capsys)
    assert said.startswith("warning: ")
    assert said.count("\n") == 1
    assert not lacking(said, "rank 1 2 '10.0.0.9' 29555 port")


@pytest.mark.parametrize(
    ("changed", "seconds"),
    [({}, 0.0), ({"LOCAL_RANK": "1"}, 0.3), ({"SWITCHCLI_LAUNCHER": "1"}, 0.3), ({"WORLD_SIZE": "1"}, 0.3)],
    ids=["others come in time", "another rank of this machine speaks", "the launcher watches", "a single rank"],
)
def test_a_rank_that_need_not_wait_says_nothing(
    changed: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not warning_of_a_rank(changed, seconds, monkeypatch, capsys)
