"""What a result says of the machine and the code that made it."""

import shutil
from pathlib import Path

import pytest

from switchcli.runs.devices import machine_info


def test_a_change_of_the_code_changes_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(machine_info.__file__).parents[2]
    copy = shutil.copytree(package, tmp_path / "switchcli", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(machine_info, "__file__", str(copy / "runs" / "devices" / "machine_info.py"))
    digest = machine_info.source_digest.__wrapped__
    assert digest() == machine_info.source_digest()
    with (copy / "spec.py").open("a") as file:
        file.write("#")
    assert digest() != machine_info.source_digest()
