"""Sparse upcycling: a Switch model initialized from a dense one (Komatsuzaki et al. 2022, beyond the paper).

Every expert is a copy of the dense feed-forward that its layer replaces, and the routers are new. With such copies a
sparse layer computes sum_i p_i(x) E(x): the dense output times the sum of a token's gates. `gate_correction` says how
that sum becomes 1.

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
"""`scaled` corrects the gates so that training starts from the dense model's output. `raw` does not: training starts
from a worse loss, but its routers learn sooner, as Adafactor's steps are relative to the size of a weight."""
UNIFORM = 1e-8
"""Factor of router weights that makes every probability 1/E in float32, while the largest logit differs by token."""
RANKED = 1e-2
"""Factor for expert choice, which ranks tokens by probability: small, but large enough that they differ."""


class GateCorrection(NamedTuple):
    """The correction of the gates in the sparse layers of a stack."""

    wo: float
    """Factor of every expert's last matrix."""
    router: float
    """Factor of the router's initial weights."""
    exact: bool
    """Whether a token in a slot gets the dense layer's output exactly, in evaluation and float32."""


def gate_correction(router: RouterSpec, num_experts: int, gate: Gate) -> GateCorrection:
    """Return the correction: a small router makes the gates 1/E, and `wo` divides by their sum; none with `raw`.

    Gates that are divided by their own sum need none. Under expert choice a token is taken by any number of experts, so
    only the mean over the tokens is correct.
    """
    if router.gates_sum_to_one:
        return GateCorrection(1.0, 1.0, exact=True)
    if gate == "raw":
        return GateCorrection(1.0, 1.0, exact=False)
    scale = router.dense_equivalent_scale(num_experts)
    if router.experts_choose:
        return GateCorrection(scale, RANKED, exact=False)
    return GateCorrection(scale, UNIFORM, exact=True)


@final
class UpcycledWeights(Mapping[str, torch.Tensor]):
    """The sparse model's weights by their names on disk. Each is computed when it is read; none is stored."""

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        names: Collection[str],
        spec: ModelSpec,
        gate: Gate = "scaled",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Describe the weights of an upcycled model.

        Args:
            dense: the dense model's weights.
            names: the names of the sparse model's weights.
            spec: the sparse model.
            gate: whether gates are corrected.
            noise: standard deviation of the normal noise that is added to each expert's matrices independently, as a
                multiple of the matrix's root mean square.
            seed: the seed of routers and noise.
        """
        self._dense, self._names, self._spec, self._noise, self._seed = dense, names, spec, noise, seed
        self._corrections: dict[str, GateCorrection] = {
            stack: gate_correction(spec.router_of(stack), spec.num_experts, gate) for stack in STACKS
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        stack = name.partition(".")[0]
        layer, _, expert = name.partition(".experts.")
        if expert:
            matrix = expert.rpartition(".")[2]  # "3.wi" -> "wi"
            weight = self._add_noise(name, self._dense[f"{layer}.{matrix}.weight"])
            return weight * self._corrections[stack].wo if matrix == "wo" else weight
        if name.endswith(".router.weight"):
            router_ED = torch.empty(self._spec.num_experts, self._spec.d_model)
            truncated_normal(router_ED, self._spec.init_scale, keyed_generator(self._seed, name))
            return router_ED * self._corrections[stack].router
        if name.endswith(".router.bias"):
            return torch.zeros(self._spec.num_experts)
        return self._dense[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _add_noise(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not self._noise:
            return weight.clone()  # safetensors refuses tensors that share memory
        normal = torch.empty(weight.shape).normal_(generator=keyed_generator(self._seed, f"{name}/noise"))
        return weight + normal * (self._noise * weight.square().mean().sqrt())
