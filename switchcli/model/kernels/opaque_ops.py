"""Operations that torch.compile calls as they are, because it cannot trace them. In eager mode they are torch's own.

Legend: E experts, A rows (each expert's, one after the other), D inputs, F outputs.
"""

import torch
import torch.nn.functional as F


def grouped_mm(left: torch.Tensor, right: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """Return torch's grouped product: [A, D] @ [E, D, F] -> [A, F], or [F, A] @ [A, D] -> [E, F, D].

    `end_E` (int32) is the end of each expert's rows. torch.compile knows the result's shape in bfloat16 only.
    """
    if torch.compiler.is_compiling():
        return _grouped_mm(left, right, end_E)
    return F.grouped_mm(left, right, offs=end_E)


def random_bits(num_draws: int, device: torch.device) -> torch.Tensor:
    """Return int64 numbers, uniform on [-2**63, 2**63), from torch's generator: [num_draws]."""
    return (_random_bits if torch.compiler.is_compiling() else _draw)(num_draws, device)


@torch.library.custom_op("switchcli::grouped_mm", mutates_args=())
def _grouped_mm(left: torch.Tensor, right: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(left, right, offs=end_E).contiguous()


@_grouped_mm.register_fake
def _(left: torch.Tensor, right: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    rows, columns = left.shape[0], right.shape[-1]
    return left.new_empty(rows, columns) if right.ndim == 3 else left.new_empty(len(end_E), rows, columns)


def _draw(num_draws: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_draws, dtype=torch.int64, device=device).random_(-(2**63), None)


# The tag keeps the compiler from merging two draws, and from repeating one in the backward pass.
_random_bits = torch.library.custom_op(
    "switchcli::random_bits", _draw, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)


@_random_bits.register_fake
def _(num_draws: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_draws, dtype=torch.int64, device=device)
