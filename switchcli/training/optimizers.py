"""Optimizers: Adafactor as T5 uses it, AdamW, and Muon.

A spec of optimizer_specs.py builds an `Optimizer`: `step(learning_rate)` updates the parameters from their gradients,
and `state()` names every tensor that resuming needs, as `<parameter>/<slot>`.

A parameter is stacked if its name says that dim 0 counts experts (`.experts.`). All statistics of a stacked parameter
are per expert, so an expert's update does not depend on which other experts share its tensor. All statistics of a
sharded parameter are those of the full tensor, so an update does not depend on the mesh.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from switchcli.distributed.layout import (
    MOMENTUM,
    Layout,
    LocalPart,
    is_stacked,
    local_values,
    reduced_dim,
    sum_over_shards,
)
from switchcli.model.flops import NEWTON_SCHULZ_STEPS
from switchcli.training.optimizer_specs import UNSHARDED, Adafactor, AdamW, Muon

NamedParameters = Mapping[str, torch.nn.Parameter]
Layouts = Mapping[str, Layout]
"""The layouts of the sharded parameters, by name."""
ShardSums = list[tuple[torch.Tensor, Layout]]
"""Sums over this rank's shards. Each must be summed over the ranks of its layout, in place."""

DECAY_EXPONENT = 0.8
"""Exponent of the decay of Adafactor's second moments (Shazeer and Stern 2018, Algorithm 6)."""
MIN_SCALE = 1e-3
"""Smallest root mean square of a weight to which updates are relative, so that a weight of 0 moves (Shazeer and Stern
2018, Algorithm 6)."""
MIN_DIM_TO_FACTOR = 128
"""Smallest size of the last two dims at which Adafactor's second moments are factored, as in T5."""
CPU_SLICE = 2**21
"""Elements of a stack that Adafactor and Muon update at a time on a CPU: they and a scratch buffer of that size fit
into the cache."""
GPU_SLICE = 2**27
"""Elements of a stack that they update at a time on a GPU: few kernel launches, with half a GB of scratch memory."""


