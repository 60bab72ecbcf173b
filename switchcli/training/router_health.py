"""Router health: metrics of the sparse layers, their records in the log, and warnings about bad routing.

Metrics are computed on the device without waiting for it. Records and warnings are made on the host when a step is
logged.

Legend: L sparse layers, G groups, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from switchcli.checkpoint import tensor_names
from switchcli.metric_names import AUXILIARY_LOSS, BALANCE, DEAD_EXPERTS, LOSS, MAX_LOAD, NEG_LOG_PERPLEXITY
from switchcli.model.moe.evenness import MORE_BALANCE, load_spread, variation
from switchcli.model.moe.router import FEW_CHOICES
from switchcli.model.transformer import ModelOutput
from switchcli.terminal.console import Console
from switchcli.training.state import Mean, Metrics

MANY_DROPPED = 0.5
"""Fraction of a layer's tokens without a slot from which a warning is given: capacity or balance is wrong."""
UNBALANCED_STEPS = 100
"""First steps of a run, in which no warning of dropped tokens is given: the router has not balanced its experts yet."""
COLLAPSED_SHARE = 0.9
"""Fraction of a layer's tokens at one expert from which the router has collapsed; with more than `FEW_CHOICES` experts
for a token, k, the fraction of all choices at only k experts."""
DEAD_STEPS = 100
"""Steps without a token, since the run started or resumed, after which an expert is dead. An expert that has none in a
few steps mostly gets some again."""
NONFINITE_FIX = (
    "checkpoints saved before it are sound. Lower schedule.learning_rate, set train.clip_norm, or take "
    "train.precision=float32"
)
"""The fix named by errors about numbers that are not finite."""
AUXILIARY = "auxiliary_loss/"
"""Prefix of the auxiliary losses of the two stacks. Each is a mean over its own tokens; `record` adds the means."""
LAYER = "layer_"
"""Prefix of metrics with one entry for each sparse layer."""


@torch.no_grad()
def routing_metrics(output: ModelOutput) -> Metrics:
    """Return the routing metrics of all layers together, of each stack, and of each layer; {} for a dense model."""
    if output.auxiliary is None:
        return {}
    stats = output.router_stats
    fields = ("load_balancing_sum", "z_sum", "load_E", "dropped", "tokens", "entropy", "confidence")
    balance_L, z_L, load_LE, dropped_L, tokens_L, entropy_L, confidence_L = (
        torch.stack([getattr(layer, field) for layer in stats]) for field in fields
    )
    one = torch.ones_like(balance_L[0])
    unequal = variation(stats)
    # Layers are in forward order: those of the encoder first.
    num_encoder = len(output.encoder_stats)
    stacks = {"": slice(None), "encoder_": slice(num_encoder), "decoder_": slice(num_encoder, None)}
    return {
        f"{AUXILIARY}encoder": Mean(output.auxiliary.encoder.total.detach(), output.auxiliary.encoder.tokens),
        f"{AUXILIARY}decoder": Mean(output.auxiliary.decoder.total.detach(), output.auxiliary.decoder.tokens),
        BALANCE: Mean(balance_L.sum(), tokens_L.sum()),
        **{
            f"{stack}dropped_fraction": Mean(dropped_L[layers].sum(), tokens_L[layers].sum())
            for stack, layers in stacks.items()
            if stats[layers]
        },
        "dropped_choice_fraction": Mean(torch.stack([layer.dropped_choices for layer in stats]).sum(), load_LE.sum()),
        f"{LAYER}balance": Mean(balance_L, tokens_L),
        **{f"{LAYER}{name}": Mean(total_L, tokens_L) for name, total_L in unequal.items()},
        f"{LAYER}z": Mean(z_L, tokens_L),
        f"{LAYER}dropped_fraction": Mean(dropped_L, tokens_L),
        f"{LAYER}entropy": Mean(entropy_L, tokens_L),
        f"{LAYER}confidence": Mean(confidence_L, tokens_L),
        f"{LAYER}load": Mean(load_LE, one),  # the weight counts microbatches
    }


