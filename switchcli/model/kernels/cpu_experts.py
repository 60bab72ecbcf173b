"""The feed-forwards of experts on a CPU, one expert at a time, so that its hidden rows and matrices stay in the cache.

For stacks that do not fit into the cache, and for oneDNN. torch's grouped product is a loop over experts too, but of
one product: all hidden rows go through memory between two of them. docs/results/speed.md has measurements.

Legend: E experts, A rows (each expert's, one after the other), R rows of one expert, D model, F hidden, O outputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from switchcli.model.kernels import cpu_products
from switchcli.model.layers import activate


def feed_forward(
    x_AD: torch.Tensor,
    end_E: torch.Tensor,
    wi_EFD: torch.Tensor,
    wi_gate_EFD: torch.Tensor | None,
    mask_AF: torch.Tensor | None,
    wo_EOF: torch.Tensor,
    adds_to_grad: bool = False,
) -> torch.Tensor:
    """Return the output of each row's expert, [A, O], in the dtype of x. Matrices of experts without rows are not read.

    Args:
        x_AD: the rows, the first expert's first.
        end_E: the end of each expert's rows.
        wi_EFD: the matrices of the hidden units.
        wi_gate_EFD: the matrices of their gates, with GEGLU. None: ReLU.
        mask_AF: a factor of each row's hidden vector; None: 1.
        wo_EOF: the matrices of the outputs.
        adds_to_grad: see `Experts`.
    """
    inputs = (wi_EFD,) if wi_gate_EFD is None else (wi_EFD, wi_gate_EFD)
    y_AO: torch.Tensor = _FeedForward.apply(x_AD, end_E, mask_AF, adds_to_grad, wo_EOF, *inputs)
    return y_AO


class _FeedForward(torch.autograd.Function):
    """`feed_forward`, whose `inputs` are the matrices that read x.

    An expert's matrix is cast to the dtype of x just before its product, and its gradient is cast back and added just
    after its product. So memory is read and written in the dtype of the weights alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: torch.Tensor,
        end_E: torch.Tensor,
        mask_AF: torch.Tensor | None,
        adds_to_grad: bool,
        wo_EOF: torch.Tensor,
        *inputs_EFD: torch.Tensor,
    ) -> torch.Tensor:
        hidden = [x_AD.new_empty(len(x_AD), weight_EFD.shape[1]) for weight_EFD in inputs_EFD]
        y_AO = x_AD.new_empty(len(x_AD), wo_EOF.shape[1])
        for expert, rows in _experts_with_rows(end_E):
            for weight_EFD, hidden_AF in zip(inputs_EFD, hidden, strict=True):
                cpu_products.write_matmul(x_AD[rows], weight_EFD[expert].to(x_AD.dtype).mT, hidden_AF[rows])
            # ReLU and its mask overwrite `hidden`, of which the backward pass needs their result alone.
            hidden_RF = activate(hidden[0][rows], hidden[1][rows] if len(hidden) > 1 else None)
            cpu_products.write_matmul(_mask(hidden_RF, mask_AF, rows), wo_EOF[expert].to(x_AD.dtype).mT, y_AO[rows])
        learns = any(ctx.needs_input_grad[5:])  # the matrices that read x, whose gradients need it
        ctx.save_for_backward(x_AD if learns else None, end_E, mask_AF, *hidden, wo_EOF, *inputs_EFD)
        # With activation checkpointing, a saved tensor comes back as another object, without `.grad`.
        ctx.parameters = [weight if adds_to_grad and weight.is_leaf else None for weight in (wo_EOF, *inputs_EFD)]
        return y_AO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_AD, end_E, mask_AF, *tensors = ctx.saved_tensors
        num_inputs = len(tensors) // 2  # as many hidden tensors as matrices that read x, and the outputs' matrices
        hidden, (wo_EOF, *inputs_EFD) = tensors[:num_inputs], tensors[num_inputs:]
        needs_x, (needs_wo, *need_inputs) = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_AO, dtype = grad_AO.contiguous(), grad_AO.dtype
        grad_AD = grad_AO.new_empty(len(grad_AO), inputs_EFD[0].shape[2]) if needs_x else None
        grad_wo, *grad_inputs = (
            _Gradient(weight, parameter, end_E) if needed else None
            for weight, parameter, needed in zip(
                (wo_EOF, *inputs_EFD), ctx.parameters, (needs_wo, *need_inputs), strict=True
            )
        )
        for expert, rows in _experts_with_rows(end_E):
            grad_RO, hidden_of_expert = grad_AO[rows], [hidden_AF[rows] for hidden_AF in hidden]
            gates_RF = _gates(hidden_of_expert)
            if grad_wo is not None:
                grad_wo.add(expert, grad_RO, _activated(hidden_of_expert, gates_RF, mask_AF, rows))
            if not (needs_x or any(need_inputs)):
                continue
            grad_RF = torch.empty_like(hidden_of_expert[0])
            cpu_products.write_matmul(grad_RO, wo_EOF[expert].to(dtype), grad_RF)
            grads_RF = _activation_gradients(_mask(grad_RF, mask_AF, rows), hidden_of_expert, gates_RF)
            for index, (grad_RF, gradient) in enumerate(zip(grads_RF, grad_inputs, strict=True)):
                if gradient is not None:
                    gradient.add(expert, grad_RF, x_AD[rows])
                if grad_AD is not None:
                    part_RD = grad_AD[rows] if index == 0 else grad_AD.new_empty(len(grad_RF), grad_AD.shape[1])
                    cpu_products.write_matmul(grad_RF, inputs_EFD[index][expert].to(dtype), part_RD)
                    if index:
                        grad_AD[rows] += part_RD
        gradients = [None if gradient is None else gradient.sum_EFD for gradient in (grad_wo, *grad_inputs)]
        return grad_AD, None, None, None, *gradients


