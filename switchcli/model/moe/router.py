"""Routing: which token sits in each expert's slot, and with what weight (paper sections 2.1, 2.2; Appendices B, C, F).

Legend: G groups, N tokens a group, E experts, C slots an expert (the capacity), K choices of a token.

A router is a spec with a pure `assign`. Its answer is slot-major, so that all routers share one dispatch and combine;
a token may sit in the slots of several experts, or in none. A group is a fixed number of whole sequences, so what is
dropped does not depend on microbatches or ranks. Routing without a capacity is the same with a slot for every token.

# Deviates: the paper counts capacity, f and P over the tokens of a core; here over those of a group, whose size is the
# recipe's, f and P over its real tokens alone.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator

from switchcli.model.moe.stats import RouterStats, choice_fraction, count_per_group, router_stats
from switchcli.spec import MOST, Spec

Factor = Annotated[float, Field(gt=0.0, le=1e12)]
Policy = Literal["paper", "dropless"] | Factor
"""How an evaluation counts capacity: by `eval_capacity_factor`, not at all, or by a factor given here. Without one, no
token's output depends on which others are beside it, so that decoding step by step equals teacher forcing. Expert
choice, which cannot do without, keeps its own for `dropless`."""
Mode = Literal["training"] | Policy
"""Training, or an evaluation under one of the policies."""


class Routing(NamedTuple):
    """The assignment of tokens to slots."""

    token_GEC: torch.Tensor
    """int64: the token in each slot, as its index in the group; N where the slot is empty."""
    weight_GEC: torch.Tensor
    """The weight of the token in the slot (p_i(x) in eq. 2), 0 where it is empty; differentiable, in the router's
    precision."""
    max_filled_slots: int
    """No more slots than this are filled, whatever the tokens choose."""
    stats: RouterStats


class Router(Spec, ABC):
    """What every router has: capacities, groups, noise, losses.

    Each router also has `capacity_factor` and `balance_loss_coef`, as keys or as constants of the class.
    """

    eval_capacity_factor: Factor | Literal["dropless"] = 2.0
    """As `capacity_factor`, for evaluation; 2.0 is Mesh-TensorFlow's default, the paper has none."""
    min_capacity: int = Field(default=4, ge=1, le=MOST["expert_capacity"])
    group_sequences: int = Field(default=1, ge=1, le=MOST["count"])
    """Sequences that share a capacity."""
    jitter: float = Field(default=0.01, ge=0.0, lt=1.0)
    """The router's copy of its input is multiplied by U[1 - jitter, 1 + jitter] in training (Appendix C); 0 with the
    other kinds of noise at their defaults is the paper's argmax."""
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of the router's copy of its input in training (Appendix C); Mesh-TensorFlow's rate is 0.1."""
    z_loss_coef: float = Field(default=0.0, ge=0.0)
    """Coefficient of the router z-loss: 1e-3 in ST-MoE, none in the paper."""

    # What a router says of itself, so that FLOPs, plan, upcycling, pruning and export need not know its kind.

    experts_choose: ClassVar[bool] = False
    """Experts choose tokens: loads are equal by construction, and a token may be taken by several experts or none."""
    has_load_balancing_loss: ClassVar[bool] = True
    """`balance_loss_coef` weighs a load-balancing loss."""
    is_in_transformers: ClassVar[bool] = False
    """transformers' SwitchTransformers has this router."""

    @property
    def experts_per_token(self) -> int:
        """Experts that a token is meant to pass: what FLOPs are counted by."""
        return 1

    @property
    def gates_sum_to_one(self) -> bool:
        """The weights of a token's experts add up to 1 whatever the router says."""
        return False

    def dense_equivalent_scale(self, num_experts: int) -> float:
        """Return 1 over the sum of a token's weights when all experts are equally probable.

        By it the output of identical experts is multiplied to be that of one dense layer; under expert choice on the
        mean over the tokens alone.
        """
        return 1.0 if self.gates_sum_to_one else num_experts / self.experts_per_token

    def incompatibility(self, num_experts: int) -> str | None:
        """Return why the router cannot do with so many experts, beginning with its key; None where it can."""
        return None

    @abstractmethod
    def assign(self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode) -> Routing:
        """Give every slot its token.

        Args:
            logits_GNE: the router's output h(x); float32, but in the paper's bfloat16 arm.
            real_GN: bool, False for padding, which takes no slot and counts in no mean.
            mode: which capacity holds, and whether what is random in training is drawn.
        """

    @abstractmethod
    def group_size(self, mode: Mode) -> int:
        """Sequences that must be routed together: a group, unless it makes no difference."""

    @abstractmethod
    def causality_violation(self) -> str | None:
        """Why a causal decoder may not route so, if it may not."""

    def _capacity(self, factor: float | str, num_tokens: int, num_experts: int) -> int:
        if isinstance(factor, str):
            return num_tokens
        return min(num_tokens, max(self.min_capacity, int(num_tokens * factor / num_experts)))


