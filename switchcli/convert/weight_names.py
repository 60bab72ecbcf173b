"""Names of our tensors in transformers' T5, mT5 and SwitchTransformers. They are the same in versions 4 and 5.

    encoder.blocks.1.feed_forward.layer.experts.3.wi    ours, one tensor per dense weight and per expert's weight
    encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight

Shapes are equal on both sides. Version 4 stores the embedding under all three names of `EMBEDDINGS`, and as `lm_head`
too if it is tied; version 5 stores only the first.
"""

import re
from collections.abc import Callable
from typing import Final, Literal

ModelType = Literal["t5", "mt5", "switch_transformers"]
"""The `model_type` of transformers."""

EMBEDDINGS: Final[tuple[str, ...]] = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of the embedding."""
HEAD: Final[str] = "lm_head.weight"
UNUSED: Final = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
"""Tensors in T5's first checkpoints that no version of transformers reads."""

_GATED: Final = {"wi": "wi_1", "wi_gate": "wi_0", "wo": "wo"}  # theirs: gelu(wi_0 x) * (wi_1 x)
_BLOCK: Final = r"(\w+)\.blocks\.(\d+)\."
# Patterns of our names with templates of theirs. LAST is the index of a block's last sublayer, DENSE its module's name.
_TEMPLATES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), template)
    for pattern, template in [
        (r"embedding", EMBEDDINGS[0]),
        (r"head\.weight", HEAD),
        (r"(\w+)\.position_bias\.weight", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (r"(\w+)\.final_norm\.weight", r"\1.final_layer_norm.weight"),
        (_BLOCK + r"self_attention\.norm\.weight", r"\1.block.\2.layer.0.layer_norm.weight"),
        (_BLOCK + r"self_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.0.SelfAttention.\3.weight"),
        (_BLOCK + r"cross_attention\.norm\.weight", r"\1.block.\2.layer.1.layer_norm.weight"),
        (_BLOCK + r"cross_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.1.EncDecAttention.\3.weight"),
        (_BLOCK + r"feed_forward\.norm\.weight", r"\1.block.\2.layer.LAST.layer_norm.weight"),
        (_BLOCK + r"feed_forward\.layer\.router\.weight", r"\1.block.\2.layer.LAST.mlp.router.classifier.weight"),
        (
            _BLOCK + r"feed_forward\.layer\.experts\.(\d+)\.(wi|wo)",
            r"\1.block.\2.layer.LAST.mlp.experts.expert_\3.\4.weight",
        ),
        (_BLOCK + r"feed_forward\.layer\.(wi|wi_gate|wo)\.weight", r"\1.block.\2.layer.LAST.DENSE.\3.weight"),
    ]
)


def transformers_names(model_type: ModelType, gated: bool) -> Callable[[str], str]:
    """Return the function from the name of one of our tensors to its name in transformers.

    `gated` says whether dense feed-forwards are gated. The model must be one that transformers has (see config.py).
    """
    dense = "mlp" if model_type == "switch_transformers" else "DenseReluDense"

    def their_name(name: str) -> str:
        for pattern, template in _TEMPLATES:
            if match := pattern.fullmatch(name):
                # Encoder: 0 self-attention, 1 feed-forward. Decoder: cross-attention is 1, feed-forward 2.
                last = "1" if name.startswith("encoder.") else "2"
                theirs = match.expand(template).replace("LAST", last)
                if ".DENSE." in theirs:
                    weight = match[3]
                    theirs = theirs.replace(f".DENSE.{weight}.", f".{dense}.{_GATED[weight] if gated else weight}.")
                return theirs
        raise AssertionError(f"{name} has no name in transformers")

    return their_name
