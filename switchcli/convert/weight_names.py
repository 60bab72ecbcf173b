"""What transformers calls each of our tensors, in T5 and in SwitchTransformers; versions 4 and 5 agree.

    encoder.blocks.1.feed_forward.layer.experts.3.wi    ours: one tensor a dense weight, one an expert's weight
    encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight

Shapes are the same on both sides. The embedding has three names: version 4 writes it under all, and under a fourth,
`lm_head`, where it is tied; version 5 writes the first alone.
"""

import re
from collections.abc import Callable
from typing import Final, Literal

Kind = Literal["t5", "switch_transformers"]
"""transformers' `model_type`."""

EMBEDDINGS: Final[tuple[str, ...]] = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""The names of the embedding."""
HEAD: Final[str] = "lm_head.weight"
UNUSED: Final = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
"""What T5's first checkpoints hold and no version of transformers reads."""

_GATED: Final = {"wi": "wi_1", "wi_gate": "wi_0", "wo": "wo"}  # theirs: gelu(wi_0 x) * (wi_1 x)
_LEAF: Final = r"(\w+)\.blocks\.(\d+)\."
_PARTS: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), name)
    for pattern, name in [
        (r"embedding", EMBEDDINGS[0]),
        (r"head\.weight", HEAD),
        (r"(\w+)\.position_bias\.weight", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (r"(\w+)\.final_norm\.weight", r"\1.final_layer_norm.weight"),
        (_LEAF + r"self_attention\.norm\.weight", r"\1.block.\2.layer.0.layer_norm.weight"),
        (_LEAF + r"self_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.0.SelfAttention.\3.weight"),
        (_LEAF + r"cross_attention\.norm\.weight", r"\1.block.\2.layer.1.layer_norm.weight"),
        (_LEAF + r"cross_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.1.EncDecAttention.\3.weight"),
        (_LEAF + r"feed_forward\.norm\.weight", r"\1.block.\2.layer.LAST.layer_norm.weight"),
        (_LEAF + r"feed_forward\.layer\.router\.weight", r"\1.block.\2.layer.LAST.mlp.router.classifier.weight"),
        (
            _LEAF + r"feed_forward\.layer\.experts\.(\d+)\.(wi|wo)",
            r"\1.block.\2.layer.LAST.mlp.experts.expert_\3.\4.weight",
        ),
        (_LEAF + r"feed_forward\.layer\.(wi|wi_gate|wo)\.weight", r"\1.block.\2.layer.LAST.DENSE.\3.weight"),
    ]
)


def transformers_names(kind: Kind, gated: bool) -> Callable[[str], str]:
    """From the name of one of our tensors, each expert's its own, to transformers' in a model of that kind.

    `gated` is said of the dense feed-forwards. The model must be one that transformers has (see `config`).
    """
    dense = "DenseReluDense" if kind == "t5" else "mlp"

    def their_name(name: str) -> str:
        for pattern, theirs in _PARTS:
            if match := pattern.fullmatch(name):
                last = "1" if name.startswith("encoder.") else "2"  # a decoder block has cross-attention between
                found = match.expand(theirs).replace("LAST", last)
                if ".DENSE." in found:
                    leaf = match[3]
                    found = found.replace(f".DENSE.{leaf}.", f".{dense}.{_GATED[leaf] if gated else leaf}.")
                return found
        raise AssertionError(f"{name} has no name in transformers")

    return their_name
