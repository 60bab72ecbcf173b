"""A command in an odd environment works, or ends in one line with a fitting exit code.

Variables of ranks are in tests/commands/test_meeting.py, closed streams in tests/commands/test_startup.py.
"""

import os
import pwd
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.harness import at_home_in, run

HERE = Path(__file__).resolve().parents[2]
UNWRITABLE = "/proc/switchcli"
"""Nobody can make a folder here, not even root."""
MAY_FAIL = (0, 2, 3, 4)


class Case(NamedTuple):
    """Variables (None: unset), what is done before the command, and how it may end."""

    variables: Mapping[str, str | None] = {}
    codes: Sequence[int] = (0,)
    act: Callable[[], object] = lambda: None


def unknown_user() -> None:
    """Have this process's user ID be in no database, as `docker run --user 12345` does."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    pwd.getpwuid = unknown


def in_deleted_folder() -> None:
    Path("deleted").mkdir()
    os.chdir("deleted")
    Path("../deleted").rmdir()


NO_CACHE = {"SWITCHCLI_CACHE": None}
CASES = {
    "no HOME, unknown user": Case({"HOME": None, **NO_CACHE}, (2,), unknown_user),
    "no HOME, unknown user, a cache given": Case({"HOME": None}, act=unknown_user),
    "HOME unwritable": Case({"HOME": UNWRITABLE, **NO_CACHE}, (2, 4)),
    "HOME a file": Case({"HOME": "/dev/null", **NO_CACHE}, (2, 4)),
    "HOME empty": Case({"HOME": "", **NO_CACHE}, (0, 2, 4)),
    "HF_HOME unwritable": Case({"HF_HOME": UNWRITABLE}),
    "umask 777": Case({}, MAY_FAIL, lambda: os.umask(0o777)),
    "deleted working directory": Case({}, (2, 3, 4), in_deleted_folder),
    "unwritable working directory": Case({}, (2, 3, 4), lambda: os.chdir("/proc")),
    "TMPDIR missing": Case({"TMPDIR": "/nowhere"}),
    "cache a file": Case({"SWITCHCLI_CACHE": "text.txt"}, (2, 4)),
    "cache unwritable": Case({"SWITCHCLI_CACHE": UNWRITABLE}, (2, 4)),
    "cache empty": Case({"SWITCHCLI_CACHE": "", "HOME": "home"}),
    "cache not UTF-8": Case({"SWITCHCLI_CACHE": "\udcff"}, (0, 2, 4)),
    "cache with a long name": Case({"SWITCHCLI_CACHE": "x" * 300}, (2, 4)),
    "CUDA_VISIBLE_DEVICES=-1": Case({"CUDA_VISIBLE_DEVICES": "-1"}),
    "few open files": Case({}, MAY_FAIL, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))),
    "PATH empty": Case({"PATH": ""}),
    "a proxy that is none": Case({"http_proxy": "::", "https_proxy": "no proxy", "no_proxy": "*"}),
    "TOKENIZERS_PARALLELISM is text": Case({"TOKENIZERS_PARALLELISM": "x"}),
    "ACCELERATE_MIXED_PRECISION is text": Case({"ACCELERATE_MIXED_PRECISION": "x"}),
    "ACCELERATE_USE_FSDP": Case({"ACCELERATE_USE_FSDP": "true"}, (0, 2)),
}
FEW = ("no HOME, unknown user", "cache unwritable", "few open files")
"""The cases of the integration tests."""


def per_tier(is_one_of_few: bool) -> pytest.MarkDecorator:
    return pytest.mark.integration if is_one_of_few else pytest.mark.nightly


@pytest.mark.parametrize("name", [pytest.param(name, marks=per_tier(name in FEW)) for name in CASES])
def test_a_run_works_in_an_odd_environment_or_says_why_not(name: str, sound: Path) -> None:
    case = CASES[name]

    def within() -> None:
        for variable, value in case.variables.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        case.act()

    with at_home_in(sound):
        done = run("pretrain", "tiny.yaml", "--out", f"odd-{name}", within=within)
    assert done.code in case.codes, done.said
    assert "Traceback" not in done.said
    assert len(done.errors) == (done.code != 0)


STARTED = [
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    *({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "xx_YY.nothing", "LANG": "?"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}),
    *({"TERM": term} for term in ("dumb", "no such terminal")),
    *({"COLUMNS": columns, "LINES": columns} for columns in ("x", "0", "-1", "9" * 30)),
    *({"TZ": "No/Such/Zone"}, {"OMP_NUM_THREADS": "abc"}, {"GOMP_SPINCOUNT": "x", "OMP_NUM_THREADS": "0"}),
]
"""Variables that Python, OpenMP or a terminal's library reads when it starts."""


@pytest.mark.parametrize(
    "variables",
    [pytest.param(one, marks=per_tier(one is STARTED[0]), id=" ".join(one)) for one in STARTED],
)
def test_a_command_starts_in_an_odd_environment(variables: dict[str, str]) -> None:
    command = [sys.executable, "-m", "switchcli", "plan", "tiny", "--devices", "1"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=HERE, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
