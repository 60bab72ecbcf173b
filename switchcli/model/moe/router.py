"""Routers: which token sits in each expert's slots, and with what weight (paper sections 2.1, 2.2; appendices B, C, F).

Legend: G groups, N tokens per group, E experts, C slots per expert (the capacity), K choices per token.

A router is a spec whose `assign` turns logits into a `Routing`: the token in each slot, so that all routers share one
dispatch and combine. A token may be in slots of several experts, or in none. A group is a fixed number of full
sequences, so which tokens are dropped does not depend on microbatches or ranks. Routing without a capacity is the same
with N slots per expert.

# Deviates: the paper counts capacity, f and P over the tokens of a core. Here they are counted over those of a group,
whose size the recipe sets, and f and P over its real tokens only.
"""

# A recipe is checked without torch, whose import takes seconds: the methods that create tensors import it.
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from switchcli.model.moe.stats import (
    RouterStats,
    choice_counts,
    choice_fraction,
    router_stats,
    softmax_over_experts,
)
from switchcli.spec import MAX_SIZE, Count, Size, Spec

if TYPE_CHECKING:
    import torch

Factor = Annotated[float, Field(gt=0.0, le=1e12)]
Policy = Literal["paper", "dropless"] | Factor
"""How an evaluation counts capacity: by `eval_capacity_factor` (`paper`), not at all (`dropless`), or by this factor.
With `dropless` no token's output depends on the other tokens of its batch, so that decoding step by step equals teacher
forcing. Expert choice needs a capacity and keeps its own under `dropless`."""
FEW_CHOICES = 2
"""Up to so many experts per token, capacity factors are the paper's, which has slots for 1.25 choices of a token in its
top-2 baseline. With more choices, a factor below their number would leave most of them out."""
Mode = Literal["training"] | Policy
"""Training, or an evaluation under one of the policies."""


class Routing(NamedTuple):
    """The assignment of tokens to expert slots."""

    token_GEC: torch.Tensor
    """int64: the token in each slot, as its index in the group; N where the slot is empty."""
    weight_GEC: torch.Tensor
    """The gate: the weight of the token in the slot, 0 if empty. Differentiable, in the router's precision."""
    max_filled_slots: int
    """Upper bound of the number of filled slots over all groups, whatever the tokens choose."""
    stats: RouterStats


