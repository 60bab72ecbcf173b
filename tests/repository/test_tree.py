"""Rules for the tree as a whole: what `--help` costs, what no tracked file holds, and the scripts."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SLOW_PACKAGES = {"torch", "numpy", "datasets", "pandas", "accelerate", "transformers", "safetensors", "tokenizers"}


def test_help_imports_nothing_slow() -> None:
    script = """
import json, runpy, sys
sys.argv = ["switchcli", "--help"]
try:
    runpy.run_module("switchcli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert not code
    assert "Usage" in done.stdout
    assert not SLOW_PACKAGES & set(modules), (
        "--help answers in under half a second: import late, in the verb that computes"
    )


LEFTOVERS = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:work|root|home)/"),
    "something put off: do it, or open an issue": re.compile(r"\b(?:T[O]DO|F[I]XME)\b"),
}


def leftovers(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        yield from (f"{number}: {what}" for what, pattern in LEFTOVERS.items() if pattern.search(line))


def test_no_leftovers_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    faults = []
    for path in filter(Path.is_file, (ROOT / name for name in listed.split("\0") if name)):
        content = path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8", errors="replace")
            faults += [f"{path.relative_to(ROOT)}:{fault}" for fault in leftovers(text)]
    assert not faults, "\n".join(faults)


def test_scripts_can_be_run_and_read() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "scripts", ".ci"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    for name in ("scripts/quickstart", "scripts/test", "scripts/check", "scripts/environment", ".ci/run"):
        if name != "scripts/environment":
            assert modes[name] == "100755", f"{name} is not executable: git update-index --chmod=+x {name}"
        subprocess.run(["bash", "-n", name], cwd=ROOT, check=True)


def test_commit_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]


def test_tests_have_no_network() -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="no network"):
        client.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports each by its name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(name for name in {*names} if names.count(name) > 1) == []
