"""The routing report: how one model routes held-out texts, or how two differ in it, as a JSON object."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.report.console import Console
from switchcli.training.expert_matching import matching_metrics
from switchcli.training.routing_counts import LayerCounts, RoutingCounts, count_routing
from switchcli.training.specialization import MIN_COUNT, specialization_metrics
from switchcli.training.validation import HeldOutText, rank_batches


def routing_report(
    models: Sequence[SwitchTransformer],
    texts: Mapping[str, tuple[HeldOutText, bool]],
    rows_each: int,
    policies: Sequence[Policy],
    context: DistributedContext,
    tokenizer: Tokenizer,
    console: Console,
) -> dict[str, Any]:
    """Return the routing of one model, or of two models on the same texts.

    Args:
        models: one or two models.
        texts: each held-out text by name, and whether its rows are packed.
        rows_each: rows of a batch, rounded up to whole groups of both models.
        policies: how the routers of each model count capacity.
        context: the device and the precision.
        tokenizer: names the tokens.
        console: shows the progress.
    """
    group_rows = math.lcm(*(model.spec.group_sequences for model in models))
    batch_rows = -(-rows_each // group_rows) * group_rows
    counts_by_text = {}
    for name, (text, packed) in texts.items():
        batches = rank_batches(text, batch_rows, 0, 1)
        tracked = console.track(batches, f"reading {name}", len(batches))
        counts_by_text[name] = count_routing(models, tracked, packed, context, policies)
    return {
        "sequences": {name: text.num_rows for name, (text, _) in texts.items()},
        "rare": MIN_COUNT,
        "layers": [_layers(index, counts_by_text, tokenizer) for index in range(len(models))],
        "drift": _drift(counts_by_text) if len(models) > 1 else None,
    }


def _layers(model_index: int, counts_by_text: Mapping[str, RoutingCounts], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the specialization of each sparse layer of one model by name, with the pieces of its tokens."""
    layers = {}
    sentinel_ids = tokenizer.sentinels.tolist()
    for name in next(iter(counts_by_text.values())).layers[model_index]:
        layer_counts = {text: counts.layers[model_index][name] for text, counts in counts_by_text.items()}
        layer = specialization_metrics(layer_counts, sentinel_ids)
        used_sentinels = [index for index in sentinel_ids if index in layer["sentinels"]]
        pieces = tokenizer.pieces(used_sentinels)
        layer["sentinels"] = {
            piece: layer["sentinels"][index] for piece, index in zip(pieces, used_sentinels, strict=True)
        }
        for expert in layer["experts"]:
            for key in ("by_lift", "by_count"):
                tokens = expert[key]
                pieces = tokenizer.pieces(int(token["id"]) for token in tokens)
                expert[key] = [{"piece": piece, **token} for piece, token in zip(pieces, tokens, strict=True)]
        layers[name] = layer
    return layers


def _drift(counts_by_text: Mapping[str, RoutingCounts]) -> dict[str, Any]:
    """Return how far two models agree in each sparse layer by name, over all texts."""
    layers = {}
    all_counts = list(counts_by_text.values())
    for name in all_counts[0].joint_EE:
        first, *others = (counts.joint_EE[name] for counts in all_counts)
        one, other = (_total([counts.layers[index][name] for counts in all_counts]) for index in (0, 1))
        layers[name] = matching_metrics(sum(others, start=first), one, other)
    return layers


def _total(counts: Sequence[LayerCounts]) -> LayerCounts:
    return sum(counts[1:], start=counts[0])
