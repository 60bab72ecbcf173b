"""Part metrics: a damaged metrics.jsonl, which a run that goes on, and a report, read as far as they can.

A run of two steps gets damage of one kind at one place. Then `switchcli report` shows it, and `switchcli pretrain` goes
on to a third step. Neither may end in a traceback. Afterwards metrics.jsonl holds every sound record, byte for byte and
in order, and the third step's; the damaged lines are in a file beside it; and the run says so.
"""

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from forked import command, faults
from table import Row
from tiny_run import RECIPE as TINY
from tiny_run import write_text

METRICS = Path("run/metrics.jsonl")
GO_ON = ("pretrain", "run/recipe.yaml", "train.steps=3", "--out", "run")
REPORT = ("report", "run", "--json")
LARGE_BYTES = 115 * 10**6
MORE_MEMORY_BYTES = 40 * 10**6
"""What going on may take more with a file of LARGE_BYTES than with a small one."""

LINES = {
    "half a record": b'{"step": 2, "neg_log',
    "an array": b"[1, 2]",
    "null": b"null",
    "a number": b"12",
    "a text": b'"step"',
    "nothing": b"",
    "spaces": b" \t ",
    "no step": b'{"loss": 1.0}',
    "a step as text": b'{"step": "2", "loss": 1.0}',
    "a step of null": b'{"step": null}',
    "a list for a step": b'{"step": [2]}',
    "an object for a step": b'{"step": {"step": 2}}',
    "a step with a fraction": b'{"step": 1.5}',
    "a step of true": b'{"step": true}',
    "a negative step": b'{"step": -1}',
    "a step of NaN": b'{"step": NaN}',
    "an infinite step": b'{"step": 1e999}',
    "a step of 400 digits": b'{"step": ' + b"9" * 400 + b"}",
    "a step of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "5,000 digits elsewhere": b'{"step": 2, "loss": ' + b"9" * 5000 + b"}",
    "nested lists": b'{"step": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "bytes that are not UTF-8": b'{"step": 2, "a": "\xff\xfe"}',
    "NUL bytes": b"\0" * 4096,
    "a line feed's worth of control characters": bytes(range(1, 10)) + b"\x1b[2J",
    "two records in a line": b'{"step": 1}{"step": 2}',
    "UTF-16": '{"step": 2}'.encode("utf-16").replace(b"\n", b""),
    "a line of 20 MB": b"x" * 20_000_000,
}
"""Lines that hold no record of a step, by what they are."""


class Trial(NamedTuple):
    """One damaged file."""

    what: str
    content: bytes
    kept: Sequence[bytes]
    """The records that must be there afterwards."""
    moved: bytes = b""
    """The lines that must lie in a file beside it."""
    warns: bool = False


