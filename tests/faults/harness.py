"""Verbs that write files, each run in a fork on a disk that fails, and what must hold after.

All is data. A verb is a row of VERBS: its command, what it writes, and how that is compared. A fault is a row of
FAULTS: what happens at an operation, and what must hold then. `trial` does one fault to one verb at one operation:

    sound = lay_out(folder)                         # once a session: the texts, recipes and runs that VERBS name
    verb = Prepared.of(sound, "eval")               # once a verb: its output, and the operations that make it
    assert not verb.trial("power cut", at=3)        # what is wrong, or nothing

To add a verb: give it a row in VERBS, and what it reads a place in `lay_out`. All faults are then done to it.
To add a fault: give it a row in FAULTS. It is then done to all verbs. Where a verb may end otherwise than others, give
the pair a row in EXCEPTIONS. `run` is for tests of anything else that a command meets: it runs one in a fork.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from drill import fingerprint
from faults.disk import Disk, Operation, Strike, cut_power, kill, refuse, strike_at, strike_path_of
from tiny_run import RECIPE, lay_out_tuning, write_text

from switchcli.checkpoint.checkpoint import Checkpoint
from switchcli.cli import main
from switchcli.report import charts

PATIENCE = 240.0
"""Seconds until a command that does not end is killed."""
KILLED = -signal.SIGKILL
THERE_ALREADY = (2, 4)
"""Exit codes of a command whose output is there already: it was struck after that."""
STEPS = ("train.steps=4", "checkpoint.save_every_steps=2", "log.every_steps=1", "eval.every_steps=2")
"""Equal metrics are equal samples in equal order."""
CHILD = """\
#!/bin/sh
shift
words=$(printf '"%s", ' "$@")
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" && echo "{\\"command\\": [${words%, }]}" > "$2/result.json" && echo trained
"""
"""Stands for Python in a sweep, whose runs take seconds of their own to import: its result has the command's words."""


# Commands in forks


class Done(NamedTuple):
    """How a command ended."""

    code: int
    """Minus a signal's number for a death by one; 124 for a hang."""
    said: str

    @property
    def errors(self) -> list[str]:
        starts = ("error: ", *["warning: failed: "] * (self.code == 1))  # a sweep goes on with its other runs
        return [line for line in self.said.splitlines() if line.startswith(starts)]

    def names(self, *paths: Path) -> bool:
        """Whether an error or a warning is about one of these relative paths, a folder of it, or a path in that."""
        names = {place.name for path in paths for place in (path, *path.parents) if place.name}
        pattern = "|".join(map(re.escape, names))
        starts = re.compile(rf"(error|warning): (.*[ /])?({pattern})(/[^:]*)?: ")
        return any(map(starts.match, self.said.splitlines()))


def run(*arguments: object, within: Callable[[], object] = lambda: None) -> Done:
    """`switchcli ARGUMENTS` in a fork of this process, after `within`.

    What it had to import is imported here afterwards, so that no fork imports it again.
    """
    imported = Path(tempfile.gettempdir(), f"imported-{os.getpid()}")

    def and_tell_of_imports() -> None:
        before, leave = set(sys.modules), os._exit

        def tell(code: int) -> NoReturn:
            with contextlib.suppress(OSError):
                imported.write_text("\n".join(name for name in sys.modules if name not in before))
            leave(code)

        os._exit = tell  # type: ignore[assignment]
        within()

    done = _run(arguments, and_tell_of_imports)
    if imported.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in imported.read_text().split():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        imported.unlink()
    return done


def _run(arguments: Sequence[object], within: Callable[[], object]) -> Done:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        _run_and_exit(arguments, within, writes)
    os.close(writes)
    said, deadline, ready = b"", time.monotonic() + PATIENCE, select.poll()  # select knows 1,024 descriptors
    ready.register(reads, select.POLLIN)
    while ready.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
        if not (piece := os.read(reads, 1 << 16)):
            break
        said += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reads)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Done(124 if time.monotonic() > deadline else code, said.decode(errors="replace"))


def _run_and_exit(arguments: Sequence[object], within: Callable[[], object], output: int) -> None:
    code = 1  # the code of no error of a user's
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: PTH123, SIM115
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has had ignored
        warnings.resetwarnings()
        sys.argv = ["switchcli", *map(str, arguments)]
        within()
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001  # what no user should see is what is looked for
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# Verbs


