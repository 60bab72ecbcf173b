"""A small run of each verb, what can be done to its disk from within, and how it ends when nothing is.

All happens in forks of this process, in the current folder. A run saves and evaluates every two steps of six, and logs
every step: equal metrics are then equal samples in equal order.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from drill import ended, fingerprint, leftovers, start
from faulty_files import FaultyFiles, LossyFiles, kill
from tiny_run import RECIPE, WORDS, lay_out_tuning

from switchcli.checkpoint.fsops import DiskOperations, FileOperations

OPERATIONS = ("make_dir", "write", "sync", "rename", "remove_tree")
REAL: FileOperations = type("Real", (), {name: vars(DiskOperations)[name] for name in OPERATIONS})()
"""The disk as it is before `put_under` has a run use another."""
STEPS = 6
SETTINGS = ["checkpoint.save_every_steps=2", "log.every_steps=1", "eval.every_steps=2"]
PATIENCE = 240.0
NOTHING: Mapping[int, Callable[[], None]] = MappingProxyType({})


class Trial(NamedTuple):
    """A verb's run of STEPS steps."""

    command: tuple[str, ...]
    wanted: dict[str, str]
    """The fingerprint of one that nothing happens to."""

    def begin(self, run: Path, within: Callable[[], None] = lambda: None, *more: str) -> int:
        return start([*self.command, *more, "--out", run], log_of(run), within)

    def run(self, run: Path, within: Callable[[], None] = lambda: None, *more: str) -> int | None:
        """The exit code; None for a hang."""
        return ended(self.begin(run, within, *more), PATIENCE)

    def together(
        self, world: int, run: Path, within: Mapping[int, Callable[[], None]] = NOTHING, *more: str
    ) -> dict[int, int | None]:
        """The exit codes of `world` ranks, as torchrun starts and ends them, in the order in which they ended; `within`
        by rank.

        They are a process group of their own. The first that fails has the others end by SIGTERM; None is one that
        hangs.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def rank_of(rank: int) -> None:
            if world > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
                )
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            within.get(rank, lambda: None)()

        left: dict[int, int] = {}
        for rank in range(world):
            left[rank] = self.begin(run, partial(rank_of, rank), *more)
            os.setpgid(left[rank], left[0])
        codes: dict[int, int | None] = {}
        until = time.monotonic() + PATIENCE
        while left and time.monotonic() < until:
            for rank, child in [*left.items()]:
                if (code := ended(child, 0)) is not None:
                    codes[rank] = code
                    del left[rank]
                    if code and len(codes) == 1:
                        time.sleep(0.1)  # as often as torchrun looks
                        for other in left.values():
                            os.kill(other, signal.SIGTERM)
            time.sleep(0.001)
        for rank, child in left.items():
            os.kill(child, signal.SIGKILL)
            ended(child, PATIENCE)
            codes[rank] = None
        return codes

    def fault(self, run: Path) -> str:
        """What is wrong with a run once the same command has gone on with it to its end; nothing if all is well."""
        code = self.run(run)
        if code != 0:
            return f"{run.name}: then exit code {code}: {said(run)}"
        return self.differs(run)

    def differs(self, run: Path) -> str:
        """In what the end of a run is not that of one that nothing happens to, and what it has left."""
        found = fingerprint(run)
        differing = [name for name in self.wanted if found[name] != self.wanted[name]]
        if differing or leftovers(run):
            return f"{run.name}: differs in {', '.join(differing)}; left {leftovers(run)}"
        return ""


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def said(run: Path) -> str:
    """The last line of what it has said."""
    lines = log_of(run).read_text(errors="replace").strip().splitlines() if log_of(run).exists() else []
    return lines[-1] if lines else ""


def clear(run: Path) -> None:
    """Remove a run that has been looked at."""
    shutil.rmtree(run, ignore_errors=True)
    log_of(run).unlink(missing_ok=True)


@contextmanager
def trials(folder: Path, verbs: str = "pretrain") -> Iterator[dict[str, Trial]]:
    """A trial of each verb, in `folder`, which is the current one within."""
    folder = folder.resolve()
    cache = os.environ.get("SWITCHCLI_CACHE")
    os.environ["SWITCHCLI_CACHE"] = str(folder / "cache")
    try:
        with chdir(folder):
            draw = random.Random(0)
            Path("text.txt").write_text("".join(" ".join(draw.choices(WORDS, k=40)) + "\n" for _ in range(300)))
            Path("tiny.yaml").write_text(RECIPE)
            lay_out_tuning(folder)
            found = {"pretrain": _trial(["pretrain", "tiny.yaml"])}
            teacher = str(_straight("pretrain"))
            others = {
                "background": ["pretrain", "tiny.yaml", "checkpoint.background=true"],
                "finetune": ["finetune", "tune.yaml", "--model", teacher, "scoring.decoding.max_tokens=2"],
                "distill": ["distill", "--teacher", teacher],
            }
            for verb in verbs.split():
                found.setdefault(verb, _trial(others[verb], verb) if verb in others else found["pretrain"])
            yield {verb: found[verb] for verb in verbs.split()}
    finally:
        os.environ.pop("SWITCHCLI_CACHE")
        if cache is not None:
            os.environ["SWITCHCLI_CACHE"] = cache


def _straight(verb: str) -> Path:
    return Path.cwd() / f"straight-{verb}"


def _trial(command: list[str], verb: str = "pretrain") -> Trial:
    verb_first, *rest = command
    whole = (verb_first, *rest, f"train.steps={STEPS}", *SETTINGS)
    run = _straight(verb)
    trial = Trial(whole, {})
    code = trial.run(run)
    assert code == 0, f"{code}: {log_of(run).read_text()}"
    return trial._replace(wanted=fingerprint(run))


# What is done to a disk from within a run


def put_under(files: FileOperations) -> None:
    """Have every save of this process go to `files`."""
    for name in OPERATIONS:
        setattr(DiskOperations, name, lambda self, *arguments, _name=name: getattr(files, _name)(*arguments))


class Beside:
    """What a run writes beside its checkpoints (recipe, vocabulary, metrics, result), as Python tells of it.

    `step` is called before each file is opened to be written, renamed, cut or removed, and before each folder is made.
    What was written since it was last synced is what `lose_power` cuts off.
    """

    def __init__(self, run: Path, step: Callable[[], object]) -> None:
        self._run, self._checkpoints = run.absolute(), run.absolute() / "checkpoints"
        self._step = step
        self._synced: dict[Path, int] = {}

    def _path(self, name: Any) -> Path | None:
        """The path of a file of the run, but not one of its checkpoints."""
        path = Path(f"/proc/self/fd/{name}").readlink() if isinstance(name, int) else Path(os.fsdecode(name)).absolute()
        return path if path.is_relative_to(self._run) and not path.is_relative_to(self._checkpoints) else None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event == "open" and (isinstance(arguments[0], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        path = self._path(arguments[0])
        if path is None:
            return
        self._step()
        if event == "open":
            old = path.stat().st_size if path.exists() and not arguments[2] & os.O_TRUNC else 0
            self._synced.setdefault(path, old)
        elif event == "os.rename" and path in self._synced:
            self._synced[Path(os.fsdecode(arguments[1])).absolute()] = self._synced.pop(path)

    def sync(self, descriptor: int) -> None:
        """Called before os.fsync."""
        path = self._path(descriptor)
        if path is not None:
            self._synced.pop(path, None)

    def lose_power(self) -> None:
        for path, size in self._synced.items():
            if path.exists():
                os.truncate(path, size)


def strike_at(at: int, run: Path, strike: Callable[[], None], *, for_good: bool = True) -> None:
    """In a fork: have operation `at` of the run, on its checkpoints or beside them, struck."""
    _install(FaultyFiles(at, strike, for_good=for_good, disk=REAL), run)


def lose_power_at(at: int, run: Path) -> None:
    """In a fork: at operation `at` drop all that was not synced, and die."""
    lossy = LossyFiles(REAL)

    def lose() -> None:
        lossy.lose_power()
        beside.lose_power()
        kill()

    beside = _install(FaultyFiles(at, lose, disk=lossy), run)


def _install(files: FaultyFiles, run: Path) -> Beside:
    put_under(files)
    striking = False

    def step() -> None:
        nonlocal striking
        if not striking:  # what a strike itself does is no operation of the run
            striking = True
            try:
                files.step()
            finally:
                striking = False

    beside = Beside(run, step)
    sys.addaudithook(beside)
    sync = os.fsync

    def noted(descriptor: int) -> None:
        beside.sync(descriptor)
        sync(descriptor)

    os.fsync = noted
    return beside