def rows(folder: Path, long: bool) -> Iterator[Row]:
    """Yield one row per class. The short form tries one place of three, and no file of 115 MB."""
    with contextlib.chdir(folder):
        lay_out()
        sound = METRICS.read_bytes().splitlines(keepends=True)
        places = {"first": 0, "middle": len(sound) // 2, "last": len(sound)}
        for place, at in places.items():
            if long or place == "middle":
                trials = [with_a_line(what, line, sound, at) for what, line in LINES.items()]
                yield row(f"a line that is no record, put in as the {place} one", trials)
        yield row("files damaged as a whole", [*whole_files(sound)])
        if long:
            yield memory(sound)


def lay_out() -> None:
    """A run of two steps, in a fork, which leaves this process as it was."""
    write_text(Path("text.txt"))
    Path("tiny.yaml").write_text(TINY)
    make = ("pretrain", "tiny.yaml", "log.every_steps=1", "eval.every_steps=1", "--out", "sound", "--quiet")
    assert not faults(1, lambda _: command(*make).fault([0]))
    shutil.copytree("sound", "run")


def with_a_line(what: str, line: bytes, sound: Sequence[bytes], at: int) -> Trial:
    content = b"".join([*sound[:at], line + b"\n", *sound[at:]])
    return Trial(f"{what} at line {at + 1}", content, sound, line + b"\n", warns=True)


def whole_files(sound: Sequence[bytes]) -> Iterator[Trial]:
    whole = b"".join(sound)
    later = b'{"step": 3, "loss": 1.0}\n{"step": 9007199254740993}\n'
    yield Trial("empty", b"", [])
    yield Trial("without its last newline", whole[:-1], sound)
    yield Trial("cut in its last line", whole[:-9], sound[:-1])
    yield Trial("with steps to come", whole + later.splitlines(keepends=True)[0], sound)
    yield Trial("with a step beyond 2**53", whole + later, sound, later.splitlines(keepends=True)[1], warns=True)
    yield Trial("a torn line that another follows", whole + b'{"step": 2, "ne' + sound[-1], sound, warns=True)
    yield Trial("with Windows' line ends", whole.replace(b"\n", b"\r\n"), [line[:-1] + b"\r\n" for line in sound])
    yield Trial("with a byte order mark", b"\xef\xbb\xbf" + whole, [b"\xef\xbb\xbf" + sound[0], *sound[1:]])
    yield Trial("NaN", whole + b'{"step": 2, "a": NaN}\n', [*sound, b'{"step": 2, "a": NaN}\n'])
    yield Trial("a key twice", whole + b'{"step": 9, "step": 2}\n', [*sound, b'{"step": 9, "step": 2}\n'])
    yield Trial("with NUL bytes at its end, without a newline", whole + b"\0" * 100_000, sound)
    yield Trial("NUL bytes alone", b"\0" * len(whole), [])
    yield Trial("with a tail of 100 MB without a newline", whole + b"x" * 10**8, sound, warns=True)
    yield Trial("UTF-16", whole.decode().encode("utf-16"), [], warns=True)
    yield Trial("each line twice", b"".join(line * 2 for line in sound), [line for line in sound for _ in range(2)])
    yield Trial("of newlines alone", b"\n" * 1000, [], b"\n" * 1000, warns=True)


def row(what: str, trials: Sequence[Trial]) -> Row:
    found = faults(len(trials), lambda number: fault(trials[number]))
    return Row("metrics", what, len(trials), len(found), " ".join(found[0].split()) if found else "")


def fault(trial: Trial) -> str:
    """What is wrong with how the damaged file is taken, or nothing."""
    found = _fault(trial)
    return found and f"{trial.what}: {found}"


def _fault(trial: Trial) -> str:
    begin_with(trial.content)
    if found := command(*REPORT).fault([0]):
        return f"report: {found}"
    done = command(*GO_ON)
    if found := done.fault([0]):
        return found
    if trial.warns != (f"{METRICS}: " in done.err):
        return f"{'no' if trial.warns else 'a'} warning: {done.err[-200:]}"
    return _lost(trial)


def _lost(trial: Trial) -> str:
    """What is missing from the files of a run that has gone on."""
    lines = METRICS.read_bytes().splitlines(keepends=True)
    records = [json.loads(line.decode("utf-8-sig")) for line in lines]
    count = len(trial.kept)
    if lines[:count] != [*trial.kept]:
        return f"{count} sound lines became {len([line for line in lines if line in trial.kept])}"
    if {record["step"] for record in records[count:]} != {3}:
        return f"goes on with {records[count:]}"
    beside = Path(f"{METRICS}.damaged-1")
    if trial.moved and (not beside.exists() or beside.read_bytes() != trial.moved):
        return "the damaged lines are gone"
    return ""


def begin_with(content: bytes) -> None:
    """The run as it was after two steps, with this metrics file."""
    shutil.rmtree("run")
    shutil.copytree("sound", "run")
    METRICS.write_bytes(content)


def memory(sound: Sequence[bytes]) -> Row:
    """Peak memory of a fork that goes on with a large file, over that of one that goes on with a small one."""
    sizes = (0, LARGE_BYTES)
    found = faults(2, lambda number: goes_on_within(sizes[number], sound))
    peaks = [int(Path(f"peak-{size}").read_text()) for size in sizes] if not found else [0, 0]
    more = peaks[1] - peaks[0]
    said = " ".join(found[0].split()) if found else f"{max(more, 0) / 1e6:,.0f} MB more"
    return Row(
        "metrics", "memory to go on with a file of 115 MB", 1, int(bool(found) or more > MORE_MEMORY_BYTES), said
    )


def goes_on_within(size: int, sound: Sequence[bytes]) -> str:
    """Return what went wrong, or nothing. It runs in a fork, so that the peak memory is that of one command."""
    whole = b"".join(sound)
    begin_with(whole * (1 + size // len(whole)))
    return next(iter(faults(1, lambda _: go_on_and_note(size))), "")


def go_on_and_note(size: int) -> str:
    found = command(*GO_ON, "--quiet").fault([0])
    Path(f"peak-{size}").write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return found
