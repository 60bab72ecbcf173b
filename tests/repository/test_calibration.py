"""A fixed piece of work: its CPU time is the unit of the budgets of all test files (cpu_budget.py)."""

import subprocess
import sys

import torch


def test_the_unit_of_cpu_time() -> None:
    """A process that imports torch, products of small matrices, and plain Python: what tests spend their time on."""
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    a = torch.ones(192, 192)
    for _ in range(300):
        a = (a @ a) / 192
    assert a[0, 0] == 1
    assert sum(hash(str(number)) % 7 for number in range(400_000)) > 0
