"""A run that goes on with another number of ranks is the run on one rank: the same bits, or but for rounding."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from drill import ROUNDING, apart, fingerprint, tensors
from tiny_run import RECIPE, write_text

OPTIMIZERS = ("{kind: adafactor, min_dim_to_factor: 16}", "{kind: adamw}")
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
def test_a_run_on_changing_numbers_of_ranks_is_the_run_on_one_bit_for_bit(
    ranks: tuple[int, ...], seed: int, tmp_path: Path
) -> None:
    keys = (
        "parallel.reduction=ordered",
        f"optimizer={OPTIMIZERS[seed % 2]}",
        f"train.seed={seed}",
        "log.every_steps=1",
    )
    moved, alone = (
        trained(tmp_path, name, each, *keys) for name, each in (("moved", ranks), ("alone", [1] * len(ranks)))
    )
    kinds = ("step", "model", "optimizer")  # metrics are sums over ranks, which differ by rounding
    assert [fingerprint(moved)[kind] for kind in kinds] == [fingerprint(alone)[kind] for kind in kinds]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_sums_in_any_order_differ_by_rounding(seed: int, tmp_path: Path) -> None:
    """Not with a ReLU and AdamW, which follows single elements however small: a unit at its kink may turn."""
    keys = (f"optimizer={OPTIMIZERS[0]}", f"train.seed={seed}", "parallel.reduction=fast")
    moved, alone = (
        trained(tmp_path, name, each, *keys) for name, each in (("moved", (1, 2, 4, 2)), ("alone", (1, 1, 1, 1)))
    )
    assert apart(tensors(moved), tensors(alone)) <= ROUNDING
