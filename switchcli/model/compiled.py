"""torch.compile for the parts of a model that are the same work for any tokens: attention and dense feed-forwards.

Sparse layers run as they are written: how many rows an expert gets is known only when the tokens have chosen, and
torch's grouped product compiles in bfloat16 alone.
"""

from torch import nn

from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import CrossAttention, FeedForwardSublayer, SelfAttention


def compile_dense_parts(model: nn.Module) -> None:
    """Compile each part without experts, in place: names and weights stay, the first steps take longer."""
    for part in model.modules():
        routed = any(isinstance(module, SwitchLayer) for module in part.modules())
        if isinstance(part, SelfAttention | CrossAttention | FeedForwardSublayer) and not routed:
            part.compile()
