"""T5's attention: heads whose width K is independent of D, no biases, no scaling, learned relative positions.

Packed rows hold several examples one after another, where no example sees another (`SegmentIds`). An example's inputs
end in exactly one EOS, and so do its targets. The example of a position is therefore the number of EOS before it, and
masks follow from the ids. Relative positions depend only on distances, so they need no reset. The examples of a row
still share expert capacity, a group of the load-balancing loss, and dropout masks, as the sequences of a group do.

Legend: B batch, T query positions and targets, S key positions and inputs, H heads, K head size, D model, A = H * K.
The 1/sqrt(K) of other transformers is folded into the initial weights of the queries.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.kernels.biased_attention import biased_attention
from switchcli.model.kernels.flex import FlexBias, flex_attend
from switchcli.model.layers import SINGLE_PROCESS, Linear, ModelAxis, compute_dtype, dropout
from switchcli.model.vocabulary import at_least_float32
from switchcli.spec import EOS, PAD

MASKED = -1e9
"""The bias of a masked key. Its weight becomes 0. Infinity would give NaN in a row where all keys are masked."""


class SegmentIds(NamedTuple):
    """The example of each position within its row, int64, from 0. The padding of a row gets the next number."""

    source_BS: torch.Tensor
    target_BT: torch.Tensor


def segment_ids(inputs_BS: torch.Tensor, targets_BT: torch.Tensor) -> SegmentIds:
    """Return the segment ids of packed rows; the n-th inputs of a row and its n-th targets are one example."""
    # The number of EOS before a position: the cumulative count, less 1 at an EOS, which belongs to the example it ends.
    source_end_BS, target_end_BT = inputs_BS == EOS, targets_BT == EOS
    return SegmentIds(
        source_end_BS.cumsum(1) - source_end_BS.long(),
        target_end_BT.cumsum(1) - target_end_BT.long(),
    )


def segment_bias(query_BT: torch.Tensor, key_BS: torch.Tensor) -> torch.Tensor:
    """Return an attention bias, float32 [B, 1, T, S]: 0 within a segment, `MASKED` between segments."""
    return torch.where(query_BT.unsqueeze(-1) == key_BS.unsqueeze(-2), 0.0, MASKED).unsqueeze(1)


def decoder_inputs(targets_BT: torch.Tensor, segments: SegmentIds | None) -> torch.Tensor:
    """Return the targets shifted right by one, behind the start token PAD. In packed rows each example starts so."""
    shifted_BT = F.pad(targets_BT, (1, -1), value=PAD)
    # A shifted EOS is where the next example of a packed row starts.
    return shifted_BT if segments is None else shifted_BT.masked_fill(shifted_BT == EOS, PAD)


class KeyValue(NamedTuple):
    """The keys and values of each head."""

    key_BHSK: torch.Tensor
    value_BHSK: torch.Tensor


class SplitBias(NamedTuple):
    """A position bias that learns, and a mask, on a CPU. Their sum, of every row of the batch, is never in memory."""

    position: torch.Tensor
    """float32; broadcasts to [B, H, T, S], and has one row for all or each row's."""
    mask: torch.Tensor | None
    """A second bias without a gradient, which broadcasts to [B, 1, T, S]; None: there is none."""


Bias = torch.Tensor | SplitBias | FlexBias
"""What is added to the logits: a tensor that broadcasts to [B, H, T, S], or its parts."""


