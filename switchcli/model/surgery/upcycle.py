"""Sparse upcycling: a Switch model initialized from a dense one, or from one with fewer experts (beyond the paper).

From a dense model (Komatsuzaki et al. 2022) every expert is a copy of the feed-forward that its layer replaces, and the
routers are new. With such copies a sparse layer computes sum_i p_i(x) E(x): the dense output times the sum of a token's
gates. `gate_correction` says how that sum becomes 1.

Experts of 1/P of the width are the P parts of such copies (virtual groups, He et al. 2024): expert e is part e % P of
copy e // P. The parts of a copy have equal router rows, so that a token whose k is a multiple of P chooses whole
copies. The parts of a copy add up to the dense output if each counts once, and its P gates add up to one gate.

A sparse model grows by copies of its experts and of their router rows: expert e is a copy of e % E. The first E experts
stay as they are but for `growth_correction`, which restores the sum of the gates. Without noise on the copied rows a
token's logits tie, and a top-1 router never chooses a copy.

Names are those on disk, where an expert's weight is a tensor of its own: `...feed_forward.layer.experts.{e}.wi`.

Legend: E experts of the sparse model, before it grows; P parts; C whole copies; D model, F hidden units, O outputs.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple, final

import torch

from switchcli.model.config import STACKS, ModelSpec, Stack
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


def growth_correction(source: ModelSpec, grown: ModelSpec, stack: Stack, gate: Gate) -> GateCorrection:
    """Return the correction for a sparse model that grows; none with `raw`.

    A softmax over g times as many experts divides the gate of each by g. A token that chose one expert chooses one copy
    of it. If it chose k, it now chooses up to k copies of the first one, unless its choices are g * k: all copies of
    the same experts. Otherwise only the sum of its gates is kept, and that only where they are equal.
    """
    before, after = source.router_of(stack), grown.router_of(stack)
    choices = (before.experts_per_token, after.experts_per_token)
    wo = after.dense_equivalent_scale(grown.num_experts) / before.dense_equivalent_scale(source.num_experts)
    is_same_choice = choices == (1, 1) or choices[1] * source.num_experts == choices[0] * grown.num_experts
    is_same_choice &= before.gates_sum_to_one == after.gates_sum_to_one
    is_same_choice &= not before.experts_choose and not after.experts_choose
    used = wo if gate == "scaled" else 1.0
    return GateCorrection(used, 1.0, exact=is_same_choice and used == wo)


def num_parts(spec: ModelSpec) -> int:
    """Return P, the number of experts that make up a feed-forward of the dense model."""
    return spec.d_ff // spec.expert_width


def correction_of(source: ModelSpec, spec: ModelSpec, stack: Stack, gate: Gate) -> GateCorrection:
    """Return the correction of the gates of `spec`, which is made from a dense or a sparse `source`."""
    if source.num_experts == 1:
        correction = gate_correction(spec.router_of(stack), spec.num_experts, gate)
        # Without P, a copy would be the mean of its parts. The model multiplies the experts' outputs by their scale.
        return correction._replace(wo=correction.wo * num_parts(spec) / spec.scale_of_experts(stack))
    return growth_correction(source, spec, stack, gate)


class CopyNoise(NamedTuple):
    """How copies are made to differ from what they are copied from, and from one another."""

    experts: float = 0.0
    """Standard deviation of the normal noise on each matrix of an expert, as a multiple of its root mean square."""
    redraw: float = 0.0
    """Share of an expert's hidden units whose weights are drawn anew (drop-upcycling, Nakamura et al. 2025): from a
    normal distribution with the mean and standard deviation of what they replace in that matrix.

    # Deviates: their code chooses other units in each matrix. Here a unit is drawn anew in all matrices of its expert.
    """
    router: float | None = None
    """Standard deviation of the normal noise on copied router rows, as a multiple of that of the router's weights."""
    seed: int = 0
    """The seed of all draws, and of new routers."""