def record(metrics: Mapping[str, Mean], layers: Sequence[str]) -> dict[str, Any]:
    """Return the metrics as numbers for the log, with the loss beside the neg. log perplexity.

    Metrics of sparse layers are under `layers`, by the names given. A layer's load is the number of tokens of each
    expert, summed over microbatches. Beside the layers, `MAX_LOAD` has the value of the layer in which it is largest.
    """
    values = {name: float(mean.value()) for name, mean in metrics.items() if not name.startswith((LAYER, AUXILIARY))}
    if NEG_LOG_PERPLEXITY in values:
        values[LOSS] = -values[NEG_LOG_PERPLEXITY]
    auxiliary_losses = [float(mean.value()) for name, mean in metrics.items() if name.startswith(AUXILIARY)]
    if auxiliary_losses:
        values[AUXILIARY_LOSS] = sum(auxiliary_losses)
    load = metrics.get(f"{LAYER}load")
    if load is None:
        return values
    # From [L] or [L, E] for each metric to one dict for each layer.
    columns: dict[str, list[Any]] = {
        name.removeprefix(LAYER): mean.value().tolist() for name, mean in metrics.items() if name.startswith(LAYER)
    }
    columns["load"] = load.total.long().tolist()
    columns |= {name: value_L.tolist() for name, value_L in load_spread(load.total).items()}
    by_layer = {layer: {name: column[index] for name, column in columns.items()} for index, layer in enumerate(layers)}
    values[MAX_LOAD], values[DEAD_EXPERTS] = max(columns[MAX_LOAD]), float((load.total == 0).sum())
    return {**values, "layers": by_layer}


def first_nonfinite_forward(metrics: Mapping[str, Mean], layers: Iterable[str]) -> str:
    """Return what is first not finite in the forward passes of this rank's step, or "" if all is finite.

    Routers come first, in forward order, then the other metrics.
    """
    if f"{LAYER}z" in metrics:
        for layer, z in zip(layers, metrics[f"{LAYER}z"].total, strict=True):
            if not z.isfinite():
                return f"the router of {layer.removeprefix('module.')}"
    return next((name for name, mean in metrics.items() if not mean.total.isfinite().all()), "")


def first_nonfinite_backward(norms: Mapping[str, torch.Tensor], experts: range) -> str:
    """Return the gradient that is first not finite in the backward pass of this rank, or "" if all are finite.

    `norms` are those of the gradients in the order of the parameters, [E] for stacked experts. The backward pass runs
    through them in reverse.
    """
    by_name = tensor_names.split_experts(norms, experts)
    return next((f"the gradient of {name}" for name in reversed(by_name) if not by_name[name].isfinite().all()), "")


class RoutingAlarms:
    """Warns once when a problem with the routing of a layer begins, and again when it returns."""

    def __init__(self, layers: Sequence[str], console: Console) -> None:
        """`layers` names the sparse layers in forward order."""
        self._layers = layers
        self._console = console
        self._active: set[tuple[str, str]] = set()
        """Layer and kind of each problem that the last check found."""
        self._idle_steps: dict[str, torch.Tensor] = {}
        """For each layer, the steps since each expert last had a token."""

    def __call__(self, metrics: Mapping[str, Mean], steps: int, step: int) -> None:
        """Check the routing metrics of the last `steps` steps before `step`."""
        load = metrics.get(f"{LAYER}load")
        if load is None:
            return
        warnings: dict[tuple[str, str], str] = {}
        dropped_L, tokens_L = metrics[f"{LAYER}dropped_fraction"]
        for layer, load_E, dropped, tokens in zip(self._layers, load.total, dropped_L, tokens_L, strict=True):
            # One expert may get nearly all tokens where a token goes to many: then the k busiest experts count.
            choices = float(load_E.sum() / tokens.clamp(min=1))
            k = int(choices) if choices >= FEW_CHOICES + 1 else 1
            busiest = load_E.topk(k)
            share = float(busiest.values.sum() / (k * tokens.clamp(min=1)))
            if share >= COLLAPSED_SHARE and share > 1.5 * choices / len(load_E):
                few = ". Targets of a few labels look so in the decoder" if layer.startswith("decoder.") else ""
                experts = sorted(busiest.indices.tolist())
                taken = f"expert {experts[0]} takes {share:.0%} of the tokens"
                if k > 1:
                    taken = f"experts {experts} take {share:.0%} of the choices"
                warnings[layer, "collapsed"] = (
                    f"{layer}: the router has collapsed: {taken}; {MORE_BALANCE}, or lower the learning rate{few}"
                )
            dropped_fraction = float(dropped / tokens.clamp(min=1))
            if dropped_fraction >= MANY_DROPPED and step > UNBALANCED_STEPS:
                warnings[layer, "dropped"] = (
                    f"{layer}: {dropped_fraction:.0%} of the tokens found no slot; raise its router's "
                    f"capacity_factor, or {MORE_BALANCE}"
                )
            # The product resets the count of every expert that had a token.
            idle_E = self._idle_steps[layer] = (self._idle_steps.get(layer, 0) + steps) * (load_E == 0)
            dead = (idle_E >= DEAD_STEPS).nonzero().flatten().tolist()
            if dead:
                warnings[layer, "dead"] = (
                    f"{layer}: no token in {int(idle_E[dead].min())} steps for experts {dead}; {MORE_BALANCE}"
                )
        for problem in sorted(warnings.keys() - self._active):
            self._console.warning(warnings[problem])
        self._active = set(warnings)
