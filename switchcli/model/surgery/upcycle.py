"""Sparse upcycling: a Switch model initialized from a dense one (beyond the paper).

Every expert is a copy of the feed-forward that its layer replaces, and the routers are new (Komatsuzaki et al. 2022).
With such copies a sparse layer computes sum_i p_i(x) E(x): the dense output times the sum of a token's gates.
`gate_correction` says how that sum becomes 1.

Experts of 1/P of the width are the P parts of such copies (virtual groups, He et al. 2024): expert e is part e % P of
copy e // P. The parts of a copy have equal router rows, so that a token whose k is a multiple of P chooses whole
copies. The parts of a copy add up to the dense output if each counts once, and its P gates add up to one gate.

Names are those on disk, where an expert's weight is a tensor of its own: `...feed_forward.layer.experts.{e}.wi`.

Legend: E experts of the sparse model; P parts; C whole copies; D model, F hidden units, O outputs.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, final

import torch

from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.init import keyed_generator, truncated_normal

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


def num_parts(spec: ModelSpec) -> int:
    """Return P, the number of experts that make up a feed-forward of the dense model."""
    return spec.d_ff // spec.expert_width


def gate_correction(spec: ModelSpec, stack: Stack) -> GateCorrection:
    """Return the correction: a small router makes the gates 1/E, and `wo` divides by their sum.

    Gates that are divided by their own sum need none. Under expert choice a token is taken by any number of experts, so
    only the mean over the tokens is correct.
    """
    router = spec.router_of(stack)
    scale, router_factor, exact = router.dense_equivalent_scale(spec.num_experts), UNIFORM, True
    if router.gates_sum_to_one:
        scale, router_factor = 1.0, 1.0
    elif router.experts_choose:
        router_factor, exact = RANKED, False
    # Without P, a copy would be the mean of its parts. The model multiplies the experts' outputs by their scale.
    return GateCorrection(scale * num_parts(spec) / spec.scale_of_experts(stack), router_factor, exact)


@final
class UpcycledWeights(Mapping[str, torch.Tensor]):
    """The sparse model's weights by their names on disk. Each is computed when it is read; none is stored."""

    def __init__(
        self, source: Mapping[str, torch.Tensor], names: Collection[str], spec: ModelSpec, noise: float, seed: int
    ) -> None:
        """Describe the weights of an upcycled model.

        Args:
            source: the weights of the dense model that it is made from.
            names: the names of the sparse model's weights.
            spec: the sparse model. Its number of experts is a multiple of P.
            noise: the standard deviation of the normal noise on each matrix of an expert, as a multiple of the root
                mean square of that matrix.
            seed: the seed of the noise and of the routers.
        """
        self._source, self._names, self._spec, self._noise, self._seed = source, names, spec, noise, seed
        self._corrections: dict[str, GateCorrection] = {stack: gate_correction(spec, stack) for stack in STACKS}

    def __getitem__(self, name: str) -> torch.Tensor:
        stack = name.partition(".")[0]
        if ".experts." in name:
            weight = self._expert(name)
            return weight * self._corrections[stack].wo if name.endswith(".wo") else weight
        if name.endswith(".router.weight"):
            return self._router(name) * self._corrections[stack].router
        if name.endswith(".router.bias"):
            return torch.zeros(self._spec.num_experts)
        return self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _expert(self, name: str) -> torch.Tensor:
        """Return a matrix of an expert, before its gate is corrected."""
        layer, _, expert = name.partition(".experts.")
        number, _, matrix = expert.partition(".")  # "3" and "wi"
        parts, hidden_dim = num_parts(self._spec), 1 if matrix == "wo" else 0  # wi [F, D], wo [O, F]
        weight = self._source[f"{layer}.{matrix}.weight"].chunk(parts, hidden_dim)[int(number) % parts]
        weight = weight.clone(memory_format=torch.contiguous_format)  # safetensors refuses tensors that share memory
        if self._noise:
            normal = torch.empty(weight.shape).normal_(generator=keyed_generator(self._seed, f"{name}/noise"))
            weight += normal * (self._noise * weight.square().mean().sqrt())
        return weight

    def _router(self, name: str) -> torch.Tensor:
        """Return the rows of a new router: equal ones for the parts of a copy."""
        parts = num_parts(self._spec)
        row_CD = torch.empty(self._spec.num_experts // parts, self._spec.d_model)
        row_CD = truncated_normal(row_CD, self._spec.init_scale, keyed_generator(self._seed, name))
        return row_CD.repeat_interleave(parts, 0)
