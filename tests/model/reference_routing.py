"""The sparse layer again, token by token in float64: what the layer must give, by loops instead of sorted indices.

Legend: B batch, S positions, G groups, N tokens a group, E experts, D model, O outputs.

Nothing of `switchcli.model` is called: a layer is its spec's settings and its parameters by name. Queues are lists of
tokens, expert by expert; a token goes to the end of a list if that is shorter than the capacity.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.moe.router import ExpertChoiceRouter, Mode, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter

Router = SwitchRouter | TopKRouter | NoTokenLeftBehindRouter | ExpertChoiceRouter
Weights = Mapping[str, torch.Tensor]
GAP = 1e-5
"""How far apart numbers are at least that decide where a token goes: float32 then finds their order too."""


class Place(NamedTuple):
    """A token in a slot."""

    token: int
    expert: int
    weight: torch.Tensor


class Group(NamedTuple):
    """What one group gives."""

    places: list[Place]
    counted: list[list[int]] | None
    """The choices of each token that count for f, none of padding; None: f is uniform."""
    load_E: list[int]


class Answer(NamedTuple):
    """The layer's output and the fields of its report."""

    y_BSO: torch.Tensor
    fraction_GE: torch.Tensor
    probability_GE: torch.Tensor
    load_balancing_loss: torch.Tensor
    z_loss: torch.Tensor
    load_E: torch.Tensor
    dropped: int
    dropped_choices: int
    tokens: int
    entropy: float
    confidence: float


def capacity(rule: Router, num_tokens: int, num_experts: int, mode: Mode) -> int:
    """Eq. 3 as Mesh-TensorFlow rounds it; a slot for every token where nothing may drop."""
    factor = rule.capacity_factor if mode == "training" else rule.eval_capacity_factor
    if factor == "dropless" or (mode == "dropless" and not isinstance(rule, ExpertChoiceRouter)):
        return num_tokens
    return min(num_tokens, max(rule.min_capacity, int(num_tokens * factor / num_experts)))


def gates(rule: Router, logits: torch.Tensor) -> torch.Tensor:
    """A softmax over the experts, or a sigmoid of each logit."""
    if getattr(rule, "gate", "softmax") == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def can_be_told_apart(rule: Router, weights: Weights, logits_GNE: torch.Tensor) -> bool:
    """Whether no two numbers that decide are nearly equal: scores of a token, gates for an expert."""
    gate_GNE = gates(rule, logits_GNE)
    score_GNE = gate_GNE + weights["router.bias"] if "router.bias" in weights else logits_GNE
    k = rule.k if isinstance(rule, TopKRouter) else 1
    first_GN = gate_GNE.gather(-1, score_GNE.topk(k).indices).amax(-1)
    return all(
        (values.sort(dim).values.diff(dim=dim) > GAP).all()
        for values, dim in ((score_GNE, 2), (gate_GNE, 1), (first_GN, 1))
    )