class TokenChoiceRouter(Router, ABC):
    """Each token chooses experts, and queues at them; a queue is cut at the capacity."""

    capacity_factor: Factor | Literal["dropless"] = 1.25
    """Slots for training, as a multiple of an even share (eq. 3); `dropless`: a slot for every token."""
    overflow: Literal["position", "probability", "random"] = "position"
    """Who is first in a queue: the earlier token; the one with the higher first probability (batch-prioritised, not in
    a decoder); or one drawn at random in training (by position in evaluation; in a decoder what is dropped in training
    then depends on later tokens)."""
    sample_temperature: float | None = Field(default=None, gt=0.0)
    """In training choose by sampling from softmax(h / temperature) (Appendix C); absent: the most probable."""
    balance_loss_coef: float = Field(default=0.01, ge=0.0)
    """alpha of eq. 4."""

    @abstractmethod
    def num_choices(self, num_experts: int) -> int:
        """K: how many experts a token may name."""

    @abstractmethod
    def _max_slots_per_token(self, num_choices: int) -> int:
        """How many slots a token may sit in."""

    @abstractmethod
    def _gates(self, gate_GNK: torch.Tensor) -> torch.Tensor:
        """The weights of the choices, from their probabilities."""

    @abstractmethod
    def _eligible(self, gate_GN: torch.Tensor, placed_GN: torch.Tensor, training: bool) -> torch.Tensor:
        """bool: which tokens queue at their next choice (after the first), given which are in a slot already."""

    def group_size(self, mode: Mode) -> int:
        return 1 if mode == "dropless" else self.group_sequences

    def causality_violation(self) -> str | None:
        if self.overflow == "probability":
            return "overflow: probability lets a later token take the slot of an earlier one"
        return None

    def capacity(self, num_tokens: int, num_experts: int, mode: Mode) -> int:
        """Slots C of each expert in a group of N tokens (eq. 3), rounded down, at least `min_capacity`, at most N."""
        factor: float | str = mode
        if mode == "training":
            factor = self.capacity_factor
        elif mode == "paper":
            factor = self.eval_capacity_factor
        return self._capacity(factor, num_tokens, num_experts)

    def assign(self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode) -> Routing:
        """Queue the tokens at their choices: all first ones, then all second ones behind them, and so on."""
        (G, N, E), training = logits_GNE.shape, mode == "training"
        K, C = self.num_choices(E), self.capacity(N, E, mode)
        probability_GNE = logits_GNE.softmax(-1)
        expert_GNK = self._choices(logits_GNE, K, training)
        chosen_GNK = probability_GNE.gather(-1, expert_GNK)
        gate_GNK = self._gates(chosen_GNK)
        order_GN = self._order(chosen_GNK[..., 0], training)

        filled_GE = torch.zeros(G, E, dtype=torch.int64, device=logits_GNE.device)
        load_GE = filled_GE
        placed_GN = torch.zeros_like(real_GN)
        places = []
        for choice in range(K):
            joins_GN = real_GN
            if choice:
                joins_GN = real_GN & self._eligible(gate_GNK[..., choice], placed_GN, training)
            queue_GN = expert_GNK[..., choice].masked_fill(~joins_GN, E)
            position_GN, asked_GE = _positions_in_expert(queue_GN, filled_GE, order_GN)
            fits_GN = joins_GN & (position_GN < C)
            places.append((queue_GN * C + position_GN).where(fits_GN, E * C))
            placed_GN = placed_GN | fits_GN
            filled_GE = (filled_GE + asked_GE).clamp(max=C)
            load_GE = load_GE + asked_GE

        place_GA = torch.cat(places, dim=1)  # what has no place goes to one slot too many, which is cut off
        token_A = torch.arange(N, device=place_GA.device).repeat(K)
        token_GS = place_GA.new_full((G, E * C + 1), N).scatter_(1, place_GA, token_A.expand(G, -1))
        weight_GS = gate_GNK.new_zeros(G, E * C + 1).scatter(1, place_GA, gate_GNK.transpose(1, 2).flatten(1))
        report = router_stats(
            logits_GNE,
            real_GN,
            fraction_GE=self._fraction(expert_GNK, real_GN, E),
            load_GE=load_GE,
            placed_GN=placed_GN,
        )
        token_GEC, weight_GEC = token_GS[:, :-1].view(G, E, C), weight_GS[:, :-1].view(G, E, C)
        return Routing(token_GEC, weight_GEC, G * min(E * C, N * self._max_slots_per_token(K)), report)

    def _choices(self, logits_GNE: torch.Tensor, num_choices: int, training: bool) -> torch.Tensor:
        """int64 [G, N, K]: the experts of each token, the first choice first."""
        score_GNE = logits_GNE.detach().float()  # noise in bfloat16 would make ties, which the first expert wins
        if training and self.sample_temperature is not None:  # the largest of logits with Gumbel noise is a sample
            noise_GNE = torch.empty_like(score_GNE).exponential_().log_()
            score_GNE = score_GNE / self.sample_temperature - noise_GNE
        if num_choices == 1:
            return score_GNE.argmax(-1, keepdim=True)
        return score_GNE.topk(num_choices).indices

    def _order(self, gate_GN: torch.Tensor, training: bool) -> torch.Tensor | None:
        """int64: the tokens of each group in the order in which they queue; None when that is by position."""
        if self.overflow == "probability":
            return gate_GN.argsort(dim=1, descending=True, stable=True)
        if self.overflow == "random" and training:
            return torch.rand_like(gate_GN, dtype=torch.float32).argsort(dim=1)
        return None

    def _fraction(self, expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
        """f, of first choices alone (Mesh-TensorFlow); no gradient."""
        return choice_fraction(expert_GNK[..., :1], real_GN, num_experts)


class SwitchRouter(TokenChoiceRouter):
    """Top-1 routing: each token to its most probable expert, weighted by that raw probability (section 2.1).

    The weight is not renormalised: over one expert that gives 1, and no gradient to the router.
    """

    kind: Literal["switch"] = "switch"
    is_in_transformers: ClassVar[bool] = True

    def num_choices(self, num_experts: int) -> int:
        return 1

    def _max_slots_per_token(self, num_choices: int) -> int:
        return 1

    def _gates(self, gate_GNK: torch.Tensor) -> torch.Tensor:
        return gate_GNK

    def _eligible(self, gate_GN: torch.Tensor, placed_GN: torch.Tensor, training: bool) -> torch.Tensor:
        raise AssertionError("there is one choice")


class TopKRouter(TokenChoiceRouter):
    """Mixture-of-Experts routing with k experts a token (eq. 2): the paper's MoE baseline, by Mesh-TensorFlow's top-2.

    First choices take their slots before any second one: in a decoder a later token's first choice then goes before an
    earlier token's second, and where slots are short what is dropped depends on the future. In training a later choice
    is kept at random, with probability min(1, gate / keep_threshold).

    # Deviates: Mesh-TensorFlow draws in evaluation too; here every choice is kept then, so that a figure repeats.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=2, ge=1, le=MOST["num_experts"])
    renormalise: bool = True
    """Divide the k gates by their sum."""
    keep_threshold: float = Field(default=0.2, ge=0.0, le=1.0)
    """0 keeps every choice."""

    @model_validator(mode="after")
    def _can_learn(self) -> Self:
        if self.k == 1 and self.renormalise:
            raise ValueError(
                "k: 1 with renormalise: true cannot learn: the one gate is always 1, and no gradient reaches the "
                "router; take kind: switch, which keeps the raw probability, or k: 2"
            )
        return self

    @property
    def experts_per_token(self) -> int:
        return self.k

    @property
    def gates_sum_to_one(self) -> bool:
        return self.renormalise

    def incompatibility(self, num_experts: int) -> str | None:
        return f"k ({self.k}) must be at most num_experts ({num_experts})" if self.k > num_experts else None

    def num_choices(self, num_experts: int) -> int:
        return self.k

    def _max_slots_per_token(self, num_choices: int) -> int:
        return num_choices

    def _gates(self, gate_GNK: torch.Tensor) -> torch.Tensor:
        return gate_GNK / gate_GNK.sum(-1, keepdim=True) if self.renormalise else gate_GNK

    def _eligible(self, gate_GN: torch.Tensor, placed_GN: torch.Tensor, training: bool) -> torch.Tensor:
        if not training:
            return torch.ones_like(placed_GN)
        return torch.rand_like(gate_GN, dtype=torch.float32) * self.keep_threshold <= gate_GN.detach()


class NoTokenLeftBehindRouter(TokenChoiceRouter):
    """Switch routing in k rounds: a token that found no slot tries its next choice (Appendix B).

    Weights are raw probabilities; f of the balance loss is the mean over the k choices (Mesh-TensorFlow), so with no
    more than k experts it is uniform whatever the router does, and the loss pulls nowhere. As in `TopKRouter` a later
    first choice goes before an earlier token's second.

    # Deviates: Mesh-TensorFlow takes this softmax in the precision of the activations; here it is the router's.
    """

    kind: Literal["no_token_left_behind"] = "no_token_left_behind"
    k: int = Field(default=4, ge=2, le=MOST["num_experts"])
    """Rounds, at most one for each expert."""

    def num_choices(self, num_experts: int) -> int:
        return min(self.k, num_experts)

    def _max_slots_per_token(self, num_choices: int) -> int:
        return 1

    def _gates(self, gate_GNK: torch.Tensor) -> torch.Tensor:
        return gate_GNK

    def _eligible(self, gate_GN: torch.Tensor, placed_GN: torch.Tensor, training: bool) -> torch.Tensor:
        return ~placed_GN

    def _fraction(self, expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
        return choice_fraction(expert_GNK, real_GN, num_experts)


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens that are most probable for it, as many as it has slots (Zhou et al. 2022).

    Beyond the paper. Loads are equal by construction, so there is no balance loss; a token may be taken by several
    experts or by none. An expert's slots are its share of the group's real tokens: padding changes nothing.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: Factor = 1.25
    """Slots for training, as a multiple of an even share: the mean number of experts that take a token."""
    eval_capacity_factor: Factor = 1.25
    """The same for evaluation, under either policy."""
    balance_loss_coef: ClassVar[float] = 0.0
    experts_choose: ClassVar[bool] = True
    has_load_balancing_loss: ClassVar[bool] = False

    def dense_equivalent_scale(self, num_experts: int) -> float:
        return num_experts / self.capacity_factor

    def group_size(self, mode: Mode) -> int:
        return self.group_sequences

    def causality_violation(self) -> str | None:
        return "kind: expert_choice lets each expert choose among all positions, later ones too"

    def assign(self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, mode: Mode) -> Routing:
        """Give each expert its most probable tokens, the most probable first."""
        _, N, E = logits_GNE.shape
        factor = self.capacity_factor if mode == "training" else self.eval_capacity_factor
        factor = mode if isinstance(mode, float) else factor
        probability_GNE = logits_GNE.softmax(-1)
        score_GEN = probability_GNE.mT.masked_fill(~real_GN.unsqueeze(1), -1.0)
        # Stable, as topk is not: before the first attention a token that is repeated ties with itself.
        score_GEN, order_GEN = score_GEN.sort(dim=-1, descending=True, stable=True)
        C = self._capacity(factor, N, E)
        weight_GEC, token_GEC = score_GEN[..., :C], order_GEN[..., :C]
        tokens_G = real_GN.sum(1)
        slots_G = (tokens_G.double() * factor / E).long().clamp(min=self.min_capacity).minimum(tokens_G)
        empty_G1C = torch.arange(C, device=slots_G.device) >= slots_G[:, None, None]
        token_GEC = token_GEC.masked_fill(empty_G1C, N)
        placed_GN = F.pad(torch.zeros_like(real_GN), (0, 1)).scatter_(1, token_GEC.flatten(1), True)[:, :-1]
        load_GE = (~empty_G1C).sum(-1).expand(-1, E)
        report = router_stats(
            logits_GNE,
            real_GN,
            fraction_GE=load_GE / load_GE.sum(1, keepdim=True).clamp(min=1),
            load_GE=load_GE,
            placed_GN=placed_GN,
        )
        weight_GEC = weight_GEC.masked_fill(empty_G1C, 0.0)
        return Routing(token_GEC, weight_GEC, token_GEC.numel(), report)


def _switch_unless_said(value: object) -> object:
    return {"kind": "switch", **value} if isinstance(value, dict) else value


RouterSpec = Annotated[
    SwitchRouter | TopKRouter | NoTokenLeftBehindRouter | ExpertChoiceRouter,
    Field(discriminator="kind"),
    BeforeValidator(_switch_unless_said),
]
"""The routers that a recipe can name by `kind`; without one it is `switch`."""


def _positions_in_expert(
    queue_GN: torch.Tensor, filled_GE: torch.Tensor, order_GN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each token in its queue, behind the `filled_GE` that are there, and how many joined each queue.

    `queue_GN` is the expert at which a token queues, E for none.
    """
    if order_GN is not None:
        queue_GN = queue_GN.gather(1, order_GN)
    joined_GF = count_per_group(queue_GN, filled_GE.shape[1] + 1)
    sorted_GN, token_GN = queue_GN.sort(dim=1, stable=True)  # the queues end to end, each in order
    shift_GF = F.pad(filled_GE, (0, 1)) - (joined_GF.cumsum(1) - joined_GF)
    position_GN = torch.arange(queue_GN.shape[1], device=queue_GN.device) + shift_GF.gather(1, sorted_GN)
    if order_GN is not None:
        token_GN = order_GN.gather(1, token_GN)
    return torch.empty_like(position_GN).scatter_(1, token_GN, position_GN), joined_GF[:, :-1]
