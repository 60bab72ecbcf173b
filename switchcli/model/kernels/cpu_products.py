"""float32 matrix products on a CPU by oneDNN, where MKL, which torch calls, leaves half of the vector width unused.

MKL uses AVX-512 on Intel's processors only. oneDNN, which torch has for bfloat16 and for its compiled code, uses it on
AMD's too. Elsewhere these functions call torch's products, but for weights that are packed for many products of few
rows: oneDNN is faster with these on Intel's processors too. Where `torch.backends.mkldnn` is disabled, all products are
torch's. docs/results/speed.md has measurements.

Legend: N rows, D inputs, F outputs, R rows of an expert. Of a batch: N products, T rows, K inputs, S outputs.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from switchcli.system.processor import has_avx512, has_full_width_avx512, is_amd_with_avx512

MIN_WORK = 2**18
"""Multiplications of a product below which oneDNN's longer call outweighs its speed."""
MIN_WORK_IN_BATCH = 2**22
"""Multiplications of each product of a batch below which MKL's one call for the batch is faster."""
MIN_WIDTH_OVER_ROWS = 128
"""The wider operand of a sum over rows below which oneDNN's copy of the other one outweighs its speed."""
MIN_ROWS_OVER_ROWS_ON_ZEN_4 = 1024
"""Rows of an expert's gradient below which MKL, which copies nothing, is faster there: oneDNN gains little on Zen 4."""
MIN_ROWS_TO_PACK = 2
"""Rows below which MKL, where it uses AVX-512, reads a weight as fast as oneDNN reads its packed copy."""
MAX_PACKED_BYTES = 2**30
"""Memory that the packed weights of one decoding may take."""
ROW_BLOCK = 16
"""oneDNN compiles a kernel for each shape. Where the number of rows changes with every call, it gets at most this many
or a multiple of it, the last of them zeros, so that there are few shapes."""

PackedWeights = Mapping[torch.Tensor, torch.Tensor]
"""Copies of weights in oneDNN's layout, by the weight."""
_packed_weights: ContextVar[PackedWeights] = ContextVar("_packed_weights", default=MappingProxyType({}))


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether torch has MKL and oneDNN, and this processor has AVX-512, which MKL does not use on it."""
    return _has_both_libraries() and is_amd_with_avx512()


def speeds_up(x_AD: torch.Tensor, weight_EFD: torch.Tensor) -> bool:
    """Return whether these functions speed up the products of A rows with the matrix of each row's expert.

    Args:
        x_AD: the rows.
        weight_EFD: the matrices of the experts.
    """
    num_experts, num_outputs, _ = weight_EFD.shape
    is_float32 = x_AD.dtype == weight_EFD.dtype == torch.float32
    return is_float32 and x_AD.numel() * num_outputs >= MIN_WORK * num_experts and _is_enabled()


def linear(x: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T, [..., F], with gradients, in autocast's dtype where it is on.

    By oneDNN it has no forward-mode and no second derivatives.
    """
    if not torch.compiler.is_compiling() and (packed := _packed_weights.get().get(weight_FD)) is not None:
        return _onednn(x.to(packed.dtype), packed)
    if not _applies(x, weight_FD) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_FD)
    if torch.is_grad_enabled() and (x.requires_grad or weight_FD.requires_grad):
        # Flat, because the result of a function of autograd must not be a view if it is to be overwritten.
        y_NF: torch.Tensor = _Linear.apply(x.flatten(0, -2), weight_FD)
        return y_NF.view(*x.shape[:-1], len(weight_FD))
    return _onednn(x, weight_FD)


def pack(weights: Iterable[torch.Tensor], dtype: torch.dtype, num_rows: int) -> PackedWeights:
    """Return copies in oneDNN's layout of those weights whose products with few rows they speed up.

    Without a copy, oneDNN and MKL arrange the weight anew in every product, which takes long where there are few rows.

    Args:
        weights: the weights [F, D]. They must not change while the copies are in use.
        dtype: the dtype of the products, float32 or bfloat16.
        num_rows: the rows of x, [num_rows, D].
    """
    packed, bytes_left = {}, MAX_PACKED_BYTES
    for weight_FD in weights:
        num_bytes = weight_FD.numel() * dtype.itemsize
        if num_bytes <= bytes_left and _is_worth_packing(weight_FD, dtype, num_rows):
            bytes_left -= num_bytes
            packed[weight_FD] = torch.ops.mkldnn._reorder_linear_weight(weight_FD.detach().to(dtype), num_rows)
    return packed


@contextmanager
def using_packed(packed: PackedWeights) -> Iterator[None]:
    """Let `linear` use packed weights within the context, without gradients, in their dtype."""
    token = _packed_weights.set(packed)
    try:
        yield
    finally:
        _packed_weights.reset(token)


def matmul(left_ND: torch.Tensor, right_DF: torch.Tensor) -> torch.Tensor:
    """Return left @ right, [N, F], outside autograd. The caller disables autocast."""
    if _applies(left_ND, right_DF.mT):
        return _onednn(left_ND, right_DF.mT)
    return left_ND @ right_DF


