"""What a process has set up when it imports torch: a torch of the test's own looks, and ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = "import os, sys; sys.stdout.write(os.environ.get('GOMP_SPINCOUNT', 'default')); sys.stdout.flush(); os._exit(0)"
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
VERBS = {
    "pretrain": ["pretrain", "quickstart/switch"],
    "eval": ["eval", "m"],
    "generate": ["generate", "m", "text"],
    "plan": ["plan", "quickstart/switch"],
}


def seen_by_torch(folder: Path, arguments: list[str], **variables: str) -> str:
    """Return GOMP_SPINCOUNT as it is when the command imports torch."""
    (folder / "torch.py").write_text(TORCH)
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "switchcli", *arguments],
        env={**environment, **variables, "PYTHONPATH": os.pathsep.join([str(folder), root])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.unit("pretrain")
@pytest.mark.parametrize("verb", ["pretrain", "eval", "generate", "plan"])
def test_threads_of_openmp_sleep_soon_at_a_barrier(verb: str, tmp_path: Path) -> None:
    assert seen_by_torch(tmp_path, VERBS[verb]) == "2000"


@pytest.mark.integration
@pytest.mark.parametrize("variable", SPINNING)
def test_a_user_who_says_how_long_threads_spin_is_obeyed(variable: str, tmp_path: Path) -> None:
    expected = "200" if variable == "GOMP_SPINCOUNT" else "default"
    assert seen_by_torch(tmp_path, VERBS["plan"], **{variable: "200"}) == expected


STREAMS = """
import os, sys
from pathlib import Path
from switchcli.system import startup
startup.reopen_closed_streams()
with Path("first").open("w") as file:
    print("to stdout")
    os.write(1, b"to descriptor 1")
    print("to stderr", file=sys.stderr)
    file.write(f"{sys.stdin.read()!r}, {sorted(map(os.get_inheritable, range(3)))}")
"""


@pytest.mark.integration
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ""])
def test_a_stream_that_the_shell_closed_is_empty_and_no_file_takes_its_place(closed: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, STREAMS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert (tmp_path / "first").read_text() == "'', [True, True, True]"


INTERRUPT = """
import os, signal, sys
from switchcli import __main__
module = sys.argv.pop(1)
class Interrupting:
    def find_spec(self, name, *rest):
        if name == module:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
__main__.main()
"""
"""A command at whose import of a module Ctrl-C comes twice."""


@pytest.mark.integration
@pytest.mark.parametrize(("module", "verb"), [("typer", "pretrain"), ("switchcli.recipe.schema", "sweep")])
def test_two_interrupts_during_the_imports_end_in_one_line(module: str, verb: str, tmp_path: Path) -> None:
    arguments = ["pretrain", "quickstart/dense", "train.steps=1", "--out", "runs"]
    command = [sys.executable, "-c", INTERRUPT, module, *([verb] if verb == "sweep" else []), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (75, 130), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


IMPORTS = """
import sys
from switchcli.cli import main
try:
    main()
except SystemExit:
    pass
print(*{*sys.modules} & {"torch", "numpy", "datasets", "transformers", "accelerate", "pyarrow"}, file=sys.stderr)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("command", "may_import"),
    [
        ("recipes validate quickstart/switch finetune/glue", {"numpy"}),
        ("recipes explain model.router", {"numpy"}),
        ("report {dense} {trained} --html page.html", {"numpy"}),
        ("data tokenizer show {trained} red", {"numpy"}),
        ("complete", set()),
    ],
)
def test_what_needs_no_model_imports_nothing_slow(
    command: str, may_import: set[str], trained: Path, dense: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if command == "complete":  # a tab
        environment |= {"_SWITCHCLI_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        environment["_TYPER_COMPLETE_ARGS"] = "switchcli pretrain quick"
    words = command.format(trained=trained, dense=dense).split()
    script = [sys.executable, "-c", f"import sys; sys.argv[0] = 'switchcli'\n{IMPORTS}"]
    done = subprocess.run([*script, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {*done.stderr.splitlines()[-1].split()} <= may_import
    assert done.stdout