class Verb(NamedTuple):
    """A command, and the file or folder that it writes."""

    command: str
    output: str = "out"
    replaces: bool = False
    """Whether the output is there before the command starts."""
    trains: bool = False
    """Whether the output is a run, which the same command goes on with."""
    is_remade: bool = False
    """Whether what is lost of the output is made again: caches and sweeps, whose folders are not synced."""
    within: Callable[[], object] = lambda: None
    """What its fork does first."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


def stand_in_for_python() -> None:
    """Have a sweep start CHILD in place of Python."""
    Path("child").write_text(CHILD)
    Path("child").chmod(0o755)
    sys.executable = str(Path("child").absolute())


def draw_no_charts() -> None:
    """Have a figure's files hold its name: to draw them all takes seconds."""
    charts.svg = lambda figure: figure.name
    charts.png = lambda figure: figure.name.encode()


TOKENIZER = "'data.tokenizer={kind: file, path: run/tokenizer.json}'"
"""What two preparations share: of equally frequent words a trained vocabulary takes any."""
VERBS = {
    "pretrain": Verb(f"pretrain tiny.yaml {' '.join(STEPS)} --out out", trains=True),
    "finetune": Verb(
        f"finetune tune.yaml --model run {' '.join(STEPS)} scoring.decoding.max_tokens=2 --out out", trains=True
    ),
    "distill": Verb(f"distill --teacher run {' '.join(STEPS)} --out out", trains=True),
    "sweep": Verb(
        "sweep pretrain tiny.yaml train.seed=0,1 --jobs 1 --out out", is_remade=True, within=stand_in_for_python
    ),
    "eval": Verb("eval run --out out", replaces=True),
    "convert --to huggingface": Verb("convert run out --to huggingface"),
    "convert --to switchcli": Verb("convert theirs out --to switchcli"),
    "upcycle": Verb("upcycle dense out --experts 4"),
    "prune": Verb("prune run out --experts 2 text.sequences=4"),
    "data prepare": Verb(f"data prepare tiny.yaml {TOKENIZER}", output="cache", is_remade=True),
    "data tokenizer train": Verb("data tokenizer train tiny.yaml --out out --force", replaces=True),
    "report --html": Verb("report run --html out", replaces=True),
    "report --routing --html": Verb("report run --routing --html out", replaces=True),
    "report --figures": Verb("report run --figures out", replaces=True, within=draw_no_charts),
    "recipes copy": Verb("recipes copy quickstart/switch out"),
}


def lay_out(folder: Path) -> Path:
    """Lay out the texts, recipes and runs that VERBS name. The cache of a command is that of its current folder."""
    sound = folder / "sound"
    sound.mkdir(parents=True)
    with at_home_in(sound):
        write_text(Path("text.txt"))
        Path("tiny.yaml").write_text(RECIPE)
        lay_out_tuning(sound)
        for command in (
            f"pretrain tiny.yaml {STEPS[3]} {STEPS[2]} --out run --quiet",
            "pretrain tiny.yaml model.num_experts=1 train.steps=1 --out dense --quiet",
            "convert run theirs --to huggingface",
        ):
            done = run(*command.split())
            assert done.code == 0, done.said
    return sound


@contextlib.contextmanager
def at_home_in(folder: Path) -> Iterator[None]:
    """Make a folder the current one, with the cache in it."""
    before = os.environ.get("SWITCHCLI_CACHE")
    os.environ["SWITCHCLI_CACHE"] = "cache"
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        os.environ.pop("SWITCHCLI_CACHE")
        if before is not None:
            os.environ["SWITCHCLI_CACHE"] = before


# Faults


class Fault(NamedTuple):
    """What happens at an operation of a command, and what must hold after it.

    After every fault: no traceback; each checkpoint of a run is whole; an output that was to be replaced is there, or
    comes back; and once the same command has run again, a day later, the output is that of a command that nothing
    happened to, and no temporary file is left.
    """

    strike: Callable[[int], Strike]
    codes: tuple[int, ...]
    """Exit codes that the command may end with. With one that is not 0 it says in one line which path, and the fix."""
    few: int = 2
    """At how many operations it strikes where all would take too long."""
    evenly: bool = False
    """Whether these few are chosen evenly among all, and not those that matter most."""
    reads: bool = False
    """Whether reads are struck, and not writes."""
    at_end: bool = False
    """Whether power is lost as the command ends: its output is there then, and a run goes on from a checkpoint."""
    may_leave: bool = True
    """Whether the command may leave temporary files to the next one, and an output in its place aside."""