def matmul_over_rows(left_NF: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    """Return left.T @ right, [F, D], outside autograd: the gradient of a weight. The caller disables autocast."""
    if _applies(left_NF.mT, right_ND.mT):
        return _over_rows(left_NF, right_ND)
    return left_NF.mT @ right_ND


def write_matmul(left_RD: torch.Tensor, right_DF: torch.Tensor, out_RF: torch.Tensor) -> None:
    """Write left @ right to `out_RF`, also under autocast. The number of rows changes with every call."""
    if _applies(left_RD, right_DF.mT):
        out_RF.copy_(_onednn(_whole_blocks(left_RD), right_DF.mT)[: len(left_RD)])
    else:
        torch.mm(left_RD, right_DF, out=out_RF)  # autocast does not change the dtype of what has `out`


def write_matmul_over_rows(
    left_RF: torch.Tensor, right_RD: torch.Tensor, out_FD: torch.Tensor, *, add: bool = False
) -> None:
    """Write left.T @ right to `out_FD`, or add it, in its dtype. The number of rows changes with every call."""
    is_long = has_full_width_avx512() or len(left_RF) >= MIN_ROWS_OVER_ROWS_ON_ZEN_4
    if is_long and _applies(left_RF.mT, right_RD.mT) and _is_wide(left_RF, right_RD):
        product_FD = _over_rows(_whole_blocks(left_RF), _whole_blocks(right_RD))
    elif not add and out_FD.dtype == left_RF.dtype:
        torch.mm(left_RF.mT, right_RD, out=out_FD)
        return
    else:
        product_FD = torch.mm(left_RF.mT, right_RD, out=left_RF.new_empty(out_FD.shape))
    if add:
        out_FD.add_(product_FD)
    else:
        out_FD.copy_(product_FD)


def write_bmm(left_NTK: torch.Tensor, right_NKS: torch.Tensor, out_NTS: torch.Tensor, *, add: bool = False) -> None:
    """Write N products left @ right to `out_NTS`, or add them to it."""
    work = left_NTK[0].numel() * right_NKS.shape[2]
    if work >= MIN_WORK_IN_BATCH and _applies(left_NTK[0], right_NKS[0].mT):
        for left_TK, right_KS, out_TS in zip(left_NTK, right_NKS, out_NTS, strict=True):
            product_TS = matmul(left_TK, right_KS) if left_TK.is_contiguous() else _over_rows(left_TK.mT, right_KS)
            if add:
                out_TS.add_(product_TS)
            else:
                out_TS.copy_(product_TS)
    elif add:
        out_NTS.baddbmm_(left_NTK, right_NKS)
    else:
        torch.bmm(left_NTK, right_NKS, out=out_NTS)


class _Linear(torch.autograd.Function):
    """x @ weight.T, which oneDNN's operation computes without a gradient."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x_ND if needs_weight else None, weight_FD if needs_x else None)
        return _onednn(x_ND, weight_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_ND, weight_FD = ctx.saved_tensors
        grad_x = None if weight_FD is None else _onednn(grad_NF, weight_FD.mT)
        grad_weight = None if x_ND is None else _over_rows(grad_NF, x_ND)
        return grad_x, grad_weight


def _applies(x: torch.Tensor, weight_FD: torch.Tensor) -> bool:
    """Return whether oneDNN is to compute x @ weight.T."""
    return (
        not torch.compiler.is_compiling()  # first, so that the compiler adds no conditions on sizes
        and x.is_cpu
        and x.dtype == weight_FD.dtype == torch.float32
        and x.dim() > 1
        and _is_plain(x)
        and _is_plain(weight_FD)
        and x.numel() * len(weight_FD) >= MIN_WORK
        and _is_enabled()
    )


def _is_worth_packing(weight_FD: torch.Tensor, dtype: torch.dtype, num_rows: int) -> bool:
    """Return whether a packed copy of the weight is faster than the weight."""
    if torch.compiler.is_compiling() or not weight_FD.is_cpu or not _is_plain(weight_FD):
        return False
    if weight_FD.numel() < MIN_WORK or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return _has_bfloat16_products()
    if dtype != torch.float32:
        return False
    return onednn_is_faster() or (num_rows >= MIN_ROWS_TO_PACK and _has_both_libraries() and has_avx512())


def _is_enabled() -> bool:
    """Return whether oneDNN is faster, and the user has not disabled it."""
    return onednn_is_faster() and bool(torch.backends.mkldnn.enabled)


def _is_plain(x: torch.Tensor) -> bool:
    """Return whether x is no DTensor and no other subclass."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def _has_both_libraries() -> bool:
    """Return whether torch has MKL and oneDNN."""
    return torch._C.has_mkl and _has_operations()


@functools.cache
def _has_operations() -> bool:
    """Return whether this torch has oneDNN with the operations of its compiled code, which are no public interface."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return torch._C._has_mkldnn and all(torch._C._dispatch_has_kernel(f"mkldnn::{name}") for name in names)


@functools.cache
def _has_bfloat16_products() -> bool:
    """Return whether oneDNN computes bfloat16 products on this processor."""
    return _has_operations() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(x: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T, [..., F], without a gradient. The weight may be packed."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_FD, None, "none", [], "")
    return y


def _whole_blocks(x_RD: torch.Tensor) -> torch.Tensor:
    """Return the rows, and, if they are more than ROW_BLOCK, rows of zeros up to a multiple of it."""
    num_missing = -len(x_RD) % ROW_BLOCK
    return F.pad(x_RD, (0, 0, 0, num_missing)) if num_missing and len(x_RD) > ROW_BLOCK else x_RD


def _is_wide(left_NF: torch.Tensor, right_ND: torch.Tensor) -> bool:
    """Return whether oneDNN is faster than MKL for left.T @ right."""
    return len(left_NF) >= ROW_BLOCK and max(left_NF.shape[1], right_ND.shape[1]) >= MIN_WIDTH_OVER_ROWS


def _over_rows(left_NF: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    """Return left.T @ right, [F, D]: the gradient of a weight."""
    num_left, num_right = left_NF.shape[1], right_ND.shape[1]
    if not _is_wide(left_NF, right_ND):
        return left_NF.mT @ right_ND
    # The first operand is copied to have its rows contiguous: let it be the narrower one.
    return _onednn(left_NF.mT, right_ND.mT) if num_left <= num_right else _onednn(right_ND.mT, left_NF.mT).mT
