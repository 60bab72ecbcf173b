"""scripts/published-model on a folder in the Hugging Face layout: what a user with a network is asked to share."""

import subprocess
from pathlib import Path

import pytest
from shared_runs import switchcli

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.integration
def test_the_report_has_each_step_with_its_exit_code(trained: Path, tmp_path: Path) -> None:
    switchcli("convert", trained, tmp_path / "model", "--to", "huggingface")
    script = [ROOT / "scripts/published-model", tmp_path / "model"]
    done = subprocess.run([*script, tmp_path / "out"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sections = (tmp_path / "out/report.md").read_text().split("\n## ")
    assert [section.split("\n")[0] for section in sections[1:]] == [
        *("Machine and versions", "Convert", "Doctor", "Loss and routing on Python's documentation", "An answer"),
    ]
    assert all("exit code 0" in section for number, section in enumerate(sections[1:]) if number != 2)
    assert "probes failed" in sections[3]
    refused = subprocess.run([*script, tmp_path / "out"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    missing = subprocess.run([script[0], tmp_path / "none", tmp_path / "other"], check=False, capture_output=True)
    assert missing.returncode != 0
    failed = (tmp_path / "other/report.md").read_text().partition("## Convert")[2]
    assert "exit code" in failed
    assert "exit code 0" not in failed
