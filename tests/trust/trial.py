"""A small run of each verb, and how it ends when nothing is done to it.

All happens in forks of this process, in the current folder. A run saves and evaluates every two steps of six, and logs
every step: equal metrics are then equal samples in equal order.
"""

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from drill import ended, fingerprint, leftovers, start
from tiny_run import RECIPE, WORDS, lay_out_tuning

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
