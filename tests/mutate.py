"""Applies each mutant of mutants.toml to a copy of the tree, runs its tests there, and prints the mutants that survive.

    scripts/test --mutants                    all mutants
    scripts/test --mutants training router    those whose file or text contains one of these words

A mutant is a small defect: one piece of text of one file, replaced by another. It is caught if one of its tests fails
or does not end; else it survives. All tests first run on the copy as it is: what fails there proves nothing.

Each run is a fork of one process that has imported torch and other packages, but nothing of switchcli: a run takes the
seconds of its tests, not of imports.
"""

import argparse
import compileall
import gc
import importlib
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple, NoReturn

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIST = TESTS / "mutants.toml"
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "numpy", "pytest", "hypothesis", "hypothesis.extra.numpy"),
    *("_hypothesis_pytestplugin", "xdist.plugin", "pytest_timeout", "pytest_cov.plugin", "anyio.pytest_plugin"),
    *("pydantic.main", "pydantic.json_schema", "typer", "rich.live", "rich.progress", "rich.table", "tokenizers"),
    *("accelerate", "datasets", "sacrebleu", "rouge_score.rouge_scorer", "transformers.models.t5.modeling_t5"),
    "transformers.models.switch_transformers.modeling_switch_transformers",
)
OPTIONS = (
    *(
        "-x",
        "-q",
        "-m",
        "not (integration or nightly)",
        "--hypothesis-profile=unit",
        "--hypothesis-seed=0",
        "--basetemp=../temporary",
    ),
    *("-p", "no:cacheprovider", "--assert=plain"),  # assertions are not rewritten: that takes time and explains more
)
FORKING = ("tests/faults/", "tests/runs/")
"""Where integration tests are cheap enough to find a mutant."""
SURVIVED = (0, 5)
"""Exit codes of pytest: all tests passed; no test ran."""
SECONDS = 300
"""How long the tests of one mutant may take."""


class Mutant(NamedTuple):
    """A defect, and the tests that are to find it."""

    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """Return the file's text with the defect. Raises ValueError unless the place is there exactly once."""
        if text.count(self.find) != 1:
            raise ValueError(f"{self.file}: {self.find!r} is there {text.count(self.find)} times, not once")
        return text.replace(self.find, self.replace)

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.find.split())!r} -> {' '.join(self.replace.split())!r}"


def mutants() -> list[Mutant]:
    """Return the mutants of the list, in its order."""
    rows = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(row["file"], row["find"], row["replace"], tuple(row["tests"])) for row in rows]


class Job(NamedTuple):
    """Tests to run, with a mutant or on the tree as it is."""

    tests: tuple[str, ...]
    mutant: Mutant | None = None


class Copy:
    """A copy of the tree, in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        # By default bytecode is valid for a size and a second: a mutant of equal size would not be seen. Files that are
        # compiled by their hash are compiled again by their hash.
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder / "switchcli", quiet=1, invalidation_mode=by_hash)

    def start(self, job: Job) -> int:
        """Run the tests in a new process, and return its ID."""
        if job.mutant is not None:
            path = self._folder / job.mutant.file
            self._original = path.read_text(encoding="utf-8")
            path.write_text(job.mutant.apply(self._original), encoding="utf-8")
        child = os.fork()
        if not child:
            self._run(job.tests)
        with suppress(OSError):  # both do it, so that it is done before either goes on
            os.setpgid(child, child)
        return child

    def _run(self, tests: Sequence[str]) -> NoReturn:
        code = 1
        try:
            os.setpgid(0, 0)
            os.chdir(self._folder)
            with Path("mutant.log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.path[0] = str(self._folder)  # was the folder of this file
            os.environ["PYTHONPATH"] = str(self._folder)  # processes that tests start use the copy too
            tiers = ["-m", "not nightly"] if any(test.startswith(FORKING) for test in tests) else []
            code = int(sys.modules["pytest"].main([*OPTIONS, *tiers, *tests]))
        except BaseException:  # noqa: BLE001 (this process must not go on as its parent)
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, process: int, job: Job) -> str:
        """Put the file back, end what the tests left running, and return what they printed."""
        with suppress(ProcessLookupError):
            os.killpg(process, SIGKILL)
        shutil.rmtree(self._folder / ".hypothesis", ignore_errors=True)  # examples that caught another mutant
        if job.mutant is not None:
            (self._folder / job.mutant.file).write_text(self._original, encoding="utf-8")
        return (self._folder / "mutant.log").read_text(errors="replace")


def results(jobs: Sequence[Job], copies: Sequence[Copy]) -> Iterator[tuple[Job, int, str]]:
    """Yield each job with pytest's exit code and its output, as jobs end."""
    free, waiting = [*copies], [*jobs]
    running: dict[int, tuple[Copy, Job, float]] = {}
    while waiting or running:
        while waiting and free:
            copy, job = free.pop(), waiting.pop(0)
            running[copy.start(job)] = copy, job, time.monotonic()
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            copy, job, _ = running.pop(process)
            output = copy.end(process, job)
            free.append(copy)
            yield job, os.waitstatus_to_exitcode(status), output
            continue
        for process, (_, _, began) in running.items():
            if time.monotonic() - began > SECONDS:
                os.killpg(process, SIGKILL)
        time.sleep(0.05)


def unchanged(mutants: Sequence[Mutant]) -> list[Job]:
    """Return the jobs that run all tests of these mutants on the tree as it is, one for each file of tests."""
    files = defaultdict[str, set[str]](set)
    for test in (test for mutant in mutants for test in mutant.tests):
        files[_file(test)].add(test)
    return [Job((file,) if file in tests else tuple(sorted(tests))) for file, tests in files.items()]


def _file(test: str) -> str:
    return test.partition("::")[0]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser("scripts/test --mutants")
    parser.add_argument("words", nargs="*", metavar="WORD", help="try the mutants whose file or text contains one")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    chosen = [one for one in mutants() if not asked.words or any(word in str(one) for word in asked.words)]
    for mutant in chosen:
        mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))  # none is tried if one is out of date
    # As tests/conftest.py sets them: before torch and the hub's client are imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage several times: not among all these objects
    failed: set[str] = set()
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(Path(folder, str(number), "tree")) for number in range(asked.workers)]
        for job, code, output in results(unchanged(chosen), copies):
            if code != 0:
                failed.add(_file(job.tests[0]))
                _say(f"fails without a mutant: {' '.join(job.tests)}\n{output[-2000:]}")
        tried = [Job(one.tests, one) for one in chosen if failed.isdisjoint(map(_file, one.tests))]
        for job, code, _ in results(tried, copies):
            if code in SURVIVED:
                survivors += 1
                _say(f"survived: {job.mutant}\n    {' '.join(job.tests)}")
    _say(f"{len(tried) - survivors} of {len(chosen)} mutants caught, {survivors} survived")
    return int(len(chosen) > len(tried) - survivors)


if __name__ == "__main__":
    sys.exit(main())
