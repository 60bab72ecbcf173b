"""Attention by torch's flex_attention: the kernel computes position bias and masks, without a tensor [B, H, T, S].

Legend: B batch, T query positions, S key positions, H heads, K head size, R = T + S - 1 distances.

It is used in compiled training on CUDA only (`compile_blocks`): uncompiled it materializes all scores, and on a CPU it
has no gradient. Logits, bias and softmax are in float32. The gradient of the bias is summed by atomic additions, in an
order that differs between runs, so runs that must repeat bit for bit use torch's other kernels.

A query whose keys are all masked gets 0 here, and the mean of the values there. Only padding has such queries, and no
token uses what padding computes.
"""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_HEAD = 16
"""The smallest head size of torch's kernels for CUDA."""


class FlexBias(NamedTuple):
    """What an attention adds to its logits, in the form that flex_attention takes."""

    by_distance_HR: torch.Tensor | None
    """float32: the position bias of each head, from the distance -(T - 1) to S - 1 of key and query; None: no bias."""
    mask: BlockMask
    """The keys that each query sees."""


def visible(
    num_queries: int,
    real_BS: torch.Tensor,
    query_segment_BT: torch.Tensor | None = None,
    key_segment_BS: torch.Tensor | None = None,
) -> BlockMask:
    """Return the mask in which a query sees the real keys, in packed rows those of its own segment.

    Args:
        num_queries: T.
        real_BS: bool, False for keys that are padding.
        query_segment_BT: int64, the segments of the queries; None: each row is one example.
        key_segment_BS: int64, the segments of the keys.
    """

    def mask(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return real_BS[b, s]

    def packed_mask(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        assert query_segment_BT is not None
        assert key_segment_BS is not None
        return real_BS[b, s] & (query_segment_BT[b, t] == key_segment_BS[b, s])

    B, S = real_BS.shape
    chosen = mask if query_segment_BT is None else packed_mask
    return create_block_mask(chosen, B, None, num_queries, S, real_BS.device)


def causal(length: int, segment_BT: torch.Tensor | None, device: torch.device) -> BlockMask:
    """Return the mask in which a position sees itself and earlier ones, in packed rows those of its own segment."""

    def mask(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return s <= t

    def packed_mask(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        assert segment_BT is not None
        return (s <= t) & (segment_BT[b, t] == segment_BT[b, s])

    B = None if segment_BT is None else len(segment_BT)
    chosen = mask if segment_BT is None else packed_mask
    return create_block_mask(chosen, B, None, length, length, device)


def flex_attend(
    query_BHTK: torch.Tensor, key_BHSK: torch.Tensor, value_BHSK: torch.Tensor, bias: FlexBias
) -> torch.Tensor:
    """Return softmax(q k^T + bias) v, [B, H, T, K], over the keys that the mask shows."""
    by_distance_HR, T = bias.by_distance_HR, query_BHTK.shape[2]

    def add_bias(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        assert by_distance_HR is not None
        return score + by_distance_HR[h, s - t + (T - 1)]  # entry 0 is the distance -(T - 1)

    score_mod = None if by_distance_HR is None else add_bias
    mixed: torch.Tensor = flex_attention(
        query_BHTK, key_BHSK, value_BHSK, score_mod=score_mod, block_mask=bias.mask, scale=1.0
    )
    return mixed
