"""Routing of one small group of tokens, from a table of probabilities to what stands in each expert's queue."""

from typing import NamedTuple

import torch

from switchcli.model.moe.router import Mode, Router, Routing
from switchcli.model.moe.stats import RouterStats

Table = list[list[float]]


class Routed(NamedTuple):
    """What a router answered."""

    queues: list[list[tuple[int, float]]]
    """Of each expert: the tokens in its slots in order, each with its weight to three places."""
    num_slots: int
    report: RouterStats


def route(rule: Router, probabilities: Table, real: list[bool] | None = None, mode: Mode = "training") -> Routed:
    """Route tokens whose p(x) are the rows of `probabilities`."""
    N = len(probabilities)
    logits_GNE = torch.tensor([probabilities]).log()
    token_GEC, weight_GEC, _, report = rule.assign(logits_GNE, torch.tensor([real or [True] * N]), mode)
    queues = []
    for token_C, weight_C in zip(token_GEC[0].tolist(), weight_GEC[0].tolist(), strict=True):
        filled = [(token, round(weight, 3)) for token, weight in zip(token_C, weight_C, strict=True) if token < N]
        assert token_C[len(filled) :] == [N] * (len(token_C) - len(filled))  # empty slots come last
        assert weight_C[len(filled) :] == [0.0] * (len(token_C) - len(filled))
        queues.append(filled)
    return Routed(queues, token_GEC.shape[2], report)


def one_row(rule: Router, probability_E: list[float], num_tokens: int, num_groups: int) -> Routing:
    """The routing in training of groups whose tokens all have the same p(x), with draws that repeat."""
    torch.manual_seed(0)
    logits_GNE = torch.tensor(probability_E).log().expand(num_groups, num_tokens, -1)
    return rule.assign(logits_GNE, torch.ones(num_groups, num_tokens, dtype=torch.bool), "training")
