"""Health of the sparse layers: metrics that stay on the device in a step, and on the host their record and alarms.

Legend: L sparse layers, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from switchcli.checkpoint import tensor_names
from switchcli.metric_names import AUXILIARY_LOSS, BALANCE, DEAD_EXPERTS
from switchcli.model.transformer import ModelOutput
from switchcli.report.console import Console
from switchcli.train.metrics import Mean, Metrics

MANY_DROPPED = 0.5
"""A layer in which so many tokens find no slot trains on the wrong ones: the capacity or the balance is off."""
COLLAPSED_SHARE = 0.9
"""An expert that takes this share of a layer's tokens has become the layer."""
DEAD_STEPS = 100
"""Without a token for as long, since the run began or went on, an expert is dead: one that has none in a few steps
mostly finds some by itself."""
WHEN_LOST = (
    "what was saved before it is sound. Lower schedule.learning_rate, set train.clip_norm, take "
    "train.precision=float32, or go on by train.nonfinite.policy=roll_back"
)
"""The way out where a number is not finite."""
AUXILIARY = "auxiliary_loss/"
"""Begins the names of the two stacks' auxiliary losses. `record` adds them: each is a mean over tokens of its own."""
LAYER = "layer_"
"""Begins the names of metrics with an entry for each sparse layer."""


@torch.no_grad()
def routing_metrics(output: ModelOutput) -> Metrics:
    """Of all layers together, of each stack, and of each layer by itself; nothing of a dense model."""
    if output.auxiliary is None:
        return {}
    reports = output.router_stats
    fields = ("load_balancing_sum", "z_sum", "load_E", "dropped", "tokens", "entropy", "confidence")
    balance_L, z_L, load_LE, dropped_L, tokens_L, entropy_L, confidence_L = (
        torch.stack([getattr(report, field) for report in reports]) for field in fields
    )
    one = torch.ones_like(balance_L[0])
    split = len(output.encoder_stats)
    stacks = {"": slice(None), "encoder_": slice(split), "decoder_": slice(split, None)}
    return {
        f"{AUXILIARY}encoder": Mean(output.auxiliary.encoder.total.detach(), output.auxiliary.encoder.tokens),
        f"{AUXILIARY}decoder": Mean(output.auxiliary.decoder.total.detach(), output.auxiliary.decoder.tokens),
        BALANCE: Mean(balance_L.sum(), tokens_L.sum()),
        **{
            f"{stack}dropped_fraction": Mean(dropped_L[part].sum(), tokens_L[part].sum())
            for stack, part in stacks.items()
            if len(reports[part])
        },
        f"{LAYER}balance": Mean(balance_L, tokens_L),
        f"{LAYER}z": Mean(z_L, tokens_L),
        f"{LAYER}dropped_fraction": Mean(dropped_L, tokens_L),
        f"{LAYER}entropy": Mean(entropy_L, tokens_L),
        f"{LAYER}confidence": Mean(confidence_L, tokens_L),
        f"{LAYER}load": Mean(load_LE, one),
    }


def record(metrics: Mapping[str, Mean], layers: Sequence[str]) -> dict[str, Any]:
    """The metrics as numbers; those of each layer under its name in `layers`, its load as tokens an expert."""
    flat = {name: float(mean.value()) for name, mean in metrics.items() if not name.startswith((LAYER, AUXILIARY))}
    parts = [float(mean.value()) for name, mean in metrics.items() if name.startswith(AUXILIARY)]
    if parts:
        flat[AUXILIARY_LOSS] = sum(parts)
    load = metrics.get(f"{LAYER}load")
    if load is None:
        return flat
    each: dict[str, list[Any]] = {
        name.removeprefix(LAYER): mean.value().tolist() for name, mean in metrics.items() if name.startswith(LAYER)
    }
    each["load"] = load.total.long().tolist()
    named = {layer: {name: values[place] for name, values in each.items()} for place, layer in enumerate(layers)}
    return {**flat, DEAD_EXPERTS: float((load.total == 0).sum()), "layers": named}


def first_nonfinite_forward(metrics: Mapping[str, Mean], layers: Iterable[str]) -> str:
    """Where on the way forward a number of a step of this rank is first not finite, in words; nothing if nowhere."""
    routers = zip(layers, metrics[f"{LAYER}z"].total, strict=True) if f"{LAYER}z" in metrics else ()
    lost = [f"the router of {layer.removeprefix('module.')}" for layer, z in routers if not z.isfinite()]
    return next(iter([*lost, *(name for name, mean in metrics.items() if not mean.total.isfinite().all())]), "")


def first_nonfinite_backward(norms: Mapping[str, torch.Tensor], experts: range) -> str:
    """The same on the way back, which ends with the first parameters; `norms` of gradients, [E] of stacked experts."""
    named = tensor_names.split_experts(norms, experts)
    return next((f"the gradient of {name}" for name in reversed(named) if not named[name].isfinite().all()), "")


class RoutingAlarms:
    """Says in words, when it begins, what is wrong with the routing of a layer."""

    def __init__(self, layers: Sequence[str], console: Console) -> None:
        self._layers = layers
        self._console = console
        self._ringing: set[tuple[str, str]] = set()
        self._idle: dict[str, torch.Tensor] = {}

    def __call__(self, metrics: Mapping[str, Mean], steps: int) -> None:
        """Look at what `steps` steps brought."""
        if (load := metrics.get(f"{LAYER}load")) is None:
            return
        alarms: dict[tuple[str, str], str] = {}
        dropped_L, tokens_L = metrics[f"{LAYER}dropped_fraction"]
        for layer, load_E, dropped, tokens in zip(self._layers, load.total, dropped_L, tokens_L, strict=True):
            share = float(load_E.max() / tokens.clamp(min=1))
            # Where tokens may go to several experts, each of them may take nearly all.
            if share >= COLLAPSED_SHARE and load_E.max() > 1.5 * load_E.mean():
                alarms[layer, "collapsed"] = (
                    f"{layer}: the router has collapsed: expert {int(load_E.argmax())} takes {share:.0%} of the "
                    "tokens; raise its router's balance_loss_coef or lower the learning rate"
                )
            lost = float(dropped / tokens.clamp(min=1))
            if lost >= MANY_DROPPED:
                alarms[layer, "dropped"] = (
                    f"{layer}: {lost:.0%} of the tokens found no slot; raise its router's capacity_factor, or "
                    "balance_loss_coef where it has one"
                )
            idle_E = self._idle[layer] = (self._idle.get(layer, 0) + steps) * (load_E == 0)
            dead = (idle_E >= DEAD_STEPS).nonzero().flatten().tolist()
            if dead:
                alarms[layer, "dead"] = f"{layer}: no token in {int(idle_E[dead].min())} steps for experts {dead}"
        for which in sorted(alarms.keys() - self._ringing):
            self._console.warning(alarms[which])
        self._ringing = set(alarms)
