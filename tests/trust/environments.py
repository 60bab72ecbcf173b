"""Commands in odd environments: each works, or ends in one line with a fitting exit code, within 5 s of CPU time.

What Python reads when it starts is tried in a process of its own, the rest in forks of this one.
"""

import os
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from drill import start
from table import Row
from trial import clear, trials

CPU_SECONDS = 5.0
PATIENCE = 90.0
RUN = ("pretrain", "tiny.yaml", "train.steps=2")
LIGHT = ("recipes", "list")
TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
UNWRITABLE = "/proc/switchcli"
"""Nobody can make a folder here, not even root."""


class Case(NamedTuple):
    codes: Sequence[int] = (0,)
    set: Mapping[str, str] = {}
    unset: Sequence[str] = ()
    act: Callable[[], object] = lambda: None
    """Called in the process before the command."""
    command: Sequence[str] = RUN


def unknown_user() -> None:
    """Have this process's user ID be in no database, as `docker run --user 12345` does."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    pwd.getpwuid = unknown


def in_deleted_folder() -> None:
    Path("deleted").mkdir(exist_ok=True)
    os.chdir("deleted")
    Path("../deleted").rmdir()


def limit(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, value))


def forked_cases() -> dict[str, dict[str, Case]]:
    """Return the cases that a fork tries, by class."""
    here = str(Path.cwd())
    Path("a-file").touch()
    Path("dangling").symlink_to("nowhere/at/all")
    absolute = ("pretrain", f"{here}/tiny.yaml", "train.steps=2")
    no_cache = ("SWITCHCLI_CACHE",)
    return {
        "home and user": {
            "no HOME, unknown user": Case((2,), unset=("HOME", *no_cache), act=unknown_user),
            "no HOME, unknown user, a cache given": Case(unset=("HOME",), act=unknown_user),
            "HOME unwritable": Case((2, 4), {"HOME": UNWRITABLE}, no_cache),
            "HOME a file": Case((2, 4), {"HOME": "/dev/null"}, no_cache),
            "HOME empty": Case((0, 2, 4), {"HOME": ""}, no_cache),
            "HF_HOME unwritable": Case(set={"HF_HOME": UNWRITABLE}),
            "umask 777": Case((0, 2, 3, 4), act=lambda: os.umask(0o777)),
        },
        "folders": {
            "deleted working directory": Case((2, 3, 4), act=in_deleted_folder),
            "deleted working directory, recipes list": Case((0, 2), act=in_deleted_folder, command=("recipes", "list")),
            "deleted working directory, absolute recipe": Case((2, 3, 4), act=in_deleted_folder, command=absolute),
            "unwritable working directory": Case((2, 3, 4), act=lambda: os.chdir("/proc"), command=absolute),
            "TMPDIR missing": Case(set={"TMPDIR": "/nowhere"}),
            "cache a file": Case((2, 4), {"SWITCHCLI_CACHE": f"{here}/a-file"}),
            "cache unwritable": Case((2, 4), {"SWITCHCLI_CACHE": UNWRITABLE}),
            "cache relative": Case(set={"SWITCHCLI_CACHE": "cache-here"}),
            "cache empty": Case(set={"SWITCHCLI_CACHE": "", "HOME": f"{here}/home"}),
            "cache a dangling link": Case((0, 2, 4), {"SWITCHCLI_CACHE": f"{here}/dangling"}),
            "cache not UTF-8": Case((0, 2, 4), {"SWITCHCLI_CACHE": f"{here}/\udcff"}),
            "cache with a long name": Case((2, 4), {"SWITCHCLI_CACHE": f"{here}/{'x' * 300}"}),
        },
        "ranks": {
            "RANK is text": Case((2,), {**TWO, "RANK": "x"}),
            "RANK is too large": Case((2,), {**TWO, "RANK": "5"}),
            "RANK alone": Case((2,), {"RANK": "0"}),
            "WORLD_SIZE alone": Case((2,), {"WORLD_SIZE": "2"}),
            "no MASTER_ADDR": Case((2,), {"RANK": "0", "WORLD_SIZE": "2"}),
            "MASTER_ADDR unknown": Case((2,), {**TWO, "MASTER_ADDR": "no.such.host.invalid"}),
            "MASTER_PORT is text": Case((2,), {**TWO, "MASTER_PORT": "abc"}),
            "MASTER_PORT out of range": Case((2,), {**TWO, "MASTER_PORT": "99999"}),
            "LOCAL_RANK is text": Case((2,), {**TWO, "LOCAL_RANK": "x"}),
            "LOCAL_RANK missing, one rank": Case(set={"RANK": "0", "WORLD_SIZE": "1"}),
            "SLURM_JOB_ID is text": Case(
                (2, 6), {"SLURM_JOB_ID": "x", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
            ),
            "SLURM_PROCID is text": Case(
                (2,), {"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
            ),
            "a batch script of SLURM": Case(set={"SLURM_JOB_ID": "x", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),
            "text in a rank's variables, no ranks": Case(
                (0, 2), {"RANK": "x", "WORLD_SIZE": "y"}, command=("recipes", "validate", "nothing.yaml")
            ),
        },
        "machine": {
            "CUDA_VISIBLE_DEVICES=-1": Case(set={"CUDA_VISIBLE_DEVICES": "-1"}),
            "CUDA_VISIBLE_DEVICES is text": Case(set={"CUDA_VISIBLE_DEVICES": "x"}),
            "few open files": Case((0, 2, 3, 4), act=limit(resource.RLIMIT_NOFILE, 24)),
            "PATH empty": Case(set={"PATH": ""}),
            "a proxy that is none": Case(set={"http_proxy": "::", "https_proxy": "no proxy", "no_proxy": "*"}),
            "TOKENIZERS_PARALLELISM is text": Case(set={"TOKENIZERS_PARALLELISM": "x"}),
            "ACCELERATE_MIXED_PRECISION is text": Case(set={"ACCELERATE_MIXED_PRECISION": "x"}),
            "ACCELERATE_USE_CPU is text": Case((0, 2), {"ACCELERATE_USE_CPU": "x"}),
            "ACCELERATE_USE_FSDP": Case((0, 2), {"ACCELERATE_USE_FSDP": "true"}),
        },
    }


def started_cases() -> dict[str, Case]:
    """Return the cases that a process of its own tries."""
    plan = ("plan", "tiny", "--devices", "1")
    return {
        "LANG=C": Case(set={"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        "PYTHONIOENCODING=ascii": Case(set={"PYTHONIOENCODING": "ascii"}),
        "an unknown locale": Case(set={"LC_ALL": "xx_YY.nothing", "LANG": "?"}),
        "TERM=dumb": Case(set={"TERM": "dumb"}),
        "TERM unknown": Case(set={"TERM": "no such terminal"}),
        "COLUMNS is text": Case(set={"COLUMNS": "x", "LINES": "y"}),
        "COLUMNS=0": Case(set={"COLUMNS": "0", "LINES": "0"}),
        "COLUMNS=-1": Case(set={"COLUMNS": "-1"}),
        "COLUMNS is large": Case(set={"COLUMNS": "9" * 30}),
        "NO_COLOR": Case(set={"NO_COLOR": "1", "FORCE_COLOR": "1"}),
        "PYTHONHASHSEED=7": Case(set={"PYTHONHASHSEED": "7"}),
        "TZ unknown": Case(set={"TZ": "No/Such/Zone"}),
        "no stdin": Case(act=lambda: os.close(0)),
        "no stdout": Case(act=lambda: os.close(1)),
        "no stderr": Case(act=lambda: os.close(2)),
        "no stdin, stdout and stderr": Case(act=lambda: os.closerange(0, 3)),
        "no stderr, a failure": Case((2,), act=lambda: os.close(2), command=("recipes", "validate", "nothing.yaml")),
        "no environment at all": Case(unset=tuple(os.environ)),
        "OMP_NUM_THREADS is text": Case(set={"OMP_NUM_THREADS": "abc"}, command=plan),
        "GOMP_SPINCOUNT is text": Case(set={"GOMP_SPINCOUNT": "x", "OMP_NUM_THREADS": "0"}, command=plan),
        "no HOME, unknown user": Case(unset=("HOME",), command=plan),
        "a small stack": Case(act=limit(resource.RLIMIT_STACK, 2**20)),
    }


def fault(case: Case, code: int | None, said: str, seconds: float) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code is None:
        return "hangs"
    if "Traceback" in said:
        return f"a traceback: {said.strip().splitlines()[-1][:160]}"
    if code not in case.codes:
        return f"exit code {code}: {said.strip()[-160:]}"
    if code and len(lines) > 1:
        return f"{len(lines)} errors: {said[:160]}"
    return f"takes {seconds:.1f} s of CPU time" if seconds > CPU_SECONDS else ""


def forked(case: Case, number: int) -> str:
    run, log = Path(f"run-{number}").absolute(), Path(f"log-{number}").absolute()

    def within() -> None:
        for name in case.unset:
            os.environ.pop(name, None)
        os.environ.update(case.set)
        case.act()

    out = ["--out", run] if case.command == RUN else []
    child = start([*case.command, *out], log, within)
    deadline, found = time.monotonic() + PATIENCE, 0
    while not found and time.monotonic() < deadline:
        found, status, used = os.wait4(child, os.WNOHANG)
        time.sleep(0.005)
    if not found:
        os.kill(child, 9)
        _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status) if found else None
    with suppress(OSError):
        log.chmod(0o644)
    told = fault(case, code, log.read_text(errors="replace"), used.ru_utime + used.ru_stime)
    clear(run)
    log.unlink()
    return told


START = """
import os, pwd
if "HOME" not in os.environ:  # docker run --user 12345
    pwd.getpwuid = lambda uid: {}[uid]
from switchcli.cli import main
main()
"""


def started(case: Case) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in case.unset}
    path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
    command = [*LIGHT] if case.command == RUN else [*case.command]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-c", START, *command],
        env={**environment, **case.set, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=case.act,  # noqa: PLW1509  # this process has no threads
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hangs"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    importing = 0.0 if case.command == RUN else 8.0  # torch, on a busy machine
    return fault(case, process.returncode, said, seconds - importing)


def rows(folder: Path, long: bool) -> Iterator[Row]:
    """Yield a row for each class; both forms try every case."""
    with trials(folder):
        number = 0
        for what, cases in forked_cases().items():
            faults = {}
            for name, case in cases.items():
                faults[name] = forked(case, number := number + 1)
            yield row(what, faults)
        yield row("terminal, streams and start", {name: started(case) for name, case in started_cases().items()})


def row(what: str, faults: dict[str, str]) -> Row:
    bad = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    return Row("environments", what, len(faults), len(bad), "; ".join(bad).replace("\n", " "))