class Router(Spec, ABC):
    """The base of all routers: capacities, groups, noise, losses.

    Each router also has `capacity_factor`, as a key.
    """

    eval_capacity_factor: Factor | Literal["dropless"] = 2.0
    """Slots for evaluation, as a multiple of an even share of the tokens, or `dropless`; 2.0 is Mesh-TensorFlow's
    default, the paper gives none."""
    min_capacity: Size = 4
    """Minimum number of slots per expert and group; 4 is Mesh-TensorFlow's default."""
    group_sequences: Count = 1
    """Number of sequences that share a capacity."""
    jitter: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Half-width of the noise U[1 - jitter, 1 + jitter] that multiplies the router's copy of its input in training
    (Appendix C); 0, without dropout and sampling, gives the paper's argmax."""
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout rate of the router's copy of its input in training (Appendix C); Mesh-TensorFlow's is 0.1."""
    z_loss_coef: float = Field(default=0.0, ge=0.0)
    """Coefficient of the router z-loss: 1e-3 in ST-MoE; the paper has no such loss."""

    # Properties by which a router describes itself, so that FLOPs, plan, upcycling, pruning and export do not check its
    # kind: override those that differ for a new router.

    experts_choose: ClassVar[bool] = False
    """Experts choose tokens: loads are equal by construction, and a token may be taken by several experts or none."""

    def key_unlike_transformers(self) -> str | None:
        """Return the key at whose value transformers' SwitchTransformers has no such router; None if it has."""
        return "kind"

    @property
    def experts_per_token(self) -> int:
        """Nominal number of experts that process a token, by which FLOPs are counted."""
        return 1

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the weights of a token's experts add up to 1 for any logits."""
        return False

    @property
    def gates_are_independent(self) -> bool:
        """Whether the weight of an expert depends on its own logit only."""
        return self.has_sigmoid_gates and not self.gates_sum_to_one

    @property
    def has_sigmoid_gates(self) -> bool:
        """Whether gates are sigmoids of their logits, before they are divided by any sum."""
        return False

    @property
    def balance_coef(self) -> float:
        """Coefficient of the load-balancing loss."""
        return 0.0

    @property
    def choice_bias_rate(self) -> float | None:
        """Change of the biases of choices in a step; None without biases."""
        return None

    def dense_equivalent_scale(self, num_experts: int) -> float:
        """Return 1 over the sum of a token's weights when all experts are equally probable.

        Identical experts, with their output multiplied by this factor, are equal to one dense layer. Under expert
        choice this holds for the mean over the tokens only.
        """
        if self.gates_are_independent:  # experts are equally probable at logits of 0, where a sigmoid is 1/2
            return 2 / self.experts_per_token
        return 1.0 if self.gates_sum_to_one else num_experts / self.experts_per_token

    def incompatibility(self, num_experts: int) -> str | None:
        """Return why the router does not work with this many experts, beginning with the key at fault, or None."""
        return None

    def gates(self, logits_GNE: torch.Tensor) -> torch.Tensor:
        """Return the gate of every expert, in the dtype and shape of the logits."""
        return logits_GNE.sigmoid() if self.has_sigmoid_gates else softmax_over_experts(logits_GNE)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of each expert over the last dim: its gate's share of the sum over the experts."""
        if not self.has_sigmoid_gates:
            return logits.softmax(-1)
        gate = logits.sigmoid()
        return gate / gate.sum(-1, keepdim=True)

    @abstractmethod
    def assign(
        self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode, bias_E: torch.Tensor | None = None
    ) -> Routing:
        """Assign tokens to slots.

        Args:
            logits_GNE: the router's output h(x): float32, or bfloat16 in the paper's ablation (Table 2).
            real_GN: bool, False for padding, which takes no slot and is left out of all means.
            mode: which capacity applies, and whether the random choices of training are drawn.
            bias_E: float32, added to the gates where experts are chosen (`TokenChoiceRouter.balance`).
        """

    @abstractmethod
    def group_size(self, mode: Mode) -> int:
        """Return how many sequences must be routed together: a group, or 1 where the mode makes groups irrelevant."""

    @abstractmethod
    def causality_violation(self) -> str | None:
        """Return why no decoder may use this router, because earlier tokens would depend on later ones, or None.

        Influence only on which tokens are dropped is tolerated in two cases: first choices of later tokens go before
        second choices of earlier ones, and `overflow: random` draws the order in training.
        """

    def _slots_for_factor(self, factor: float | str, num_tokens: int, num_experts: int) -> int:
        """Return the slots per expert in a group of `num_tokens` tokens (eq. 3); `factor` may be `dropless`."""
        if isinstance(factor, str):
            return num_tokens
        return min(num_tokens, max(self.min_capacity, int(num_tokens * factor / num_experts)))


