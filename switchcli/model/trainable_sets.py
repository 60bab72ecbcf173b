"""Which parameters a fine-tuning updates: sets of them, by the module that a parameter is in (beyond the paper).

ST-MoE finds that updating all parameters, all but the experts, or only the dense feed-forwards gives about equal
quality, and updating only the experts gives much worse quality. A router belongs to the set of its experts: it is of no
use without them, and only they learn from its loss.
"""

from typing import Literal

from switchcli.model.config import STACKS, ModelSpec

TrainableSet = Literal["all", "non_expert", "expert", "dense_feed_forward"]
"""`expert`: the sparse layers with their routers and shared paths, in feed-forwards and attentions; `non_expert`: all
else; `dense_feed_forward`: the feed-forwards without experts, but not the norms before them."""


def check(spec: ModelSpec, trainable_set: TrainableSet) -> None:
    """Raise ValueError, with the fix, if a model of this spec has no parameter in the set."""
    if trainable_set == "expert" and spec.num_experts == 1:
        raise ValueError(
            "a dense model (num_experts: 1) has no experts to update: choose all or dense_feed_forward, or a sparse "
            "model"
        )
    blocks = [(stack, layer) for stack in STACKS for layer in range(spec.num_blocks(stack))]
    if trainable_set == "dense_feed_forward" and all(spec.is_sparse(*block, "feed_forward") for block in blocks):
        raise ValueError(
            "every feed-forward of this model has experts, so there is no dense one to update: choose all, non_expert "
            "or expert"
        )
