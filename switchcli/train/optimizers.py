"""Optimizers: Adafactor with the semantics that T5 gave it, and AdamW.

An optimizer spec builds an object with one interface: `step(learning_rate)` updates the parameters from their
gradients, `state()` names every tensor that resuming needs as `<parameter>/<slot>`.

A parameter is stacked when its name says that it holds experts (`.experts.`, dim 0 counts them): every statistic of it
is one expert's own, so that what happens to an expert does not depend on which others share its tensor. Of a weight of
which other ranks have parts every statistic is that of the whole.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from switchcli.distributed.layout import Layout, LocalPart, is_stacked, local_values, reduced_dim, sum_over_shards
from switchcli.spec import MOST, Spec

Named = Mapping[str, torch.nn.Parameter]
Layouts = Mapping[str, Layout]
"""How the parameters of which other ranks have parts are cut, by name."""
Sums = list[tuple[torch.Tensor, Layout]]
"""Sums over what is here, each to be summed over the ranks of its cuts."""
WHOLE: Layouts = MappingProxyType({})

CPU_SLICE = 2**21
"""Elements that Adafactor works on at a time: with a scratch as large they stay in a CPU's cache."""
GPU_SLICE = 2**27
"""The same on a GPU, where launches cost: half a GB of scratch."""


class Optimizer(ABC):
    """Updates `parameters` in place; holds float32 state of its own for each."""

    def __init__(self, parameters: Named, cuts: Layouts = WHOLE) -> None:
        self.parameters = dict(parameters)
        self.cuts = {name: cuts[name] for name in self.parameters if name in cuts}

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """One update of every parameter from its `.grad`."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Every state tensor by `<parameter>/<slot>`, not copied: writing into them restores a state."""

    def state_layouts(self) -> dict[str, Layout]:
        """How each of them is cut; absent of those that are whole here."""
        found = {}
        for name, tensor in self.state().items():
            owner, _, slot = name.rpartition("/")
            if owner in self.cuts and tensor.ndim:
                lost = reduced_dim(slot, self.parameters[owner].ndim)
                cuts = [cut for cut in self.cuts[owner] if cut.dim != lost]
                found[name] = tuple(cut._replace(dim=cut.dim - (lost is not None and cut.dim > lost)) for cut in cuts)
        return found

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply every gradient, in place."""
        gradients = [local_values(one.grad) for one in self.parameters.values() if one.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None


class Adafactor(Spec):
    """Adafactor (Shazeer and Stern 2018) as T5 runs it: no momentum, factored second moments, relative step sizes.

    Update of parameter w from gradient g at step t = 1, 2, ...:
    decay_t = 1 - t**-decay_exponent; v = decay_t v + (1 - decay_t)(g**2 + epsilon), kept as row and column means when
    the last two dims are both >= `min_dim_to_factor`; u = g / sqrt(v), divided by max(1, RMS(u) / clip_threshold);
    w -= learning_rate * max(scale_epsilon, RMS(w)) * u.

    # Deviates: Mesh-TensorFlow factors the two largest dims and takes both RMS over all experts of a stacked weight;
    # here the last two dims are factored and each RMS is one expert's own: the update is the same at any sharding.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_exponent: float = Field(default=0.8, gt=0.0)
    clip_threshold: float = Field(default=1.0, gt=0.0)
    epsilon: float = Field(default=1e-30, gt=0.0)
    scale_epsilon: float = Field(default=1e-3, gt=0.0)
    min_dim_to_factor: int = Field(default=128, ge=1, le=MOST["count"])
    scale_by_parameter: bool = True
    """False: the learning rate is absolute."""

    def build(self, parameters: Named, cuts: Layouts = WHOLE) -> Optimizer:
        return _Adafactor(self, parameters, cuts)