class Attention(nn.Module):
    """Multi-head attention. Keys and values are projected separately, so that decoding steps can cache them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.num_heads * spec.head_width
        self.q = Linear(spec.d_model, width)
        self.k = Linear(spec.d_model, width)
        self.v = Linear(spec.d_model, width)
        self.o = Linear(width, spec.d_model)
        self.head_width = spec.head_width
        self.dropout = spec.dropout
        self.axis = SINGLE_PROCESS
        """The processes among which the heads are divided. The caller passes x through its `enter_region`, once for
        queries, keys and values."""

    def query(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the queries of each head: [B, H, T, K]."""
        return self._split_heads(self.q(x_BTD))

    def key_value(self, memory_BSD: torch.Tensor) -> KeyValue:
        """Return the keys and values of each head."""
        return KeyValue(self._split_heads(self.k(memory_BSD)), self._split_heads(self.v(memory_BSD)))

    def forward(self, query_BHTK: torch.Tensor, memory: KeyValue, bias: Bias) -> torch.Tensor:
        """Return softmax(q k + bias) v of all heads through the output projection: [B, T, D].

        The bias broadcasts: position bias [1, H, T, S], padding mask [B, 1, 1, S], or their sum.
        """
        mixed_BHTK = attend(query_BHTK, memory, bias, self.dropout if self.training else 0.0, self.axis)
        # [B, H, T, K] -> [B, T, H * K]
        return self.axis.all_reduce(self.o(mixed_BHTK.transpose(1, 2).flatten(2)))

    def _split_heads(self, x_BSA: torch.Tensor) -> torch.Tensor:
        # [B, S, H * K] -> [B, H, S, K]; H is the number of heads in this process.
        B, S, _ = x_BSA.shape
        return x_BSA.view(B, S, -1, self.head_width).transpose(1, 2)


def attend(
    query_BHTK: torch.Tensor, memory: KeyValue, bias: Bias, rate: float, axis: ModelAxis = SINGLE_PROCESS
) -> torch.Tensor:
    """Return softmax(q k^T + bias) v, [B, H, T, K], in the dtype of the values, which is that of queries and keys.

    Logits and softmax are in float32, or in float64 if the queries are.

    Args:
        query_BHTK: the queries, which are not scaled here.
        memory: the keys and values.
        bias: float32, added to the logits; broadcasts to [B, H, T, S]. On a CPU it is not rounded to the dtype of the
            queries. On other devices the caller passes it in that dtype, see `cast_bias`. A `SplitBias` or
            a `FlexBias` holds its parts.
        rate: the dropout rate of the attention weights. All queries share a mask, [B, H, 1, S], so dropping the weights
            of a key is the same as dropping its value.
        axis: the processes among which the heads are divided.

    Uses torch's fused kernels, except on a CPU where the bias needs a gradient or there is one query, as in decoding:
    there they are slower than products.
    """
    key_BHSK, value_BHSK = memory
    value_BHSK = dropout(value_BHSK, rate, training=True, shared=-1, axis=axis, divided=1)
    if isinstance(bias, FlexBias):
        return flex_attend(query_BHTK, key_BHSK, value_BHSK, bias)
    position, mask = bias if isinstance(bias, SplitBias) else (bias, None)
    if position.is_cpu and position.requires_grad and not torch.compiler.is_compiling():
        return biased_attention(query_BHTK, key_BHSK, value_BHSK, position, mask)
    bias = position if mask is None else position + mask
    if not query_BHTK.is_cpu:
        bias = bias.to(query_BHTK.dtype)
        return F.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, attn_mask=bias, scale=1.0)
    # Autocast would round the bias, and the logits of the plain products, which the compiler fuses.
    with torch.autocast(query_BHTK.device.type, enabled=False):
        if bias.requires_grad or query_BHTK.shape[2] == 1 or key_BHSK.dtype != query_BHTK.dtype:
            exact = at_least_float32(query_BHTK)
            logits_BHTS = (query_BHTK.to(exact) @ key_BHSK.to(exact).mT).add_(bias)
            return logits_BHTS.softmax(-1).to(value_BHSK.dtype) @ value_BHSK
        # The CPU kernels take a float32 bias with bfloat16 products and add it in float32.
        bias = bias.to(torch.promote_types(bias.dtype, query_BHTK.dtype))
        return F.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, attn_mask=bias, scale=1.0)


