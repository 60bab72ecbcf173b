"""Time the training steps of the arms of recipes/choices/tune.runs in turns, on one thread, and print their ratios.

    python scripts/experiments/step_times.py [ROUNDS] > times.csv

Each round takes five steps of each arm, with random ids in the shapes of quickstart/switch. Times are those of the
processor, so that other work on the machine hardly counts; ratios are those of one round, to the first arm.
"""

import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import switchcli
from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.model.init import initial_weights
from switchcli.model.trainable import trainable
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS
from switchcli.system.signals import StopRequest
from switchcli.training.loop import fit
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.state import TrainState

LIST = Path(__file__).parents[2] / "recipes/choices/tune.runs"
STEPS = 5


class RandomRows(BatchSource):
    """A source that gives the same rows of random ids in every step."""

    def __init__(self, rows: int, inputs_length: int, targets_length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = (inputs_length, targets_length)
        self._batch = Batch(*(torch.randint(EOS + 1, vocabulary, (rows, n), generator=generator) for n in lengths))

    def batch(self, step: int, first: int, count: int) -> Batch:
        return Batch(*(ids[first : first + count] for ids in self._batch))


class Arm:
    """A model with its optimizer, which takes steps."""

    def __init__(self, keys: list[str]) -> None:
        self._recipe = switchcli.Recipe.load("choices/switch", [*keys, "model.vocab_size=1024"]).spec
        recipe, self._context = self._recipe, DistributedContext("cpu", "float32")
        with torch.device("meta"):
            model = SwitchTransformer(recipe.model)
        weights = self._context.parallelize(model)
        weights.load_full(initial_weights(recipe.model, 0, weights.experts))
        self._model, self._state = self._context.wrap(model), TrainState()
        self._optimizer = recipe.optimizer.build(trainable(model), weights.layouts)
        rows = recipe.rows_per_step
        source = RandomRows(rows, recipe.inputs_length, recipe.targets_length, recipe.model.vocab_size)
        self._microbatches = Microbatches(source, rows, rows, 0, 1)

    def seconds(self) -> float:
        """Take `STEPS` more steps, and return the seconds of one."""
        settings = self._recipe.train.model_copy(update={"steps": self._state.step + STEPS})
        started = time.process_time()
        fit(
            self._state,
            self._model,
            cross_entropy,
            self._microbatches,
            self._optimizer,
            self._recipe.schedule,
            self._context,
            [],
            settings,
            StopRequest(),
        )
        return (time.process_time() - started) / STEPS


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    arms = {}
    for line in LIST.read_text().splitlines():
        name, *words = line.split("#")[0].split() or [""]
        if name:
            arms[name] = Arm([word for word in words if "=" in word and not word.startswith(("train.", "schedule."))])
    for arm in arms.values():  # warm up
        arm.seconds()
    times = np.array([[arm.seconds() for arm in arms.values()] for _ in range(rounds)])
    ratios = times / times[:, :1]
    table = csv.writer(sys.stdout)
    table.writerow(["arm", "milliseconds", "ratio", "least", "most"])
    for name, seconds, ratio in zip(arms, times.T, ratios.T, strict=True):
        figures = (np.median(ratio), ratio.min(), ratio.max())
        table.writerow([name, f"{1000 * np.median(seconds):.1f}", *(f"{figure:.3f}" for figure in figures)])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
