"""The routing report: how one model routes held-out texts, or how two differ in it, as a JSON object."""

import math
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from switchcli.analysis.routing_counts import ExpertCounts, LayerCounts, RoutingCounts, count_routing
from switchcli.analysis.specialization import MIN_COUNT, information, specialization_metrics
from switchcli.data.python_kinds import kinds_of
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.report.console import Console
from switchcli.training.validation import HeldOutText, rank_batches


def routing_report(
    models: Sequence[SwitchTransformer],
    texts: Mapping[str, HeldOutText],
    rows_each: int,
    policies: Sequence[Policy],
    context: DistributedContext,
    tokenizer: Tokenizer,
    console: Console,
) -> dict[str, Any]:
    """Return the routing of one model, or of two models on the same texts.

    Args:
        models: one or two models.
        texts: the held-out texts by name.
        rows_each: rows of a batch, rounded up to whole groups of both models.
        policies: how the routers of each model count capacity.
        context: the device and the precision.
        tokenizer: names the tokens.
        console: shows the progress.
    """
    group_rows = math.lcm(*(model.spec.group_sequences for model in models))
    batch_rows = -(-rows_each // group_rows) * group_rows
    counts_by_text = {}
    for name, text in texts.items():
        batches = rank_batches(text, batch_rows, 0, 1)
        kinds = text.kind_rows and [
            kinds_of(batch, tokenizer) for batch in rank_batches(text._replace(rows=text.kind_rows()), batch_rows, 0, 1)
        ]
        tracked = console.track(batches, f"reading {name}", len(batches))
        counts_by_text[name] = count_routing(models, tracked, text.is_packed, context, policies, kinds)
    return {
        "sequences": {name: text.num_rows for name, text in texts.items()},
        "rare": MIN_COUNT,
        "layers": [_layers(index, counts_by_text, tokenizer) for index in range(len(models))],
        "drift": _drift(counts_by_text) if len(models) > 1 else None,
    }


def _layers(model_index: int, counts_by_text: Mapping[str, RoutingCounts], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the specialization of each sparse layer of one model by name, with the pieces of its tokens."""
    layers = {}
    sentinel_ids = tokenizer.sentinels.tolist()
    sentinel_pieces = tokenizer.pieces(sentinel_ids)
    for name in next(iter(counts_by_text.values())).layers[model_index]:
        layer_counts = {text: counts.layers[model_index][name] for text, counts in counts_by_text.items()}
        layer = specialization_metrics(layer_counts, sentinel_ids)
        loads = layer["sentinels"]
        named_ids = zip(sentinel_pieces, sentinel_ids, strict=True)
        layer["sentinels"] = {piece: loads[index] for piece, index in named_ids if index in loads}
        for expert in layer["experts"]:
            for key in ("by_lift", "by_count"):
                tokens = expert[key]
                pieces = tokenizer.pieces(int(token["id"]) for token in tokens)
                expert[key] = [{"piece": piece, **token} for piece, token in zip(pieces, tokens, strict=True)]
        layers[name] = layer
    return layers


def _drift(counts_by_text: Mapping[str, RoutingCounts]) -> dict[str, Any]:
    """Return how far the choices of two models differ in each sparse layer by name, over all texts."""
    layers = {}
    all_counts = [*counts_by_text.values()]
    for name in all_counts[0].joint_EE:
        joint_EE = reduce(operator.add, (counts.joint_EE[name] for counts in all_counts))
        one, other = (reduce(operator.add, (counts.layers[index][name] for counts in all_counts)) for index in (0, 1))
        layers[name] = _layer_drift(joint_EE.cpu(), one, other)
    return layers


def _layer_drift(joint_EE: torch.Tensor, one: LayerCounts, other: LayerCounts) -> dict[str, Any]:
    """Return the JSON object of one layer of two models.

    `changed` is the fraction of choices that differ. A token with several experts counts by the fraction of its experts
    that only one of the models chose. `shared_information` is what an expert of the first model tells about the expert
    of the second, whatever their numbers. Where tokens have several experts, it stays below 1 even for equal models.

    Args:
        joint_EE: how often a token chose expert i of the first model (rows) and expert j of the second (columns).
    """
    choices = int(one.chosen_E.sum())
    key_X = joint_EE.flatten().nonzero().flatten()  # i * E + j of each pair that occurs
    pairs = ExpertCounts(key_X, joint_EE.flatten()[key_X].long(), len(joint_EE))
    return {
        "tokens": int(one.num_tokens),
        "changed": 1 - 2 * float(joint_EE.trace()) / (choices + int(other.chosen_E.sum())),
        "shared_information": information(pairs, choices, other.within).to_json(),
    }
