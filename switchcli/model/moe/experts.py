"""E feed-forwards as stacked weights, computed by grouped matrix products, or one by one on a CPU.

Legend: E experts, B sequences, A rows (each expert's, one after the other), D model, F hidden, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.kernels import cpu_experts, cpu_products
from switchcli.model.kernels.opaque_ops import grouped_mm
from switchcli.model.layers import SINGLE_PROCESS, activate, local_slice

ALIGNMENT = 16
"""Alignment of matrix rows that torch's grouped product requires, in bytes."""
CPU_CACHE = 2**22
"""Bytes of stacked weights, in the dtype of products, up to which a CPU computes them at once."""


class Experts(nn.Module):
    """E feed-forwards as stacked weights: slice e is the `nn.Linear` weight [outputs, inputs] of expert e."""

    def __init__(self, spec: ModelSpec, num_outputs: int) -> None:
        super().__init__()
        E, D, hidden = spec.num_experts, spec.d_model, spec.expert_width
        self.wi = nn.Parameter(torch.empty(E, hidden, D))
        self.wi_gate = nn.Parameter(torch.empty(E, hidden, D)) if spec.activation == "geglu" else None
        self.wo = nn.Parameter(torch.empty(E, num_outputs, hidden))
        self.dropout = spec.experts_dropout
        self.num_experts = E
        """Number of experts of the layer, over all processes."""
        self.expert_ids = range(E)
        """The numbers of the experts that this process stores: all of them unless other processes store the rest."""
        self.axis = SINGLE_PROCESS
        """The processes among which the hidden units are divided."""
        self.adds_to_grad = False
        """Whether the backward pass may itself add the gradients of large stacks to `.grad` on a CPU, which saves
        reading and writing them once more. Then use plain `backward()`: `torch.autograd.grad` and
        `backward(inputs=...)` lose gradients, and hooks of the weights get the sum so far."""

    def keep_slice(self, rank: int, num_ranks: int) -> None:
        """Keep only slice `rank` of `num_ranks` equal slices of the experts. `num_ranks` must divide their number."""
        num_local = self.num_experts // num_ranks
        self.expert_ids = range(rank * num_local, (rank + 1) * num_local)
        for name, weight in list(self.named_parameters()):
            # A clone, as a view would keep the memory of all experts.
            local = weight.detach()[self.expert_ids.start : self.expert_ids.stop].clone()
            self.register_parameter(name, nn.Parameter(local, weight.requires_grad))

    def draw_dropout_mask(self, x_AD: torch.Tensor, num_sequences: int) -> torch.Tensor | None:
        """Draw the dropout mask of each sequence's hidden vectors: [B, F] in the dtype of x; None without dropout.

        # Deviates: the positions of a sequence share a mask, as in T5's other layers. Mesh-TensorFlow's experts draw
        for each entry, which is slow on a CPU.
        """
        if not self.training or not self.dropout:
            return None
        # Each process of the axis draws the mask of all hidden units and takes its slice, so that the mask does not
        # depend on the number of processes.
        mask_BF = F.dropout(x_AD.new_ones(num_sequences, self.wi.shape[1] * self.axis.size), self.dropout)
        return local_slice(mask_BF, self.axis, 1)

    def forward(
        self, x_AD: torch.Tensor, end_E: torch.Tensor, mask_AF: torch.Tensor | None, equal_rows: bool = False
    ) -> torch.Tensor:
        """Return the output of each row's expert: [A, O] in the dtype of x.

        Args:
            x_AD: the rows of the local experts, the first expert's first.
            end_E: int32, the end of each expert's rows. An expert without rows gets a gradient of 0.
            mask_AF: a factor of each row's hidden vector; None: no dropout.
            equal_rows: whether every expert has as many rows, so that one batched product computes them all.
        """
        if x_AD.is_cpu and not torch.compiler.is_compiling() and _is_computed_per_expert(x_AD, self.wi):
            inputs = self.wi, self.wi_gate
            return cpu_experts.feed_forward(x_AD, end_E, *inputs, mask_AF, self.wo, self.adds_to_grad)

        def product(x_AI: torch.Tensor, weight_EOI: torch.Tensor) -> torch.Tensor:
            if equal_rows:  # [E, rows, I] @ [E, I, O]
                return torch.bmm(x_AI.view(len(weight_EOI), -1, x_AI.shape[1]), weight_EOI.mT).flatten(0, 1)
            return grouped_product(x_AI, weight_EOI, end_E)

        gate = None if self.wi_gate is None else product(x_AD, self.wi_gate)
        hidden_AF = activate(product(x_AD, self.wi), gate)
        if mask_AF is not None:
            hidden_AF = hidden_AF * mask_AF
        return product(hidden_AF, self.wo)


def grouped_product(x_AD: torch.Tensor, weight_EFD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T with the weight of each row's expert: [A, F] in the dtype of x, which is not float64.

    In bfloat16 CUDA runs one kernel. In float32 it falls back to one product per expert, which waits for `end_E`;
    `Experts` avoids it where all experts have as many rows.
    """
    num_outputs, D = weight_EFD.shape[1:]
    # Pad both widths to the alignment, which only narrow models need. The added inputs are zeros, so no product
    # changes, and the added outputs are cut off. -n % unit is the distance from n to the next multiple of unit.
    unit = ALIGNMENT // x_AD.element_size()
    pad_inputs, pad_outputs = -D % unit, -num_outputs % unit
    if pad_inputs or pad_outputs:
        x_AD = F.pad(x_AD, (0, pad_inputs))
        weight_EFD = F.pad(weight_EFD, (0, pad_inputs, 0, pad_outputs))
    y_AF: torch.Tensor = _GroupedProduct.apply(x_AD, weight_EFD, end_E)
    return y_AF[:, :num_outputs] if pad_outputs else y_AF


def _is_computed_per_expert(x_AD: torch.Tensor, weight_EFD: torch.Tensor) -> bool:
    """Return whether a CPU computes one expert at a time. torch's grouped product has no float64."""
    is_large = weight_EFD.numel() * x_AD.element_size() > CPU_CACHE
    return is_large or x_AD.dtype == torch.float64 or cpu_products.speeds_up(x_AD, weight_EFD)


class _GroupedProduct(torch.autograd.Function):
    """`grouped_product` with aligned widths. For the backward pass it saves the weights, not their copy in x's dtype.

    The backward pass casts the weights again. x is saved only if the weights need a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_AD: torch.Tensor, weight_EFD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_AD if ctx.needs_input_grad[1] else None, weight_EFD, end_E)
        # [A, D] @ [E, D, F] -> [A, F]: rows end_E[e - 1] to end_E[e] by matrix e.
        return grouped_mm(x_AD, weight_EFD.to(x_AD.dtype).mT, end_E)

    @staticmethod
    def backward(ctx: Any, grad_AF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_AD, weight_EFD, end_E = ctx.saved_tensors
        grad_AF = grad_AF.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grad_AF, weight_EFD.to(grad_AF.dtype), end_E)  # [A, F] @ [E, F, D]
        if ctx.needs_input_grad[1]:
            # [F, A] @ [A, D] -> [E, F, D]: the offsets divide the summed dim A, one product per expert.
            grad_weight = grouped_mm(grad_AF.mT, x_AD, end_E).to(weight_EFD.dtype)
        return grad_x, grad_weight, None
