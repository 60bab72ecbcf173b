"""The rows of the ladder's models, and what smaller sizes predict of a larger one.

    python scripts/experiments/ladder.py rows COMMIT PROCESSOR SIZE=FOLDER ... > ladder.csv
    python scripts/experiments/ladder.py gains ladder.csv > gains.csv
    python scripts/experiments/ladder.py predict ladder.csv ACTIVE TOKENS [TOKENS ...] > predictions.csv
    python scripts/experiments/ladder.py speed ladder.csv > speed.csv

`rows` reads the runs ARM-SEED, ARM-half-SEED and ARM-quarter-SEED of each folder. `gains` compares each arm with the
dense model of its size and steps: differences within a seed, with their 95 % interval (Student's). `predict` fits, for
each arm, log(loss) = a - b log(active) - c log(tokens) to the means over seeds at all sizes below ACTIVE parameters,
which are those of the dense model, and states the 95 % interval of another mean. The gain over the dense model has its
own fit, a + b log(active) + c log(tokens). The intervals hold if the law does: a bend beyond the fitted sizes is not in
them. `speed` says how many times fewer steps, FLOPs and seconds an arm needs for the last loss of the dense model.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from switchcli import Recipe
from switchcli.metric_names import HELD_OUT_LOSS
from switchcli.report.significance import t_95

Row = dict[str, str]
COLUMNS = (
    *("size", "arm", "seed", "rate", "steps", "tokens", "held_out_loss", "flops_per_token", "active_parameters"),
    *("parameters", "tokens_per_expert", "seconds_per_step", "commit", "torch", "processor"),
)
DENSE = "dense"


def rows(folder: Path, size: str, commit: str, processor: str) -> Iterable[Sequence[object]]:
    """Yield a row for each model. Rows of the embedding do not count as active parameters."""
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        recipe = Recipe.load(path.parent / "recipe.yaml").spec
        name, _, seed = path.parent.name.rpartition("-")
        embedding = recipe.model.vocab_size * recipe.model.d_model
        tokens = result["step"] * recipe.train.batch_tokens
        per_expert = tokens * recipe.model.router.experts_per_token // recipe.model.num_experts
        flops = result["flops_per_sequence"] // recipe.data.objective.inputs_length
        seconds = recipe.train.batch_tokens / result["tokens_per_second"]
        yield (
            *(size, name.removesuffix("-half").removesuffix("-quarter"), seed, recipe.schedule.learning_rate),
            *(result["step"], tokens, f"{result[HELD_OUT_LOSS]:.4f}", flops, result["active_parameters"] - embedding),
            *(result["parameters"], per_expert, f"{seconds:.4f}", commit, result["versions"]["torch"], processor),
        )


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

    def predict(self, active: float, tokens: float) -> tuple[float, float]:
        """Return the value of another point, and half the width of its interval."""
        x = np.array(self._row(active, tokens))
        leverage = float(x @ np.linalg.inv(self._inputs.T @ self._inputs) @ x)
        return float(x @ self.coefficients), t_95(self.degrees) * math.sqrt(self.variance * (1 + leverage))


def gains(table: Sequence[Row]) -> Iterable[Sequence[object]]:
    """Yield size, arm, steps, tokens, mean loss, and the gain over the dense model with its interval."""
    losses: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in table:
        losses[row["size"], row["arm"], row["steps"], row["tokens"]][row["seed"]] = float(row["held_out_loss"])
    for (size, arm, steps, tokens), by_seed in losses.items():
        dense = losses[size, DENSE, steps, tokens]
        differences = [dense[seed] - loss for seed, loss in by_seed.items()]
        gain, count = fmean(differences), len(differences)
        half = t_95(count - 1) * stdev(differences) / math.sqrt(count)
        figures = [] if arm == DENSE else [f"{value:+.4f}" for value in (gain, gain - half, gain + half)]
        yield size, arm, steps, tokens, f"{fmean(by_seed.values()):.4f}", *figures


def predict(table: Sequence[Row], active: float, horizons: Sequence[float]) -> Iterable[Sequence[object]]:
    """Yield arm, tokens, and the predicted loss and gain over the dense model with their intervals."""
    sizes = {row["size"]: float(row["active_parameters"]) for row in table if row["arm"] == DENSE}
    seeds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in table:
        if sizes[row["size"]] < active:
            seeds[row["arm"], row["size"], row["tokens"]].append(float(row["held_out_loss"]))
    losses = {key: fmean(values) for key, values in seeds.items()}
    for arm in dict.fromkeys(arm for arm, _, _ in losses):
        points = [(sizes[size], float(tokens), loss) for (one, size, tokens), loss in losses.items() if one == arm]
        dense = [losses[DENSE, size, tokens] for one, size, tokens in losses if one == arm]
        loss_fit = Fit([(size, tokens, math.log(loss)) for size, tokens, loss in points])
        gain_fit = Fit(
            [(size, tokens, other - loss) for (size, tokens, loss), other in zip(points, dense, strict=True)]
        )
        for tokens in horizons:
            middle, width = loss_fit.predict(active, tokens)
            gain, gain_width = gain_fit.predict(active, tokens)
            loss = [f"{math.exp(value):.4f}" for value in (middle, middle - width, middle + width)]
            yield arm, int(tokens), *loss, *(f"{value:+.4f}" for value in (gain, gain - gain_width, gain + gain_width))


def speed(table: Sequence[Row]) -> Iterable[Sequence[object]]:
    """Yield size, arm, seeds that reach the dense model's last loss, and the ratios of steps, FLOPs and seconds there.

    The steps of an arm are found between two of its horizons, by a straight line in log(steps).
    """
    curves: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    costs = defaultdict(list)
    for row in table:
        curves[row["size"], row["arm"], row["seed"]].append((int(row["steps"]), float(row["held_out_loss"])))
        costs[row["size"], row["arm"]].append((float(row["flops_per_token"]), float(row["seconds_per_step"])))
    for size, arm in costs:
        flops, seconds = (
            fmean(cost[part] for cost in costs[size, DENSE]) / fmean(cost[part] for cost in costs[size, arm])
            for part in (0, 1)
        )
        found = []
        for (one_size, one_arm, seed), curve in curves.items():
            if (one_size, one_arm) == (size, arm):
                last_step, target = max(curves[size, DENSE, seed])
                if steps := _steps_to(target, sorted(curve)):
                    found.append(last_step / steps)
        ratios = [f"{ratio:.2f}" for ratio in (fmean(found), min(found), max(found))] if found else ["", "", ""]
        costs_there = [f"{fmean(found) * factor:.2f}" for factor in (flops, seconds)] if found else ["", ""]
        yield size, arm, len(found), *ratios, *costs_there


def _steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Return the steps at which a curve of falling losses reaches a loss; None if that is not between two of them."""
    for (first, high), (second, low) in pairwise(curve):
        if low <= target <= high:
            return first * (second / first) ** ((high - target) / (high - low)) if high > low else second
    return None


def main() -> None:
    command, *rest = sys.argv[1:]
    table = csv.writer(sys.stdout)
    if command == "rows":
        commit, processor, *folders = rest
        table.writerow(COLUMNS)
        for size, _, folder in (text.partition("=") for text in folders):
            table.writerows(rows(Path(folder), size, commit, processor))
        return
    with Path(rest[0]).open(encoding="utf-8", newline="") as file:
        data = [*csv.DictReader(file)]
    if command == "gains":
        table.writerow(["size", "arm", "steps", "tokens", "loss", "gain", "gain_low", "gain_high"])
        table.writerows(gains(data))
    elif command == "predict":
        table.writerow(["arm", "tokens", "loss", "loss_low", "loss_high", "gain", "gain_low", "gain_high"])
        table.writerows(predict(data, float(rest[1]), [*map(float, rest[2:])]))
    else:
        table.writerow(["size", "arm", "seeds", "steps", "steps_least", "steps_most", "flops", "seconds"])
        table.writerows(speed(data))


if __name__ == "__main__":
    main()
