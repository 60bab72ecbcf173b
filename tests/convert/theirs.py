"""Models of transformers with random weights, saved as it saves them, with a tokenizer in T5's layout beside them."""

import json
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file

from switchcli.model.transformer import SwitchTransformer

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_max_distance": 20,
}
SPARSE = {
    "num_experts": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "router_jitter_noise": 0.0,
    "expert_capacity": 64,
}


def t5(**keys: Any) -> torch.nn.Module:
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**SHAPE, **keys}))
    if not keys.get("tie_word_embeddings", True):  # version 5 ties the matrices even so
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    return filled(model)


def mt5(is_tied: bool = False, **keys: Any) -> torch.nn.Module:
    """As the published ones: two matrices, which version 5 keeps apart although it always writes that they are tied."""
    import transformers

    model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**{**SHAPE, **keys}))
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    return filled(model)


def switch(**keys: Any) -> torch.nn.Module:
    import transformers

    config = transformers.SwitchTransformersConfig(**{**SHAPE, **SPARSE, **keys})
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    if not config.tie_word_embeddings:  # it gives each stack a matrix of its own then, which T5 never had
        model.set_input_embeddings(model.shared)
    return filled(model)


@torch.no_grad()
def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which every layer, router and norm matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model.eval()


def save(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


def tokenizer(num_pieces: int = 40) -> str:
    """tokenizer.json with pieces of one letter and three sentinels."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [
        ((string.ascii_letters + string.digits)[index], -2.0 - index) for index in range(num_pieces - len(pieces))
    ]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{index}>" for index in (2, 1, 0))])
    return str(inner.to_str())


def as_version_4(folder: Path, *, pickled: bool = False) -> None:
    """Rewrite a folder the way the hub's checkpoints are: the embedding under all its names, an older config.json."""
    weights = load_file(folder / "model.safetensors")
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if "lm_head.weight" not in weights:
        names.append("lm_head.weight")
    weights |= {name: weights["shared.weight"].clone() for name in names}
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights[bias.replace("layer.0.SelfAttention", "layer.1.EncDecAttention")] = weights[bias].clone()
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if "scale_decoder_outputs" in config:
        config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
    if config["model_type"] == "mt5":
        config["tie_word_embeddings"] = False
    for key in ("dtype", "transformers_version"):
        config.pop(key, None)
    config |= {"torch_dtype": "float32", "num_selected_experts": 1, "router_type": "tokens_masked", "n_positions": 512}
    (folder / "config.json").write_text(json.dumps(config))


def batch(source: int = 17, target: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, some with padding behind."""
    generator = torch.Generator().manual_seed(2)
    inputs_BS = torch.randint(2, VOCABULARY, (3, source), generator=generator)
    targets_BT = torch.randint(2, VOCABULARY, (3, target), generator=generator)
    inputs_BS[1, 12:] = 0
    targets_BT[2, 6:] = 0
    return inputs_BS, targets_BT


@torch.no_grad()
def assert_same_logits(ours: SwitchTransformer, theirs: torch.nn.Module) -> None:
    """To 1e-5 of the largest, at every real target."""
    inputs_BS, targets_BT = batch()
    labels = targets_BT.masked_fill(targets_BT == 0, -100)
    expected = theirs(input_ids=inputs_BS, attention_mask=(inputs_BS != 0).long(), labels=labels).logits
    got = ours(inputs_BS, targets_BT).logits_BTV
    real_BT = targets_BT != 0
    difference = (got - expected)[real_BT].abs().max() / expected[real_BT].abs().max()
    assert difference <= 1e-5, difference
