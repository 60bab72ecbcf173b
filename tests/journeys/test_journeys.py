"""Six journeys of a new user: the scripts beside this file, each in an empty folder with only the wheel installed.

The wheel is built from this checkout and installed into an environment of its own, which finds the packages that
switchcli needs, but not this checkout. Nothing uses the network. The journeys share one cache, empty at first, as on a
user's machine. pytest's summary says how long each took; `--junitxml` records it.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
JOURNEYS = sorted(HERE.glob("*.sh"))
LIMIT_OF_PROCESSOR = 240
"""Processor seconds that a journey may take: on a machine without other work about its wall time."""
LIMIT_OF_WALL = 1500
"""Wall seconds after which `timeout` ends a journey and all that it has started, however busy the machine."""


def run(*command: str | Path, **options: object) -> str:
    """Return the output of a command, stdout and stderr together. Fails the test with it if the exit code is not 0."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}: {' '.join(map(str, command))}\n{done.stdout[-8000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a shell in whose environment the wheel of this checkout is installed."""
    base = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", base, ROOT)
    (wheel,) = base.glob("switchcli-*.whl")
    environment = base / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # A path in a .pth file is searched, but .pth files in it are not read: an editable install there is not seen.
    (packages,) = environment.glob("lib/python*/site-packages")
    others = (path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in others))

    (base / "home").mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "HF_"))}
    variables |= {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(base / "home"),
        "SWITCHCLI_CACHE": str(base / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",  # nothing listens there
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    found = run(python, "-c", "import switchcli; print(switchcli.__file__)", cwd=base, env=variables)
    assert Path(found.strip()).is_relative_to(packages), found
    return variables


@pytest.mark.timeout(LIMIT_OF_WALL + 100)
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            script, id=script.stem, marks=pytest.mark.nightly if script.name[0] > "1" else pytest.mark.integration
        )
        for script in JOURNEYS
    ],
)
def test_a_journey_arrives(
    script: Path, environment: dict[str, str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    began, used = time.monotonic(), _processor_seconds()
    run("timeout", "--kill-after=10", str(LIMIT_OF_WALL), "bash", script, cwd=tmp_path, env=environment)
    wall, processor = time.monotonic() - began, _processor_seconds() - used
    record_property("journey", script.stem)
    record_property("wall_seconds", round(wall))
    record_property("processor_seconds", round(processor))
    assert processor < LIMIT_OF_PROCESSOR


def test_there_are_six_journeys_and_bash_reads_them() -> None:
    assert [script.name[:2] for script in JOURNEYS] == ["1-", "2-", "3-", "4-", "5-", "6-"]
    for script in JOURNEYS:
        assert os.access(script, os.X_OK), f"{script.name} is not executable"
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")
        run("bash", "-n", script)


def _processor_seconds() -> float:
    """Return what the children of this process have used so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
