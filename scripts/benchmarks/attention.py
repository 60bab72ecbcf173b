"""Attention with a learned bias on a CPU: this project's, plain products under autograd, and torch's kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import BATCH, HEADS, PRECISIONS, SOURCE, Job, Result, begin

from switchcli.model.attention import KeyValue, SplitBias, attend, padding_bias

WIDTHS = {"base": (BATCH, HEADS, SOURCE, 64), "quickstart": (64, 4, 128, 16)}
"""Batch, heads, positions and head width of an encoder's self-attention."""


def attention(job: Job) -> Result:
    """Seconds of forward and backward of each way, and of the six products alone, into standing memory."""
    _, clock = begin(job)
    B, H, S, K = WIDTHS[job["widths"]]
    dtype = PRECISIONS[job["precision"]]
    # As the projections give them: [B, S, H, K], transposed.
    query, key, value, gradient = (torch.randn(B, S, H, K, dtype=dtype).transpose(1, 2) for _ in range(4))
    query *= K**-0.5
    learned = torch.randn(1, H, S, S)
    mask = padding_bias(torch.ones(B, S, dtype=torch.bool))

    def both_ways(
        way: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], learns: bool = True
    ) -> Callable[[], None]:
        def call() -> None:
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            way(*inputs, learned.detach().requires_grad_(learns)).backward(gradient)

        return call

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (q.float() @ k.float().mT).add_(bias + mask).softmax(-1).to(dtype) @ v

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask, scale=1.0)

    wide = torch.empty(B * H, S, S, dtype=dtype)
    narrow, left, right = (torch.randn(B * H, S, K, dtype=dtype) for _ in range(3))

    def products() -> None:
        for _ in range(2):
            torch.bmm(left, right.mT, out=wide)
        for _ in range(2):
            torch.bmm(wide, left, out=narrow)
            torch.bmm(wide.mT, right, out=narrow)

    calls = {
        "this project's": both_ways(lambda q, k, v, bias: attend(q, KeyValue(k, v), SplitBias(bias, mask), 0.0)),
        "plain products": both_ways(plain),
        "SDPA without bias": both_ways(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, scale=1.0), False),
        "SDPA, bias without gradient": both_ways(fused, False),
    }
    if dtype == torch.float32:
        calls["SDPA, bias with gradient"] = both_ways(fused)
    calls["the six products alone"] = products
    return {"seconds": clock.in_turn(calls, job["rounds"])}
