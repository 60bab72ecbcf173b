"""Switch attention: experts produce the queries, and one vector that serves as key and value (paper, Appendix A).

Legend: B batch, S positions of x, T queries, H heads, K head size, D model, O = 2 * H * K outputs of the experts.

As in Mesh-TensorFlow, one routed layer has a hidden vector and two outputs of width H * K. The gate multiplies both, a
dropped token has zeros for both, and the output projection stays dense. The query is divided by sqrt(K), which T5's
own attention folds into its initial weights.
"""

import torch
from torch import nn

from switchcli.model.attention import Bias, KeyValue, attend
from switchcli.model.config import ModelSpec, Stack
from switchcli.model.layers import Linear
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.stats import RouterStats


class SwitchAttention(nn.Module):
    """Multi-head self-attention with routed queries, keys and values."""

    def __init__(self, spec: ModelSpec, stack: Stack) -> None:
        super().__init__()
        width = spec.num_heads * spec.head_width
        self.switch = SwitchLayer(spec, stack, 2 * width)
        self.o = Linear(width, spec.d_model)
        self.num_heads = spec.num_heads
        self.dropout = spec.dropout

    def project(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> tuple[torch.Tensor, KeyValue, RouterStats]:
        """Return the queries [B, H, S, K], the keys and values of x, and the statistics of the routed layer."""
        y_BSO, stats = self.switch(x_BSD, real_BS)
        B, S, _ = y_BSO.shape
        # [B, S, 2, H, K] -> [2, B, H, S, K]: the first half of the outputs is the query, the second key and value.
        query_BHSK, key_value_BHSK = y_BSO.view(B, S, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return query_BHSK * query_BHSK.shape[-1] ** -0.5, KeyValue(key_value_BHSK, key_value_BHSK), stats

    def forward(self, query_BHTK: torch.Tensor, memory: KeyValue, bias: Bias) -> torch.Tensor:
        """Return softmax(q k + bias) v of all heads through the output projection: [B, T, D]."""
        mixed_BHTK = attend(query_BHTK, memory, bias, self.dropout if self.training else 0.0)
        return self.o(mixed_BHTK.transpose(1, 2).flatten(2))
