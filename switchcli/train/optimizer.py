"""Optimizers: Adafactor with the semantics that T5 gave it, and AdamW.

An optimizer spec builds an object with one interface: `step(learning_rate)` updates the parameters from their
gradients, `state()` names every tensor that resuming needs as `<parameter>/<slot>`.

A parameter is stacked when its name says that it holds experts (`.experts.`, dim 0 counts them): every statistic of it
is one expert's own, so that what happens to an expert does not depend on which others share its tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field

from switchcli.spec import Spec

Named = Mapping[str, torch.nn.Parameter]

CPU_SLICE = 2**21
"""Elements that Adafactor works on at a time: with a scratch as large they stay in a CPU's cache."""
GPU_SLICE = 2**27
"""The same on a GPU, where launches cost: half a GB of scratch."""


class Optimizer(ABC):
    """Updates `parameters` in place; holds float32 state of its own for each."""

    def __init__(self, parameters: Named) -> None:
        self.parameters = dict(parameters)

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """One update of every parameter from its `.grad`."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Every state tensor by `<parameter>/<slot>`, not copied: writing into them restores a state."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore a state that `state` named."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])


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
    min_dim_to_factor: int = Field(default=128, ge=1)
    scale_by_parameter: bool = True
    """False: the learning rate is absolute."""

    def build(self, parameters: Named) -> Optimizer:
        return _Adafactor(self, parameters)


class AdamW(Spec):
    """Adam with decoupled weight decay (torch's fused kernel). Norm scales and position biases are decayed too."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)

    def build(self, parameters: Named) -> Optimizer:
        return _AdamW(self, parameters)


OptimizerSpec = Annotated[Adafactor | AdamW, Field(discriminator="kind")]


def is_stacked(name: str) -> bool:
    """Whether the parameter `name` holds one slice an expert along dim 0."""
    return ".experts." in f".{name}"


class _Adafactor(Optimizer):
    def __init__(self, spec: Adafactor, parameters: Named) -> None:
        super().__init__(parameters)
        self.spec = spec
        self._steps = torch.zeros((), dtype=torch.int64)
        self._moments = {name: self._new_moments(parameter) for name, parameter in self.parameters.items()}

    def _new_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = parameter.shape
        if parameter.ndim >= 2 and min(shape[-2:]) >= self.spec.min_dim_to_factor:
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
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                tensors = [parameter, parameter.grad, *self._moments[name].values()]
                if not is_stacked(name):
                    tensors = [tensor.unsqueeze(0) for tensor in tensors]
                update = self._update_factored if "row" in self._moments[name] else self._update_whole
                update(tensors, 1.0 - decay, learning_rate)

    def _update_whole(self, tensors: list[torch.Tensor], new: float, learning_rate: float) -> None:
        """With a moment for each entry. `tensors`: parameter, gradient, moments, dim 0 of each counts experts.

        `new` is the weight of the new squares.
        """
        parameters, gradients, moments = tensors
        square = gradients.square().add_(self.spec.epsilon)
        update = torch.mul(gradients, moments.lerp_(square, new).rsqrt(), out=square)
        parameters.addcmul_(update, self._scale(parameters, _rms(update), learning_rate), value=-1.0)

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
            factor = left.sqrt_().mul_(self._scale(parameter, mean_square.sqrt_(), learning_rate))
            parameter.addcmul_(gradient, torch.mul(factor, right.sqrt_().mT, out=square), value=-1.0)

    def _scale(self, parameter: torch.Tensor, rms: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """What an update whose root mean square is `rms` is multiplied with."""
        scale = learning_rate / (rms / self.spec.clip_threshold).clamp_(min=1.0)
        return scale * _rms(parameter).clamp_(min=self.spec.scale_epsilon) if self.spec.scale_by_parameter else scale


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Root mean square of each slice of dim 0, to broadcast. By rows first: torch sums one number in one thread."""
    norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(norm, dim=_inner(tensor), keepdim=True) / tensor[0].numel() ** 0.5


def _inner(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


class _AdamW(Optimizer):
    def __init__(self, spec: AdamW, parameters: Named) -> None:
        super().__init__(parameters)
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=(spec.beta1, spec.beta2),
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        for parameter in self.parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{slot}": tensor
            for name, parameter in self.parameters.items()
            for slot, tensor in self._adamw.state[parameter].items()
        }

    def step(self, learning_rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
