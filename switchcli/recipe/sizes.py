"""Model sizes by name: Table 9 as printed, released checkpoints, T5, and small ones for a laptop. One line per size.

A size sets only the shape: vocabulary, dropout, router and training settings belong to the recipe. `model.size` fills
these keys below the ones that a recipe states (`switchcli.recipe.resolve` says exactly when).
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Size(NamedTuple):
    """The keys of `ModelSpec` that a size fills. Both stacks have `num_layers` blocks."""

    d_model: int
    d_ff: int
    d_kv: int | None
    num_heads: int
    num_layers: int
    activation: str = "relu"
    tie_embeddings: bool = True
    num_experts: int = 1
    sparse_every: int = 2
    num_decoder_layers: int | None = None


# fmt: off
SIZES: Mapping[str, Size] = MappingProxyType({
    # Table 9 as printed. It does not say whether embeddings are tied; its parameter counts fit tied ones. In three rows
    # the shape does not give the printed parameter count. The Large counts fit ReLU and d_ff 4096 (T5-Large is 750M
    # here, printed 739M; Switch-Large 27B, printed 26B); Switch-XXL's fits 128 experts (201B here, printed 395B).
    "t5-base":      Size(768, 2048, 64, 12, 12, "geglu"),
    "t5-large":     Size(1024, 2816, 64, 16, 24, "geglu"),
    "t5-xxl":       Size(4096, 10240, 64, 64, 24, "geglu"),
    "switch-base":  Size(768, 2048, 64, 12, 12, "geglu", num_experts=128),
    "switch-large": Size(1024, 2816, 64, 16, 24, "geglu", num_experts=128),
    "switch-xxl":   Size(4096, 10240, 64, 64, 24, "geglu", num_experts=64),
    "switch-c":     Size(2080, 6144, 64, 32, 15, num_experts=2048, sparse_every=1),

    # As released (T5X configurations): Base and Large with ReLU, XXL and C untied, C with 30 heads.
    "switch-base-8":    Size(768, 3072, 64, 12, 12, num_experts=8),
    "switch-base-16":   Size(768, 3072, 64, 12, 12, num_experts=16),
    "switch-base-32":   Size(768, 3072, 64, 12, 12, num_experts=32),
    "switch-base-64":   Size(768, 3072, 64, 12, 12, num_experts=64),
    "switch-base-128":  Size(768, 3072, 64, 12, 12, num_experts=128),
    "switch-base-256":  Size(768, 3072, 64, 12, 12, num_experts=256),
    "switch-large-128": Size(1024, 4096, 64, 16, 24, num_experts=128),
    "switch-xxl-128":   Size(4096, 10240, 64, 64, 24, "geglu", False, num_experts=128),
    "switch-c-2048":    Size(2080, 6144, 64, 30, 15, "relu", False, num_experts=2048, sparse_every=1),

    # T5 1.0 as released. Its base and large differ from those of Table 9, hence the longer names.
    "t5-small":      Size(512, 2048, 64, 8, 6),
    "t5-v1_0-base":  Size(768, 3072, 64, 12, 12),
    "t5-v1_0-large": Size(1024, 4096, 64, 16, 24),
    "t5-3b":         Size(1024, 16384, 128, 32, 24),
    "t5-11b":        Size(1024, 65536, 128, 128, 24),

    # T5 1.1 as released.
    "t5-v1_1-small": Size(512, 1024, 64, 6, 8, "geglu", False),
    "t5-v1_1-base":  Size(768, 2048, 64, 12, 12, "geglu", False),
    "t5-v1_1-large": Size(1024, 2816, 64, 16, 24, "geglu", False),
    "t5-v1_1-xl":    Size(2048, 5120, 64, 32, 24, "geglu", False),
    "t5-v1_1-xxl":   Size(4096, 10240, 64, 64, 24, "geglu", False),

    # For a laptop. Each switch- size has the FLOPs per token of the dense one.
    "tiny":          Size(128, 512, None, 4, 2),
    "mini":          Size(256, 1024, None, 4, 4),
    "small":         Size(384, 1536, None, 6, 6),
    "switch-tiny-8": Size(128, 512, None, 4, 2, num_experts=8),
    "switch-mini-8": Size(256, 1024, None, 4, 4, num_experts=8),
    "switch-small-8": Size(384, 1536, None, 6, 6, num_experts=8),
})
# fmt: on

CUSTOM = "custom"
"""The value of `model.size` for a model without a named size."""


def size_problem(name: str) -> str | None:
    """Return what is wrong with `name` as a `model.size` and how to fix it, or None if it is a size."""
    if name == CUSTOM or name in SIZES:
        return None
    close = difflib.get_close_matches(name, SIZES, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"The sizes are {', '.join(SIZES)}"
    return f"no such size (got {name!r}). {hint}"
