"""Write a dense model for CTranslate2, an inference engine in C++ for CPUs and GPUs.

The specification is filled in from our tensors. CTranslate2's own converter reads a Hugging Face folder instead. In
version 4.8.5, with transformers 5.24, it scales the logits of a model with untied embeddings, whose probabilities are
then wrong; ignores `layer_norm_epsilon`; and gives rows that pad the embedding the names of sentinels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec, Stack
from switchcli.spec import EOS, PAD

if TYPE_CHECKING:
    from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec
    from ctranslate2.specs.transformer_spec import (
        FeedForwardSpec,
        TransformerDecoderSpec,
        TransformerEncoderSpec,
        TransformerSpec,
    )

Quantization = Literal["float32", "int8"]
VOCABULARY: Final = "shared_vocabulary.json"
"""The file with the tokens, which CTranslate2 names so because inputs and answers share them."""


def require_ctranslate2() -> None:
    """Raise a RecipeError unless ctranslate2 is installed."""
    try:
        import ctranslate2.specs  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"--to ctranslate2: needs a package that is not installed ({error}): pip install 'switchcli[ctranslate2]', "
            "or take --to huggingface"
        ) from error


def check_dense(spec: ModelSpec, path: Path) -> None:
    """Raise a CheckpointError, naming the checkpoint `path`, if the model has experts."""
    if spec.num_experts > 1:
        raise CheckpointError(
            f"{path}: {spec.num_experts} experts, and CTranslate2 has no sparse layers: distill a dense student first "
            "(switchcli distill --teacher CHECKPOINT), or take --to huggingface"
        )


def vocabulary(pieces: Sequence[str], rows: int) -> list[str]:
    """Return one token for each of the `rows` of the embedding. All tokens differ.

    `pieces` are the tokenizer's by ID, "" where an ID has none. The rows without a piece, which pad the embedding, get
    names that are no piece.
    """
    taken = set(pieces)
    tokens = []
    for row in range(rows):
        piece = pieces[row] if row < len(pieces) else ""
        if not piece:
            piece = f"<unused_{row}>"
            while piece in taken:
                piece = f"<{piece}>"
        tokens.append(piece)
    return tokens


def model_spec(
    spec: ModelSpec, weights: Mapping[str, Tensor], tokens: Sequence[str], unknown: str, quantization: Quantization
) -> "TransformerSpec":
    """Return a dense model as CTranslate2 saves it.

    `weights` are ours by logical name, in float32, and `unknown` is the token for text without a piece. `int8` rounds
    each row of a matrix to 8 bits with a scale of its own; norms and position biases stay in float32.
    """
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    is_gated = spec.activation == "geglu"
    options = {
        "num_heads": spec.num_heads,
        "activation": Activation.GELUTanh if is_gated else Activation.RELU,  # T5 1.1 approximates GELU by tanh
        "relative_attention_bias": True,
        "ffn_glu": is_gated,
        "rms_norm": True,
    }
    if quantization == "int8":  # CTranslate2 then scales each matrix in place
        weights = {name: weight.clone() for name, weight in weights.items()}
    encoder = TransformerEncoderSpec(spec.num_layers, **options)
    decoder = TransformerDecoderSpec(spec.decoder_layers, **options)
    _fill_stack("encoder", encoder, spec, weights)
    _fill_stack("decoder", decoder, spec, weights)
    encoder.embeddings[0].weight = decoder.embeddings.weight = weights["embedding"]
    decoder.projection.weight = weights["embedding" if spec.tie_embeddings else "head.weight"]
    if spec.tie_embeddings:
        decoder.scale_outputs = spec.d_model**-0.5

    converted = TransformerSpec(encoder, decoder)
    converted.register_source_vocabulary(list(tokens))
    converted.register_target_vocabulary(list(tokens))
    config = converted.config
    config.decoder_start_token = config.bos_token = tokens[PAD]
    config.eos_token = tokens[EOS]
    config.unk_token = unknown
    config.layer_norm_epsilon = spec.layer_norm_epsilon
    converted.validate()
    converted.optimize(quantization)
    return converted


def num_bytes(converted: "TransformerSpec") -> int:
    """Return the bytes of the weights on disk. Equal weights are stored once, and the others are names of it."""
    return sum(value.num_bytes() for value in converted.variables().values() if not isinstance(value, str))


def _fill_stack(
    stack: Stack,
    target: "TransformerEncoderSpec | TransformerDecoderSpec",
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
) -> None:
    target.scale_embeddings = False
    target.layer_norm.gamma = weights[f"{stack}.final_norm.weight"]
    for block, layer in enumerate(target.layer):
        name = f"{stack}.blocks.{block}"
        _fill_attention(layer.self_attention, f"{name}.self_attention", weights, fused=["qkv"])
        # A stack has one position bias, and CTranslate2 has one in each layer. Equal ones are stored once.
        layer.self_attention.relative_attention_bias = weights[f"{stack}.position_bias.weight"]
        max_distance = torch.tensor(spec.relative_attention_max_distance, dtype=torch.int32)
        layer.self_attention.relative_attention_max_distance = max_distance.numpy()
        if stack == "decoder":
            _fill_attention(layer.attention, f"{name}.cross_attention", weights, fused=["q", "kv"])
        _fill_feed_forward(layer.ffn, f"{name}.feed_forward", weights)


def _fill_attention(
    target: "MultiHeadAttentionSpec", name: str, weights: Mapping[str, Tensor], fused: Sequence[str]
) -> None:
    """Fill in the matrices of an attention. Those of the letters in a string of `fused` become one, row below row."""
    target.layer_norm.gamma = weights[f"{name}.norm.weight"]
    target.queries_scale = 1.0  # T5 does not divide by the square root of a head's width
    for linear, letters in zip(target.linear, [*fused, "o"], strict=True):
        linear.weight = torch.cat([weights[f"{name}.attention.{letter}.weight"] for letter in letters])


def _fill_feed_forward(target: "FeedForwardSpec", name: str, weights: Mapping[str, Tensor]) -> None:
    target.layer_norm.gamma = weights[f"{name}.norm.weight"]
    wi = weights[f"{name}.layer.wi.weight"]
    if (gate := weights.get(f"{name}.layer.wi_gate.weight")) is None:
        target.linear_0.weight = wi
    else:  # linear_0 goes through the activation
        target.linear_0.weight, target.linear_0_noact.weight = gate, wi
    target.linear_1.weight = weights[f"{name}.layer.wo.weight"]
