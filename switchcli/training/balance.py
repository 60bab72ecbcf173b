"""RouterBalance: what the choices of one step change in the routers of the next.

- `balance: bias`: after each step an expert's bias changes by bias_rate * sign(mean load - its load), where the load is
  the number of choices before capacity, without padding (DeepSeek-V3, section 2.1.2).
- `balance_scope: step`: f of the load-balancing loss is that of the step before, over all ranks.

Legend: L sparse layers, E experts.
"""

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.layer import sparse_layers
from switchcli.training.loss import Objective, StepLoss
from switchcli.training.state import TrainState


class RouterBalance:
    """Counts the choices of each step, and balances routers by them. It does nothing where no router asks for it."""

    def __init__(self, model: nn.Module, context: DistributedContext) -> None:
        self._context = context
        self._routers = [layer.router for layer in sparse_layers(model).values()]
        self._choice_LE: torch.Tensor | None = None
        """int64: choices of this rank in the step so far."""
        self._uses_last = False
        # A router that is not trained keeps its biases too.
        self._biases = [
            (index, router.bias, rate)
            for index, router in enumerate(self._routers)
            if router.bias is not None and (rate := router.router_spec.choice_bias_rate) and router.weight.requires_grad
        ]
        """Layer, bias and rate of the routers that choose by biases."""
        self._counts = bool(self._biases)
        for router in self._routers:
            if router.router_spec.needs_last_loads:
                router.last_fraction_E = torch.empty(len(router.weight), device=router.weight.device)
                self._uses_last = self._counts = True

    def begin_step(self, state: TrainState) -> None:
        """Give the routers f of the last step. The state may be that of a checkpoint to which the run returned."""
        self._choice_LE = None
        if not self._uses_last:
            return
        shape = (len(self._routers), len(self._routers[0].weight))
        last_LE = state.last_choices
        if last_LE is None or last_LE.shape != shape:  # the first step, or the experts have changed
            last_LE = torch.ones(shape, device=self._context.device)
        fraction_LE = last_LE / last_LE.sum(1, keepdim=True).clamp(min=1)
        for router, fraction_E in zip(self._routers, fraction_LE, strict=True):
            if router.last_fraction_E is not None:
                router.last_fraction_E.copy_(fraction_E)

    def counting(self, objective: Objective) -> Objective:
        """Return the objective, whose choices are counted from now on."""

        def counted(model: nn.Module, batch: Batch) -> StepLoss:
            loss = objective(model, batch)
            # The loss has them once, also where the backward pass computes blocks again.
            choice_LE = torch.stack(loss.choices).long()
            self._choice_LE = choice_LE if self._choice_LE is None else self._choice_LE + choice_LE
            return loss

        return counted if self._counts else objective

    @torch.no_grad()
    def end_step(self, state: TrainState) -> None:
        """Balance by the choices of the step, which has updated the weights. Collective."""
        if self._choice_LE is None:
            return
        choice_LE = self._context.all_reduce(self._choice_LE)
        for index, bias_E, rate in self._biases:
            choice_E = choice_LE[index]
            # The sign of mean - load, without rounding.
            bias_E.add_((choice_E.sum() - len(choice_E) * choice_E).sign(), alpha=rate)
        if self._uses_last:
            state.last_choices = choice_LE
