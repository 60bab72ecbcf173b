"""Attention with a learned bias on a CPU.

Legend: B batch, T query positions, S key positions, H heads, K head size; P pairs of a row and a head, N of them in the
chunk that is computed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from switchcli.model.kernels.cpu_products import write_bmm
from switchcli.model.vocabulary import at_least_float32

CACHED_LOGITS = 2**19
"""Logits that a thread of a CPU computes at a time if the bias learns: 2 MiB in float32, which the cache holds."""


def biased_attention(
    query_BHTK: torch.Tensor,
    key_BHSK: torch.Tensor,
    value_BHSK: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax(q k^T + position + mask) v, [B, H, T, K]; the bias is that of `attention.SplitBias`."""
    bias_BHTS = position.expand(-1, query_BHTK.shape[1], query_BHTK.shape[2], key_BHSK.shape[2])
    with torch.autocast(position.device.type, enabled=False):  # it would round the logits
        mixed_BHTK: torch.Tensor = _BiasedAttention.apply(query_BHTK, key_BHSK, value_BHSK, bias_BHTS, mask)
    return mixed_BHTK


class _BiasedAttention(torch.autograd.Function):
    """Attention with a learned bias on a CPU, for as many rows and heads at a time as have logits that fit the cache.

    Logits, their gradient and the sum of bias and mask exist for these rows and heads only. For the backward pass the
    attention weights are saved, in the dtype of the values: computing them again takes longer than reading them. The
    gradient of a bias that all rows share is summed on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTK: torch.Tensor,
        key_BHSK: torch.Tensor,
        value_BHSK: torch.Tensor,
        bias_BHTS: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [B, H, T, K]. The bias, [1 or B, H, T, S], and the mask are those of a `SplitBias`."""
        B, H, T, _ = query_BHTK.shape
        S = key_BHSK.shape[2]
        query_PTK, key_PSK, value_PSK = (x.reshape(B * H, *x.shape[2:]) for x in (query_BHTK, key_BHSK, value_BHSK))
        mask_B1TS = (bias_BHTS.new_zeros(()) if mask is None else mask).expand(B, 1, T, S)
        exact = at_least_float32(query_PTK)
        mixed_PTK = torch.empty_like(query_PTK)
        weights_PTS = value_PSK.new_empty(B * H, T, S)
        for pairs, rows, heads in _cached_chunks(B, H, T * S):
            query_NTK, key_NSK, value_NSK, weights_NTS, mixed_NTK = (
                x[pairs] for x in (query_PTK, key_PSK, value_PSK, weights_PTS, mixed_PTK)
            )
            bias_rows = rows if len(bias_BHTS) > 1 else slice(None)
            logits_NTS = (bias_BHTS[bias_rows, heads] + mask_B1TS[rows]).flatten(0, 1).to(exact)
            write_bmm(query_NTK.to(exact), key_NSK.to(exact).mT, logits_NTS, add=True)
            if weights_NTS.dtype == exact:
                torch.softmax(logits_NTS, -1, out=weights_NTS)
            else:
                weights_NTS.copy_(torch.softmax(logits_NTS, -1, out=logits_NTS))
            write_bmm(weights_NTS, value_NSK, mixed_NTK)
        ctx.save_for_backward(query_PTK, key_PSK, value_PSK, weights_PTS)
        ctx.bias_shape, ctx.bias_dtype = bias_BHTS.shape, bias_BHTS.dtype
        return mixed_PTK.view_as(query_BHTK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With weights P and their gradient G = g v^T: the gradient of the logits is P (G - the row sums of P G)."""
        query_PTK, key_PSK, value_PSK, weights_PTS = ctx.saved_tensors
        B, H, T, K = grad_BHTK.shape
        S = key_PSK.shape[1]
        exact = at_least_float32(query_PTK)
        grad_PTK = grad_BHTK.reshape(B * H, T, K)
        grads = tuple(torch.empty_like(x) for x in (query_PTK, key_PSK, value_PSK))
        grad_bias_BHTS = torch.zeros(ctx.bias_shape, dtype=ctx.bias_dtype)
        for pairs, rows, heads in _cached_chunks(B, H, T * S):
            query_NTK, key_NSK, value_NSK, weights_NTS, grad_NTK, grad_query_NTK, grad_key_NSK, grad_value_NSK = (
                x[pairs] for x in (query_PTK, key_PSK, value_PSK, weights_PTS, grad_PTK, *grads)
            )
            write_bmm(weights_NTS.mT, grad_NTK, grad_value_NSK)
            exact_weights_NTS = weights_NTS.to(exact)
            grad_logits_NTS = torch.empty_like(weights_NTS)
            write_bmm(grad_NTK, value_NSK.mT, grad_logits_NTS)
            grad_logits_NTS = grad_logits_NTS.to(exact).mul_(exact_weights_NTS)
            sum_NT1 = grad_logits_NTS.sum(-1, keepdim=True)
            grad_logits_NTS.addcmul_(exact_weights_NTS, sum_NT1, value=-1.0)
            grad_bias = grad_bias_BHTS[rows if len(grad_bias_BHTS) > 1 else slice(None), heads]
            # [N, T, S] -> [rows, heads, T, S], summed over the rows if they share the bias.
            grad_bias += grad_logits_NTS.view(-1, *grad_bias.shape[1:]).sum_to_size(grad_bias.shape)
            grad_logits_NTS = grad_logits_NTS.to(query_PTK.dtype)
            write_bmm(grad_logits_NTS, key_NSK, grad_query_NTK)
            write_bmm(grad_logits_NTS.mT, query_NTK, grad_key_NSK)
        grad_query, grad_key, grad_value = (x.view(B, H, *x.shape[1:]) for x in grads)
        return grad_query, grad_key, grad_value, grad_bias_BHTS, None


def _cached_chunks(num_rows: int, num_heads: int, num_logits: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield chunks of pairs of a row and a head whose logits, `num_logits` of each, fit the caches of the threads.

    A chunk is a slice of the pairs, of the rows and of the heads. It has all heads of some rows, or heads of one row.
    """
    num_pairs = max(1, CACHED_LOGITS * torch.get_num_threads() // max(1, num_logits))
    rows, heads = max(1, num_pairs // num_heads), min(num_pairs, num_heads)
    for row in range(0, num_rows, rows):
        for head in range(0, num_heads, heads):
            row_end, head_end = min(row + rows, num_rows), min(head + heads, num_heads)
            # Pair number row * H + head. The last one of the chunk has its last row and its last head.
            pairs = slice(row * num_heads + head, (row_end - 1) * num_heads + head_end)
            yield pairs, slice(row, row_end), slice(head, head_end)
