"""transformers' T5 and SwitchTransformers of our shapes, and which of their weights is which of ours.

transformers is imported where it is used: the tests for a GPU import this module on machines without it.
"""

import re

import torch

from switchcli.model.transformer import SwitchTransformer

SHAPE = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "relative_attention_max_distance": 20,
}
OURS = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
}


def t5(feed_forward: str, tied: bool) -> torch.nn.Module:
    import transformers

    config = transformers.T5Config(
        **SHAPE, feed_forward_proj=feed_forward, tie_word_embeddings=tied, attn_implementation="eager"
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # transformers 5 ties the matrices whatever the configuration says, and then only leaves out the scale
        model.lm_head.weight = torch.nn.Parameter(torch.empty(61, 24))
    return model


def switch(num_experts: int) -> torch.nn.Module:
    import transformers

    config = transformers.SwitchTransformersConfig(
        **{**SHAPE, "num_layers": 4},
        num_experts=num_experts,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1,
        expert_capacity=64,
        router_jitter_noise=0.0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def their_name(name: str) -> str:
    """The name in transformers of one of our parameters (stacked experts: of expert 0)."""
    if name == "embedding":
        return "shared.weight"
    if name == "head.weight":
        return "lm_head.weight"
    stack, rest = name.split(".", 1)
    feed_forward = 1 if stack == "encoder" else 2
    for pattern, replacement in [
        (r"^position_bias\.weight$", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (r"^final_norm\.weight$", "final_layer_norm.weight"),
        (r"^blocks\.(\d+)\.self_attention\.norm\.", r"block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.self_attention\.attention\.", r"block.\1.layer.0.SelfAttention."),
        (r"^blocks\.(\d+)\.cross_attention\.norm\.", r"block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.cross_attention\.attention\.", r"block.\1.layer.1.EncDecAttention."),
        (r"^blocks\.(\d+)\.feed_forward\.norm\.", rf"block.\1.layer.{feed_forward}.layer_norm."),
        (
            r"^blocks\.(\d+)\.feed_forward\.layer\.router\.weight",
            rf"block.\1.layer.{feed_forward}.mlp.router.classifier.weight",
        ),
        (
            r"^blocks\.(\d+)\.feed_forward\.layer\.experts\.(\w+)$",
            rf"block.\1.layer.{feed_forward}.mlp.experts.expert_0.\2.weight",
        ),
        (r"^blocks\.(\d+)\.feed_forward\.layer\.", rf"block.\1.layer.{feed_forward}.MLP."),
    ]:
        rest, found = re.subn(pattern, replacement, rest)
        if found:
            break
    return f"{stack}.{rest}"


def pairs(ours: SwitchTransformer, theirs: torch.nn.Module) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Our parameters beside theirs: (name, ours or one expert's slice of it, theirs); every one of theirs once."""
    their = dict(theirs.named_parameters())
    geglu = ours.spec.activation == "geglu"
    found = []
    for name, parameter in ours.named_parameters():
        key = their_name(name)
        if ".MLP." in key:
            kind = (
                "DenseReluDense"
                if key.replace("MLP", "DenseReluDense")
                .replace(".wi.", ".wi_1." if geglu else ".wi.")
                .replace(".wi_gate.", ".wi_0.")
                in their
                else "mlp"
            )
            key = key.replace("MLP", kind)
            if geglu:  # theirs: gelu(wi_0 x) * (wi_1 x)
                key = key.replace(".wi.", ".wi_1.").replace(".wi_gate.", ".wi_0.")
        if "expert_0" in key:
            found += [
                (f"{name}.{e}", (name, e), their.pop(key.replace("expert_0", f"expert_{e}")))
                for e in range(len(parameter))
            ]
        else:
            found.append((name, (name, None), their.pop(key)))
    assert not their, sorted(their)
    named = dict(ours.named_parameters())
    return [(label, (named[name], e), theirs_) for label, (name, e), theirs_ in found]


def slice_of(tensor: torch.Tensor, expert: int | None) -> torch.Tensor:
    return tensor if expert is None else tensor[expert]


@torch.no_grad()
def copy_weights(ours: SwitchTransformer, theirs: torch.nn.Module) -> None:
    for _, (parameter, expert), their in pairs(ours, theirs):
        their.copy_(slice_of(parameter, expert))
