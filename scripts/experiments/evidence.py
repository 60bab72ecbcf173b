"""The rows of the runs of recipes/evidence, and the statistics that docs/results/evidence.md registers for them.

    python scripts/experiments/evidence.py rows COMMIT PROCESSOR FOLDER ... > slope.csv
    python scripts/experiments/evidence.py slope|batch|students FILE.csv > statistics.csv

`rows` reads the finished runs of folders, which are named by their lists. The others read the rows of `...-judge`:
differences within a seed, above 0 if the arm named first has the lower loss, with Student's interval and Holm's p.
"""

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from judge import holm, t_tail
from numpy.typing import NDArray

from switchcli.report.significance import t_95

ROW = "list arm seed rate steps batch_tokens held_out_loss flops_per_token router_flops slots_per_token parameters"
ROW += " tokens_per_second commit torch processor"  # FLOPs of a forward pass, for each token of the input
EXPERTS = {"dense": 1, "switch4": 4, "switch8": 8, "switch16": 16, "switch32": 32}
Values = NDArray[np.float64]  # of each seed
Losses = Mapping[tuple[str, int], Values]  # of each arm and number of steps


def rows(folder: Path, commit: str, processor: str) -> Iterator[Sequence[object]]:
    """Yield a row for each run."""
    for path in sorted(folder.glob("*/result.json")):
        result, recipe = json.loads(path.read_text()), yaml.safe_load((path.parent / "recipe.yaml").read_text())
        model, train, sparse = recipe["model"], recipe["train"], recipe["model"]["num_experts"] > 1
        flops = result["flops_per_sequence"] // recipe["data"]["objective"]["inputs_length"]
        tokens = 1 + result["target_tokens"] / result["input_tokens"]  # each block of both stacks has a router
        router = sparse * round(2 * model["num_layers"] * model["d_model"] * model["num_experts"] * tokens)
        run = (path.parent.name.rpartition("-")[0], train["seed"], recipe["schedule"]["learning_rate"], result["step"])
        cost = (flops, router, model["router"]["capacity_factor"] if sparse else 1, result["parameters"])
        origin = (round(result["tokens_per_second"]), commit, result["versions"]["torch"], processor)
        yield folder.name, *run, train["batch_tokens"], f"{result['held_out/loss']:.4f}", *cost, *origin


def slope(losses: Losses, steps: int) -> Values:
    """Return the fall of the loss for each doubling of the experts, by least squares within each seed."""
    arms = [arm for arm in EXPERTS if (arm, steps) in losses]  # an arm may have been left out
    return -np.polyfit([math.log2(EXPERTS[arm]) for arm in arms], [losses[arm, steps] for arm in arms], 1)[0]


def speed_up(losses: Losses, arm: str) -> Values:
    """Return log(steps of the dense model / steps of an arm to its last loss), at least 0, by lines in log(steps)."""
    horizons = sorted((steps for one, steps in losses if one == arm), reverse=True)
    curves = np.transpose([losses[arm, steps] for steps in horizons])
    pairs = zip(losses["dense", horizons[0]], curves, strict=True)
    found = [np.interp(target, curve, np.log(horizons)) for target, curve in pairs]
    return math.log(horizons[0]) - np.array(found)


def fieller(numerator: Values, denominator: Values) -> list[float]:
    """Return the ratio of two means of pairs with its 95 % interval, which is NaN where the denominator may be 0."""
    (a, b), seeds = (numerator.mean(), denominator.mean()), len(numerator)
    (aa, ab), (_, bb) = np.cov(numerator, denominator) * t_95(seeds - 1) ** 2 / seeds
    square, middle = b * b - bb, a * b - ab
    root = math.sqrt(max(middle**2 - square * (a * a - aa), 0.0)) if square > 0 else math.nan
    return [a / b, (middle - root) / square, (middle + root) / square]


def hypotheses(experiment: str, losses: Losses) -> Iterator[tuple[str, Values, float]]:
    """Yield the registered hypotheses: name, a value for each seed, and the value that is to be excluded."""
    arms, horizons = sorted({arm for arm, _ in losses}), sorted({steps for _, steps in losses})
    last = {arm: losses[max(key for key in losses if key[0] == arm)] for arm in arms}
    if experiment == "slope":
        yield "slope", slope(losses, horizons[-1]), 0.0
        yield "slope minus that of the first steps", slope(losses, horizons[-1]) - slope(losses, horizons[0]), 0.0
        yield "log of the speed-up of switch32", speed_up(losses, "switch32"), math.log(1.2)
        yield from ((f"{arm} over dense", last["dense"] - last[arm], 0.0) for arm in arms if arm != "dense")
    elif experiment == "batch":
        gains = {arm: last[f"{arm.split('-')[0]}-dense"] - last[arm] for arm in arms if "switch" in arm}
        for one in ("switch8", "switch32"):
            yield f"few minus large, {one}", gains[f"few-{one}"] - gains[f"large-{one}"], 0.0
        yield from ((arm, gain, 0.0) for arm, gain in gains.items())
    else:
        for one, base in ("ba", "ca", "da", "ea", "fa", "ed", "fe"):
            yield f"{one} over {base}", last[base] - last[one], 0.0


def statistics(experiment: str, losses: Losses) -> Iterator[Sequence[object]]:
    """Yield a row for each hypothesis, and for each share of the teacher's gain that students keep."""
    found = [*hypotheses(experiment, losses)]
    error = {name: values.std(ddof=1) / math.sqrt(len(values)) for name, values, _ in found}
    p = {name: t_tail((values.mean() - zero) / error[name], len(values) - 1) for name, values, zero in found}
    for name, values, zero in found:
        mean, half = values.mean(), t_95(len(values) - 1) * error[name]
        numbers = [f"{number:+.4f}" for number in (mean, mean - half, mean + half, zero)]
        yield name, len(values), *numbers, f"{p[name]:.4f}", f"{holm(p)[name]:.4f}"
    for (arm, steps), values in losses.items() if experiment == "students" else ():
        if arm in "bcdef":
            share = fieller(losses["a", steps] - values, losses["a", steps] - losses["teacher-on", steps])
            yield f"share kept by {arm}", len(values), *(f"{number:+.4f}" for number in share), "", "", ""


def main() -> None:
    command, *rest = sys.argv[1:]
    write = csv.writer(sys.stdout).writerows
    if command == "rows":
        write([ROW.split(), *(row for folder in rest[2:] for row in rows(Path(folder), rest[0], rest[1]))])
        return
    losses: dict[tuple[str, int], dict[int, float]] = {}
    for row in csv.DictReader(Path(rest[0]).read_text().splitlines()):
        if row["list"].endswith("-judge"):
            arm = row["arm"].removesuffix(f"-{row['steps']}")
            losses.setdefault((arm, int(row["steps"])), {})[int(row["seed"]) % 100] = float(row["held_out_loss"])
    seeds = sorted(set.intersection(*map(set, losses.values())))  # a base has 100 more than its students
    by_arm = {key: np.array([one[seed] for seed in seeds]) for key, one in losses.items()}
    write([["hypothesis", "seeds", "mean", "low", "high", "excluded", "p", "holm"], *statistics(command, by_arm)])


if __name__ == "__main__":
    main()