class Optimizer(ABC):
    """Updates `parameters` in place, and holds float32 state for each of them."""

    nonnegative_slots: frozenset[str] = frozenset()
    """The slots of the state that are never negative: counts and means of squares. Loading a state checks it."""

    def __init__(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> None:
        self.parameters = dict(parameters)
        self.layouts = {name: layouts[name] for name in self.parameters if name in layouts}

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Update every parameter once from its `.grad`. A parameter without a gradient is unchanged."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return every state tensor by `<parameter>/<slot>`, not copied: writing into them restores a state."""

    def state_layouts(self) -> dict[str, Layout]:
        """Return the layout of each state tensor of a sharded parameter. Other state tensors are not sharded."""
        layouts = {}
        for name, tensor in self.state().items():
            parameter_name, _, slot = name.rpartition("/")
            if parameter_name not in self.layouts or tensor.ndim == 0:
                continue
            missing_dim = reduced_dim(slot, self.parameters[parameter_name].ndim)
            sharded_dims = []
            for sharded in self.layouts[parameter_name]:
                if sharded.dim == missing_dim:
                    continue  # a mean over the sharded dim, which is equal on its ranks
                # A dim behind the missing one has moved forward by one.
                shift = missing_dim is not None and sharded.dim > missing_dim
                sharded_dims.append(sharded._replace(dim=sharded.dim - shift))
            layouts[name] = tuple(sharded_dims)
        return layouts

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply every gradient by a scalar, in place."""
        gradients = [local_values(one.grad) for one in self.parameters.values() if one.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters.values():
            parameter.grad = None


class AdafactorOptimizer(Optimizer):
    """Adafactor's moments and updates.

    In the methods below tensors have a leading dim E: the experts of a stacked parameter, or 1. `new_weight` is the
    weight of the new squares in the second moments, 1 - decay_t.
    """

    nonnegative_slots = frozenset({"steps", "moment", "row", "column"})

    def __init__(self, spec: Adafactor, parameters: NamedParameters, layouts: Layouts) -> None:
        super().__init__(parameters, layouts)
        self.spec = spec
        self._steps = torch.zeros((), dtype=torch.int64)
        self._moments = {
            name: self._new_moments(name, local_values(weight)) for name, weight in self.parameters.items()
        }

    def _new_moments(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return zeros for the second moments of this rank's part of a parameter, by slot."""
        shape, full_shape = parameter.shape, LocalPart(parameter, self.layouts.get(name, ())).full_shape
        if parameter.ndim >= 2 and min(full_shape[-2:]) >= MIN_DIM_TO_FACTOR:
            # Means over the last dim (one for each row), and over the dim before it (one for each column).
            shapes = {"row": shape[:-1], "column": shape[:-2] + shape[-1:]}
        else:
            shapes = {"moment": shape}
        return {slot: torch.zeros(size, dtype=torch.float32, device=parameter.device) for slot, size in shapes.items()}

    def state(self) -> dict[str, torch.Tensor]:
        moments = {f"{name}/{slot}": m for name, slots in self._moments.items() for slot, m in slots.items()}
        return {"optimizer/steps": self._steps, **moments}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        self._steps += 1
        decay = 1.0 - float(self._steps) ** -DECAY_EXPONENT
        new_weight = 1.0 - decay
        shards: list[Iterator[ShardSums]] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            moments = self._moments[name]
            tensors = [local_values(parameter), local_values(parameter.grad), *moments.values()]
            if not is_stacked(name):
                tensors = [tensor.unsqueeze(0) for tensor in tensors]
            factored = "row" in moments
            if name in self.layouts:
                layout = self.layouts[name]
                full = _FullWeight(layout, LocalPart(local_values(parameter), layout).full_shape, is_stacked(name))
                update_shard = _update_factored_shard if factored else _update_unfactored_shard
                shards.append(update_shard(self.spec, full, tensors, new_weight, learning_rate))
            else:
                update = self._update_factored if factored else self._update_unfactored
                update(tensors, new_weight, learning_rate)
        # The sums of all shards go into the same few collectives, which put the totals in their place.
        for _ in range(2):
            sum_over_shards([local for shard in shards for local in next(shard)])
        for shard in shards:
            next(shard, None)

    def _update_unfactored(self, tensors: list[torch.Tensor], new_weight: float, learning_rate: float) -> None:
        """Update a parameter with a second moment for each entry. `tensors`: parameter, gradient, moment."""
        parameter, gradient, moment = tensors
        square = gradient.square().add_(self.spec.epsilon)
        update = torch.mul(gradient, moment.lerp_(square, new_weight).rsqrt(), out=square)
        parameter.addcmul_(update, _scale(self.spec, _rms(parameter), _rms(update), learning_rate), value=-1.0)

    def _update_factored(self, tensors: list[torch.Tensor], new_weight: float, learning_rate: float) -> None:
        """Update a parameter with factored moments. `tensors`: parameter, gradient, row means, column means.

        Memory access is what costs time. So as many experts as one slice holds are updated at a time, while they are in
        the cache. All slices share one scratch buffer. The update u = g sqrt(mean(R) / R) sqrt(1 / C) is never stored:
        the sum of its squares is sum over i of (mean(R) / R_i) * (sum over j of g_ij**2 / C_j).
        """
        num_experts = _experts_of_slice(tensors[0], tensors[0][0].numel())
        slices = zip(*(torch.split(tensor, num_experts) for tensor in tensors), strict=True)
        scratch = torch.empty_like(tensors[1][:num_experts])
        for parameter, gradient, row, column in slices:
            # E experts of this slice: gradient [E, ..., I, J], row [E, ..., I], column [E, ..., J].
            square = torch.mul(gradient, gradient, out=scratch[: len(gradient)])  # the last slice may be shorter
            row.lerp_(square.mean(-1).add_(self.spec.epsilon), new_weight)
            column.lerp_(square.mean(-2).add_(self.spec.epsilon), new_weight)
            row_factor = (row.mean(-1, keepdim=True) / row).unsqueeze(-1)  # [E, ..., I, 1]: mean(R) / R
            column_factor = column.reciprocal().unsqueeze(-1)  # [E, ..., J, 1]: 1 / C
            # [E, ..., I, J] @ [E, ..., J, 1] = [E, ..., I, 1]; the mean over I, divided by J, is mean(u**2).
            mean_square = (row_factor * (square @ column_factor)).mean(_inner_dims(row_factor), keepdim=True)
            mean_square = mean_square / gradient.shape[-1]
            factor = row_factor.sqrt_().mul_(_scale(self.spec, _rms(parameter), mean_square.sqrt_(), learning_rate))
            # [E, ..., I, 1] * [E, ..., 1, J]: the factor of each entry of g, in the scratch memory.
            parameter.addcmul_(gradient, torch.mul(factor, column_factor.sqrt_().mT, out=square), value=-1.0)


class _FullWeight(NamedTuple):
    """The shape and the layout of the full weight that a shard belongs to."""

    layout: Layout
    shape: torch.Size
    stacked: bool
    """Whether dim 0 counts experts, each with its own statistics."""

    def layout_of(self, dim: int) -> Layout:
        """Return the part of the layout that shards `dim`, which is negative: counted from the last."""
        return tuple(sharded for sharded in self.layout if sharded.dim - len(self.shape) == dim)

    def rms(self, square_sum: torch.Tensor) -> torch.Tensor:
        """Return the root mean squares [E] from sums of squares over full experts, or [1] over the full weight."""
        return (square_sum / math.prod(self.shape[self.stacked :])).sqrt_()


def _update_unfactored_shard(
    spec: Adafactor, full: _FullWeight, tensors: list[torch.Tensor], new_weight: float, learning_rate: float
) -> Iterator[ShardSums]:
    """Update a shard like `AdafactorOptimizer._update_unfactored`, by one round of sums; see the factored update."""
    parameter, gradient, moment = tensors
    moment.lerp_(gradient.square().add_(spec.epsilon), new_weight)
    update_sum, weight_sum = _square_sum(gradient * moment.rsqrt()), _square_sum(parameter)
    yield [(update_sum, full.layout), (weight_sum, full.layout)]
    yield []
    scale = _scale(spec, full.rms(weight_sum), full.rms(update_sum), learning_rate)
    scale = scale.view(-1, *[1] * (parameter.ndim - 1))  # [E] to [E, 1, ..., 1], for the dims of an expert
    parameter.addcmul_(gradient * moment.rsqrt(), scale, value=-1.0)


def _update_factored_shard(
    spec: Adafactor, full: _FullWeight, tensors: list[torch.Tensor], new_weight: float, learning_rate: float
) -> Iterator[ShardSums]:
    """Update a shard like `AdafactorOptimizer._update_factored`, by the statistics of the full weight.

    It yields sums over this shard, twice. The caller adds each up over the ranks of its layout, in place, before the
    update goes on: then the same tensors are totals. Parameter and gradient are [E, I, J], row [E, I], column [E, J],
    of this shard.

    Example: the columns of a weight [4, 6] are divided between two ranks, so a shard is [4, 3].

    1. `row_sum` [4] is over the three columns of a shard: added up over both ranks it is over all six. `column_sum` [3]
       is over all four rows already: no rank shares dim -2. Both give the moments R [4] and C [3].
    2. `row_total` [1], the sum of R, is over all four rows already. `update_sum`, the sum of u**2 / mean(R), is over
       the twelve entries of a shard: added up it is over all 24.
    3. Each rank updates its twelve entries by the same RMS of u and of the weight.
    """
    parameter, gradient, row, column = tensors
    square = gradient.square()
    weight_sum, row_sum, column_sum = _square_sum(parameter), square.sum(-1), square.sum(-2)
    del square  # computed again below: the squares of all parameters would take as much memory as the gradients
    # A row's sum over columns is complete once it is summed over the ranks that share dim -1, and vice versa.
    yield [(row_sum, full.layout_of(-1)), (column_sum, full.layout_of(-2)), (weight_sum, full.layout)]
    row.lerp_(row_sum.div_(full.shape[-1]).add_(spec.epsilon), new_weight)
    column.lerp_(column_sum.div_(full.shape[-2]).add_(spec.epsilon), new_weight)
    # The local sum of R, [E, 1], and that of u**2 / mean(R), [E].
    row_total = row.sum(-1, keepdim=True)
    weighted = (gradient.square() @ column.reciprocal().unsqueeze(-1)).squeeze(-1)
    update_sum = (weighted / row).sum(-1)
    yield [(row_total, full.layout_of(-2)), (update_sum, full.layout)]
    row_mean = row_total.div_(full.shape[-2])
    scale = _scale(spec, full.rms(weight_sum), full.rms(update_sum * row_mean.squeeze(-1)), learning_rate)
    factor = (row_mean / row).sqrt_().mul_(scale.unsqueeze(-1)).unsqueeze(-1)  # [E, I, 1]
    parameter.addcmul_(gradient, factor * column.rsqrt().unsqueeze(-2), value=-1.0)


def _scale(spec: Adafactor, weight_rms: torch.Tensor, update_rms: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """Return the factor of u: learning_rate max(MIN_SCALE, RMS(w)) / max(1, RMS(u))."""
    scale = learning_rate / update_rms.clamp_(min=1.0)
    return scale * weight_rms.clamp_(min=MIN_SCALE) if spec.scale_by_parameter else scale


def _experts_of_slice(stack: torch.Tensor, numel: int) -> int:
    """Return how many experts of a stack are updated at a time, if each has `numel` elements."""
    return max(1, (CPU_SLICE if stack.is_cpu else GPU_SLICE) // numel)


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each slice of dim 0: [E, 1, ..., 1].

    Rows are reduced first, because torch reduces a tensor to a single number in one thread.
    """
    norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(norm, dim=_inner_dims(tensor), keepdim=True) / tensor[0].numel() ** 0.5


def _square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each slice of dim 0, [E]. Rows are reduced first, as in `_rms`."""
    return torch.linalg.vector_norm(tensor, dim=-1).square_().view(len(tensor), -1).sum(1)


def _inner_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return all dims but the first."""
    return tuple(range(1, tensor.ndim))


class AdamWOptimizer(Optimizer):
    nonnegative_slots = frozenset({"step", "exp_avg_sq"})

    def __init__(self, spec: AdamW, parameters: NamedParameters, layouts: Layouts) -> None:
        super().__init__(parameters, layouts)
        self.spec = spec
        # Plain tensors that share memory with this rank's values: torch's fused kernel refuses a mix of DTensors and
        # plain tensors.
        self._local = {name: torch.nn.Parameter(local_values(weight)) for name, weight in self.parameters.items()}
        self._adamw = torch.optim.AdamW(
            [{"params": [*self._local.values()]}],  # a group may be empty: Muon may have left nothing
            lr=0.0,
            betas=(spec.beta1, spec.beta2),
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        # torch creates its state in the first step. Resuming needs it before.
        for parameter in self._local.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{slot}": tensor
            for name, parameter in self._local.items()
            for slot, tensor in self._adamw.state[parameter].items()
        }

    def step(self, learning_rate: float) -> None:
        if self.spec.scale_by == "rms":
            self._scaled_step(learning_rate)
            return
        self._adamw.param_groups[0]["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            self._local[name].grad = None if parameter.grad is None else local_values(parameter.grad)
        self._adamw.step()
        self._adamw.zero_grad()

    @torch.no_grad()
    def _scaled_step(self, learning_rate: float) -> None:
        """Update every parameter by AdamW's step times max(MIN_SCALE, RMS(w)) of the full weight, or of each expert."""
        spec = self.spec
        weights, gradients = {}, {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                weights[name], gradients[name] = local_values(parameter), local_values(parameter.grad)
        layouts = {name: self.layouts.get(name, ()) for name in weights}
        # [E], or [1]: with a leading dim as in Adafactor.
        sums = {name: _square_sum(weight if is_stacked(name) else weight[None]) for name, weight in weights.items()}
        sum_over_shards([(total, layouts[name]) for name, total in sums.items()])
        for name, weight in weights.items():
            full = _FullWeight(layouts[name], LocalPart(weight, layouts[name]).full_shape, is_stacked(name))
            scale = full.rms(sums[name]).clamp_(min=MIN_SCALE).view(-1, *[1] * (weight.ndim - 1))
            gradient, state = gradients[name], self._adamw.state[self._local[name]]
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            # float64, because 1 - beta2**step is small at first. A tensor, so that a GPU is not waited for.
            step = state["step"].add_(1.0).double()
            mean.lerp_(gradient, 1 - spec.beta1)
            square.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
            divisor = (square / (1 - spec.beta2**step)).sqrt_().add_(spec.epsilon).mul_(1 - spec.beta1**step)
            weight.mul_(1 - learning_rate * spec.weight_decay)
            weight.addcdiv_(mean * scale, divisor, value=-learning_rate)


class MuonOptimizer(Optimizer):
    """Muon's momenta and updates of the hidden matrices, and an AdamW of all other weights."""

    nonnegative_slots = AdamWOptimizer.nonnegative_slots

    def __init__(self, spec: Muon, parameters: NamedParameters, layouts: Layouts) -> None:
        super().__init__(parameters, layouts)
        self.spec = spec
        self._momenta = {
            name: torch.zeros_like(local_values(weight))
            for name, weight in self.parameters.items()
            if weight.ndim >= 2 and _NOT_HIDDEN.isdisjoint(name.split("."))
        }
        others = {name: weight for name, weight in self.parameters.items() if name not in self._momenta}
        adamw = AdamW(beta1=spec.beta1, beta2=spec.beta2, epsilon=spec.epsilon, weight_decay=spec.weight_decay)
        self._adamw = AdamWOptimizer(adamw, others, layouts)

    def state(self) -> dict[str, torch.Tensor]:
        return {**{f"{name}/{MOMENTUM}": momentum for name, momentum in self._momenta.items()}, **self._adamw.state()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        self._adamw.step(learning_rate)
        for name, momentum in self._momenta.items():
            parameter, layout = self.parameters[name], self.layouts.get(name, ())
            if parameter.grad is None:
                continue
            tensors = (local_values(parameter), local_values(parameter.grad), momentum)
            *_, rows, columns = LocalPart(momentum, layout).full_shape
            # Few experts at a time, to bound the memory of what is gathered and of the products. No layout divides dim
            # 0 of a stack, and all ranks of a layout know the same full shape: they gather the same slices.
            size = _experts_of_slice(momentum, rows * columns) if is_stacked(name) else max(1, len(momentum))
            for weight, gradient, mean in zip(*(torch.split(one, size) for one in tensors), strict=True):
                mean.lerp_(gradient, 1 - self.spec.momentum)
                part = LocalPart(gradient.lerp(mean, self.spec.momentum), layout)
                update = newton_schulz(part.gather())[part.slices]
                weight.mul_(1 - learning_rate * self.spec.weight_decay)
                weight.sub_(update, alpha=learning_rate * 0.2 * max(rows, columns) ** 0.5)


_NOT_HIDDEN = frozenset({"embedding", "head", "router", "position_bias"})
"""Parts of the names of matrices that map from or to something else than hidden vectors."""


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return each matrix [..., A, B] with all of its singular values near 1, in its dtype (Jordan et al. 2024, Muon).

    A step takes each singular value s to 3.4445 s - 4.775 s**3 + 2.0315 s**5: the small ones grow fast, and all of them
    stay within about 0.3 of 1. Each matrix is divided by its own norm first, so that none is above 1.
    """
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix  # the products x x^T are of the smaller side
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if is_tall else x
