"""A rank that dies: the others end soon, the errors say where, how and which rank, and the same command goes on.

A fault is planted in a rank from outside (planted/sitecustomize.py): every rank is a process of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from drill import ROUNDING, apart, leftovers, ranks_of, tensors
from tiny_run import RECIPE, write_text

SECONDS = 30
"""The other ranks must have ended after this many seconds, on a machine that has other things to do."""
STEPS = 6
KEYS = (f"train.steps={STEPS}", "checkpoint.save_every_steps=2", "eval.every_steps=2", "parallel.expert=2", "-q")
PHASES = {
    "start": "outside training",
    "step": "step 2",
    "all-to-all": r"step \d+",
    "save": "step 2",
    "evaluation": "step 2",
    "end": f"step {STEPS}",
}
"""Where a rank fails, and how that is told."""
FAULTS = {
    "kill": (6, r"rank +: {rank}\b.*\n.*\bSIGKILL\b"),
    "exit": (3, ""),
    "raise": (1, r"rank {rank}\b.*{where}\b.*\bValueError: planted"),
    "memory": (1, r"rank {rank}\b.*{where}\b.*(train\.microbatch_tokens|\bmemory\b)"),
    "stop": (75, r"\bsaved\b.*\bstep \d\b.*\bcommand\b"),
    "stop the launcher": (75, r"\bsaved\b.*\bstep \d\b.*\bcommand\b"),
}
"""What happens to a rank; the exit code, and what is said."""
FEW = [("kill", "save", 1), ("stop the launcher", "step", 0), ("stop the launcher", "save", 0)]
"""The cases of the integration tests; the nightly ones have four ranks."""
ALL = [(fault, phase, number % 4) for number, (fault, phase) in enumerate(product(FAULTS, PHASES))]


def pretrain(run: Path, ranks: int, *keys: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "switchcli",
        "pretrain",
        "tiny.yaml",
        *KEYS,
        *keys,
        f"train.batch_tokens={128 * ranks}",
    ]
    return [*command, "--out", str(run), "--processes", str(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(RECIPE.replace("text.txt", f"{folder}/text.txt"))
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[int, Path]:
    """Runs that nothing happens to, by their number of ranks."""
    return {}


def undisturbed(straight: dict[int, Path], folder: Path, ranks: int) -> Path:
    if ranks not in straight:
        straight[ranks] = folder / f"straight-{ranks}"
        subprocess.run(pretrain(straight[ranks], ranks), cwd=folder, check=True, capture_output=True)
    return straight[ranks]


def strike(folder: Path, run: Path, case: tuple[str, str, int], ranks: int) -> tuple[int, str, float]:
    """Return the exit code of a run with a fault, what it says, and its seconds from the fault on."""
    fault, phase, rank = case
    planted = {"fault": fault, "phase": phase, "rank": rank, "moment": f"{run}.moment"}
    path = os.pathsep.join([str(Path(__file__).with_name("planted")), str(Path(__file__).parents[2])])
    done = subprocess.run(
        pretrain(run, ranks),
        env={**os.environ, "PLANTED": json.dumps(planted), "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    seconds = time.time() - float(Path(planted["moment"]).read_text())
    return done.returncode, done.stderr, seconds


def assert_it_ends_and_goes_on(folder: Path, straight: dict[int, Path], case: tuple[str, str, int], ranks: int) -> None:
    fault, phase, rank = case
    run = folder / f"{fault.replace(' ', '-')}-{phase}-{rank}"
    code, words = FAULTS[fault]
    found, said, seconds = strike(folder, run, case, ranks)
    assert (found, ranks_of(str(run))) == (code, []), said
    assert re.search(words.format(rank=rank, where=PHASES[phase]), said), said
    assert seconds < SECONDS
    subprocess.run(pretrain(run, ranks), cwd=folder, check=True, capture_output=True)
    assert apart(tensors(run), tensors(undisturbed(straight, folder, ranks))) <= (ROUNDING if ranks > 2 else 0)
    assert not leftovers(run)


@pytest.mark.integration
@pytest.mark.parametrize("case", FEW, ids=[" ".join(map(str, case)) for case in FEW])
def test_the_others_end_in_time_say_who_and_go_on_to_the_same_weights(
    case: tuple[str, str, int], folder: Path, straight: dict[int, Path]
) -> None:
    assert_it_ends_and_goes_on(folder, straight, case, ranks=2)


@pytest.mark.nightly
@pytest.mark.parametrize("case", ALL, ids=[" ".join(map(str, case)) for case in ALL])
def test_any_of_four_ranks_may_fail_in_any_phase(
    case: tuple[str, str, int], folder: Path, straight: dict[int, Path]
) -> None:
    assert_it_ends_and_goes_on(folder, straight, case, ranks=4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks go on without their launcher")
@pytest.mark.parametrize(
    "delay",
    [
        pytest.param(None, id="training", marks=pytest.mark.integration),
        pytest.param(1.5, id="importing", marks=pytest.mark.integration),
        *(pytest.param(delay, marks=pytest.mark.nightly) for delay in (0.0, 3.0, 5.0)),
    ],
)
def test_ranks_end_whose_launcher_is_killed(delay: float | None, folder: Path) -> None:
    """So many seconds after the first rank's start, while it imports or waits for the other; or once it has saved."""
    run = folder / f"orphans-{delay}"
    command = pretrain(run, 2, "train.steps=100000")
    launcher = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (list(run.glob("checkpoints/step-*")) if delay is None else ranks_of(str(run))):
        assert launcher.poll() is None
        time.sleep(0.02)
    spinning = Path(f"/proc/{ranks_of(str(run))[0]}/environ").read_bytes()
    time.sleep(delay or 0)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + SECONDS
    try:
        while ranks_of(str(run)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not ranks_of(str(run))
    finally:
        for rank in ranks_of(str(run)):
            os.kill(rank, signal.SIGKILL)
    assert b"GOMP_SPINCOUNT=2000" in spinning
