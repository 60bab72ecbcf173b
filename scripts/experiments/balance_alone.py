"""Descend the load-balancing loss alone from checkpoints, and chart how the largest load over the mean changes.

    python scripts/experiments/balance_alone.py FOLDER RUN [RUN ...]

Each RUN was trained with a recipe like quickstart/switch. From its newest checkpoint 50 steps are taken in which the
cross-entropy has no gradient: with the loss over groups, with biases, and with nothing that balances. FOLDER gets
RUN.csv, RUN.svg and RUN.png.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import switchcli
from switchcli.metric_names import MAX_LOAD
from switchcli.model.transformer import ModelOutput
from switchcli.report import charts
from switchcli.report.charts import Axis
from switchcli.terminal.table import Table
from switchcli.training import loss

STEPS = 50
ARMS: dict[str, dict[str, Any]] = {
    "nothing": {"balance_loss_coef": 0.0},
    "group": {},
    "bias": {"balance": "bias", "balance_loss_coef": 0.0},
}


def loads_of(run: Path, arm: str, folder: Path) -> list[list[float]]:
    """Return the largest load over the mean of each layer, for each step."""
    out = folder / f"{run.name}-{arm}"
    settings = {
        "train.steps": STEPS,
        "schedule": {"kind": "constant", "learning_rate": 0.01},
        "start": {"checkpoint": str(run), "keep": "weights"},
        "log.every_steps": 1,
        "eval": {"every_steps": STEPS, "sequences": 64},
        "checkpoint.save_every_steps": STEPS,
        # A run without the loss names a coefficient of 0.
        **{f"model.router.{key}": value for key, value in ({"balance_loss_coef": 0.01} | ARMS[arm]).items()},
    }
    switchcli.train(switchcli.Recipe.load(run / "recipe.yaml", settings), out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        [layer[MAX_LOAD] for layer in record["layers"].values()]
        for record in records
        if "layers" in record and "loss" in record
    ]


def main() -> None:
    target_loss = loss._target_loss

    def without_gradient(output: ModelOutput, targets_BT: Any) -> loss.StepLoss:
        found = target_loss(output, targets_BT)
        return found._replace(target_sum=found.target_sum * 0.0)

    loss._target_loss = without_gradient
    out, *runs = map(Path, sys.argv[1:])
    figures = []
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            loads = {arm: loads_of(run, arm, Path(folder)) for arm in ARMS}
        rows = [
            (arm, step, fmean(layers), min(layers), max(layers))
            for arm in ARMS
            for step, layers in enumerate(loads[arm], 1)
        ]
        table = Table(("series", "step", "load", "least", "most"), rows, name=run.name)
        x, y = Axis("step", "steps on the balance alone"), Axis("load", "largest load over the mean", "~g")
        figures.append(
            charts.lines(run.name, f"From {run.name}: mean of the layers, least to most", "", table, x, y, [*ARMS])
        )
    charts.write_files(figures, [], out)


if __name__ == "__main__":
    main()
