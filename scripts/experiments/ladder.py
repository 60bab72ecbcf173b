"""The rows of the ladder's models, and what two sizes predict of the third.

    python scripts/experiments/ladder.py rows FOLDER SIZE COMMIT PROCESSOR >> ladder.csv
    python scripts/experiments/ladder.py predict ladder.csv ACTIVE TOKENS [TOKENS ...] > predictions.csv
    python scripts/experiments/ladder.py speed ladder.csv > speed.csv

`rows` reads the runs ARM-SEED, ARM-half-SEED and ARM-quarter-SEED of a folder. `predict` fits, for each arm,
log(loss) = a - b log(active parameters) - c log(tokens) to all models of the file, and states the 95 % interval of the
mean of three new seeds. The gain over the dense model has its own fit, a + b log(active) + c log(tokens), paired by
seed. `speed` says how many times fewer steps, FLOPs and seconds an arm needs for the last loss of the dense model.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml
from judge import t_tail

from switchcli.metric_names import HELD_OUT_LOSS

Row = dict[str, str]
COLUMNS = (
    *("size", "arm", "seed", "rate", "steps", "tokens", "held_out_loss", "flops_per_token", "active_parameters"),
    *("parameters", "tokens_per_expert", "seconds_per_step", "commit", "torch", "processor"),
)
DENSE = "dense"


def rows(folder: Path, size: str, commit: str, processor: str) -> Iterable[Sequence[object]]:
    """Yield a row for each model. Vocabulary rows do not count as active parameters."""
    for path in sorted(folder.glob("*/result.json")):
        result, settings = json.loads(path.read_text()), (path.parent / "recipe.yaml").read_text()
        name, _, seed = path.parent.name.rpartition("-")
        recipe = _flat(settings)
        sequence = recipe["data.objective.inputs_length"]
        vocabulary = recipe["model.vocab_size"] * recipe["model.d_model"]
        tokens = result["step"] * recipe["train.batch_tokens"]
        choices = recipe.get("model.router.k", 1)
        per_expert = tokens * choices // recipe["model.num_experts"]
        yield (
            *(size, name.removesuffix("-half").removesuffix("-quarter"), seed, recipe["schedule.learning_rate"]),
            *(result["step"], tokens, f"{result[HELD_OUT_LOSS]:.4f}", result["flops_per_sequence"] // sequence),
            *(result["active_parameters"] - vocabulary, result["parameters"], per_expert),
            *(f"{tokens / result['tokens_per_second'] / result['step']:.4f}", commit, result["versions"]["torch"]),
            processor,
        )


def _flat(text: str) -> dict[str, float]:
    """Return the numbers of a recipe by their dotted keys."""
    found: dict[str, float] = {}

    def walk(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        elif isinstance(value, (int, float)):
            found[key] = value

    walk(yaml.safe_load(text), "")
    return found


def quantile(degrees: int) -> float:
    """Return the t of a two-sided interval of 95 %."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 0.05 else (low, middle)
    return high


class Fit:
    """Least squares of y on 1, log(active parameters) and log(tokens)."""

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        self._inputs = np.array([self._row(active, tokens) for active, tokens, _ in points])
        y = np.array([value for *_, value in points])
        self.coefficients, *_ = np.linalg.lstsq(self._inputs, y, rcond=None)
        self.degrees = len(points) - 3
        self.variance = float(((self._inputs @ self.coefficients - y) ** 2).sum()) / self.degrees

    @staticmethod
    def _row(active: float, tokens: float) -> list[float]:
        return [1.0, math.log(active), math.log(tokens)]

    def predict(self, active: float, tokens: float, seeds: int = 3) -> tuple[float, float]:
        """Return the mean of new seeds, and half the width of its interval."""
        x = np.array(self._row(active, tokens))
        leverage = float(x @ np.linalg.inv(self._inputs.T @ self._inputs) @ x)
        return float(x @ self.coefficients), quantile(self.degrees) * math.sqrt(self.variance * (leverage + 1 / seeds))


def predict(table: Sequence[Row], active: float, horizons: Sequence[float]) -> Iterable[Sequence[object]]:
    """Yield arm, tokens, and the predicted loss and gain over the dense model with their intervals."""
    dense_active = {row["size"]: float(row["active_parameters"]) for row in table if row["arm"] == DENSE}
    losses = {(row["size"], row["arm"], row["seed"], row["tokens"]): float(row["held_out_loss"]) for row in table}
    for arm in dict.fromkeys(row["arm"] for row in table):
        points = [(key, loss) for key, loss in losses.items() if key[1] == arm]
        loss_fit = Fit([(dense_active[size], float(tokens), math.log(loss)) for (size, _, _, tokens), loss in points])
        gains = [
            (dense_active[size], float(tokens), losses[size, DENSE, seed, tokens] - loss)
            for (size, _, seed, tokens), loss in points
        ]
        gain_fit = Fit(gains)
        for tokens in horizons:
            middle, width = loss_fit.predict(active, tokens)
            gain, gain_width = gain_fit.predict(active, tokens)
            loss = [f"{math.exp(value):.4f}" for value in (middle, middle - width, middle + width)]
            yield arm, int(tokens), *loss, *(f"{value:+.4f}" for value in (gain, gain - gain_width, gain + gain_width))


def speed(table: Sequence[Row]) -> Iterable[Sequence[object]]:
    """Yield size, arm, and the ratios of steps, FLOPs and seconds at the dense model's last loss, as means over seeds.

    The steps of an arm are found between two of its horizons, by a straight line in log(steps).
    """
    curves: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in table:
        curves[row["size"], row["arm"], row["seed"]].append((int(row["steps"]), float(row["held_out_loss"])))
    costs = defaultdict(list)
    for row in table:
        costs[row["size"], row["arm"]].append((float(row["flops_per_token"]), float(row["seconds_per_step"])))
    ratios = defaultdict(list)
    for (size, arm, seed), curve in curves.items():
        last_step, target = max(curves[size, DENSE, seed])
        ratios[size, arm].append(last_step / _steps_to(target, sorted(curve)))
    for (size, arm), found in ratios.items():
        flops, seconds = (
            fmean(cost[part] for cost in costs[size, DENSE]) / fmean(cost[part] for cost in costs[size, arm])
            for part in (0, 1)
        )
        yield (
            *(size, arm, f"{fmean(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}"),
            *(f"{fmean(found) * flops:.2f}", f"{fmean(found) * seconds:.2f}"),
        )


def _steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float:
    """Return the steps at which a curve reaches a loss; beyond its ends by its nearest two points."""
    pairs = [*pairwise(curve)]
    first, second = next((pair for pair in pairs if pair[1][1] <= target), pairs[-1])
    slope = (second[1] - first[1]) / math.log(second[0] / first[0])
    return first[0] * math.exp((target - first[1]) / slope)


def main() -> None:
    command, *rest = sys.argv[1:]
    table = csv.writer(sys.stdout)
    if command == "rows":
        folder, size, commit, processor = rest
        if size == "small":
            table.writerow(COLUMNS)
        table.writerows(rows(Path(folder), size, commit, processor))
        return
    with Path(rest[0]).open(encoding="utf-8", newline="") as file:
        data = [*csv.DictReader(file)]
    if command == "predict":
        table.writerow(["arm", "tokens", "loss", "loss_low", "loss_high", "gain", "gain_low", "gain_high"])
        table.writerows(predict(data, float(rest[1]), [*map(float, rest[2:])]))
    else:
        table.writerow(["size", "arm", "steps", "steps_least", "steps_most", "flops", "seconds"])
        table.writerows(speed(data))


if __name__ == "__main__":
    main()