@final
class UpcycledWeights(Mapping[str, torch.Tensor]):
    """The new model's weights by their names on disk. Each is computed when it is read; none is stored."""

    def __init__(
        self,
        source: Mapping[str, torch.Tensor],
        source_spec: ModelSpec,
        names: Collection[str],
        spec: ModelSpec,
        gate: Gate,
        noise: CopyNoise,
    ) -> None:
        """Describe the weights of an upcycled model.

        Args:
            source: the weights of the dense or sparse model that it is made from.
            source_spec: that model.
            names: the names of the new model's weights.
            spec: the new model. Its number of experts is a multiple of that of a sparse source, and of P.
            gate: whether gates are corrected.
            noise: how copies are made to differ.
        """
        self._source, self._names, self._spec, self._noise = source, names, spec, noise
        self._num_kept = source_spec.num_experts if source_spec.num_experts > 1 else 0
        """Number of experts of the source, which stay as they are."""
        self._corrections: dict[str, GateCorrection] = {
            stack: correction_of(source_spec, spec, stack, gate) for stack in STACKS
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        stack = name.partition(".")[0]
        if ".experts." in name:
            weight = self._expert(name)
            return weight * self._corrections[stack].wo if name.endswith(".wo") else weight
        if name.endswith(".router.weight"):
            return self._router(name) * self._corrections[stack].router
        if name.endswith(".router.bias"):
            return self._router_bias(name)
        return self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _expert(self, name: str) -> torch.Tensor:
        """Return a matrix of an expert, before its gate is corrected."""
        expert, _, matrix = name.rpartition(".")  # "...experts.3" and "wi"
        layer, _, number = expert.rpartition(".experts.")
        if int(number) < self._num_kept:
            return self._source[name]
        copied = f"experts.{int(number) % self._num_kept}.{matrix}" if self._num_kept else f"{matrix}.weight"
        weight = self._source[f"{layer}.{copied}"]
        noise, seed = self._noise, self._noise.seed
        hidden_dim = 1 if matrix == "wo" else 0  # wi [F, D], wo [O, F]
        if not self._num_kept:
            parts = num_parts(self._spec)
            weight = weight.chunk(parts, hidden_dim)[int(number) % parts]
        weight = weight.clone(memory_format=torch.contiguous_format)  # safetensors refuses tensors that share memory
        if noise.redraw:
            num_units = weight.shape[hidden_dim]
            order_F = torch.randperm(num_units, generator=keyed_generator(seed, f"{expert}/redraw"))  # for all matrices
            units = order_F[: max(1, round(noise.redraw * num_units))]
            replaced = weight.index_select(hidden_dim, units)
            drawn = _normal_like(replaced, seed, f"{name}/redraw") * replaced.std(correction=0) + replaced.mean()
            weight.index_copy_(hidden_dim, units, drawn)
        if noise.experts:
            weight += _normal_like(weight, seed, f"{name}/noise") * (noise.experts * weight.square().mean().sqrt())
        return weight

    def _router(self, name: str) -> torch.Tensor:
        """Return the rows of a router: new ones, or those of the source followed by copies with noise."""
        if not self._num_kept:
            parts = num_parts(self._spec)
            row_CD = torch.empty(self._spec.num_experts // parts, self._spec.d_model)
            row_CD = truncated_normal(row_CD, self._spec.init_scale, keyed_generator(self._noise.seed, name))
            return row_CD.repeat_interleave(parts, 0)
        row_ED = self._source[name]
        copy_ED = row_ED.repeat(self._spec.num_experts // self._num_kept, 1)
        if self._noise.router:
            new_ED = copy_ED[self._num_kept :]
            new_ED += _normal_like(new_ED, self._noise.seed, f"{name}/noise") * (self._noise.router * row_ED.std())
        return copy_ED

    def _router_bias(self, name: str) -> torch.Tensor:
        """Return the biases of a router's choices, which were added to gates g times as large if these are softmax."""
        if name not in self._source:
            return torch.zeros(self._spec.num_experts)
        growth = self._spec.num_experts // self._num_kept
        router = self._spec.router_of("encoder" if name.startswith("encoder") else "decoder")
        return self._source[name].repeat(growth) / (1 if router.has_sigmoid_gates else growth)


def _normal_like(weight: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    return torch.empty(weight.shape).normal_(generator=keyed_generator(seed, name))
