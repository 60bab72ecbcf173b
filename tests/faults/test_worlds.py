"""A run that goes on with another number of ranks is the run on one rank, but for rounding."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from drill import ROUNDING, apart, tensors
from tiny_run import RECIPE, write_text

EACH = 2
"""Steps on one number of ranks."""


def trained(folder: Path, name: str, ranks: Sequence[int], *keys: str) -> Path:
    """A run that does EACH steps on each of these numbers of ranks."""
    write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(RECIPE)
    command = [
        sys.executable,
        "-m",
        "switchcli",
        "pretrain",
        "tiny.yaml",
        *keys,
        "train.batch_tokens=512",
        "--out",
        name,
    ]
    for turn, world in enumerate(ranks, 1):
        steps = (f"train.steps={EACH * turn}", "--processes", str(world), "--quiet")
        subprocess.run([*command, *steps], cwd=folder, check=True, capture_output=True)
    return folder / name


@pytest.mark.parametrize(
    ("ranks", "seed"),
    [
        pytest.param((1, 2, 1), 0, marks=pytest.mark.integration, id="1, 2, 1"),
        *(pytest.param((1, 2, 4, 2, 1), seed, marks=pytest.mark.nightly) for seed in range(10)),
    ],
)
def test_a_run_on_changing_numbers_of_ranks_is_the_run_on_one_but_for_rounding(
    ranks: tuple[int, ...], seed: int, tmp_path: Path
) -> None:
    """Not with a ReLU and AdamW, which follows single elements however small: a unit at its kink may turn."""
    moved, alone = (
        trained(tmp_path, name, each, f"train.seed={seed}")
        for name, each in (("moved", ranks), ("alone", [1] * len(ranks)))
    )
    assert apart(tensors(moved), tensors(alone)) <= ROUNDING
