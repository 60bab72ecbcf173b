"""The trace of steps on a GPU that is not there: its table, its rules and its page. Nightly: the trace itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from switchcli.model.kernels.cpu_products import matmul

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("TRACE_ENVIRONMENT", ROOT / ".venv-trace"))


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """The modules of the trace can be imported by their names, as the script does."""
    sys.path.insert(0, str(ROOT / "scripts/trace"))
    yield
    sys.path.remove(str(ROOT / "scripts/trace"))


def test_the_rules_are_those_of_the_page_on_precision() -> None:
    from watch import Rules

    assert Rules.of("float32") == (torch.float32, torch.float32, torch.float32)
    assert Rules.of("selective") == (torch.bfloat16, torch.float32, torch.float32)
    assert Rules.of("bfloat16") == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda x: x.sum().item(), "wait"),
        (lambda x: x.cpu(), "to host"),
        (lambda x: torch.ops.aten._to_copy(torch.empty(3, device="cpu"), device=x.device), "to device"),
        (lambda x: x.double(), "float64"),
        (lambda x: matmul(x, x.mT), "product of float32"),
        (lambda x: matmul(x.bfloat16(), x.bfloat16().mT), None),
        (lambda x: x.bfloat16() * 2.0 + x, None),
    ],
)
def test_what_a_gpu_would_pay_for_is_found(action: Any, kind: str | None) -> None:
    from watch import Rules, Watch

    watch = Watch(Rules.of("selective"))
    with FakeTensorMode(), watch:
        action(torch.empty(2, 3, device="cuda"))
    assert [finding.kind for finding in watch.faults] == ([] if kind is None else [kind])


@pytest.mark.nightly
@pytest.mark.timeout(18000)
@pytest.mark.skipif(
    not (ENVIRONMENT / "bin/python").exists(), reason="`scripts/gpu --trace` has not installed torch for CUDA"
)
def test_the_trace_finds_what_is_planted_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts/gpu", "--trace", "--out", tmp_path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    planted = json.loads((tmp_path / "planted.json").read_text())["figures"]
    assert len(planted) == 8
    assert all(planted.values())


PAGE = ROOT / "docs/concepts/gpu-trace.md"


def test_the_page_lists_what_is_replaced() -> None:
    from fake_gpu import REPLACED

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {' | '.join(replaced)} |" in text for replaced in REPLACED)
    assert len(text.splitlines()) <= 120
