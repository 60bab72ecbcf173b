"""Sparse upcycling: a Switch model that begins where a dense one ended (Komatsuzaki et al. 2022, beyond the paper).

Every expert is a copy of the dense feed-forward in whose place it stands, and the routers are new. Of copies a sparse
layer gives sum_i p_i(x) E(x): the dense output times the sum of a token's gates. `correction` says how that becomes 1.

Names are those on disk, where an expert's weight is a tensor of its own: `...feed_forward.layer.experts.{e}.wi`.

Legend: E experts, D model.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple, final

import torch

from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.init import keyed_generator, truncated_normal
from switchcli.model.moe.router import RouterSpec

Gate = Literal["scaled", "raw"]
"""`raw` begins worse, with routers that learn sooner: Adafactor's steps are relative to the size of a weight."""
UNIFORM = 1e-8
"""Router weights so small that every probability is 1/E in float32, while the largest logit still differs by token."""
RANKED = 1e-2
"""Small, and yet large enough that probabilities differ: expert choice ranks tokens by them, ties by position."""


class GateCorrection(NamedTuple):
    """What makes up for the gates of a stack's sparse layers."""

    wo: float
    """Factor of every expert's last matrix."""
    router: float
    """Factor of the router's initial weights."""
    exact: bool
    """Whether a token that no capacity drops gets what the dense layer gave it, in evaluation and float32."""


def gate_correction(router: RouterSpec, num_experts: int, gate: Gate) -> GateCorrection:
    """`raw` changes nothing. Otherwise gates are made 1/E by a small router, and `wo` is divided by their sum.

    Gates that are divided by their own sum add up to 1 as they are. Under expert choice a token is taken by no expert
    or by several, so that only the mean over the tokens is right.
    """
    if router.gates_sum_to_one:
        return GateCorrection(1.0, 1.0, exact=True)
    if gate == "raw":
        return GateCorrection(1.0, 1.0, exact=False)
    scale, chosen = router.dense_equivalent_scale(num_experts), router.experts_choose
    return GateCorrection(scale, RANKED if chosen else UNIFORM, exact=not chosen)


@final
class UpcycledWeights(Mapping[str, torch.Tensor]):
    """The sparse model's weights by their names on disk; each is made whenever it is asked for, none is kept."""

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        names: Collection[str],
        spec: ModelSpec,
        gate: Gate = "scaled",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`dense` holds the dense model's weights, `names` are those of the model that `spec` describes.

        To each expert's weights normal numbers are added, independent for each expert and entry, with a standard
        deviation of `noise` times the root mean square of the matrix that they are added to. Routers and noise are
        drawn from `seed`.
        """
        self._dense, self._names, self._spec, self._noise, self._seed = dense, names, spec, noise, seed
        self._corrections: dict[str, GateCorrection] = {
            stack: gate_correction(spec.router_of(stack), spec.num_experts, gate) for stack in STACKS
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        stack, layer, expert = name.partition(".")[0], *name.partition(".experts.")[::2]
        if expert:
            part = expert.rpartition(".")[2]
            weight = self._noisy(name, self._dense[f"{layer}.{part}.weight"])
            return weight * self._corrections[stack].wo if part == "wo" else weight
        if name.endswith(".router.weight"):
            router_ED = torch.empty(self._spec.num_experts, self._spec.d_model)
            truncated_normal(router_ED, self._spec.init_scale, keyed_generator(self._seed, name))
            return router_ED * self._corrections[stack].router
        return self._dense[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _noisy(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not self._noise:
            return weight.clone()  # no two tensors of a file may share memory
        drawn = torch.empty(weight.shape).normal_(generator=keyed_generator(self._seed, f"{name}/noise"))
        return weight + drawn * (self._noise * weight.square().mean().sqrt())