def layer(
    rule: Router, weights: Weights, x_BSD: torch.Tensor, real_BS: torch.Tensor, mode: Mode, scale: float = 1.0
) -> tuple[Answer, torch.Tensor]:
    """The answer of the layer, and the router's logits [G, N, E]. `scale` multiplies what experts give."""
    B, S, D = x_BSD.shape
    together = 1 if mode == "dropless" and not isinstance(rule, ExpertChoiceRouter) else rule.group_sequences
    x_GND = x_BSD.reshape(B // together, together * S, D)
    logits_GNE = x_GND @ weights["router.weight"].T
    gate_GNE = gates(rule, logits_GNE)
    outputs, groups, fractions, means = [], [], [], []
    squares, counts, entropy, confidence = [], [], 0.0, 0.0
    tokens = dropped = 0
    for x_ND, logits_NE, gate_NE, real_N in zip(
        x_GND, logits_GNE, gate_GNE, real_BS.reshape(len(x_GND), -1).tolist(), strict=True
    ):
        real = [token for token, there in enumerate(real_N) if there]
        if isinstance(rule, ExpertChoiceRouter):
            group = _expert_choice(rule, gate_NE, real, mode)
        else:
            group = _token_choice(rule, gate_NE, weights.get("router.bias"), real, mode)
        probability_NE = gate_NE / gate_NE.sum(-1, keepdim=True)
        y_N = [torch.zeros(weights["experts.wo"].shape[1], dtype=x_BSD.dtype) for _ in real_N]
        for token, expert, weight in group.places:
            y_N[token] = y_N[token] + scale * weight * _expert(weights, expert, x_ND[token])
        if "shared.wi.weight" in weights:
            shared = {
                name.replace("shared", "experts").removesuffix(".weight"): weight[None]
                for name, weight in weights.items()
                if name.startswith("shared.")
            }
            y_N = [y_D + _expert(shared, 0, x_D) for y_D, x_D in zip(y_N, x_ND, strict=True)]
        outputs.append(torch.stack(y_N))
        groups.append(group)
        fractions.append(_fraction(group, real, logits_NE.shape[1]))
        means.append(probability_NE[real].sum(0) / max(1, len(real)))
        counts.append(len(real))
        tokens += len(real)
        dropped += len(set(real) - {place.token for place in group.places})
        total = torch.zeros((), dtype=x_BSD.dtype)
        for token in real:
            total = total + logits_NE[token].exp().sum().log() ** 2
            entropy -= sum(p * torch.tensor(p).log().item() for p in probability_NE[token].tolist())
            confidence += max(probability_NE[token].tolist())
        squares.append(total)
    fraction_GE = torch.tensor(fractions, dtype=x_BSD.dtype)
    num_experts = fraction_GE.shape[1]
    balance = sum(  # a group counts by its real tokens
        count * num_experts * f * p
        for count, fraction_E, mean_E in zip(counts, fraction_GE, means, strict=True)
        for f, p in zip(fraction_E, mean_E, strict=True)
    )
    answer = Answer(
        y_BSO=torch.stack(outputs).reshape(B, S, -1),
        fraction_GE=fraction_GE,
        probability_GE=torch.stack(means),
        load_balancing_loss=torch.as_tensor(balance) / max(1, tokens),
        z_loss=torch.stack(squares).sum() / max(1, tokens),
        load_E=torch.tensor([group.load_E for group in groups]).sum(0),
        dropped=dropped,
        dropped_choices=int(sum(sum(group.load_E) - len(group.places) for group in groups)),
        tokens=tokens,
        entropy=entropy,
        confidence=confidence,
    )
    return answer, logits_GNE


def _fraction(group: Group, tokens: list[int], num_experts: int) -> list[float]:
    """f of eq. 5 over these tokens."""
    if group.counted is None:
        return [1 / num_experts if tokens else 0.0] * num_experts
    chosen = [expert for token in tokens for expert in group.counted[token]]
    return [chosen.count(expert) / max(1, len(chosen)) for expert in range(num_experts)]


def _token_choice(
    rule: Router, gate_NE: torch.Tensor, bias_E: torch.Tensor | None, real: list[int], mode: Mode
) -> Group:
    """Switch, top-k and no-token-left-behind without noise; a later choice of top-k is always kept."""
    N, E = gate_NE.shape
    C = capacity(rule, N, E, mode)
    gate, score = gate_NE.tolist(), (gate_NE if bias_E is None else gate_NE + bias_E).tolist()
    ranked = {token: sorted(range(E), key=lambda expert, s=score[token]: -s[expert]) for token in real}
    if isinstance(rule, TopKRouter):  # scores choose, and gates say which choice is first
        for token, experts in ranked.items():
            experts[: rule.k] = sorted(experts[: rule.k], key=lambda expert, g=gate[token]: -g[expert])
    rounds = {"switch": 1, "top_k": getattr(rule, "k", 1), "no_token_left_behind": min(getattr(rule, "k", 1), E)}
    queue = list(real)
    if rule.overflow == "probability":
        queue.sort(key=lambda token: -gate[token][ranked[token][0]])
    slots: list[list[int]] = [[] for _ in range(E)]
    load = [0] * E
    places: list[Place] = []
    for choice in range(rounds[rule.kind]):
        settled = {place.token for place in places}
        for token in queue:
            if isinstance(rule, NoTokenLeftBehindRouter) and token in settled:
                continue
            expert = ranked[token][choice]
            load[expert] += 1
            if len(slots[expert]) < C:
                slots[expert].append(token)
                weight = gate_NE[token, expert]
                if isinstance(rule, TopKRouter) and rule.renormalize:
                    weight = weight / gate_NE[token, ranked[token][: rule.k]].sum()
                places.append(Place(token, expert, weight))
    counts_all = isinstance(rule, NoTokenLeftBehindRouter) or rounds[rule.kind] > 2
    counted = rounds[rule.kind] if counts_all else 1
    return Group(places, [ranked[token][:counted] if token in ranked else [] for token in range(N)], load)


def _expert_choice(rule: ExpertChoiceRouter, probability_NE: torch.Tensor, real: list[int], mode: Mode) -> Group:
    E = probability_NE.shape[1]
    C = capacity(rule, len(real), E, mode)
    places = [
        Place(token, expert, probability_NE[token, expert])
        for expert in range(E)
        for token in sorted(real, key=lambda token, e=expert: -probability_NE[token, e].item())[:C]
    ]
    return Group(places, None, [C] * E)


def _expert(weights: Weights, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    hidden_F = weights["experts.wi"][expert] @ x_D
    if "experts.wi_gate" in weights:
        hidden_F = hidden_F * F.gelu(weights["experts.wi_gate"][expert] @ x_D, approximate="tanh")
    else:
        hidden_F = hidden_F.clamp(min=0.0)
    return weights["experts.wo"][expert] @ hidden_F