class TokenChoiceRouter(Router, ABC):
    """Base of routers in which tokens choose experts; each expert's slots go to the first tokens of its queue."""

    capacity_factor: Factor | Literal["dropless"] = 1.25
    """Slots for training, as a multiple of an even share of the tokens (eq. 3), or `dropless`: a slot for every
    token."""
    overflow: Literal["position", "probability", "random"] = "position"
    """Which tokens are first in a queue: `position`, the earlier ones; `probability`, those with the higher first
    probability (batch-prioritized, not in a decoder); `random`, drawn in training and by position in evaluation (in a
    decoder, later tokens then affect which tokens are dropped in training)."""
    sample_temperature: float | None = Field(default=None, gt=0.0)
    """Temperature of training choices that are sampled from softmax(h / temperature) (Appendix C); absent: the most
    probable experts are chosen."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Function of the logits that gives the weights: `softmax` over the experts, or a `sigmoid` of each expert's logit
    (DeepSeek-V3), whose P in the load-balancing loss is its share of the sum over the experts."""
    balance: Literal["loss", "bias"] = "loss"
    """What balances the experts: `loss` is the paper's load-balancing loss. `bias` adds a number to each expert's gate
    where experts are chosen, but not to the weight; after each step it rises for experts with less than the mean load
    and falls for the others (DeepSeek-V3). It suits `gate: sigmoid`: its rate is large beside a softmax of 1/E."""
    bias_rate: float = Field(default=1e-3, gt=0.0)
    """Change of an expert's bias in a step, with `balance: bias`; 0.001 as in DeepSeek-V3."""
    balance_loss_coef: float | None = Field(default=None, ge=0.0)
    """Coefficient alpha of the load-balancing loss (eq. 4); absent: the paper's 0.01, or 0 with `balance: bias`."""

    @model_validator(mode="after")
    def _bias_chooses_by_gates(self) -> Self:
        if self.balance == "bias" and self.sample_temperature is not None:
            raise ValueError(
                "sample_temperature samples from the logits, and balance: bias chooses by biased gates: leave "
                "sample_temperature out, or take balance: loss"
            )
        return self

    @property
    def has_sigmoid_gates(self) -> bool:
        return self.gate == "sigmoid"

    @property
    def balance_coef(self) -> float:
        if self.balance_loss_coef is not None:
            return self.balance_loss_coef
        return 0.0 if self.balance == "bias" else 0.01

    @property
    def choice_bias_rate(self) -> float | None:
        return self.bias_rate if self.balance == "bias" else None

    @abstractmethod
    def num_choices(self, num_experts: int) -> int:
        """Return K, the number of experts that a token may choose."""

    @abstractmethod
    def _max_slots_per_token(self, num_choices: int) -> int:
        """Return the maximum number of slots that hold the same token."""

    @abstractmethod
    def _eligible(self, gate_GN: torch.Tensor, assigned_GN: torch.Tensor, training: bool) -> torch.Tensor:
        """Return which tokens queue for their next choice, after the first: bool [G, N].

        Args:
            gate_GN: the weight of that choice.
            assigned_GN: bool, tokens that have a slot already.
            training: whether random decisions are drawn.
        """

    def _gates(self, probability_GNK: torch.Tensor) -> torch.Tensor:
        """Return the weights of the choices, given their probabilities; by default the probabilities themselves."""
        return probability_GNK

    def group_size(self, mode: Mode) -> int:
        return 1 if mode == "dropless" else self.group_sequences

    def causality_violation(self) -> str | None:
        if self.overflow == "probability":
            return "overflow: probability lets a later token take the slot of an earlier one"
        return None

    def capacity(self, num_tokens: int, num_experts: int, mode: Mode) -> int:
        """Return C, the slots per expert in a group of N tokens: eq. 3, rounded down, from `min_capacity` to N."""
        factor: float | str = mode  # `dropless` or a number; `training` and `paper` are replaced below
        if mode == "training":
            factor = self.capacity_factor
        elif mode == "paper":
            factor = self.eval_capacity_factor
        return self._slots_for_factor(factor, num_tokens, num_experts)

    def assign(
        self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode, bias_E: torch.Tensor | None = None
    ) -> Routing:
        """Queue the tokens for their choices: all first choices, then all second ones behind them, and so on."""
        import torch.nn.functional as F

        from switchcli.model.moe.slots import fill_slots, search_slots

        G, N, E = logits_GNE.shape
        training = mode == "training"
        K, C = self.num_choices(E), self.capacity(N, E, mode)
        probability_GNE = self.gates(logits_GNE)
        # Logits choose as their gates do. Noise in bfloat16 would make ties, and the first expert wins a tie.
        score_GNE = logits_GNE.detach().float()
        if bias_E is not None:
            score_GNE = probability_GNE.detach().float() + bias_E
        expert_GNK = self._choices(score_GNE, real_GN, K, training)
        probability_GNK = probability_GNE.gather(-1, expert_GNK)  # of each choice
        if bias_E is not None and K > 1:  # biases choose the experts; they queue in the order of their gates
            order_GNK = probability_GNK.detach().argsort(dim=-1, descending=True, stable=True)
            expert_GNK, probability_GNK = expert_GNK.gather(-1, order_GNK), probability_GNK.gather(-1, order_GNK)
        gate_GNK = self._gates(probability_GNK)  # the weight of each choice, if it gets a slot
        order_GN = self._order(probability_GNK[..., 0], training)

        def eligible(choice: int, assigned_GN: torch.Tensor) -> torch.Tensor:
            return self._eligible(gate_GNK[..., choice], assigned_GN, training)

        found = search_slots(expert_GNK, real_GN, order_GN, eligible, E, C)
        token_GEC, weight_GEC = fill_slots(found.slot_GA, gate_GNK, E, C)
        stats = router_stats(
            logits_GNE,
            real_GN,
            fraction_GE=self._fraction(expert_GNK, real_GN, E),
            load_GE=found.load_GE,
            assigned_GN=found.assigned_GN,
            num_filled=(found.slot_GA < E * C).sum(),
            choice_E=choice_counts(expert_GNK, real_GN, E).sum(0) if K > 1 and self.balance == "bias" else None,
            log_gate_GNE=F.logsigmoid(logits_GNE.float()) if self.gate == "sigmoid" else None,
        )
        return Routing(
            token_GEC,
            weight_GEC,
            max_filled_slots=G * min(E * C, N * self._max_slots_per_token(K)),
            stats=stats,
        )

    def _choices(
        self, score_GNE: torch.Tensor, real_GN: torch.Tensor, num_choices: int, training: bool
    ) -> torch.Tensor:
        """Return the experts with the largest scores for each token, the first choice first: int64 [G, N, K].

        `real_GN` is False for padding, which must not affect the choices of other tokens.
        """
        import torch

        if training and self.sample_temperature is not None:
            # Gumbel-max: -log(Exponential(1)) is Gumbel noise, and the argmax of logits plus Gumbel noise is a sample.
            noise_GNE = torch.empty_like(score_GNE).exponential_().log_()
            score_GNE = score_GNE / self.sample_temperature - noise_GNE
        if num_choices == 1:
            return score_GNE.argmax(-1, keepdim=True)
        return score_GNE.topk(num_choices).indices

    def _order(self, probability_GN: torch.Tensor, training: bool) -> torch.Tensor | None:
        """Return the tokens of each group in the order in which they queue, int64 [G, N]; None: by position.

        `probability_GN` is that of each token's first choice.
        """
        import torch

        if self.overflow == "probability":
            return probability_GN.argsort(dim=1, descending=True, stable=True)
        if self.overflow == "random" and training:
            return torch.rand_like(probability_GN, dtype=torch.float32).argsort(dim=1)
        return None

    def _fraction(self, expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Return f of eq. 5: [G, E], without a gradient. By default only first choices count."""
        return choice_fraction(expert_GNK[..., :1], real_GN, num_experts)


class SwitchRouter(TokenChoiceRouter):
    """Top-1 routing: each token goes to its most probable expert, weighted by that raw probability (section 2.1).

    The weight is not renormalized: over one expert that would give 1, and no gradient to the router.
    """

    kind: Literal["switch"] = "switch"
    """`switch` sends each token to its most probable expert (paper section 2.1)."""

    def key_unlike_transformers(self) -> str | None:
        if self.gate != "softmax":
            return "gate"
        return "balance" if self.balance != "loss" else None

    def num_choices(self, num_experts: int) -> int:
        return 1

    def _max_slots_per_token(self, num_choices: int) -> int:
        return 1

    def _eligible(self, gate_GN: torch.Tensor, assigned_GN: torch.Tensor, training: bool) -> torch.Tensor:
        raise AssertionError("SwitchRouter has one choice per token, so no token queues for a second one")


class TopKRouter(TokenChoiceRouter):
    """Mixture-of-Experts routing with k experts per token (eq. 2): the paper's MoE baseline, Mesh-TensorFlow's top-2.

    First choices take their slots before any second choice. In a decoder, the first choice of a later token thus goes
    before the second choice of an earlier one, so where slots are short, later tokens affect which choices are dropped.
    In training a later choice is kept at random, with probability min(1, gate / keep_threshold).

    # Deviates: Mesh-TensorFlow draws in evaluation too. Here evaluation keeps every choice, so that results repeat.
    """

    kind: Literal["top_k"] = "top_k"
    """`top_k` sends each token to its k most probable experts: the paper's Mixture-of-Experts baseline."""
    k: Size = 2
    """Number of experts per token. For more than two, the defaults have room for all of them: `capacity_factor` is
    1.25 k, `eval_capacity_factor` 2 k, and `keep_threshold` 0. The load-balancing loss then counts all choices, and of
    two the first."""
    renormalize: bool = True
    """Whether the k gates are divided by their sum."""
    keep_threshold: float = Field(default=0.2, ge=0.0, le=1.0)
    """Gate above which training always keeps a second or later choice; 0 keeps every choice."""

    @model_validator(mode="before")
    @classmethod
    def _many_choices_have_room(cls, keys: object) -> object:
        """Fill in the defaults for more than a few choices."""
        if not isinstance(keys, dict) or not isinstance(k := keys.get("k"), int) or k <= FEW_CHOICES:
            return keys
        return {"capacity_factor": 1.25 * k, "eval_capacity_factor": 2.0 * k, "keep_threshold": 0.0, **keys}

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.k == 1 and self.renormalize:
            raise ValueError(
                "k: 1 with renormalize: true cannot learn: the only gate is always 1, and no gradient reaches the "
                "router; use kind: switch, which keeps the raw probability, or k: 2"
            )
        if self.k > FEW_CHOICES and self.keep_threshold > 1 / self.k:
            raise ValueError(
                f"keep_threshold ({self.keep_threshold:g}) is above 1 / k: training would skip many of the {self.k} "
                "choices, as their gates are near that: set it to 0"
            )
        return self

    @property
    def experts_per_token(self) -> int:
        return self.k

    @property
    def gates_sum_to_one(self) -> bool:
        return self.renormalize

    def incompatibility(self, num_experts: int) -> str | None:
        return f"k ({self.k}) must be at most num_experts ({num_experts})" if self.k > num_experts else None

    def num_choices(self, num_experts: int) -> int:
        return self.k

    def _max_slots_per_token(self, num_choices: int) -> int:
        return num_choices

    def _gates(self, probability_GNK: torch.Tensor) -> torch.Tensor:
        if not self.renormalize:
            return probability_GNK
        import torch

        # Of sigmoids, and of experts that a bias has chosen, all gates may be 0.
        total_GN1 = probability_GNK.sum(-1, keepdim=True).clamp(min=torch.finfo(probability_GNK.dtype).tiny)
        return probability_GNK / total_GN1

    def _fraction(self, expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
        # Of two choices the first counts, as in Mesh-TensorFlow. Of many all do, as in DeepSeekMoE: which one is first
        # says little, and among the parts of one upcycled feed-forward, whose gates are equal, it is always the same.
        counted_GNK = expert_GNK if self.k > FEW_CHOICES else expert_GNK[..., :1]
        return choice_fraction(counted_GNK, real_GN, num_experts)

    def _eligible(self, gate_GN: torch.Tensor, assigned_GN: torch.Tensor, training: bool) -> torch.Tensor:
        import torch

        if not training:
            return torch.ones_like(assigned_GN)
        # P(u * threshold <= gate) = min(1, gate / threshold) for u uniform on [0, 1).
        return torch.rand_like(gate_GN, dtype=torch.float32) * self.keep_threshold <= gate_GN.detach()


class NoTokenLeftBehindRouter(TokenChoiceRouter):
    """Switch routing in k rounds: a token that found no slot queues for its next choice (Appendix B).

    Weights are raw probabilities. f of the load-balancing loss is the mean over the k choices (Mesh-TensorFlow), so
    with k or fewer experts it is uniform for any router and the loss has no effect. As in `TopKRouter`, a later token's
    first choice goes before an earlier token's second.

    # Deviates: Mesh-TensorFlow takes this softmax in the precision of the activations; here it is the router's.
    """

    kind: Literal["no_token_left_behind"] = "no_token_left_behind"
    """`no_token_left_behind` routes in rounds: a token that found no slot goes to its next expert (Appendix B)."""
    k: int = Field(default=4, ge=2, le=MAX_SIZE)
    """Number of rounds, limited to the number of experts."""

    @model_validator(mode="after")
    def _has_no_biases(self) -> Self:
        if self.balance == "bias":
            raise ValueError(
                "balance: bias counts all choices of a token, and here most of them are never used: take kind: switch "
                "or top_k, or balance: loss"
            )
        return self

    def num_choices(self, num_experts: int) -> int:
        return min(self.k, num_experts)

    def _max_slots_per_token(self, num_choices: int) -> int:
        return 1

    def _eligible(self, gate_GN: torch.Tensor, assigned_GN: torch.Tensor, training: bool) -> torch.Tensor:
        return ~assigned_GN

    def _fraction(self, expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
        return choice_fraction(expert_GNK, real_GN, num_experts)


class ExpertChoiceRouter(Router):
    """Expert choice: each expert takes its most probable tokens, as many as it has slots (Zhou et al. 2022).

    Beyond the paper. Loads are equal by construction, so there is no load-balancing loss. A token may be taken by
    several experts or by none. The number of slots follows the group's real tokens, so padding changes nothing.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    """`expert_choice` lets each expert take its most probable tokens (Zhou et al. 2022)."""
    capacity_factor: Factor = 1.25
    """Slots for training, as a multiple of an even share: the mean number of experts that take a token."""
    eval_capacity_factor: Factor = 1.25
    """Slots for evaluation, as a multiple of an even share, under the policies `paper` and `dropless`."""
    experts_choose: ClassVar[bool] = True

    def dense_equivalent_scale(self, num_experts: int) -> float:
        return num_experts / self.capacity_factor

    def group_size(self, mode: Mode) -> int:
        return self.group_sequences

    def causality_violation(self) -> str | None:
        return "kind: expert_choice lets each expert choose among all positions, including later ones"

    def assign(
        self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode, bias_E: torch.Tensor | None = None
    ) -> Routing:
        """Give each expert its most probable tokens, the most probable first."""
        import torch
        import torch.nn.functional as F

        _, N, E = logits_GNE.shape
        factor = self.capacity_factor if mode == "training" else self.eval_capacity_factor
        factor = mode if isinstance(mode, float) else factor
        probability_GNE = logits_GNE.softmax(-1)
        # Padding scores -1, below every probability, so that each expert's real tokens come first.
        score_GEN = probability_GNE.mT.masked_fill(~real_GN.unsqueeze(1), -1.0)
        # The sort is stable, unlike topk: before the first attention, repeated tokens have equal scores.
        score_GEN, order_GEN = score_GEN.sort(dim=-1, descending=True, stable=True)
        C = self._slots_for_factor(factor, N, E)
        weight_GEC, token_GEC = score_GEN[..., :C], order_GEN[..., :C]
        # C is the capacity of a group of N real tokens. A group with padding has fewer slots; the others stay empty.
        tokens_G = real_GN.sum(1)
        slots_G = (tokens_G.double() * factor / E).long().clamp(min=self.min_capacity).minimum(tokens_G)
        empty_G1C = torch.arange(C, device=slots_G.device) >= slots_G[:, None, None]
        token_GEC = token_GEC.masked_fill(empty_G1C, N)
        # Mark every token that is in a slot. Column N, which empty slots mark, is cut off.
        assigned_GN = F.pad(torch.zeros_like(real_GN), (0, 1)).scatter_(1, token_GEC.flatten(1), True)[:, :-1]
        load_GE = (~empty_G1C).sum(-1).expand(-1, E)  # all experts of a group fill the same number of slots
        stats = router_stats(
            logits_GNE,
            real_GN,
            fraction_GE=load_GE / load_GE.sum(1, keepdim=True).clamp(min=1),
            load_GE=load_GE,
            assigned_GN=assigned_GN,
        )
        weight_GEC = weight_GEC.masked_fill(empty_G1C, 0.0)
        return Routing(token_GEC, weight_GEC, max_filled_slots=token_GEC.numel(), stats=stats)


def _default_to_switch(value: object) -> object:
    return {"kind": "switch", **value} if isinstance(value, dict) else value


RouterSpec = Annotated[
    SwitchRouter | TopKRouter | NoTokenLeftBehindRouter | ExpertChoiceRouter,
    Field(discriminator="kind"),
    BeforeValidator(_default_to_switch),
]
"""The routers that a recipe can name by `kind`; without a `kind` it is `switch`."""
