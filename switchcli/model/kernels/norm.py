"""RMS norm with a gradient written by hand for a CPU.

Legend: B batch, S positions, D model, N positions of all rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def rms_norm(x_BSD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean(x**2) + epsilon) * weight over the last dim."""
    full_precision = x_BSD.dtype == weight_D.dtype and x_BSD.dtype in (torch.float32, torch.float64)
    if x_BSD.is_cpu and full_precision and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        normed_BSD: torch.Tensor = _RMSNorm.apply(x_BSD, weight_D, epsilon)
        return normed_BSD
    return F.rms_norm(x_BSD, weight_D.shape, weight_D, epsilon)


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm`, with the same bits, and a gradient written by hand for a CPU.

    On a CPU torch composes the norm of plain operations, each with a gradient that reads and writes all of x.
    """

    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale_BS1 = x_BSD.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_BSD, weight_D, scale_BS1)
        return (x_BSD * scale_BS1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With y = x r w and r = (mean(x**2) + epsilon)**-0.5: dL/dw = sum of g x r over the positions, and
        dL/dx = g w r - x r**3 (g w . x) / D."""
        x_BSD, weight_D, scale_BS1 = ctx.saved_tensors
        product_ND = (grad_BSD * x_BSD).flatten(0, -2)  # g x, whose sums over D and over the positions are both needed
        with torch.autocast(x_BSD.device.type, enabled=False):
            grad_weight_D = scale_BS1.flatten() @ product_ND
            sum_N = product_ND @ weight_D
        # r and y are 0 where the sum of squares overflowed. A gradient of NaN lets the check of the step find that.
        cube_BS1 = scale_BS1.pow(3).masked_fill_(scale_BS1 == 0, float("nan"))
        factor_BS1 = sum_N.view_as(scale_BS1) * cube_BS1 / -len(weight_D)
        grad_x_BSD = (grad_BSD * weight_D).mul_(scale_BS1).addcmul_(x_BSD, factor_BS1)
        return grad_x_BSD, grad_weight_D, None