def shared_bias(bias: torch.Tensor, mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | SplitBias:
    """Return bias and mask as every block of a stack adds them to its logits, see `attend`.

    They stay apart on a CPU if the bias needs a gradient. Else their sum is computed once.
    """
    if bias.is_cpu and bias.requires_grad:
        return SplitBias(bias, mask)
    return cast_bias(bias if mask is None else bias + mask, x)


def cast_bias(bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the bias as it is added to logits: float32 on a CPU, else in the dtype of products with x.

    # Deviates: off the CPU the position bias is rounded to bfloat16 before the float32 addition, because fused kernels
    # take it only in the dtype of the queries. The error of a bias b is up to |b| / 512: 8.03 becomes 8. Masks are not
    # affected.
    """
    return bias if bias.is_cpu else bias.to(compute_dtype(x))


def cached_keys(key_BHSK: torch.Tensor) -> torch.Tensor:
    """Return keys as a decoder caches them: on a CPU in the dtype of logits, so that no step has to cast them."""
    return key_BHSK.to(at_least_float32(key_BHSK)) if key_BHSK.is_cpu else key_BHSK


def padding_bias(real_BS: torch.Tensor) -> torch.Tensor:
    """Return the bias that masks padding: float32 [B, 1, 1, S], 0 at tokens and `MASKED` at padding."""
    return torch.where(real_BS, 0.0, MASKED)[:, None, None, :]


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance bucket. All self-attentions of a stack share one table.

    The encoder uses half of the buckets for each direction, the decoder all of them for the past. In each direction,
    half of the buckets hold one distance each. The others grow logarithmically up to `relative_attention_max_distance`,
    and the last one holds all larger distances too.
    """

    def __init__(self, spec: ModelSpec, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.relative_attention_num_buckets, spec.num_heads))
        self.max_distance = spec.relative_attention_max_distance
        self.bidirectional = bidirectional

    def forward(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Return the bias of the last T of S positions, float32 [1, H, T, S]; later keys are masked in a decoder."""
        device = self.weight.device
        key_S = torch.arange(num_keys, device=device)
        query_T1 = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
        distance_TS = key_S - query_T1  # positive: the key is later than the query
        # The table is [buckets, H], so indexing gives [T, S, H]. A mask is added faster to contiguous heads.
        bias_1HTS = self.weight.float()[self._bucket(distance_TS)].permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.bidirectional:
            return bias_1HTS
        return bias_1HTS.masked_fill(distance_TS > 0, MASKED)

    def by_distance(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Return the bias of each distance from 1 - T to S - 1, float32 [H, T + S - 1], without a mask."""
        distance_R = torch.arange(1 - num_queries, num_keys, device=self.weight.device)
        return self.weight.float()[self._bucket(distance_R)].mT.contiguous()

    def _bucket(self, distance_TS: torch.Tensor) -> torch.Tensor:
        """Return the bucket of each distance, T5's `_relative_position_bucket`: int64, of any shape."""
        num_buckets = self.weight.shape[0]
        if self.bidirectional:
            # The second half of the buckets is for later keys.
            num_buckets //= 2
            direction_TS = (distance_TS > 0) * num_buckets
            distance_TS = distance_TS.abs()
        else:
            # Later keys are masked; they get bucket 0.
            direction_TS = torch.zeros_like(distance_TS)
            distance_TS = (-distance_TS).clamp(min=0)
        # Bucket d holds distance d below num_exact. Beyond, distance d is in bucket
        # num_exact + (num_buckets - num_exact) * log(d / num_exact) / log(max_distance / num_exact), rounded down.
        num_exact = num_buckets // 2
        log_range = math.log(self.max_distance / num_exact)
        # The clamp avoids log(0); distances below num_exact do not use this value.
        log_TS = torch.log(distance_TS.clamp(min=1).float() / num_exact) / log_range * (num_buckets - num_exact)
        far_TS = (num_exact + log_TS.long()).clamp(max=num_buckets - 1)
        return direction_TS + torch.where(distance_TS < num_exact, distance_TS, far_TS)