class _Gradient:
    """The gradient of a stack of matrices, in its dtype: zeros for an expert without rows."""

    def __init__(self, weight_EFD: torch.Tensor, parameter: torch.Tensor | None, end_E: torch.Tensor) -> None:
        """`parameter`: the parameter to whose `.grad` the gradient is added, in place."""
        self._adds = False
        if parameter is not None and parameter.grad is not None:
            self._adds = True
            # autograd finds no `.grad`, and makes the returned sum the new one without a copy.
            self.sum_EFD, parameter.grad = parameter.grad, None
        else:
            self.sum_EFD = torch.empty_like(weight_EFD)
            for expert in (end_E.diff(prepend=end_E.new_zeros(1)) == 0).nonzero():
                self.sum_EFD[expert] = 0.0

    def add(self, expert: int, left_RF: torch.Tensor, right_RD: torch.Tensor) -> None:
        """Add left.T @ right to the gradient of an expert. Called once for each expert with rows."""
        cpu_products.write_matmul_over_rows(left_RF, right_RD, self.sum_EFD[expert], add=self._adds)


def _experts_with_rows(end_E: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and where they are."""
    begin = 0
    for expert, end in enumerate(map(int, end_E)):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _mask(hidden_RF: torch.Tensor, mask_AF: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """Multiply an expert's hidden vectors, or their gradient, by its rows of the mask, in place."""
    return hidden_RF if mask_AF is None else hidden_RF.mul_(mask_AF[rows])


def _gates(hidden: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the factors of GEGLU's values; None for ReLU."""
    return F.gelu(hidden[1], approximate="tanh") if len(hidden) > 1 else None


def _activated(
    hidden: Sequence[torch.Tensor], gates_RF: torch.Tensor | None, mask_AF: torch.Tensor | None, rows: slice
) -> torch.Tensor:
    """Return the masked hidden vectors; those of ReLU stand in place of its input."""
    return hidden[0] if gates_RF is None else _mask(gates_RF * hidden[0], mask_AF, rows)


def _activation_gradients(
    grad_RF: torch.Tensor, hidden: Sequence[torch.Tensor], gates_RF: torch.Tensor | None
) -> Sequence[torch.Tensor]:
    """Return the gradients of `hidden`, given the gradient of the hidden vectors."""
    if gates_RF is None:
        # `hidden` is masked, and 0 where the mask is. So is the masked gradient there, if it is finite.
        return [torch.ops.aten.threshold_backward.grad_input(grad_RF, hidden[0], 0.0, grad_input=grad_RF)]
    of_gates = torch.ops.aten.gelu_backward(grad_RF * hidden[0], hidden[1], approximate="tanh")
    return [grad_RF * gates_RF, of_gates]
