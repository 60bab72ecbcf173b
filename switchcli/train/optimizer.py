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
                first = 1 if is_stacked(name) else 0
                self._update(parameter, parameter.grad, self._moments[name], decay, learning_rate, first)

    def _update(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        moments: dict[str, torch.Tensor],
        decay: float,
        learning_rate: float,
        first: int,
    ) -> None:
        """`first`: the first dim over which a root mean square is taken (1 keeps experts apart)."""
        spec = self.spec
        square = gradient.square().add_(spec.epsilon)
        if "row" in moments:
            row = moments["row"].lerp_(square.mean(-1), 1.0 - decay)
            column = moments["column"].lerp_(square.mean(-2), 1.0 - decay)
            row_factor = (row / row.mean(-1, keepdim=True)).rsqrt_()
            update = torch.mul(gradient, row_factor.unsqueeze(-1), out=square)
            update.mul_(column.rsqrt().unsqueeze(-2))
        else:
            moment = moments["moment"].lerp_(square, 1.0 - decay)
            update = torch.mul(gradient, moment.rsqrt(), out=square)
        scale = learning_rate / (_rms(update, first) / spec.clip_threshold).clamp_(min=1.0)
        if spec.scale_by_parameter:
            scale = scale * _rms(parameter, first).clamp_(min=spec.scale_epsilon)
        parameter.addcmul_(update, scale, value=-1.0)


def _rms(tensor: torch.Tensor, first: int) -> torch.Tensor:
    """Root mean square over dims `first` and up, as a tensor that broadcasts against `tensor`."""
    dims = tuple(range(first, tensor.ndim))
    return (
        torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
        / (tensor[:1].numel() if first else tensor.numel()) ** 0.5
    )


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