ROOM = ("write", "make", "sync")
"""Operations that need room on a disk."""


def limit_files(disk: Disk, operation: Operation) -> None:
    """Have writes fail in the middle of a file, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS = {
    "kill": Fault(lambda at: strike_at(at, kill), (KILLED,), few=3, evenly=True),
    "power cut": Fault(lambda at: strike_at(at, cut_power), (KILLED,), few=4),
    "power cut after it": Fault(lambda at: lambda disk, operation: None, (0,), few=1, at_end=True),
    "full disk": Fault(lambda at: strike_at(at, refuse(errno.ENOSPC, *ROOM)), (0, 4), may_leave=False),
    "full in a file": Fault(lambda at: strike_at(at, limit_files), (0, 4), few=1, may_leave=False),
    "one error": Fault(lambda at: strike_at(at, refuse(errno.EIO), for_good=False), (0, 4), few=3),
    "unreadable file": Fault(lambda at: strike_path_of(at, refuse(errno.EIO)), (0, 2, 3, 4), reads=True),
}
EXCEPTIONS = {(fault, "sweep"): (0, 1, 4) for fault in ("full disk", "full in a file", "one error")}
"""Exit codes where a verb may end otherwise than others under a fault."""


class Prepared(NamedTuple):
    """A verb that is ready to be struck."""

    name: str
    folder: Path
    """Holds `before` and `after`, what the verb starts from and leaves, and `tried`, a trial's copy of one of them."""
    wanted: dict[str, str]
    """The digests of its output when nothing happens."""
    writes: list[Operation]
    reads: list[Operation]

    @classmethod
    def of(cls, sound: Path, name: str) -> "Prepared":
        verb, folder = VERBS[name], sound.parent / name.replace(" ", "-")
        shutil.copytree(sound, folder / "before", symlinks=True)
        with at_home_in(folder / "before"):
            if verb.output == "cache":
                shutil.rmtree("cache")
            if verb.replaces:
                made = run(*verb.words, within=verb.within)
                assert made.code == 0, made.said
        found = cls(name, folder, {}, [], [])
        operations = []
        for reads in (False, True):
            with found.tried():
                done = run(*verb.words, within=lambda reads=reads: found._count(reads))
                assert done.code == 0, done.said
                rows = [json.loads(line) for line in (folder / "operations").read_text().splitlines()]
                operations.append([Operation(kind, Path(path), at) for at, (kind, path) in enumerate(rows)])
                wanted = digests(verb)
        shutil.move(folder / "tried", folder / "after")
        return found._replace(wanted=wanted, writes=operations[0], reads=operations[1])

    @contextlib.contextmanager
    def tried(self, copied: str = "before") -> Iterator[None]:
        """Make the current folder a copy of the files before the verb, or after it."""
        for left in self.folder.glob("tried*"):
            shutil.rmtree(left)
        shutil.copytree(self.folder / copied, self.folder / "tried", symlinks=True)
        with at_home_in(self.folder / "tried"):
            yield

    def _count(self, reads: bool) -> None:
        """In a fork: write down each operation."""
        VERBS[self.name].within()
        log = (self.folder / "operations").open("w", buffering=1)

        def note(disk: Disk, operation: Operation) -> None:
            log.write(f"{json.dumps([operation.kind, str(operation.path)])}\n")

        Disk(Path.cwd(), note, reads=reads).__enter__()

    @property
    def verb(self) -> Verb:
        return VERBS[self.name]

    def operations(self, fault: str, few: bool) -> list[int]:
        """Return the operations to strike: all, or a few: the first, the last rename, one by chance, and the last; or
        the middle ones of equal parts."""
        all_of_them = self.reads if FAULTS[fault].reads else self.writes
        if not few or not all_of_them:
            return [operation.number for operation in all_of_them][: 1 if FAULTS[fault].at_end else None]
        parts = FAULTS[fault].few
        if FAULTS[fault].evenly:
            return sorted({(2 * part + 1) * len(all_of_them) // (2 * parts) for part in range(parts)})
        renames = [operation.number for operation in all_of_them if operation.kind == "rename"]
        by_chance = random.Random(f"{self.name} {fault}").randrange(len(all_of_them))
        chosen = dict.fromkeys([0, *renames[-1:], by_chance, len(all_of_them) - 1])
        return sorted([*chosen][:parts])

    def trial(self, name: str, at: int) -> str:
        """What is wrong after a fault, and once the same command has run again; nothing if all is well."""
        verb, fault = self.verb, FAULTS[name]

        def strike() -> None:
            verb.within()
            disk, leave = Disk(Path.cwd(), fault.strike(at), reads=fault.reads), os._exit

            def lose_power_and_leave(code: int) -> NoReturn:
                disk.lose_power()
                leave(code)

            if fault.at_end:
                os._exit = lose_power_and_leave  # type: ignore[assignment]
            disk.__enter__()

        with self.tried():
            done = run(*verb.words, within=strike)
            wrong = self._wrong(done, fault, EXCEPTIONS.get((name, self.name), fault.codes))
            struck = self.reads[at : at + 1] if fault.reads else self.writes[at:]
            paths = {one.path.relative_to(Path.cwd()) for one in struck}
            if not wrong and done.code > 0 and not done.names(Path(verb.output), *paths):
                wrong = f"does not say which path: {done.said}"
            if not wrong and not (fault.reads and done.code == 0 and not verb.trains):  # it did without the file
                wrong = self.goes_on()
        return wrong and f"{self.name}: {name} at {at} ({struck[0].kind} {struck[0].path.name}): {wrong}"

    def _wrong(self, done: Done, fault: Fault, codes: Sequence[int]) -> str:
        verb = self.verb
        if done.code not in codes or "Traceback" in done.said:
            return f"exit code {done.code}: {done.said[-800:]}"
        if done.code > 0 and (not done.errors or (done.code > 1 and len(done.errors) > 1)):
            return f"says not one line of what is wrong: {done.said}"
        if verb.replaces:
            kept = [Path(verb.output), *(Path().glob(".tmp-*/old/*") if fault.may_leave else ())]
            if done.code != 0 and not any(self.wanted.items() <= digests(verb, one).items() for one in kept):
                return "what was to be replaced is gone"
        for checkpoint in Path(verb.output).glob("checkpoints/step-*"):
            Checkpoint.open(checkpoint)
        is_lost = fault.at_end and verb.trains and not [*Path(verb.output).glob("checkpoints/step-*")]
        is_final = done.code == 0 and not (fault.reads or verb.trains or verb.is_remade)
        if is_lost or (is_final and digests(verb) != self.wanted):
            return "what it has said is done is not"
        if not fault.may_leave and (left := leftovers()):
            return f"left {left}"
        return ""

    def goes_on(self, said: str = "") -> str:
        """What is wrong once the command has run again, a day later; nothing if all is well.

        What it says must match the pattern `said`.
        """
        verb = self.verb
        pass_a_day()
        done = run(*verb.words, within=verb.within)
        if done.code not in (0, *THERE_ALREADY):
            return f"then exit code {done.code}: {done.said[-800:]}"
        if not re.search(said, done.said):
            return f"does not say so: {done.said}"
        found = digests(verb)
        if found != self.wanted:
            differing = sorted(name for name in found.keys() | self.wanted if found.get(name) != self.wanted.get(name))
            return f"then another output, in {differing} (exit code {done.code}): {done.said[-800:]}"
        return f"then left {left}" if (left := leftovers()) else ""


def pass_a_day() -> None:
    """Make what a killed command left older than a day: the next writer of the same output removes it then."""
    for left in leftovers():
        for path in (Path(left), *Path(left).rglob("*")):
            os.utime(path, times=(0, 0), follow_symlinks=False)


def leftovers() -> list[str]:
    """Temporary files below the current folder."""
    return [str(path) for path in Path().rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


NOT_COMPARED = ("run.lock", "teacher.json", "checked.json")
"""Files that hold a process's number, seconds or times of files."""
MINUTE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
"""The time at which a page was made."""


def digests(verb: Verb, output: Path | None = None) -> dict[str, str]:
    """What is to be equal of two outputs: the end of a run, or a digest of every file by its place."""
    path = output or Path(verb.output)
    if verb.trains:
        return fingerprint(path)
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    files = [one for one in files if one.name not in NOT_COMPARED]
    return {str(one.relative_to(path)): _digest(one) for one in files}


def _digest(path: Path) -> str:
    content = MINUTE.sub(b"", path.read_bytes())
    if content.startswith(b'{"version"') and b'"vocab"' in content:  # of equally frequent words any is taken
        return str(len(json.loads(content)["model"]["vocab"]))
    return hashlib.sha256(content).hexdigest()
