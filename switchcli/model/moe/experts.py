"""E feed-forwards as stacked weights, run together as grouped products.

Legend: E experts, B sequences, A rows (each expert's, one after the other), D model, F hidden, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.axis import SINGLE_PROCESS, local_slice
from switchcli.model.config import ModelSpec
from switchcli.model.layers import activate

ALIGNMENT = 16
"""Bytes to which torch's grouped product wants the rows of matrices aligned."""


class Experts(nn.Module):
    """E feed-forwards as stacked weights: slice e is the `nn.Linear` weight [outputs, inputs] of expert e."""

    def __init__(self, spec: ModelSpec, num_outputs: int) -> None:
        super().__init__()
        E, D, hidden = spec.num_experts, spec.d_model, spec.d_ff
        self.wi = nn.Parameter(torch.empty(E, hidden, D))
        self.wi_gate = nn.Parameter(torch.empty(E, hidden, D)) if spec.activation == "geglu" else None
        self.wo = nn.Parameter(torch.empty(E, num_outputs, hidden))
        self.dropout = spec.experts_dropout
        self.num_experts = E
        """Experts of the whole layer."""
        self.expert_ids = range(E)
        """The numbers of the experts whose weights this process stores: all of them unless others store the rest."""
        self.axis = SINGLE_PROCESS
        """The processes among which the hidden units are divided."""

    def keep_slice(self, part: int, parts: int) -> None:
        """Hold part number `part` alone, of `parts` equal ones; a divisor of the experts."""
        here = self.num_experts // parts
        self.expert_ids = range(part * here, (part + 1) * here)
        for name, weight in list(self.named_parameters()):
            kept = weight.detach()[self.expert_ids.start : self.expert_ids.stop].clone()
            self.register_parameter(name, nn.Parameter(kept, weight.requires_grad))

    def draw_dropout_mask(self, x_AD: torch.Tensor, num_sequences: int) -> torch.Tensor | None:
        """The dropout of each sequence's hidden vectors, drawn: [B, F] in the type of x; None where there is none.

        # Deviates: the positions of a sequence share a mask, as in T5's other layers; Mesh-TensorFlow's experts draw
        # for each entry, which is what costs on a CPU.
        """
        if not self.training or not self.dropout:
            return None
        mask_BF = F.dropout(x_AD.new_ones(num_sequences, self.wi.shape[1] * self.axis.size), self.dropout)
        return local_slice(mask_BF, self.axis, 1)

    def forward(self, x_AD: torch.Tensor, end_E: torch.Tensor, mask_AF: torch.Tensor | None) -> torch.Tensor:
        """[A, O] in the type of x. `end_E` is the end of each expert's rows; one without rows has a gradient, 0.

        `mask_AF` is what each row's hidden vector is multiplied with.
        """
        gate = None if self.wi_gate is None else grouped_product(x_AD, self.wi_gate, end_E)
        hidden_AF = activate(grouped_product(x_AD, self.wi, end_E), gate)
        if mask_AF is not None:
            hidden_AF = hidden_AF * mask_AF
        return grouped_product(hidden_AF, self.wo, end_E)


def grouped_product(x_AD: torch.Tensor, weight_EFD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, each row by the weight of its own expert: [A, F] in the type of x, float32 or shorter.

    On CUDA one kernel in bfloat16; float32 there falls back to a product an expert, which waits for `end_E`.
    """
    if x_AD.is_cpu and len(x_AD) < len(weight_EFD) and not torch.is_grad_enabled():
        return _few_rows(x_AD, weight_EFD, end_E)
    num_outputs, D = weight_EFD.shape[1:]
    unit = ALIGNMENT // x_AD.element_size()
    more_inputs, more_outputs = -D % unit, -num_outputs % unit
    if more_inputs or more_outputs:  # narrow models alone: zeros change no product
        x_AD = F.pad(x_AD, (0, more_inputs))
        weight_EFD = F.pad(weight_EFD, (0, more_inputs, 0, more_outputs))
    y_AF: torch.Tensor = _GroupedProduct.apply(x_AD, weight_EFD, end_E)  # type: ignore[no-untyped-call]
    return y_AF[:, :num_outputs] if more_outputs else y_AF


def _few_rows(x_AD: torch.Tensor, weight_EFD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """Compute `grouped_product` for a decoding step on a CPU. Weights of experts without rows are not even cast."""
    y_AF = x_AD.new_empty(len(x_AD), weight_EFD.shape[1])
    begin = 0
    for expert in end_E.diff(prepend=end_E.new_zeros(1)).nonzero().squeeze(1):
        end = int(end_E[expert])
        torch.mm(x_AD[begin:end], weight_EFD[expert].to(x_AD.dtype).mT, out=y_AF[begin:end])
        begin = end
    return y_AF


class _GroupedProduct(torch.autograd.Function):
    """Keeps the weights as they are for the way back, not their copy in the shorter type of x: that is made twice.

    x is kept only where the weights learn.
    """

    @staticmethod
    def forward(ctx: Any, x_AD: torch.Tensor, weight_EFD: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_AD if ctx.needs_input_grad[1] else None, weight_EFD, end_E)
        return F.grouped_mm(x_AD, weight_EFD.to(x_AD.dtype).mT, offs=end_E)

    @staticmethod
    def backward(ctx: Any, gradient_AF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x_AD, weight_EFD, end_E = ctx.saved_tensors
        gradient_AF = gradient_AF.contiguous()
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = F.grouped_mm(gradient_AF, weight_EFD.to(gradient_AF.dtype), offs=end_E)
        if ctx.needs_input_grad[1]:
            for_weight = F.grouped_mm(gradient_AF.mT, x_AD, offs=end_E).to(weight_EFD.dtype)
        return for_x, for_weight, None
