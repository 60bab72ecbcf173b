"""How noisy the gradients of feed-forward weights are, dense or of experts.

    python scripts/experiments/gradient_noise.py BATCHES CHECKPOINT [CHECKPOINT ...] > noise.csv

The gradient of the training loss is taken on BATCHES batches of held-out text, each as large as a step of the run. With
G its mean and S the total variance of one batch, S / |G|^2 steps make a batch in which noise and signal are equal: the
simple noise scale of McCandlish et al. (2018), equation 2.9, here in tokens and with their unbiased estimates (appendix
A.1). An expert has weights, and so a G and an S, of its own. `signal` is |G|^2 / S, the ratio in one step.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import switchcli
from switchcli.data.batch import Batch
from switchcli.runs.inputs.text_sets import held_out_rows, prepare_texts
from switchcli.spec import PAD
from switchcli.terminal.console import main_console
from switchcli.training.loss import cross_entropy


class Noise(NamedTuple):
    """The estimates for the experts of a layer, [E]; E = 1 for a dense layer."""

    signal_E: torch.Tensor
    """|G|^2."""
    variance_E: torch.Tensor
    """S, of one batch."""


def is_feed_forward(name: str) -> bool:
    return name.endswith((".wi", ".wo", ".wi.weight", ".wo.weight"))


def by_expert(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient as [E, numbers], in float64; E = 1 for a dense weight."""
    return gradient.double().flatten(1) if name.endswith((".wi", ".wo")) else gradient.double().reshape(1, -1)


def measure(model: switchcli.Model, batches: list[Batch]) -> dict[str, Noise]:
    """Return the noise of each feed-forward layer, by its name."""
    module = model.model.train()
    weights = {name: weight for name, weight in module.named_parameters() if is_feed_forward(name)}
    layers = {name: name.removesuffix(".weight").rpartition(".")[0] for name in weights}
    sums: dict[str, Any] = defaultdict(float)  # each weight's gradient, [E, numbers]
    squares: dict[str, Any] = defaultdict(float)  # |gradient|^2 of each layer, [E]
    for batch in batches:
        found = cross_entropy(module, batch)
        loss = found.target_sum / (batch.targets_BT != PAD).sum()
        if found.auxiliary is not None:
            loss = loss + found.auxiliary.mean()
        gradients = torch.autograd.grad(loss, [*weights.values()])
        for name, gradient in zip(weights, gradients, strict=True):
            gradient_EN = by_expert(name, gradient)
            sums[name] += gradient_EN
            squares[layers[name]] += gradient_EN.square().sum(1)
    n = len(batches)
    noise = {}
    for layer, square_E in squares.items():
        of_batch_E = square_E / n
        of_mean_E = sum((sums[name] / n).square().sum(1) for name in weights if layers[name] == layer)
        noise[layer] = Noise((n * of_mean_E - of_batch_E) / (n - 1), (of_batch_E - of_mean_E) * n / (n - 1))
    return noise


def main() -> None:
    count, *paths = sys.argv[1:]
    table = csv.writer(sys.stdout)
    table.writerow(["checkpoint", "step", "layer", "experts", "tokens_per_step", "signal", "noise_scale_tokens"])
    for path in paths:
        model = switchcli.load(path)
        recipe: Any = model.recipe
        rows = recipe.rows_per_step
        text = prepare_texts(recipe.data, int(count) * rows, main_console(), model.tokenizer)
        (held_out,) = held_out_rows(text, recipe.data, int(count) * rows, main_console()).values()
        assert held_out.num_rows == int(count) * rows, f"{held_out.num_rows // rows} batches are held out"
        batches = [held_out.rows(first, rows) for first in range(0, held_out.num_rows, rows)]
        name = Path(path).parent.parent.name if "step-" in Path(path).name else Path(path).name
        for layer, noise in measure(model, batches).items():
            # |G|^2 of an expert without tokens is 0, and its estimate may be negative: the median takes it as it is.
            ratio = median((noise.signal_E / noise.variance_E).tolist())
            scale = recipe.train.batch_tokens / ratio
            line = (name, model.step, layer, len(noise.signal_E), recipe.train.batch_tokens)
            table.writerow([*line, f"{ratio:.4f}", f"{scale:.0f}"])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
