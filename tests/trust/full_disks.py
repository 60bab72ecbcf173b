"""Part d: disks that are full, refuse or may not be written to, met by a run that goes on from its first checkpoint."""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from drill import ended, leftovers, start
from table import Row, every
from trial import PATIENCE, Trial, clear, said, strike_at, trials

from switchcli.checkpoint.checkpoint import Checkpoint
from switchcli.runs import trainer

CHECKPOINT = 4
FIRST = "begun"
"""A run with the checkpoint of step 2, as it is before the disk fails."""
BLOCK = 4096
LOG = 4000
"""More than a run says, which goes to a file as well."""
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
BYTES = re.compile(r"\b\d[\d,]* bytes\b|Input/output error")


def rows(folder: Path, long: bool) -> Iterator[Row]:
    with trials(folder) as found:
        trial = found["pretrain"]
        assert trial.run(Path(FIRST), lambda: None, "train.steps=2") == 0
        files = [path for path in Path(FIRST).rglob("*") if path.is_file()]
        used = sum(BLOCK * (1 + path.stat().st_size // BLOCK) for path in files)
        saved = sum(path.stat().st_size for path in files if path.parent.name.startswith("step-"))
        largest = max(path.stat().st_size for path in files)
        yield by_limits(trial, sizes(LOG, largest + 20_000, 40 if long else 5))
        if can_mount():
            yield by_mounts(trial, sizes(used, used + 4 * saved, 40 if long else 4))
            yield read_only(trial)
        for number in NUMBERS if long else NUMBERS[:1]:
            yield by_errors(trial, number, 1 if long else 30)


def sizes(low: int, high: int, num: int) -> list[int]:
    return [low + (high - low) * n // (num - 1) for n in range(num)]


def fault(trial: Trial, run: Path, code: int | None, *, may_remove: bool = True) -> str:
    """What is wrong with how a run met its disk, which may have refused to remove a file too, and with how it goes on
    when all is well again."""
    if code not in (0, CHECKPOINT):
        return f"{run.name}: exit code {code}: {said(run)}"
    steps = sorted((run / "checkpoints").glob("step-*"))
    assert steps, "the first checkpoint is gone"
    for path in steps:
        Checkpoint.open(path)
    if may_remove and leftovers(run):
        return f"{run.name}: left {leftovers(run)}"
    if code == CHECKPOINT and not (said(run).startswith(f"error: {run}") and BYTES.search(said(run))):
        return f"{run.name}: says no path or no bytes: {said(run)}"
    return trial.fault(run)


def met(trial: Trial, run: Path, within: Callable[[], None], *, may_remove: bool = True) -> tuple[str, bool]:
    """The fault of a run that goes on, from its first checkpoint, on such a disk; and whether it was refused."""
    shutil.copytree(FIRST, run, dirs_exist_ok=True)
    code = trial.run(run, within)
    try:
        return fault(trial, run, code, may_remove=may_remove), code == CHECKPOINT
    finally:
        clear(run)


def unforeseen() -> None:
    """In a fork: the disk fills after it was looked at."""
    trainer.preflight = lambda *arguments: None


def by_limits(trial: Trial, sizes: list[int]) -> Row:
    """No file may grow over so many bytes: a full disk in the middle of a file."""

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    found = [met(trial, Path(f"limit-{size}"), partial(limited, size)) for size in sizes]
    return row(f"RLIMIT_FSIZE of {sizes[0]:,} to {sizes[-1]:,} bytes", found)


def by_errors(trial: Trial, number: int, stride: int) -> Row:
    """An error at every `stride`-th operation, alone and from there on."""

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    found = []
    for for_good in (False, True):
        for at in count(stride // 2, stride):
            run = Path(f"error-{number}-{for_good}-{at}")
            one = met(trial, run, partial(strike_at, at, run, refuse, for_good=for_good), may_remove=False)
            if not one[1] and not one[0]:
                break
            found.append(one)
    return row(f"{errno.errorcode[number]} at {every(stride, 'operation')}, once or from there on", found)


def row(what: str, found: list[tuple[str, bool]]) -> Row:
    faults = [fault for fault, _ in found if fault]
    refused = sum(refused for _, refused in found)
    return Row("d", what, len(found), len(faults), faults[0] if faults else f"{refused} refused, the others had room")


# Disks of our own


def can_mount() -> bool:
    return ended(start([], Path("mount.log"), lambda: os._exit(0 if alone() else 1)), PATIENCE) == 0


def alone() -> bool:
    """In a fork: give this process a name space for mounts of its own; whether that is allowed here."""
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000  # Linux, sched.h
    if ctypes.CDLL(None).unshare(new_user | new_mounts):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True


def elsewhere(run: Path, act: Callable[[], object]) -> object:
    """What `act` returns, or its error in words, in a fork that may mount."""
    answer = run.with_name(f"{run.name}.json").absolute()

    def within() -> None:
        assert alone()
        answer.write_text(json.dumps(act()))
        os._exit(0)

    log = run.with_name(f"{run.name}.mounts.log")
    code = ended(start([], log, within), 4 * PATIENCE)
    found = json.loads(answer.read_text()) if code == 0 else [f"{run.name}: {log.read_text()}", False]
    answer.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return found


def mount(*arguments: object) -> None:
    command = ["mount", *map(str, arguments)]
    assert os.spawnvp(os.P_WAIT, "mount", command) == 0, command


def by_mounts(trial: Trial, sizes: list[int]) -> Row:
    """A file system of so many bytes, of which the run takes its share already; every other one fills unforeseen."""

    def on_one(run: Path, size: int, within: Callable[[], None]) -> tuple[str, bool]:
        run.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", run)

        def roomy(code: int | None) -> str:
            mount("-o", "remount,size=1g", run)
            return fault(trial, run, code)

        shutil.copytree(FIRST, run, dirs_exist_ok=True)
        code = trial.run(run, within)
        return roomy(code), code == CHECKPOINT

    found = []
    for number, size in enumerate(sizes):
        run, within = Path(f"full-{size}"), unforeseen if number % 2 else lambda: None
        found.append(elsewhere(run, partial(on_one, run, size, within)))
        clear(run)
    return row(f"file systems of {sizes[0]:,} to {sizes[-1]:,} bytes", found)


def read_only(trial: Trial) -> Row:
    """A folder on a file system that may only be read."""
    run = Path("shut")

    def act() -> tuple[str, bool]:
        mount("--bind", run, run)
        mount("-o", "remount,bind,ro", run)
        code = trial.run(run)
        mount("-o", "remount,bind,rw", run)
        named = said(run).startswith("error: shut") and "Read-only file system" in said(run)
        return ("" if code == CHECKPOINT and named else f"{code}: {said(run)}") or trial.fault(run), True

    shutil.copytree(FIRST, run)
    found = elsewhere(run, act)
    clear(run)
    return row("a read-only file system", [found])
