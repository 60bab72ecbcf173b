"""RouterBalance: with `balance: bias`, the choices of one step change the biases of the next.

After each step an expert's bias changes by bias_rate * sign(mean load - its load), where the load is the number of
choices before capacity, without padding (DeepSeek-V3, section 2.1.2).

Legend: L sparse layers, E experts.
"""

import torch
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.layer import sparse_layers
from switchcli.training.loss import Objective, StepLoss


class RouterBalance:
    """Counts the choices of each step, and changes biases by them. It does nothing where no router has biases."""

    def __init__(self, model: nn.Module, context: DistributedContext) -> None:
        self._context = context
        self._choice_LE: torch.Tensor | None = None
        """int64: choices of this rank in the step so far."""
        routers = [layer.router for layer in sparse_layers(model).values()]
        # A router that is not trained keeps its biases too.
        self._biases = [
            (index, router.bias, rate)
            for index, router in enumerate(routers)
            if router.bias is not None and (rate := router.router_spec.choice_bias_rate) and router.weight.requires_grad
        ]
        """Layer, bias and rate of the routers that choose by biases."""

    def begin_step(self) -> None:
        self._choice_LE = None

    def counting(self, objective: Objective) -> Objective:
        """Return the objective, whose choices are counted from now on."""

        def counted(model: nn.Module, batch: Batch) -> StepLoss:
            loss = objective(model, batch)
            # The loss has them once, also where the backward pass computes blocks again.
            choice_LE = torch.stack(loss.choices).long()
            self._choice_LE = choice_LE if self._choice_LE is None else self._choice_LE + choice_LE
            return loss

        return counted if self._biases else objective

    @torch.no_grad()
    def end_step(self) -> None:
        """Change the biases by the choices of the step, which has updated the weights. Collective."""
        if self._choice_LE is None:
            return
        choice_LE = self._context.all_reduce(self._choice_LE)
        for index, bias_E, rate in self._biases:
            choice_E = choice_LE[index]
            # The sign of mean - load, without rounding.
            bias_E.add_((choice_E.sum() - len(choice_E) * choice_E).sign(), alpha=rate)
