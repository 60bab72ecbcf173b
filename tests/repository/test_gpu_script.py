"""scripts/gpu tried on the CPU with tiny shapes: its list, its results, and that it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [str(ROOT / "scripts/gpu"), "--python", sys.executable]
TINY = ["--device", "cpu", "--tiny", "--out", "results"]


def script(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_the_list_names_every_row_of_the_table_with_minutes(tmp_path: Path) -> None:
    done = script(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:-1]}
    models = ("t5-v1_1-base", *(f"switch-base-{experts}" for experts in (8, 32, 64, 128)))
    rows = {f"step-{model}-{who}" for model in models for who in ("eager", "compiled", "transformers")}
    rows |= {f"step-{model}-compiled-sdpa" for model in models[::3]}
    rows |= {f"layer-{experts}" for experts in (8, 32, 64, 128)}
    assert rows <= lines.keys()
    assert {name for name in lines if name.startswith("tests-")} >= {"tests-layer", "tests-model", "tests-verbs"}
    assert all(0 < float(minutes) < 10 for minutes in lines.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_try_on_the_cpu_does_not_count_as_a_result_of_the_gpu(tmp_path: Path) -> None:
    only = ("--out", "results", "--only", "layer-8", "--dry-run")
    (tmp_path / "results").mkdir()
    found = {"status": "done", "device": "cpu", "tiny": True}
    (tmp_path / "results/layer-8.json").write_text(json.dumps(found))
    assert "[done]" in script(tmp_path, *TINY, *only).stdout
    assert "1 of 1 calls" in script(tmp_path, *only).stdout


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a call outlives a script that was killed")
def test_it_goes_on_after_a_kill_and_keeps_what_was_done(tmp_path: Path) -> None:
    chosen = ["--only", "step-t5-v1_1-base-eager", "--only", "step-switch-base-8-eager", "--only", "layer-8"]
    results = tmp_path / "results"
    with subprocess.Popen([*SCRIPT, *TINY, *chosen], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not list(results.glob("step-*.json")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)  # within the second call
        os.kill(process.pid, signal.SIGKILL)
    first = (results / "step-t5-v1_1-base-eager.json").read_bytes()
    assert len(list(results.glob("step-*.json"))) == 1
    done = script(tmp_path, *TINY, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (results / "step-t5-v1_1-base-eager.json").read_bytes() == first
    found = json.loads((results / "all.json").read_text())
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(found, "done")
    assert len(found) == 3
    step = found["step-switch-base-8-eager"]
    assert step["batch"] % 16 == 0
    assert step["tokens_per_second"]["least"] <= step["tokens_per_second"]["median"]
    assert step["share_of_ceiling"] > 0
    assert step["planned"]["tokens_per_second"] > 0
    assert step["planned"]["gib"] > 0
    ways = found["layer-8"]["ways"]
    assert all("seconds" in ways[name] for name in ("this layer", "grouped_mm alone", "batched products"))
    assert "not installed" in ways["ScatterMoE"]["absent"]
    again = script(tmp_path, *TINY, *chosen, "--dry-run")
    assert again.stdout.count("[done]") == 3
    assert "| t5-v1_1-base | eager |" in script(tmp_path, "--out", "results", "--report").stdout


@pytest.mark.integration
def test_a_step_of_the_trace_runs_with_values_too(tmp_path: Path) -> None:
    done = script(tmp_path, *TINY, "--only", "waits")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results/waits.json").read_text())
    assert found["status"] == "done"
    assert [row["faults"] for row in found["rows"].values()] == [[], []]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_kind_of_row_runs(tmp_path: Path) -> None:
    """So that a GPU is not needed to find what is trivially wrong. The rows left out differ in sizes only."""
    rows = ("switch-base-8-compiled", "t5-v1_1-base-compiled-sdpa", "t5-v1_1-base-transformers", "switch-base-8-transf")
    done = script(tmp_path, *TINY, *(argument for row in rows for argument in ("--only", f"step-{row}")))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results/all.json").read_text())
    assert [one["status"] for one in found.values()] == ["done"] * 4
    assert found["step-switch-base-8-compiled"]["flex_attention"] is False  # it needs CUDA
    table = script(tmp_path, "--out", "results", "--report").stdout
    assert sum(line.startswith(("| t5", "| switch")) for line in table.splitlines()) == 4


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_its_tests_run_without_plugins_and_failures_have_a_reason(tmp_path: Path) -> None:
    done = script(tmp_path, *TINY, "--only", "tests-layer")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results/tests-layer.json").read_text())
    assert (result["status"], result["failed"]) == ("done", {})
    assert result["passed"] > 5
    # A GPU is asked for: where there is none every test is skipped, which is not success.
    if not torch.cuda.is_available():
        missing = script(tmp_path, "--out", "none", "--only", "tests-layer", "--only", "layer-8")
        assert missing.returncode == 1
        failed = json.loads((tmp_path / "none/all.json").read_text())
        assert {one["status"] for one in failed.values()} == {"failed"}
        assert "no CUDA device" in failed["layer-8"]["reason"]
