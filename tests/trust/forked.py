"""Trials in a fork of this process, which has imported everything: a crash or a hang ends one of them, and is counted.

A fork saves the seconds that importing torch takes. Commands run in it as the user's do, by the entry point of the
command line, on streams that take UTF-8 alone.
"""

import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from switchcli.cli import main
from switchcli.errors import SwitchError
from switchcli.runs import (  # noqa: F401  # for the forks
    conversion,
    eval_job,
    finetuning,
    run_comparison,
    text_generation,
    trainer,
)

CPU_SECONDS = 5.0
"""Of one trial on what is tiny or refused: more is a hang. Its own seconds, so that a busy machine does not count."""
PATIENCE = 120
"""Seconds on the clock until a trial that does not end is killed: a hang that waits."""
MEMORY_BYTES = 2**34
"""Of the fork: what asks for more gets a MemoryError, which is a traceback."""
UNSAFE = frozenset(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F]))
UNSAFE |= frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
"""What a terminal acts on, or what reorders what is read; said again here, so that safe_text is not its own judge."""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    def fault(self, codes: Sequence[int]) -> str:
        """What is wrong with an end that should have one of these exit codes; nothing for a good one."""
        if "Traceback" in self.err:
            return f"a traceback: {self.err.strip().splitlines()[-1][:200]}"
        if unsafe := UNSAFE & {*self.said}:
            return f"prints {sorted(map(ascii, unsafe))}"
        return "" if self.code in codes else f"exit code {self.code}: {self.said.strip()[-200:]}"


def command(*arguments: object, stdin: str = "") -> Done:
    """`switchcli ARGUMENTS` in this process. What it raises that no user should see is a traceback on its stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr, os._exit
    sys.argv, sys.stdin = ["switchcli", *map(str, arguments)], io.StringIO(stdin)
    sys.stdout, sys.stderr = streams
    os._exit = _leave  # type: ignore[assignment]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001  # what no user should see is what is looked for
        traceback.print_exc()
        code = 1
    finally:
        for stream in streams:
            stream.flush()
        sys.argv, sys.stdin, sys.stdout, sys.stderr, os._exit = before
    return Done(code, *(stream.buffer.getvalue().decode() for stream in streams))  # type: ignore[attr-defined]


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)


def refused(act: Callable[[], object]) -> str:
    """The fault of what may be done, or refused by a SwitchError, and nothing else."""
    try:
        act()
    except SwitchError as error:
        return "" if error.exit_code in (2, 3, 4) else f"exit code {error.exit_code}: {error}"
    except BaseException as error:  # noqa: BLE001
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"
    return ""


def faults(count: int, act: Callable[[int], str], patience: int = PATIENCE) -> list[str]:
    """What went wrong in `act(0)` to `act(count - 1)`, each of which says what did, or nothing."""
    found, done = [], 0
    while done < count:
        told, end = _forked(range(done, count), act, patience)
        found += [f"trial {done + place}: {said}" for place, said in enumerate(told) if said]
        done += len(told)
        if done < count:
            found.append(f"trial {done}: {end}")
            done += 1
    return found


def _forked(numbers: range, act: Callable[[int], str], patience: int) -> tuple[list[str], str]:
    """What was said of each, up to the one that ended the fork, and how that did."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        _try(numbers, act, writes, patience)
    os.close(writes)
    with os.fdopen(reads) as lines:
        told = [json.loads(line) for line in lines]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return told, "hangs, waiting" if code == -signal.SIGALRM else f"killed: exit code {code}"


def _try(numbers: range, act: Callable[[int], str], writes: int, patience: int) -> NoReturn:
    """In the fork: a line for each, as soon as it is known."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in other languages have words of their own
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for number in numbers:
            signal.alarm(patience)
            began = time.process_time()
            said = act(number)
            seconds = time.process_time() - began
            said = said or (f"takes {seconds:.1f} s" if seconds > CPU_SECONDS else "")
            os.write(writes, f"{json.dumps(said)}\n".encode())
    except BaseException:  # noqa: BLE001
        os.write(writes, f"{json.dumps(f'the trial itself: {traceback.format_exc()[-300:]}')}\n".encode())
    finally:
        os._exit(1)
