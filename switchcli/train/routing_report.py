"""A survey: one model's atlas, or two's and how far they differ, over texts by name, as JSON has it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.report.console import Console
from switchcli.train import atlas, expert_matching, specialization
from switchcli.train.atlas import LayerCounts, RoutingCounts
from switchcli.train.validation import HeldOutText, rank_batches


def routing_report(
    models: Sequence[SwitchTransformer],
    texts: Mapping[str, tuple[HeldOutText, bool]],
    rows_each: int,
    policies: Sequence[Policy],
    context: DistributedContext,
    tokenizer: Tokenizer,
    console: Console,
) -> dict[str, Any]:
    """What one model does with texts, or two with the same ones, `rows_each` rows a batch at least."""
    groups = math.lcm(*(model.spec.group_sequences for model in models))
    counted = {}
    for name, (text, packed) in texts.items():
        batches = rank_batches(text, -(-rows_each // groups) * groups, 0, 1)
        tracked = console.track(batches, f"reading {name}", len(batches))
        counted[name] = atlas.count_routing(models, tracked, packed, context, policies)
    return {
        "sequences": {name: text.num_rows for name, (text, _) in texts.items()},
        "rare": specialization.LEAST,
        "layers": [_layers(place, counted, tokenizer) for place in range(len(models))],
        "drift": _drift(counted) if len(models) > 1 else None,
    }


def _layers(place: int, counted: Mapping[str, RoutingCounts], tokenizer: Tokenizer) -> dict[str, Any]:
    """The layers of one model, their tokens named."""
    layers = {}
    for name in next(iter(counted.values())).layers[place]:
        each = {text: one.layers[place][name] for text, one in counted.items()}
        found = specialization.specialization_metrics(each, tokenizer.sentinels.tolist())
        sentinels = [index for index in tokenizer.sentinels.tolist() if index in found["sentinels"]]
        named = zip(tokenizer.pieces(sentinels), sentinels, strict=True)
        found["sentinels"] = {piece: found["sentinels"][index] for piece, index in named}
        for expert in found["experts"]:
            for listed in ("by_lift", "by_count"):
                pieces = tokenizer.pieces(int(one["id"]) for one in expert[listed])
                expert[listed] = [{"piece": piece, **one} for piece, one in zip(pieces, expert[listed], strict=True)]
        layers[name] = found
    return layers


def _drift(counted: Mapping[str, RoutingCounts]) -> dict[str, Any]:
    layers = {}
    for name in next(iter(counted.values())).together_EE:
        together = [one.together_EE[name] for one in counted.values()]
        one, other = (_total([each.layers[place][name] for each in counted.values()]) for place in (0, 1))
        layers[name] = expert_matching.matching_metrics(sum(together[1:], start=together[0]), one, other)
    return layers


def _total(counts: Sequence[LayerCounts]) -> LayerCounts:
    return sum(counts[1:], start=counts[0])