class AdamW(Spec):
    """Adam with decoupled weight decay (torch's fused kernel). Norm scales and position biases are decayed too."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)

    def build(self, parameters: Named, cuts: Layouts = WHOLE) -> Optimizer:
        return _AdamW(self, parameters, cuts)


OptimizerSpec = Annotated[Adafactor | AdamW, Field(discriminator="kind")]


class _Adafactor(Optimizer):
    def __init__(self, spec: Adafactor, parameters: Named, cuts: Layouts) -> None:
        super().__init__(parameters, cuts)
        self.spec = spec
        self._steps = torch.zeros((), dtype=torch.int64)
        self._moments = {
            name: self._new_moments(name, local_values(weight)) for name, weight in self.parameters.items()
        }

    def _new_moments(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        shape, whole = parameter.shape, LocalPart(parameter, self.cuts.get(name, ())).full_shape
        if parameter.ndim >= 2 and min(whole[-2:]) >= self.spec.min_dim_to_factor:
            shapes = {"row": shape[:-1], "column": shape[:-2] + shape[-1:]}
        else:
            shapes = {"moment": shape}
        return {slot: torch.zeros(size, dtype=torch.float32, device=parameter.device) for slot, size in shapes.items()}

    def state(self) -> dict[str, torch.Tensor]:
        named = {f"{name}/{slot}": m for name, slots in self._moments.items() for slot, m in slots.items()}
        return {"optimizer/steps": self._steps, **named}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        self._steps += 1
        decay = 1.0 - float(self._steps) ** -self.spec.decay_exponent
        of_parts = []
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                tensors = [local_values(parameter), local_values(parameter.grad), *self._moments[name].values()]
                if not is_stacked(name):
                    tensors = [tensor.unsqueeze(0) for tensor in tensors]
                factored = "row" in self._moments[name]
                if name in self.cuts:
                    shape = LocalPart(local_values(parameter), self.cuts[name]).full_shape
                    whole = _Whole(self.cuts[name], shape, is_stacked(name))
                    update_part = self._update_factored_part if factored else self._update_whole_part
                    of_parts.append(update_part(whole, tensors, 1.0 - decay, learning_rate))
                else:
                    update = self._update_factored if factored else self._update_whole
                    update(tensors, 1.0 - decay, learning_rate)
        for _ in range(2):  # all of them together: few collectives
            sum_over_shards([each for one in of_parts for each in next(one)])
        for one in of_parts:
            next(one, None)

    def _update_whole(self, tensors: list[torch.Tensor], new: float, learning_rate: float) -> None:
        """With a moment for each entry. `tensors`: parameter, gradient, moments, dim 0 of each counts experts.

        `new` is the weight of the new squares.
        """
        parameters, gradients, moments = tensors
        square = gradients.square().add_(self.spec.epsilon)
        update = torch.mul(gradients, moments.lerp_(square, new).rsqrt(), out=square)
        parameters.addcmul_(update, self._scale(_rms(parameters), _rms(update), learning_rate), value=-1.0)

    def _update_factored(self, tensors: list[torch.Tensor], new: float, learning_rate: float) -> None:
        """With row and column means, as many experts at a time as one slice holds.

        What costs is memory: a slice is read again while it is in the cache, all slices share one scratch, and u is
        not formed. As v = row column / mean(row), sum(u**2) is a quadratic form in the squares.
        """
        num_experts = max(1, (CPU_SLICE if tensors[0].is_cpu else GPU_SLICE) // tensors[0][0].numel())
        slices = zip(*(torch.split(each, num_experts) for each in tensors), strict=True)
        scratch = torch.empty_like(tensors[1][:num_experts])
        for parameter, gradient, row, column in slices:
            square = torch.mul(gradient, gradient, out=scratch[: len(gradient)])
            row.lerp_(square.mean(-1).add_(self.spec.epsilon), new)
            column.lerp_(square.mean(-2).add_(self.spec.epsilon), new)
            left = (row.mean(-1, keepdim=True) / row).unsqueeze(-1)
            right = column.reciprocal().unsqueeze(-1)
            mean_square = (left * (square @ right)).mean(_inner(left), keepdim=True) / gradient.shape[-1]
            factor = left.sqrt_().mul_(self._scale(_rms(parameter), mean_square.sqrt_(), learning_rate))
            parameter.addcmul_(gradient, torch.mul(factor, right.sqrt_().mT, out=square), value=-1.0)

    def _update_whole_part(
        self, whole: "_Whole", tensors: list[torch.Tensor], new: float, learning_rate: float
    ) -> Iterator[Sums]:
        """`_update_whole` where other ranks have other parts: what is yielded comes back summed over them."""
        parameters, gradients, moments = tensors
        moments.lerp_(gradients.square().add_(self.spec.epsilon), new)
        of_update, of_weight = _square_sum(gradients * moments.rsqrt()), _square_sum(parameters)
        yield [(of_update, whole.cuts), (of_weight, whole.cuts)]
        yield []
        scale = self._scale(whole.rms(of_weight), whole.rms(of_update), learning_rate)
        parameters.addcmul_(gradients * moments.rsqrt(), scale.view(-1, *[1] * (parameters.ndim - 1)), value=-1.0)

    def _update_factored_part(
        self, whole: "_Whole", tensors: list[torch.Tensor], new: float, learning_rate: float
    ) -> Iterator[Sums]:
        """`_update_factored`, in the same way. Squares are made twice: to keep those of all parameters would take
        as much memory as their gradients."""
        parameter, gradient, row, column = tensors
        square, of_weight = gradient.square(), _square_sum(parameter)
        over_columns, over_rows = square.sum(-1), square.sum(-2)
        del square
        yield [(over_columns, whole.along(-1)), (over_rows, whole.along(-2)), (of_weight, whole.cuts)]
        row.lerp_(over_columns.div_(whole.shape[-1]).add_(self.spec.epsilon), new)
        column.lerp_(over_rows.div_(whole.shape[-2]).add_(self.spec.epsilon), new)
        of_rows = row.sum(-1, keepdim=True)
        of_update = ((gradient.square() @ column.reciprocal().unsqueeze(-1)).squeeze(-1) / row).sum(-1)
        yield [(of_rows, whole.along(-2)), (of_update, whole.cuts)]
        left = of_rows.div_(whole.shape[-2]) / row
        of_update *= of_rows.squeeze(-1)
        scale = self._scale(whole.rms(of_weight), whole.rms(of_update), learning_rate)
        factor = left.sqrt_().mul_(scale.unsqueeze(-1)).unsqueeze(-1)
        parameter.addcmul_(gradient, factor * column.rsqrt().unsqueeze(-2), value=-1.0)

    def _scale(self, of_weight: torch.Tensor, of_update: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """What an update is multiplied with, by the root mean squares of the weight and of the update."""
        scale = learning_rate / (of_update / self.spec.clip_threshold).clamp_(min=1.0)
        return scale * of_weight.clamp_(min=self.spec.scale_epsilon) if self.spec.scale_by_parameter else scale


class _Whole(NamedTuple):
    """The whole weight of a part, as far as the statistics of the part need it."""

    cuts: Layout
    shape: torch.Size
    experts: bool
    """Dim 0 counts experts, each with statistics of its own."""

    def along(self, dim: int) -> Layout:
        """Return the cuts along a dim, which is negative: counted from the last."""
        return tuple(cut for cut in self.cuts if cut.dim - len(self.shape) == dim)

    def rms(self, square_sum: torch.Tensor) -> torch.Tensor:
        """Return the root mean square [E] of each expert, or [1] of the one weight, from sums of squares."""
        return (square_sum / math.prod(self.shape[self.experts :])).sqrt_()


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Root mean square of each slice of dim 0, to broadcast. By rows first: torch sums one number in one thread."""
    norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(norm, dim=_inner(tensor), keepdim=True) / tensor[0].numel() ** 0.5


def _square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each slice of dim 0; by rows first, as in `_rms`."""
    return torch.linalg.vector_norm(tensor, dim=-1).square_().view(len(tensor), -1).sum(1)


def _inner(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


class _AdamW(Optimizer):
    def __init__(self, spec: AdamW, parameters: Named, cuts: Layouts) -> None:
        super().__init__(parameters, cuts)
        # What is here of each: torch's fused kernel does not take shards and plain tensors together.
        self._here = {name: torch.nn.Parameter(local_values(weight)) for name, weight in self.parameters.items()}
        self._adamw = torch.optim.AdamW(
            self._here.values(),
            lr=0.0,
            betas=(spec.beta1, spec.beta2),
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        for parameter in self._here.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{slot}": tensor
            for name, parameter in self._here.items()
            for slot, tensor in self._adamw.state[parameter].items()
        }

    def step(self, learning_rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            self._here[name].grad = None if parameter.grad is None else local_values(parameter.grad)
        self._adamw.step()
        self._adamw.zero_grad()
